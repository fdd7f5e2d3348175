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
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from launcher.cluster import Cluster, Device, Node
from launcher.memory import Memory
from launcher.modelshape import shape_of_config
from launcher.plan import Plan
from launcher.plan.deciding import Deciding
from launcher.recipe import Recipe
from launcher.rundir import RunDir

_ENDLESS_BYTES = 10**15  # so that no plan is refused here
_PARTS = [name.removesuffix("_bytes") for name in Memory.model_fields]


def planned(recipe: Mapping[str, Any], num_devices: int = 1, kind: str = "cuda") -> Plan:
    """The plan of a recipe without `data.path` and `hardware`, on as many devices with memory without end."""
    whole = {**recipe, "data": {"path": "rows.jsonl", **recipe.get("data", {})}}
    checked = Recipe.model_validate(whole)
    devices = tuple(
        Device(name=kind, kind=kind, memory_bytes=_ENDLESS_BYTES, bf16=True, index=index)  # type: ignore[arg-type]
        for index in range(num_devices)
    )
    cluster = Cluster(nodes=(Node(host="localhost", devices=devices),), source=f"{num_devices} endless devices")
    config = recipe["model"]["config"]
    shape = shape_of_config(config, str(config["model_type"]), "the benchmark")
    return Deciding(checked, cluster, shape).plan("oracle")


class Ledger(TorchDispatchMode):
    """Every storage that is alive, from the tensors that operations return; fake or real.

    `default` is the part that unknown storages belong to; `claim` moves storages to another part, also afterwards: a
    gradient is known as one only when the backward pass is over.
    """

    def __init__(self, logits_elements: int = 0) -> None:
        super().__init__()
        self.default = "activations"
        self.logits_elements = logits_elements
        self.serial: dict[int, int] = {}  # id of a living storage -> its number
        self.part: list[str] = []  # of every storage by number
        self.size: list[int] = []
        self.events: list[tuple[int, int]] = []  # number of the storage, bytes that came or went

    def __enter__(self) -> Ledger:
        resize = torch.UntypedStorage.resize_

        def seen(storage: Any, size: int) -> None:
            """FSDP empties and fills the same storage, and no operation shows it."""
            resize(storage, size)
            number = self.serial.get(id(storage))
            if number is not None and size != self.size[number]:
                self.events.append((number, size - self.size[number]))
                self.size[number] = size

        self._resizing = mock.patch.object(torch.UntypedStorage, "resize_", seen)
        self._resizing.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._resizing.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, func, args)
        return result

    def _see(self, tensor: torch.Tensor, func: Any, args: Any) -> None:
        storage = _storage(tensor)
        if id(storage) in self.serial:
            return
        part = self.default
        if part == "activations":
            if tensor.numel() == self.logits_elements:
                part = "logits"
            elif func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
                part = "buffers"  # autocast's own copy of a weight
            elif func is torch.ops.aten.empty.memory_format and tensor.dim() == 1:
                part = "buffers"  # FSDP gathers and reduces in flat ones
        self._add(storage, part)

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        number = self.serial.get(id(_storage(tensor)))
        return number is not None and self.part[number] in ("weights", "adapter")

    def _add(self, storage: Any, part: str) -> int:
        number = len(self.part)
        self.serial[id(storage)] = number
        self.part.append(part)
        self.size.append(storage.nbytes())
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._gone, id(storage), number)
        return number

    def _gone(self, key: int, number: int) -> None:
        if self.serial.get(key) == number:
            del self.serial[key]
        self.events.append((number, -self.size[number]))

    def claim(self, part: str, tensors: Iterable[torch.Tensor | None]) -> None:
        """These tensors are of that part, and have been since they exist."""
        for tensor in tensors:
            if tensor is not None:
                storage = _storage(tensor)
                number = self.serial.get(id(storage))
                self.part[self._add(storage, part) if number is None else number] = part

    @contextlib.contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """New storages belong to that part meanwhile."""
        before, self.default = self.default, part
        yield
        self.default = before

    def peak(self) -> dict[str, int]:
        """Bytes by part at the fullest moment."""
        now = dict.fromkeys(_PARTS, 0)
        total = highest = 0
        fullest = dict(now)
        for number, change in self.events:
            now[self.part[number]] += change
            total += change
            if total > highest:
                highest, fullest = total, dict(now)
        return fullest


def _storage(tensor: torch.Tensor) -> Any:
    """The storage of a tensor; of a DTensor that of this rank's share."""
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


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
    ledger = Ledger(plan.micro_batch * plan.recipe.data.max_length * plan.shape.vocab_size)
    with _stepping(plan) as steps:
        model, optimizer = steps.model, steps.optimizer
        adapted = plan.recipe.adapter.type != "full"
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ledger.claim("weights", (*model.parameters(), *model.buffers()))
        if adapted:
            ledger.claim("adapter", trained)
        with ledger:
            for _ in range(2):
                for _ in range(min(2, plan.accumulation)):  # the third micro batch finds what the second found
                    steps.forward_backward()
                    ledger.claim("gradients", (parameter.grad for parameter in trained))
                with ledger.counting("buffers"):
                    steps.update()
                state = (value for values in optimizer.state.values() for value in values.values())
                ledger.claim("optimizer", (value for value in state if isinstance(value, torch.Tensor)))
                model.zero_grad()
    parts = ledger.peak()
    if plan.strategy == "ddp":
        parts["buffers"] += sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return Memory(**{f"{part}_bytes": size for part, size in parts.items()})


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
    with _stepping(plan) as steps, FlopCounterMode(display=False, custom_mapping=attention) as counter:
        steps.forward_backward()
    return counter.get_total_flops()


class _Steps:
    """The Trainer's own forward, backward and update on fake tensors."""

    def __init__(self, plan: Plan, trainer: Any, model: Any) -> None:
        self.plan = plan
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(2)
        self.model, optimizer = trainer.accelerator.prepare(model, trainer.optimizer)
        trainer.optimizer = self.optimizer = optimizer
        trainer.current_gradient_accumulation_steps = plan.accumulation

    def forward_backward(self) -> None:
        """One micro batch, as the collator of the plan makes it, in its longest shape."""
        rows, length = self.plan.micro_batch, self.plan.recipe.data.max_length
        packed = self.plan.batching == "packed"
        ids = torch.zeros((1, rows * length) if packed else (rows, length), dtype=torch.long)
        batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        if packed:
            batch["position_ids"] = torch.zeros_like(ids)
        elif rows > 1:  # as if one of them were padded; a single row has nothing to mask
            batch["attention_mask"] = torch.zeros_like(ids)
        self.trainer.training_step(self.model, batch, torch.empty((), dtype=torch.long))

    def update(self) -> None:
        """Clipping, and the step of AdamW."""
        if self.plan.recipe.train.max_grad_norm:
            self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.plan.recipe.train.max_grad_norm)
        self.optimizer.step()


@contextlib.contextmanager
def _stepping(plan: Plan) -> Iterator[_Steps]:
    """A Trainer on fake tensors, ready to step; everything global is as before afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import Trainer

    from launcher.worker.training import training_arguments

    assert plan.recipe.model.quantization == "none", "bitsandbytes computes on data, which is not there"
    on_cuda = plan.kind == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = _on_meta(plan)
        on_cpu = plan.model_copy(update={"cluster": _cpu_cluster(plan)})
        arguments = training_arguments(on_cpu, RunDir(Path("oracle")), plan.global_batch)
        with _process_group(plan) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
            _become_fake(model)
            model.to = lambda *_, **__: model  # everything is where it has to be, and parameters cannot be swapped here
            trainer = Trainer(model=model, args=arguments)
            if mesh is not None:
                shard(model, mesh, plan)
            if plan.gradient_checkpointing:
                model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
            steps = _Steps(plan, trainer, model)
            for group in steps.optimizer.param_groups:
                group["foreach"] = on_cuda
            with as_on_cuda() if on_cuda else contextlib.nullcontext(), _packed(plan):
                yield steps


def _packed(plan: Plan) -> Any:
    """transformers looks at position ids for rows that are packed together; values that are not there cannot tell it."""
    if plan.batching == "packed" and plan.micro_batch > 1:
        return contextlib.nullcontext()
    return mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)


def _cpu_cluster(plan: Plan) -> Cluster:
    """The plan's cluster with CPU ranks in place of cards: what the Trainer is told must exist."""
    device = Device(name="cpu", kind="cpu", memory_bytes=_ENDLESS_BYTES, bf16=True, index=0)
    return plan.cluster.model_copy(update={"nodes": (Node(host="localhost", devices=(device,)),)})


def _on_meta(plan: Plan) -> Any:
    """The real model with the real adapter, as a rank makes it, without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.worker.adapters import with_adapter
    from launcher.worker.model import DTYPES

    config = dict(plan.recipe.model.config or {})
    described = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, dtype=DTYPES[plan.weights_dtype])
        model.config.use_cache = False
        model = with_adapter(model, plan, 100)
    if plan.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _become_fake(model: Any) -> None:
    """Replace every tensor of a model on meta by a fake one on a CPU; tied weights stay tied."""
    made: dict[int, Any] = {}
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
    from launcher.worker.model import DTYPES

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
