"""What somebody writes who uses transformers.Trainer or TRL's SFTTrainer by themselves: torchrun starts it with a JSON file of settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Train as the settings say."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text(encoding="utf-8").splitlines()]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    train = _with_trl if settings["trl"] else _with_trainer
    train(model, tokenizer, rows, lora, settings["arguments"])
    torch.distributed.destroy_process_group()


def _with_trainer(model: Any, tokenizer: Any, rows: list[dict[str, str]], lora: Any, arguments: dict[str, Any]) -> None:
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def encoded(row: dict[str, str]) -> dict[str, Any]:
        before, behind = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("context", "target"))
        behind = [*behind, tokenizer.eos_token_id]
        ids = [*before, *behind]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(before) + behind}

    Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(**arguments),
        train_dataset=[encoded(row) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
    ).train()


def _with_trl(model: Any, tokenizer: Any, rows: list[dict[str, str]], lora: Any, arguments: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made = Dataset.from_list([{"prompt": row["context"], "completion": row["target"]} for row in rows])
    SFTTrainer(
        model=model, args=SFTConfig(**arguments), train_dataset=made, processing_class=tokenizer, peft_config=lora
    ).train()


if __name__ == "__main__":
    main()
