"""The one task: a tiny Llama with random weights, a tokenizer of its own, and the English Alpaca rows that fit, as text and as ids."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LENGTH = 512
NUM_VALIDATION = 100
_SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "mid": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
}
VOCABULARY = 2048
PAD, EOS = "<pad>", "</s>"


@dataclass(frozen=True)
class Task:
    """Where everything lies.

    Args:
        model: folder with config, weights and tokenizer.
        rows: JSON lines of {"context", "target"}; pairs: the same as {"instruction", "input", "output"} for LLaMA-Factory.
        validation: batches of ids for the probe.
        num_rows, num_tokens: of training.
    """

    model: Path
    rows: Path
    pairs: Path
    validation: Path
    num_rows: int
    num_tokens: int
    pad: int


def make(data: Path, folder: Path, shape: str, num_rows: int | None = None) -> Task:
    """Write the task of an Alpaca file into a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, fitting = encoded_rows(data)
    model = folder / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        **_SHAPES[shape],
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_LENGTH * 8,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    held_out, training = fitting[:NUM_VALIDATION], fitting[NUM_VALIDATION:][:num_rows]
    rows, pairs = folder / "rows.jsonl", folder / "pairs.json"
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"context": row[0], "target": row[1]}) + "\n" for row in training)
    pairs.write_text(json.dumps([{"instruction": row[0], "input": "", "output": row[1]} for row in training]))
    validation = folder / "validation.pt"
    torch.save(
        [_padded(held_out[at : at + 20], tokenizer.pad_token_id) for at in range(0, NUM_VALIDATION, 20)], validation
    )
    return Task(
        model, rows, pairs, validation, len(training), sum(len(row[2]) for row in training), tokenizer.pad_token_id
    )


def encoded_rows(data: Path) -> tuple[Any, list[tuple[str, str, list[int], int]]]:
    """A tokenizer made for an Alpaca file; question, answer, ids and where the answer begins of its rows that fit, shuffled."""
    texts = [(_prompt(row), row["output"]) for row in json.loads(data.read_text(encoding="utf-8"))]
    tokenizer = _tokenizer([prompt + answer for prompt, answer in texts])
    encoded = [(prompt, answer, *_encoded(tokenizer, prompt, answer)) for prompt, answer in texts]
    fitting = [row for row in encoded if len(row[2]) <= MAX_LENGTH and row[1]]
    random.Random(0).shuffle(fitting)
    return tokenizer, fitting


def _prompt(row: dict[str, str]) -> str:
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=EOS, padding_side="right")


def _encoded(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Ids of prompt, answer and end; how many are the prompt's."""
    before, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    return [*before, *behind, tokenizer.eos_token_id], len(before)


def _padded(rows: list[Any], pad: int) -> dict[str, Any]:
    import torch

    longest = max(len(row[2]) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for at, (_, _, tokens, learned_from) in enumerate(rows):
        ids[at, : len(tokens)] = torch.tensor(tokens)
        labels[at, learned_from : len(tokens)] = torch.tensor(tokens[learned_from:])
        mask[at, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
