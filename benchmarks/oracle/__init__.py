"""What does a training step really keep in memory?      the real model, PEFT, Trainer and AdamW, on tensors without data

    observe(plan) -> Memory        the parts at the fullest moment of two optimizer steps; the context is 0
    flops(plan) -> int             of one micro batch, in a pass of its own: counting changes what is kept

Never used for planning: `launcher.memory` is held against it. The model is built on the meta device, its tensors are then
replaced by fake ones (shape, dtype, device and no data), and transformers.Trainer, set up by the worker's own functions, takes
two steps on them: in the first the optimizer has no state yet. A small dispatch mode sees every tensor that any operation
returns, forward, backward, computed again or in the optimizer, and every one that dies. 7B takes three seconds.

The fake device is a CPU: fake CUDA tensors fail without CUDA at the first node of the autograd graph. `as_on_cuda` makes up
for what differs there: dropout keeps a mask of a byte, autocast computes norms and powers in fp32, AdamW goes over all tensors at
once. Memory that an operation takes and gives back inside itself (cuBLAS workspace, the accumulators of flash attention)
is seen by nobody here, nor is what the allocator loses: that is part of the context.

Strategies: single; fsdp for rank 0 of N, over a process group that sends nothing; ddp is single and DDP's buckets. ZeRO is
DeepSpeed's own code and has to be measured (`memory_honesty.py`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from launcher.cluster import Cluster, Device, Node
from launcher.memory import Memory
from launcher.modelshape import shape_of_config
from launcher.plan import Plan
from launcher.plan.deciding import Deciding
from launcher.recipe import Recipe
from launcher.rundir import RunDir
from launcher.worker.model import DTYPES

from .ledger import Ledger

_ENDLESS_BYTES = 10**15  # so that no plan is refused here


def planned(recipe: Mapping[str, Any], num_devices: int = 1, kind: str = "cuda") -> Plan:
    """The plan of a recipe without `data.path` and `hardware`, on as many devices with memory without end; under fp16 they lack bf16."""
    whole = {**recipe, "data": {"path": "rows.jsonl", **recipe.get("data", {})}}
    checked = Recipe.model_validate(whole)
    devices = tuple(
        Device(name=kind, kind=kind, memory_bytes=_ENDLESS_BYTES, bf16=checked.model.dtype != "fp16", index=index)  # type: ignore[arg-type]
        for index in range(num_devices)
    )
    cluster = Cluster(nodes=(Node(host="localhost", devices=devices),), source=f"{num_devices} endless devices")
    config = recipe["model"]["config"]
    shape = shape_of_config(config, str(config["model_type"]), "the benchmark")
    return Deciding(checked, cluster, shape).plan("oracle")


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Operations whose memory is another on CUDA: fused dropout, and those that CUDA's autocast list does in fp32."""

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(input, p, training)[0] if p and training else input

    with (
        mock.patch.object(F, "dropout", dropout),
        mock.patch.object(F, "layer_norm", _in_fp32(F.layer_norm)),
        mock.patch.object(torch, "pow", _in_fp32(torch.pow)),
    ):
        yield


def _in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on fp32 copies of what is shorter, as under autocast."""

    def up(value: Any) -> Any:
        is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if is_half else value

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(up, (args, kwargs))
        return function(*args, **kwargs)

    return wrapper


def observe(plan: Plan) -> Memory:
    """Parts of the memory of rank 0 at the fullest moment of two optimizer steps."""
    if plan.dtype == "fp16":  # accelerate has autocast on a CPU in bf16 alone; the sizes are the same
        weights = "bf16" if plan.weights_dtype == "fp16" else plan.weights_dtype
        plan = plan.model_copy(update={"dtype": "bf16", "weights_dtype": weights})
    with _on_fake_tensors(plan) as (model, trainer):
        memory = watch(plan, model, trainer)
    if plan.strategy == "ddp":
        buckets = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        memory = memory.model_copy(update={"buffers_bytes": memory.buffers_bytes + buckets})
    return memory


def watch(plan: Plan, model: Any, trainer: Any) -> Memory:
    """The same of a model and a Trainer that are there, on tensors fake or real."""
    ledger = Ledger(plan.micro_batch * plan.recipe.data.max_length * plan.shape.vocab_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ledger.claim("weights", (*model.parameters(), *model.buffers()))
    if plan.needs_bitsandbytes:
        from .quantized import scales

        ledger.claim("weights", scales(model))
    if plan.recipe.adapter.type != "full":
        ledger.claim("adapter", trained)
    with ledger:
        with ledger.counting("buffers"):  # DDP's buckets
            steps = Steps(plan, trainer, model)
        for _ in range(2):
            for _ in range(min(2, plan.accumulation)):  # the third micro batch finds what the second found
                steps.forward_backward()
                ledger.claim("gradients", (parameter.grad for parameter in trained))
            with ledger.counting("buffers"):
                steps.update()
            state = (value for values in steps.optimizer.state.values() for value in values.values())
            ledger.claim("optimizer", (value for value in state if isinstance(value, torch.Tensor)))
            steps.model.zero_grad()
    return ledger.memory()


def flops(plan: Plan) -> int:
    """Multiplications and additions of forward and backward pass of one micro batch, attention as if nothing were masked."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with _on_fake_tensors(plan) as (model, trainer):
        steps = Steps(plan, trainer, model)
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            steps.forward_backward()
    return counter.get_total_flops()


class Steps:
    """The Trainer's own forward, backward and update, on batches of the longest shape."""

    def __init__(self, plan: Plan, trainer: Any, model: Any) -> None:
        self.plan = plan
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(2)
        self.model, optimizer = trainer.accelerator.prepare(model, trainer.optimizer)
        trainer.optimizer = self.optimizer = optimizer
        trainer.current_gradient_accumulation_steps = plan.accumulation

    def forward_backward(self) -> None:
        """One micro batch."""
        batch = longest_batch(self.plan)
        self.trainer.training_step(self.model, batch, torch.tensor(batch["labels"].numel()))

    def update(self) -> None:
        """Clipping, and the step of AdamW."""
        if self.plan.recipe.train.max_grad_norm:
            self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.plan.recipe.train.max_grad_norm)
        self.optimizer.step()


def longest_batch(plan: Plan) -> dict[str, torch.Tensor]:
    """A micro batch as the plan's collator makes it, in its longest shape; of several rows one is padded."""
    rows, length = plan.micro_batch, plan.recipe.data.max_length
    packed = plan.batching == "packed"
    ids = torch.ones((1, rows * length) if packed else (rows, length), dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.ones_like(ids)}
    if plan.logits != "whole":  # every token but the last of a row is followed by a label
        from launcher.worker.headloss import PLACES

        batch[PLACES] = torch.arange(rows * (length - 1))
    if packed:
        batch["position_ids"] = torch.arange(length).repeat(rows)[None]
    else:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1:, -1] = 0
        if plan.unmasked:
            del batch["attention_mask"]
    return batch


@contextlib.contextmanager
def _on_fake_tensors(plan: Plan) -> Iterator[tuple[Any, Any]]:
    """The model and its Trainer on fake tensors; everything global is as before afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with torch.device("meta"):
            model = build(plan)
        with _process_group(plan) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
            _become_fake(model, DTYPES[plan.dtype])
            model.to = lambda *_, **__: model  # everything is where it has to be, and parameters cannot be swapped here
            trainer = trainer_of(plan, model)
            if mesh is not None:
                shard(model, mesh, plan)
            with as_on_cuda() if plan.kind == "cuda" else contextlib.nullcontext(), _told(plan):
                yield model, trainer


def trainer_of(plan: Plan, model: Any, on_cpu: bool = True) -> Any:
    """transformers.Trainer as the worker sets it up; checkpointing is switched on as it does when training starts."""
    from transformers import Trainer

    from launcher.worker.training import training_arguments

    kind = plan.kind
    if on_cpu:
        device = Device(name="cpu", kind="cpu", memory_bytes=_ENDLESS_BYTES, bf16=True, index=0)
        nodes = (Node(host="localhost", devices=(device,)),)
        plan = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"nodes": nodes})})
    loss_at_labels(plan, model, kind)
    arguments = training_arguments(plan, RunDir(Path("oracle")), plan.global_batch)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    return Trainer(model=model, args=arguments)


def loss_at_labels(plan: Plan, model: Any, kind: str) -> None:
    """Between the model and its head what the worker puts there."""
    from launcher.worker.headloss import LossAtLabels

    if plan.logits != "whole":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        LossAtLabels(base, plan.logits == "parts", kind)


@contextlib.contextmanager
def _told(plan: Plan) -> Iterator[None]:
    """What transformers would see in the values of a batch, which are not there: whether rows are padded, or packed."""
    several = plan.micro_batch > 1 and not plan.unmasked
    masks = "transformers.masking_utils."
    with contextlib.ExitStack() as stack:
        if not (several and plan.batching == "packed"):
            stack.enter_context(mock.patch(f"{masks}find_packed_sequence_indices", return_value=None))
        if not several:
            stack.enter_context(mock.patch(f"{masks}is_tracing", return_value=False))
            stack.enter_context(mock.patch(f"{masks}fast_all", return_value=True))
        yield


def build(plan: Plan) -> Any:
    """The real model with random weights and the real adapter, as a rank makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.worker.adapters import with_adapter
    from launcher.worker.attention import repeat_keys

    config = dict(plan.recipe.model.config or {})
    described = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(described, dtype=DTYPES[plan.weights_dtype])
    model.config.use_cache = False
    if not plan.cluster.has_flash(plan.dtype):
        repeat_keys(model)
    if plan.recipe.model.quantization != "none":
        from .quantized import quantize

        quantize(model, plan)
    model = with_adapter(model, plan, 100)
    if plan.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _become_fake(model: Any, dtype: torch.dtype) -> None:
    """Replace every tensor of a model on meta by a fake one on a CPU; tied weights stay tied."""
    made: dict[int, Any] = {}
    if any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
        from .quantized import fake_weights

        made = fake_weights(model, dtype)
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) not in made:
                fake = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                made[id(old)] = torch.nn.Parameter(fake, requires_grad=old.requires_grad)
            if old is not None:
                module._parameters[name] = made[id(old)]
        for name, old in list(module._buffers.items()):
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device="cpu")


@contextlib.contextmanager
def _process_group(plan: Plan) -> Iterator[Any]:
    """A mesh of the plan's size where parameters are sharded; its collectives do nothing."""
    if plan.strategy != "fsdp":
        yield None
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.num_processes)
    try:
        yield dist.init_device_mesh("cpu", (plan.num_processes,))
    finally:
        dist.destroy_process_group()


def shard(model: Any, mesh: Any, plan: Plan) -> None:
    """FSDP2 as accelerate 1.15 applies it: each layer, the embedding, and norm and head together; trained weights in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from launcher.families import family

    dtype = DTYPES[plan.dtype]
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = family(plan.shape.family)
    embedding, norm, head = (base.get_submodule(name) for name in (known.embedding, known.norm, known.head))
    for layer in base.get_submodule(known.layers):
        fully_shard(layer, **options)
    if embedding.weight is head.weight:
        fully_shard([norm, embedding, head], reshard_after_forward=False, **options)
    else:
        fully_shard(embedding, **options)
        fully_shard([norm, head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
