"""RUN/plan.json in, RUN/prepared.json out: model, tokenizer and token ids on local disk, once a node, before any rank exists.

Everything is kept in a cache by content: the same data, tokenizer, template and lengths are tokenised once, whatever the run. A folder
of the cache is written under a temporary name and renamed, so it is whole or not there, and two launchers may prepare at once.
Heavy libraries are imported only where something has to be made: with everything cached this takes a third of a second.

Prints one JSON object a line: progress, or the error that ended it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import DataError, LaunchError, PreflightError
from launcher.families import family
from launcher.plan import Plan
from launcher.rundir import RunDir, read_json, write_json
from launcher.worker.data.rows import Message, data_files, read_conversations
from launcher.worker.prepared import DataReport, Prepared, write_prepared
from launcher.worker.pulse import die_with_parent

# Part of every key: raise it when the same input no longer gives the same folder.
_FORMAT = 1
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_OTHER_PATTERNS = ("*.json", "*.model", "*.txt", "*.py", "*.jinja", "*.tiktoken", "tokenizer*")


def main(plan_path: str) -> int:
    """Prepare the run that a plan belongs to; the exit code."""
    die_with_parent()
    run = RunDir(Path(plan_path).resolve().parent)
    try:
        plan = Plan.model_validate_json(run.plan.read_text(encoding="utf-8"))
        write_prepared(run, prepare(plan))
    except LaunchError as error:
        _say(event="error", you_set=error.you_set, found=error.found, to_type=error.to_type, exit_code=error.exit_code)
        return error.exit_code
    except OSError as error:
        traceback.print_exc()
        what = f"{cache_folder()}: {error.strerror}"
        _say(
            event="error",
            you_set="prepare",
            found=what,
            to_type="make room there, or set LAUNCH_CACHE to another folder",
            exit_code=4,
        )
        return 4
    return 0


def prepare(plan: Plan) -> Prepared:
    """Make or find everything the ranks need.

    Raises:
        DataError: rows that cannot be read.
        PreflightError: a model that is not there.
    """
    recipe, cached = plan.recipe, []
    files = data_files(recipe.data.path)
    eval_path = recipe.data.eval.path if recipe.data.eval else None
    eval_files = data_files(eval_path) if eval_path else []
    data_hash = _hash_files([*files, *eval_files])

    if recipe.model.config is not None:
        tokenizer_key = _key(
            "tokenizer",
            data_hash,
            recipe.data.model_dump(mode="json", exclude={"path"}),
            recipe.model.config.get("vocab_size"),
        )
        tokenizer_dir = _made("tokenizer", tokenizer_key, cached, lambda into: _train_tokenizer(plan, into))
        model_key = _key("model", recipe.model.config, recipe.train.seed, tokenizer_key)
        model_dir = _made("model", model_key, cached, lambda into: _random_model(plan, tokenizer_dir, into))
    else:
        model_dir = tokenizer_dir = _existing_model(plan)
        found = sorted({path for pattern in _TOKENIZER_FILES for path in model_dir.glob(pattern)})
        tokenizer_key = _hash_files([path for path in found if path.is_file()])

    selection = recipe.data.model_dump(mode="json", exclude={"path", "batching"})
    data_key = _key("data", data_hash, selection, recipe.train.seed, tokenizer_key, plan.shape.family)
    data_dir = _made("data", data_key, cached, lambda into: _tokenize(plan, tokenizer_dir, into))
    left = read_json(data_dir / "report.json")
    return Prepared(
        model_dir=str(model_dir),
        tokenizer_dir=str(tokenizer_dir),
        data_dir=str(data_dir),
        rows_key=_rows_key(plan, data_hash),
        cached=tuple(cached),
        template=left["template"],
        pad_token_id=left["pad_token_id"],
        eos_token_ids=left["eos_token_ids"],
        report=DataReport.model_validate(left["report"]),
    )


def _rows_key(plan: Plan, data_hash: str) -> str:
    """Hash of the training rows; how long they are is part of it only where longer ones are dropped."""
    data = plan.recipe.data
    chosen = data.model_dump(mode="json", include={"format", "fields", "max_rows", "bad_rows", "eval"})
    if data.eval is not None and data.eval.path is not None:
        chosen["eval"] = "a file of its own"
    return _key("rows", data_hash, chosen, plan.recipe.train.seed, data.max_length if data.overlong == "drop" else None)


def cache_folder() -> Path:
    """Where prepared things are kept: $LAUNCH_CACHE, else below the user's cache folder."""
    root = os.environ.get("LAUNCH_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "launch"


def _made(what: str, key: str, cached: list[str], make: Callable[[Path], None]) -> Path:
    """The cache folder of a key; made under a temporary name and renamed where it is not there yet."""
    target = cache_folder() / f"{what}-{key[:24]}"
    if target.is_dir():
        cached.append(what)
        _say(event="prepare", what=what, state="cached")
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        make(temporary)
        try:
            temporary.rename(target)
        except OSError:
            # Somebody else was faster; theirs has the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _say(event="prepare", what=what, state="made")
    return target


def _existing_model(plan: Plan) -> Path:
    """The folder of the recipe's model, fetched from the hub where it is none.

    Raises:
        PreflightError: it is neither here nor to be had.
    """
    name = plan.recipe.model.path
    assert name is not None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    _say(event="prepare", what="download", state=f"fetching {name}")
    revision = plan.recipe.model.revision
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_WEIGHT_PATTERNS, *_OTHER_PATTERNS]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=["*.bin", "*.bin.index.json", *_OTHER_PATTERNS]
                )
            )
    except RepositoryNotFoundError:
        raise PreflightError(
            f"model.path: {name}",
            "is no folder here and no model on the hub that you may read",
            "check the name, or log in: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:160]
        raise PreflightError(
            f"model.path: {name}",
            f"is no folder here, and the hub cannot be reached: {reason}",
            "give the folder of a copy: model.path=/path/to/model",
        ) from None
    return folder


def _conversations(plan: Plan) -> tuple[list[list[Message]], list[list[Message]], list[str]]:
    """Training rows, evaluation rows and the lines about bad ones."""
    data, evaluation = plan.recipe.data, plan.recipe.data.eval
    rows, bad = read_conversations(data, data.path)
    if evaluation is None:
        return rows, [], bad
    if evaluation.path is not None:
        eval_rows, eval_bad = read_conversations(data, evaluation.path)
        return rows, eval_rows, bad + eval_bad
    num = evaluation.rows or max(1, round(len(rows) * (evaluation.fraction or 0)))
    if num >= len(rows):
        raise DataError(
            f"data.eval: {num} rows",
            f"there are only {len(rows)} rows in all",
            f"keep fewer: data.eval.rows={max(1, len(rows) // 10)}",
        )
    kept = set(random.Random(plan.recipe.train.seed).sample(range(len(rows)), num))
    return [row for place, row in enumerate(rows) if place not in kept], [rows[place] for place in sorted(kept)], bad


def _train_tokenizer(plan: Plan, into: Path) -> None:
    """A byte-level BPE tokenizer from the rows of the recipe, with as many entries as the config has (fewer for little text)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rows, eval_rows, _ = _conversations(plan)
    assert plan.recipe.model.config is not None
    vocab_size = plan.recipe.model.config.get("vocab_size", 32000)
    special = ["<pad>", "<s>", "</s>"]
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


def _random_model(plan: Plan, tokenizer_dir: Path, into: Path) -> None:
    """The recipe's config with random weights, saved like any other model, so that everything after this treats it like one."""
    _say(event="prepare", what="model", state="building from config")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert plan.recipe.model.config is not None
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = {**ids, **plan.recipe.model.config}
    try:
        config = AutoConfig.for_model(**values)
        torch.manual_seed(plan.recipe.train.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise PreflightError(
            "model.config", f"transformers builds no model from it: {error}", "mend the config in the recipe"
        ) from None
    model.save_pretrained(into)
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, into / file.name)


def _tokenize(plan: Plan, tokenizer_dir: Path, into: Path) -> None:
    """Rows to token ids, with a report about them."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer

    from launcher.worker.data.tokens import Prompter, Tokens
    from launcher.worker.quiet import quiet_libraries

    quiet_libraries()
    disable_progress_bars()
    data = plan.recipe.data
    rows, eval_rows, bad = _conversations(plan)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_dir, trust_remote_code=plan.recipe.model.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise PreflightError(
            f"model {plan.shape.name}",
            f"its tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            f"check the tokenizer files in {tokenizer_dir}",
        ) from None
    if tokenizer.eos_token_id is None:
        raise PreflightError(
            f"model {plan.shape.name}",
            "its tokenizer has no eos token, so answers would never end",
            "add one to its tokenizer_config.json",
        )
    template = _template(plan, tokenizer)
    prompter = Prompter(tokenizer, template)
    total, done = len(rows) + len(eval_rows), 0
    counts = {"dropped": 0, "truncated": 0}

    def encode(conversations: Sequence[list[Message]]) -> list[Tokens]:
        nonlocal done
        kept = []
        for conversation in conversations:
            tokens = prompter.tokens(conversation, data.max_length)
            done += 1
            if done % 2000 == 0:
                _say(event="prepare", what="data", state="tokenizing", done=done, total=total)
            counts["truncated" if data.overlong == "truncate" else "dropped"] += tokens.cut
            if not tokens.cut or data.overlong == "truncate":
                kept.append(tokens)
        return kept

    train, evaluation = encode(rows), encode(eval_rows)
    if not any(label != -100 for tokens in train for label in tokens.labels):
        raise DataError(
            f"data.max_length: {data.max_length}",
            f"no answer is left of {len(rows):,} rows",
            "allow longer rows: data.max_length=1024",
        )
    for name, part in (("train", train), ("eval", evaluation)):
        if not part:
            continue  # datasets writes an empty one but cannot read it back
        columns = {
            "input_ids": [tokens.input_ids for tokens in part],
            "labels": [tokens.labels for tokens in part],
            "length": [len(tokens.input_ids) for tokens in part],
        }
        Dataset.from_dict(columns).save_to_disk(str(into / name))
    lengths = sorted(len(tokens.input_ids) for tokens in train)
    report = DataReport(
        rows_read=total + len(bad),
        rows_bad=len(bad),
        rows_dropped=counts["dropped"],
        rows_truncated=counts["truncated"],
        train_rows=len(train),
        eval_rows=len(evaluation),
        tokens=sum(lengths),
        supervised_tokens=sum(label != -100 for tokens in train for label in tokens.labels),
        length_mean=round(sum(lengths) / len(lengths), 1),
        length_p50=lengths[len(lengths) // 2],
        length_p90=lengths[int(len(lengths) * 0.9)],
        length_max=lengths[-1],
    )
    left: dict[str, Any] = {
        "template": template,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        "eos_token_ids": _eos_token_ids(tokenizer, tokenizer_dir),
        "report": report.model_dump(),
        "bad_rows": bad[:1000],
    }
    write_json(into / "report.json", left)


def _template(plan: Plan, tokenizer: Any) -> str:
    """The recipe's template, or what `auto` means for this tokenizer and this kind of rows."""
    asked = plan.recipe.data.template
    if plan.recipe.data.format in ("context_target", "text"):
        return "plain" if asked == "auto" else asked
    if asked == "auto":
        return "chat" if tokenizer.chat_template else family(plan.shape.family).template
    if asked == "chat" and not tokenizer.chat_template:
        raise PreflightError(
            "data.template: chat", f"the tokenizer of {plan.shape.name} has no chat template", "set data.template=auto"
        )
    return asked


def _eos_token_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of generation_config.json."""
    config = read_json(folder / "generation_config.json") or {}
    more = config.get("eos_token_id") or []
    return sorted({tokenizer.eos_token_id, *([more] if isinstance(more, int) else more)})


def _hash_files(files: Sequence[Path]) -> str:
    """One checksum over names and bytes, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _say(**event: Any) -> None:
    print(json.dumps(event, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
