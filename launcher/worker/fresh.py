"""A model that does not exist yet: a tokenizer from the rows of the recipe, and its config with random weights.

Both are saved like any other model's, so that everything after prepare treats them like one.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from launcher.errors import PreflightError
from launcher.families import template
from launcher.plan import Plan
from launcher.rundir import write_json
from launcher.worker.data.dataset import conversations
from launcher.worker.quiet import quiet_libraries


def train_tokenizer(plan: Plan, into: Path) -> None:
    """A byte-level BPE tokenizer from the rows of the recipe, with as many entries as the config has (fewer for little text)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rows, eval_rows, _ = conversations(plan)
    assert plan.recipe.model.config is not None
    vocab_size = plan.recipe.model.config.get("vocab_size", 32000)
    special = ["<pad>", "<s>", "</s>", *_named_tokens(plan)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise PreflightError(
            f"model.config.vocab_size: {vocab_size}",
            "a byte-level tokenizer needs 259 entries",
            "set model.config.vocab_size=2048",
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        (text for row in [*rows, *eval_rows] for message in row for text in message.values()), trainer
    )
    tokenizer.save(str(into / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    write_json(into / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


def _named_tokens(plan: Plan) -> list[str]:
    """Special tokens that the recipe's template names: in a rehearsal the tokenizer that has them may not be here."""
    if plan.rehearsal is None or plan.recipe.data.template in ("auto", "chat"):
        return []
    named = template(plan.recipe.data.template)
    names = [
        *named.prefix_tokens,
        *named.answer_tokens,
        *named.tokens,
        *named.roles.values(),
        *([named.end] if named.end else []),
    ]
    return [name for name in dict.fromkeys(names) if name not in ("<s>", "</s>")]


def random_model(plan: Plan, tokenizer_dir: Path, into: Path) -> None:
    """The recipe's config with random weights, saved like any other model, so that everything after this treats it like one."""
    quiet_libraries()
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    assert plan.recipe.model.config is not None
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = {**ids, **plan.recipe.model.config}
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        raise PreflightError(
            f"model.config.model_type: {model_type}",
            "transformers has no such model",
            f"did you mean {close[0]}?" if close else "take one that it has, such as llama or qwen2",
        )
    try:
        config = AutoConfig.for_model(**values)
        torch.manual_seed(plan.recipe.train.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # noqa: BLE001 - whatever a config class thinks of a person's numbers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise PreflightError(
            "model.config", f"transformers builds no model from it: {reason[:300]}", "mend the config in the recipe"
        ) from None
    model.save_pretrained(into)
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, into / file.name)
