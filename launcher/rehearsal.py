"""The plan of a run in, that of its rehearsal out: the same strategy, ranks and code paths on this machine's CPU, with a small model.

Same classes and module names, a few layers, random weights; the tokenizer and the code are the model's own where it is here. Whatever
could not be kept is a note, which the person reads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.cluster.machine import cpu_cluster
from launcher.modelshape import ModelShape, shape_of_config, unmatched_targets
from launcher.modelshape.files import cached_snapshot, config_of_folder, read_config
from launcher.modelshape.small import small_sizes
from launcher.native import NativeConfig, native_config
from launcher.plan import Plan, Rehearsal, make_plan
from launcher.recipe.device_maps import DeviceMap
from launcher.recipe.schema import Data, Eval
from launcher.recipe.shipped import shipped_folder
from launcher.rundir import RunDir, write_json

# Steps before the checkpoint from which it is gone on with: AdaLoRA takes no rank away in fewer than three.
_STEPS = {"adalora": 3}
_ROWS = 128
_MAX_LENGTH = 256
_MOST_RANKS = 16
# The vocabulary of a tokenizer that is made from the rows.
_VOCABULARY = 2048
# In the place of code that is not here, of whatever family.
_STAND_IN: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
             "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": _VOCABULARY,
             "tie_word_embeddings": False}  # fmt: skip


def rehearsal_of(plan: Plan, run: RunDir) -> Plan:
    """The plan of the rehearsal, whose rows may be written into its run directory."""
    notes: list[str] = []
    ranks = min(plan.cluster.num_devices, _MOST_RANKS)
    if ranks < plan.cluster.num_devices or plan.cluster.num_nodes > 1:
        there = f"{plan.cluster.num_devices} on {plan.cluster.num_nodes}"
        notes.append(f"{ranks} ranks on one host in the place of {there}")
    dtype = plan.dtype
    if dtype == "fp16":
        dtype = "fp32"
        notes.append("fp32 in the place of fp16, which a CPU does not compute in")
    if plan.schedule == "naive" and len(plan.stages) > 1:
        notes.append("all layers on one CPU: what one device hands to the next is not rehearsed")
    num_layers = max(2, len(plan.stages) + 1)
    model, shape, rehearsal = _model(plan, num_layers, notes)
    data = _data(plan, shape, rehearsal, run, notes)
    accumulation = len(plan.stages) if plan.schedule == "pipelined" else min(2, plan.accumulation)
    micro_batch = min(2, plan.micro_batch)
    replicas = min(plan.global_batch // (plan.micro_batch * plan.accumulation), ranks)
    recipe = plan.recipe.model_copy(
        update={
            "model": plan.recipe.model.model_copy(update={**model, "dtype": dtype}),
            "data": data,
            "adapter": plan.recipe.adapter.model_copy(update={"targets": _targets(plan, shape, notes)}),
            "strategy": plan.recipe.strategy.model_copy(
                update={"type": plan.strategy, "schedule": plan.schedule or "auto"}
            ),
            "train": plan.recipe.train.model_copy(
                update={
                    "max_steps": _STEPS.get(plan.recipe.adapter.type, 1),
                    "micro_batch": micro_batch,
                    "global_batch": replicas * micro_batch * accumulation,
                    "gradient_checkpointing": plan.gradient_checkpointing,
                    "log_every_steps": 1,
                    "eval_every_steps": 1,
                }
            ),
            "checkpoint": plan.recipe.checkpoint.model_copy(update={"every_steps": 1, "keep": 2, "init_from": None}),
            "hardware": f"{ranks}xcpu",
            "launch": plan.recipe.launch.model_copy(update={"run_dir": str(run.path), "port": None}),
        }
    )
    cluster = cpu_cluster(ranks, f"rehearsal of {plan.cluster.source}")
    made = make_plan(plan.name, recipe, cluster, shape, plan.code, _placed(plan, num_layers))
    return made.model_copy(update={"rehearsal": rehearsal.model_copy(update={"notes": tuple(notes)})})


def one_more_step(plan: Plan) -> Plan:
    """The same, to be gone on with from its last checkpoint."""
    train = plan.recipe.train.model_copy(update={"max_steps": (plan.recipe.train.max_steps or 0) + 1})
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"train": train})})


def _model(plan: Plan, num_layers: int, notes: list[str]) -> tuple[dict[str, Any], ModelShape, Rehearsal]:
    """What changes in the recipe's `model`, the shape of the small one, and what is taken from the real one."""
    model, name = plan.recipe.model, plan.shape.name
    if model.path is None:
        return _fresh(model.config or {}, name, num_layers, Rehearsal(), notes)
    found = Path(model.path) if Path(model.path).is_dir() else cached_snapshot(model.path, model.revision)
    folder = str(found) if found else None
    config = config_of_folder(found, model.path) if found else read_config(model.path, model.revision) or {}
    native = native_config(config)
    if isinstance(native, NativeConfig):
        return _fresh(native.config, name, num_layers, Rehearsal(folder=folder, native=native.native), notes)
    if not plan.shape.remote_code:
        return _fresh(config, name, num_layers, Rehearsal(folder=folder), notes)
    if plan.code is None or folder is None:
        notes.append(f"a Llama in the place of {name}, whose own code is not here")
        return _fresh(_STAND_IN, name, num_layers, Rehearsal(), notes)
    small = {**config, **small_sizes(config, num_layers)}
    return {"path": folder}, shape_of_config(small, name, "a small copy"), Rehearsal(folder=folder)


def _fresh(
    config: Mapping[str, Any], name: str, num_layers: int, rehearsal: Rehearsal, notes: list[str]
) -> tuple[dict[str, Any], ModelShape, Rehearsal]:
    """A class of transformers, built from a config."""
    small = {**config, **small_sizes(config, num_layers)}
    for key in ("auto_map", "_name_or_path", "quantization_config", "architectures", "dtype", "torch_dtype"):
        small.pop(key, None)
    if rehearsal.folder is None:
        # Ids that mean something to a tokenizer go with it.
        small |= {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if name != config.get("model_type"):  # a recipe with a config of its own has no other tokenizer
            notes.append("a tokenizer made from the rows, since the model's own is not here")
    changed = {"path": None, "revision": None, "trust_remote_code": False, "code_sha256": None, "config": small}
    return changed, shape_of_config(small, name, "a small copy"), rehearsal


def _targets(plan: Plan, shape: ModelShape, notes: list[str]) -> Any:
    """The recipe's targets; every linear layer where the small model has none of them."""
    targets = plan.recipe.adapter.targets
    if isinstance(targets, str) or not unmatched_targets(shape, targets):
        return targets
    notes.append(f"an adapter on every linear layer in the place of {', '.join(targets)}")
    return "all-linear"


def _data(plan: Plan, shape: ModelShape, rehearsal: Rehearsal, run: RunDir, notes: list[str]) -> Data:
    """The first rows of the recipe; where they are not here, shipped ones in the recipe's format."""
    data = plan.recipe.data
    changed: dict[str, Any] = {}
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    missing = next((path for path in paths if "://" not in path and not Path(path).exists()), None)
    evaluation = data.eval
    if missing is not None:
        rows = json.loads((shipped_folder() / "data" / "quickstart.json").read_text(encoding="utf-8"))
        write_json(run.rehearsal_rows, [_as_row(row, data) for row in rows])
        notes.append(f"{len(rows)} shipped rows in the place of {Path(missing).name}, which is not here")
        changed = {"path": str(run.rehearsal_rows), "streaming": False}
        if evaluation is not None and evaluation.path is not None:
            evaluation = Eval(rows=8)
    if evaluation is not None and evaluation.rows is not None:
        evaluation = Eval(rows=min(evaluation.rows, 8))
    if data.template == "auto" and rehearsal.folder is None:
        changed["template"] = plan.shape.template
    changed |= {"max_rows": min(_ROWS, data.max_rows or _ROWS), "max_length": min(_MAX_LENGTH, data.max_length)}
    changed |= {"eval": evaluation, "batching": plan.batching, "questions": data.questions[:1]}
    return data.model_copy(update=changed)


def _as_row(row: Mapping[str, str], data: Data) -> dict[str, Any]:
    """A question and its answer as a row of the recipe's format."""
    question, answer, names = row["instruction"], row["output"], data.fields
    if data.format == "alpaca":
        return {names.instruction: question, names.output: answer}
    if data.format == "context_target":
        return {names.context: question, names.target: answer}
    if data.format == "prompt_response":
        return {names.prompt: question, names.response: answer}
    if data.format == "messages":
        return {names.messages: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    return {names.text: f"{question}\n{answer}"}


def _placed(plan: Plan, num_layers: int) -> DeviceMap | None:
    """Stages in the order of the real ones, each with one layer and the largest with what is left."""
    if not plan.stages:
        return None
    sizes = [1] * len(plan.stages)
    largest = max(range(len(sizes)), key=lambda i: plan.stages[i].stop - plan.stages[i].first)
    sizes[largest] += num_layers - len(sizes)
    stops = list(itertools.accumulate(sizes))
    placement = tuple(f"{stop - size}-{stop - 1}" for size, stop in zip(sizes, stops, strict=True))
    return DeviceMap(devices=(f"{len(sizes)}xcpu",), schedule=plan.schedule or "auto", placement=placement)
