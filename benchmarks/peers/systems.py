"""The systems that are compared: for each the files that it wants, its command, its variables. Two ranks, the same step for all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environments import python_of
from .task import MAX_LENGTH, Task

RANKS = 2
ROWS_A_STEP = 80  # the seed's micro batch of 40 on two ranks; everybody takes as many
LR = 2e-3
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """What is run: a command in a folder, with variables beside those of all."""

    argv: list[str]
    cwd: Path
    env: dict[str, str]


@dataclass(frozen=True)
class System:
    """One of them.

    Args:
        what: how it is set up, for the page.
        job: (task, folder for its files, folder of the environments, epochs) to the command.
        environment: the name of its environment; None for that of this script.
    """

    name: str
    what: str
    job: Callable[[Task, Path, Path, int], Job]
    environment: str | None = None


def _arguments(folder: Path, epochs: int, micro_batch: int) -> dict[str, Any]:
    """Settings of transformers' TrainingArguments that all of them are given."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": ROWS_A_STEP // RANKS // micro_batch,
        "num_train_epochs": epochs,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 42,
        "ddp_find_unused_parameters": False,
    }


def _torchrun(python: str | Path, *argv: str) -> list[str]:
    return [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", *argv]


def _script(trl: bool, micro_batch: int, environment: str | None, **more: Any) -> Callable[..., Job]:
    def job(task: Task, folder: Path, environments: Path, epochs: int) -> Job:
        settings = folder / "settings.json"
        arguments = _arguments(folder, epochs, micro_batch) | more
        wanted = {"model": str(task.model), "rows": str(task.rows), "trl": trl, "arguments": arguments}
        settings.write_text(json.dumps(wanted), encoding="utf-8")
        python = python_of(environment, environments) if environment else Path(sys.executable)
        return Job(_torchrun(python, str(_HERE / "plain_trainer.py"), str(settings)), folder, {})

    return job


def _launch(task: Task, folder: Path, environments: Path, epochs: int) -> Job:
    recipe = folder / "ours.yaml"
    recipe.write_text(
        f"""\
model: {{path: {task.model}}}
data: {{path: {task.rows}, format: context_target, max_length: {MAX_LENGTH}}}
adapter: {{type: lora, r: 8, alpha: 16, dropout: 0, targets: all-linear}}
train: {{epochs: {epochs}, lr: {LR}, schedule: constant, warmup: 0, weight_decay: 0, global_batch: {ROWS_A_STEP}, log_every_steps: 1}}
checkpoint: {{every_steps: 100000}}
hardware: {RANKS}xcpu
""",
        encoding="utf-8",
    )
    launch = Path(sys.executable).with_name("launch")
    variables = {"LAUNCH_CACHE": str(task.model.parent / "cache")}
    return Job([str(launch), str(recipe), "--run-dir", str(folder / "run")], folder, variables)


def _llamafactory(task: Task, folder: Path, environments: Path, epochs: int) -> Job:
    python = python_of("llamafactory", environments)
    described = {"pairs": {"file_name": str(task.pairs)}}
    (folder / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    settings = _arguments(folder, epochs, 8) | {
        "model_name_or_path": str(task.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_target": "all",
        "dataset_dir": str(folder),
        "dataset": "pairs",
        "template": "empty",
        "cutoff_len": MAX_LENGTH,
        "train_sampling_strategy": "group_by_length",
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
        "dataloader_num_workers": 0,
    }
    config = folder / "llamafactory.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    # It starts the torchrun that PATH finds.
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(RANKS), "DISABLE_VERSION_CHECK": "1"}
    return Job([str(python.with_name("llamafactory-cli")), "train", str(config)], folder, variables)


def _axolotl(task: Task, folder: Path, environments: Path, epochs: int) -> Job:
    python = python_of("axolotl", environments)
    packs = 4  # of 512 tokens: about as many rows a step as the others
    settings = {
        "base_model": str(task.model),
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        **{f"lora_{name}_kernel": False for name in ("mlp", "qkv", "o", "embedding")},
        "datasets": [
            {
                "path": str(task.rows),
                "ds_type": "json",
                "type": {
                    "field_instruction": "context",
                    "field_output": "target",
                    "format": "{instruction}",
                    "no_input_format": "{instruction}",
                },
            }
        ],
        "sequence_len": MAX_LENGTH,
        "sample_packing": True,
        "excess_length_strategy": "truncate",
        "sdp_attention": True,
        "micro_batch_size": packs,
        "gradient_accumulation_steps": 5,
        "num_epochs": epochs,
        "learning_rate": LR,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_on_inputs": False,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 42,
        "max_memory": {"cpu": "8GiB"},
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "special_tokens": {"pad_token": "<pad>"},
    }
    config = folder / "axolotl.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")
    variables = {"ACCELERATE_USE_CPU": "true", "AXOLOTL_DO_NOT_TRACK": "1"}
    return Job(_torchrun(python, "-m", "axolotl.cli.train", str(config)), folder, variables)


GROUPED = {"train_sampling_strategy": "group_by_length"}
SYSTEMS = {
    system.name: system
    for system in (
        System("seed", "plain Trainer, micro batch 40, padded to the longest", _script(False, 40, None)),
        System("grouped", "plain Trainer, grouped by length, 8 × 5", _script(False, 8, None, **GROUPED)),
        System(
            "trl",
            "TRL's SFTTrainer, grouped by length, 8 × 5",
            _script(True, 8, "trl", max_length=MAX_LENGTH, gradient_checkpointing=False, **GROUPED),
            "trl",
        ),
        System("llamafactory", "LLaMA-Factory, grouped by length, 8 × 5", _llamafactory, "llamafactory"),
        System("axolotl", "Axolotl, sample packing, 4 packs of 512 × 5", _axolotl, "axolotl"),
        System("launch", "this launcher, what it plans by itself", _launch),
    )
}
