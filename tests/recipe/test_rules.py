"""Rules between the fields of a recipe: each broken once and kept once, and the attempts at the libraries behind them.

An attempt does what a rule forbids with the real library. It fails here, or is shown to do something else than asked;
should one of them work one day, the rule goes. Rules that only contradict themselves have no attempt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from launcher.families import family, family_names
from launcher.recipe import Recipe
from launcher.recipe.rules import broken_rules

Sections = dict[str, dict[str, Any]]


def recipe(sections: Sections) -> Recipe:
    """A recipe that is right, with these sections laid over it."""
    right: Sections = {"model": {"path": "org/name"}, "data": {"path": "rows.json"}}
    for name, values in sections.items():
        right[name] = {**right.get(name, {}), **values}
    return Recipe.model_validate(right)


# What breaks a rule, the key and the words of its one problem, and the nearest recipe that keeps it.
RULES: list[tuple[Sections, str, str, Sections]] = [
    (
        {"model": {"path": None}},
        "model",
        "neither path nor config is set. Give one: path for a model that exists, config for one from random weights",
        {"model": {"path": None, "config": {"model_type": "llama"}}},
    ),
    (
        {"model": {"config": {"model_type": "llama"}}},
        "model",
        "path and config are both set. Give one: path for a model that exists, config for one from random weights",
        {"model": {"path": "org/name"}},
    ),
    ({"model": {"path": ""}}, "model.path", "is empty. Give a hub id or a folder", {"model": {"path": "."}}),
    (
        {"model": {"path": None, "config": {"hidden_size": 64}}},
        "model.config",
        "has no model_type. Add it, e.g. model_type: llama",
        {"model": {"path": None, "config": {"hidden_size": 64, "model_type": "llama"}}},
    ),
    *(
        (
            {"model": {"quantization": kind}, "adapter": {"type": "full"}},
            "adapter.type",
            f"full cannot train a base stored in {kind}: quantised weights have no gradient. "
            "Set adapter.type=lora, or model.quantization=none",
            {"model": {"quantization": kind}, "adapter": {"type": "lora"}},
        )
        for kind in ("int8", "nf4")
    ),
    *(
        (
            {"data": {"path": empty}},
            "data.path",
            "is empty. Give a file, a folder or a list of them",
            {"data": {"path": ("a", "b")}},
        )
        for empty in ("", (), ("a", ""))
    ),
    (
        {"data": {"eval": {"path": ""}}},
        "data.eval.path",
        "is empty. Give a file, a folder or a list of them",
        {"data": {"eval": {"path": "e"}}},
    ),
    (
        {"data": {"eval": {}}},
        "data.eval",
        "nothing is set. Give one of fraction, rows, path",
        {"data": {"eval": {"rows": 10}}},
    ),
    (
        {"data": {"eval": {"fraction": 0.1, "rows": 10}}},
        "data.eval",
        "fraction and rows are set. Give one of fraction, rows, path",
        {"data": {"eval": {"fraction": 0.1}}},
    ),
    (
        {"train": {"early_stopping": {}}},
        "train.early_stopping",
        "needs an evaluation loss. Add data.eval, e.g. data.eval.fraction=0.02",
        {"train": {"early_stopping": {}}, "data": {"eval": {"fraction": 0.02}}},
    ),
    *(
        (
            {"data": {"format": name, "system": "Be brief."}},
            "data.system",
            f"{name} is used word for word and has no system prompt. Remove it, or use another data.format",
            {"data": {"format": "alpaca", "system": "Be brief."}},
        )
        for name in ("text", "context_target")
    ),
    (
        {"adapter": {"type": "full", "modules_to_save": ("lm_head",)}},
        "adapter.modules_to_save",
        "full trains every module already. Remove it",
        {"adapter": {"type": "lora", "modules_to_save": ("lm_head",)}},
    ),
    (
        {"adapter": {"type": "dora", "init_r": 12}},
        "adapter.init_r",
        "only adalora has it; dora keeps its rank. Remove it, or set adapter.r",
        {"adapter": {"type": "adalora", "init_r": 12}},
    ),
    (
        {"adapter": {"type": "adalora", "r": 8, "init_r": 7}},
        "adapter.init_r",
        "7 is below adapter.r=8: ranks only fall. Set adapter.init_r=12",
        {"adapter": {"type": "adalora", "r": 8, "init_r": 8}},
    ),
    (
        {"adapter": {"type": "lora", "orth_reg_weight": 0.1}},
        "adapter.orth_reg_weight",
        "only adalora has it, not lora. Remove it",
        {"adapter": {"type": "adalora", "orth_reg_weight": 0.1}},
    ),
    (
        {"strategy": {"type": "ddp", "schedule": "pipelined"}},
        "strategy.schedule",
        "ddp has no schedule. Set strategy.type=device_map, or strategy.schedule=naive",
        {"strategy": {"type": "device_map", "device_map": "2gpu-mixed", "schedule": "pipelined"}},
    ),
    (
        {"data": {"questions": ("What is it?", " ")}},
        "data.questions",
        "holds an empty one. Write a question, or remove it",
        {"data": {"questions": ("What is it?",)}},
    ),
    *(
        (
            {"strategy": {"type": name, **more}, "data": {"questions": ("What is it?",)}},
            "data.questions",
            f"under {name} no rank holds the whole model, so none can answer while it trains. Remove them, and ask "
            "afterwards: launch chat RUN",
            {"strategy": {"type": name, **more}},
        )
        for name, more in (
            ("zero3", {}),
            ("fsdp", {}),
            ("device_map", {"device_map": "2gpu-mixed", "schedule": "pipelined"}),
        )
    ),
    (
        {"adapter": {"targets": ()}},
        "adapter.targets",
        "is an empty list. Write auto, all-linear or names of modules",
        {"adapter": {"targets": ("q_proj",)}},
    ),
    *(
        (
            {"strategy": {"type": name, "offload": "optimizer"}},
            "strategy.offload",
            f"{name} has no offload. Set strategy.type=zero2 or zero3, or offload=none",
            {"strategy": {"type": "zero2", "offload": "optimizer"}},
        )
        for name in ("auto", "single", "ddp", "fsdp")
    ),
    *(
        (
            {"strategy": {"type": name, "offload": "optimizer", "nvme_path": "/fast"}},
            "strategy.nvme_path",
            f"under {name} DeepSpeed keeps what is offloaded in host memory. Set strategy.type=zero3, or remove it",
            {"strategy": {"type": "zero3", "offload": "optimizer", "nvme_path": "/fast"}},
        )
        for name in ("zero1", "zero2")
    ),
    (
        {"strategy": {"type": "zero3", "nvme_path": "/fast"}},
        "strategy.nvme_path",
        "offload=none keeps nothing there. Set strategy.offload=optimizer or parameters, or remove it",
        {"strategy": {"type": "zero3", "offload": "parameters", "nvme_path": "/fast"}},
    ),
    *(
        (
            {"strategy": {"type": name, "offload": "parameters"}},
            "strategy.offload",
            f"{name} does not shard parameters. Set strategy.type=zero3, or offload=optimizer",
            {"strategy": {"type": "zero3", "offload": "parameters"}},
        )
        for name in ("zero1", "zero2")
    ),
    *(
        (
            {"strategy": {"type": name, "device_map": "2gpu-mixed"}},
            "strategy.type",
            f"{name} does not spread one model over the devices, a device map does. Set strategy.type=device_map",
            {"strategy": {"type": "auto", "device_map": "2gpu-mixed"}},
        )
        for name in ("single", "ddp", "zero3", "fsdp")
    ),
    *(
        (
            {"launch": {"backend": "python"}, "strategy": {"type": name}},
            "launch.backend",
            f"python starts one process, {name} needs one per device. Set launch.backend=torchrun",
            {"launch": {"backend": "python"}, "strategy": {"type": "single"}},
        )
        for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    ),
    *(
        (
            {"strategy": {"type": name}, "model": {"quantization": "nf4"}},
            "strategy.type",
            f"{name} would cut up weights stored in nf4, whose blocks have scales of their own. "
            "Set strategy.type=zero2, or model.quantization=none",
            {"strategy": {"type": "zero2"}, "model": {"quantization": "nf4"}},
        )
        for name in ("fsdp", "zero3")
    ),
    *(
        (
            {"strategy": {"type": name}, "adapter": {"type": "adalora"}},
            "adapter.type",
            f"adalora looks at whole weights and their gradients, of which a rank under {name} has a share. "
            "Set strategy.type=ddp, or adapter.type=lora",
            {"strategy": {"type": "ddp"}, "adapter": {"type": "adalora"}},
        )
        for name in ("zero1", "zero2", "zero3", "fsdp")
    ),
    (
        {"strategy": {"type": "device_map"}, "adapter": {"type": "adalora"}},
        "adapter.type",
        "adalora adds up a term of all layers, which lie on several devices under device_map. "
        "Set adapter.type=lora, or strategy.type=single",
        {"strategy": {"type": "device_map"}, "adapter": {"type": "dora"}},
    ),
    (
        {"data": {"streaming": True}},
        "data.streaming",
        "nobody knows how many rows a stream has. Set train.max_steps, e.g. train.max_steps=1000",
        {"data": {"streaming": True}, "train": {"max_steps": 10}},
    ),
    (
        {"data": {"streaming": True, "eval": {"rows": 9}}, "train": {"max_steps": 10}},
        "data.eval.rows",
        "rows of a stream cannot be set aside. Give a file: data.eval.path=FILE",
        {"data": {"streaming": True, "eval": {"path": "eval.jsonl"}}, "train": {"max_steps": 10}},
    ),
    (
        {"data": {"streaming": True, "shuffle_rows": 31}, "train": {"max_steps": 10}},
        "data.shuffle_rows",
        "31 rows do not make a step of 32. Set data.shuffle_rows=512",
        {"data": {"streaming": True, "shuffle_rows": 32}, "train": {"max_steps": 10}},
    ),
    (
        {"data": {"path": ("a.json", "https://b/c.jsonl")}},
        "data.path",
        "https://b/c.jsonl is an address, and only a stream is read from one. Set data.streaming=true",
        {"data": {"path": ("a.json", "https://b/c.jsonl"), "streaming": True}, "train": {"max_steps": 10}},
    ),
    (
        {"model": {"quantization": "nf4"}, "train": {"compile": True}},
        "train.compile",
        "compiled layers over a base stored in nf4 fail, or give no gradient, once they have evaluated. "
        "Set train.compile=false, or model.quantization=int8",
        {"model": {"quantization": "int8"}, "train": {"compile": True}},
    ),
    *(
        (
            {"strategy": {"type": name}, "train": {"compile": True}},
            "train.compile",
            f"under {name} layers are called with {hooks}, and nobody has held a compiled one against its plan. "
            "Set train.compile=false, or strategy.type=ddp or fsdp",
            {"strategy": {"type": "fsdp"}, "train": {"compile": True}},
        )
        for name, hooks in (("device_map", "hooks between the devices"), ("zero2", "DeepSpeed's hooks"))
    ),
    (
        {"strategy": {"type": "fsdp"}, "train": {"optimizer": "adamw_8bit"}},
        "train.optimizer",
        "adamw_8bit knows no sharded tensors. Set train.optimizer=adamw, or strategy.type=zero2",
        {"strategy": {"type": "zero2"}, "train": {"optimizer": "adamw_8bit"}},
    ),
    (
        {"strategy": {"type": "zero2", "offload": "optimizer"}, "train": {"optimizer": "adamw_8bit"}},
        "train.optimizer",
        "adamw_8bit does not run on the host, where strategy.offload=optimizer puts it. "
        "Set train.optimizer=adamw, or strategy.offload=none",
        {"strategy": {"type": "zero2", "offload": "optimizer"}},
    ),
    *(
        (
            {"strategy": {"type": name, "deepspeed": "ds.json"}},
            "strategy.deepspeed",
            f"{name} does not read it. Set strategy.type=zero1, zero2 or zero3, or deepspeed=null",
            {"strategy": {"type": "zero1", "deepspeed": "ds.json"}},
        )
        for name in ("auto", "ddp", "fsdp")
    ),
    (
        {"checkpoint": {"resume": "auto"}},
        "checkpoint.resume",
        "auto needs a run directory that stays the same. Set launch.run_dir, or use: launch resume RUN",
        {"checkpoint": {"resume": "auto"}, "launch": {"run_dir": "runs/a"}},
    ),
    (
        {"launch": {"run_dir": ""}},
        "launch.run_dir",
        "is empty. Give a folder, or null for runs/<recipe>-<time>",
        {"launch": {"run_dir": None}},
    ),
]


@pytest.mark.parametrize(("broken", "key", "message", "kept"), RULES, ids=[f"{rule[1]}-{rule[0]}" for rule in RULES])
def test_a_rule_says_what_is_wrong_and_its_advice_helps(broken, key, message, kept):
    assert [(problem.key, problem.message) for problem in broken_rules(recipe(broken))] == [(key, message)]
    assert broken_rules(recipe(kept)) == []


def test_all_broken_rules_are_found_at_once():
    found = broken_rules(
        recipe(
            {
                "model": {"path": None},
                "data": {"eval": {}},
                "adapter": {"type": "full", "modules_to_save": ("lm_head",), "init_r": 3},
                "strategy": {"type": "ddp", "offload": "parameters", "device_map": "a"},
                "launch": {"backend": "python"},
                "checkpoint": {"resume": "auto"},
            }
        )
    )
    assert [problem.key for problem in found] == [
        "model", "data.eval", "adapter.modules_to_save", "adapter.init_r", "strategy.offload", "strategy.type",
        "launch.backend", "checkpoint.resume",
    ]  # fmt: skip


# The attempts.

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS_OF_16 = ("gemma", "gemma2", "gemma3_text", "glm", "glm4", "qwen3")

# PEFT reads a name of transformers that is going to change.
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def tiny_model(name: str = "llama") -> Any:
    """A model of a family with two small layers and random weights, the same at every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **SIZES, **({"head_dim": 16} if name in HEADS_OF_16 else {}))
    config.use_cache = False
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_attempt_a_config_without_model_type():
    from transformers import AutoConfig

    with pytest.raises(TypeError, match="model_type"):
        AutoConfig.for_model(**SIZES)


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantized_model(request, tmp_path_factory):
    """A tiny model whose linear layers lie in 8 or 4 bits, prepared as `worker.adapters` does it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    kind = {"load_in_8bit": True} if request.param == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**kind), device_map={"": "cpu"}, dtype=torch.float32
    )
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_attempt_full_training_of_a_quantised_base(quantized_model):
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require gradients"):
        quantized_model.requires_grad_(True)


@OLD_NAME
def test_its_advice_an_adapter_on_a_quantised_base_has_gradients_everywhere(quantized_model):
    import peft
    import torch

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(quantized_model, config)
    ids = torch.arange(16).reshape(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert not [name for name, gradient in trained.items() if gradient is None]


def test_attempt_init_r_without_adalora():
    import peft

    with pytest.raises(TypeError, match="init_r"):
        peft.LoraConfig(r=8, init_r=12)


def adalora_steps(init_r: int, target_r: int) -> int:
    """Ten steps of AdaLoRA; how many ranks are left of four modules."""
    import peft
    import torch

    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_r=init_r, target_r=target_r,
        tinit=1, tfinal=3, deltaT=1, total_step=10,
    )  # fmt: skip
    model = peft.get_peft_model(tiny_model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(16).reshape(2, 8)
    for step in range(10):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


@OLD_NAME
def test_attempt_adalora_that_starts_below_its_target():
    with pytest.raises(RuntimeError, match="selected number k out of range"):
        adalora_steps(init_r=3, target_r=4)
    assert adalora_steps(init_r=6, target_r=4) == 4 * 4


@OLD_NAME
def test_attempt_an_adapter_without_targets():
    import peft

    with pytest.raises(ValueError, match="No `target_modules` passed"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=[]))


@pytest.fixture
def _fresh_accelerate():
    """Undoes what accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_attempt_a_device_map_in_several_processes():
    from accelerate import Accelerator, DistributedType

    accelerator = Accelerator(cpu=True)
    model = tiny_model()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert accelerator.prepare(model) is model
    accelerator.state.distributed_type = DistributedType.MULTI_CPU
    with pytest.raises(ValueError, match="You can't train a model that has been loaded with `device_map='auto'`"):
        accelerator.prepare(model)


def test_attempt_ranks_without_a_launcher(monkeypatch):
    import torch.distributed as dist

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="environment variable RANK expected, but not set"):
        dist.init_process_group("gloo")


DEEPSPEED = """
import json, os, torch, deepspeed
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first, for a minute
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
for stage, part in ((0, "optimizer"), (1, "optimizer"), (2, "optimizer"), (1, "param"), (2, "param"), (3, "param")):
    model = torch.nn.Linear(8, 8)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, f"offload_{part}": {"device": "cpu"}},
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    done = hasattr(model.weight, "ds_id") if part == "param" else getattr(optimizer, "cpu_offload", False)
    print("RESULT", json.dumps([stage, part, done]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_attempt_deepspeed_takes_an_offload_that_its_stage_has_not_and_leaves_it_out():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", DEEPSPEED], env=env, capture_output=True, text=True, check=True)
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results == [
        [0, "optimizer", False],
        [1, "optimizer", True],
        [2, "optimizer", True],
        [1, "param", False],
        [2, "param", False],
        [3, "param", True],
    ]


# The rules of `launcher.plan`, which need a model's family or the devices.


@pytest.mark.usefixtures("_fresh_accelerate")
def test_attempt_fp16_on_a_cpu_is_taken_and_computes_in_fp32(tmp_path):
    """No error and no scaling: the Trainer says fp16, and every number is that of fp32."""
    import torch
    from transformers import Trainer, TrainingArguments

    def train(**precision: bool) -> tuple[Any, set[Any], float]:
        model, dtypes = tiny_model(), set()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            **precision,
        )  # fmt: skip
        rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 6
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        return trainer.accelerator.scaler, dtypes, trainer.train().training_loss

    assert train(fp16=True) == train() == (None, {torch.float32}, pytest.approx(4.5, abs=1))
    assert train(bf16=True)[1] == {torch.bfloat16}


def test_attempt_positions_in_bf16():
    """Why the own code of ChatGLM and ChatGLM2, which counts positions in the model's dtype, gets no bf16."""
    import torch

    positions = torch.arange(512)
    assert positions.to(torch.bfloat16).unique().numel() == 385
    assert torch.tensor(257).to(torch.bfloat16).item() == 256
    assert positions.to(torch.float16).unique().numel() == 512


@pytest.mark.parametrize("name", [name for name in family_names()[:-1] if not family(name).needs_remote_code])
def test_attempt_packed_rows_see_each_other_just_where_the_family_cannot_pack(name):
    """Two rows in one sequence, positions starting again: are the logits of the second those it has alone?"""
    import torch

    model = tiny_model(name).eval()
    first, second = torch.arange(5, 14)[None], torch.arange(20, 29)[None]
    positions = torch.arange(9).repeat(2)[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions).logits[:, 9:]
        alone = model(input_ids=second).logits
    difference = (packed - alone).abs().max().item()
    assert difference < 1e-5 if family(name).packing else difference > 1e-3
