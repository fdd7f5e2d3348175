"""One model over several devices in one process: which module lies where, connected, proved, its random states kept.

accelerate's `dispatch_model` moves what goes from one device to the next. from_pretrained calls it too, but before there is an adapter,
with a main device drawn from a set, and so that all logits are copied to the first device; so it is undone there, and called again here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import recursively_apply, send_to_device

from launcher.errors import PreflightError
from launcher.families import Family, family
from launcher.plan import Plan, StagePlan
from launcher.remotecode import Staged
from launcher.worker.devices import stage_devices
from launcher.worker.staged import from_config, load_config

# Module -> device; for a whole model on one device the name is empty.
Places = Mapping[str, torch.device]

_RNG_FILE = "rng_devices.pth"
_PEFT_PREFIX = "base_model.model."


def places(
    known: Family,
    stages: Sequence[StagePlan],
    devices: Sequence[torch.device],
    folder: str | Path,
    code: Staged | None,
    in_host: int = 0,
) -> dict[str, torch.device]:
    """Where each module of the model in a folder lies, found out on a copy of it without memory.

    Args:
        devices: of each stage.
        in_host: so many of the first layers lie in host memory.

    Raises:
        PreflightError: its layers are not where the table of families says.
    """
    if len(set(devices)) == 1 and not in_host:
        return {"": devices[0]}
    wanted = {}
    for stage, device in zip(stages, devices, strict=True):
        beside = (known.embedding, known.rotary, *known.others) if stage.embedding else ()
        wanted |= {module: device for module in beside if module is not None}
        wanted |= {f"{known.layers}.{layer}": device for layer in range(stage.first, stage.stop)}
        wanted |= {known.norm: device, known.head: device} if stage.head else {}
    wanted |= {f"{known.layers}.{layer}": torch.device("cpu") for layer in range(in_host)}
    with torch.device("meta"):
        return _completed(wanted, from_config(load_config(folder, code), code), known)


def _completed(wanted: Places, model: torch.nn.Module, known: Family) -> dict[str, torch.device]:
    """Without modules that the model lacks; what the table of families does not name lies where the embedding does."""
    modules = dict(model.named_modules())
    missing = [name for name in wanted if name.startswith(f"{known.layers}.") and name not in modules]
    if missing:
        found = f"has no {missing[0]}, which layers of the family `{known.name}` are called"
        raise PreflightError(f"model {type(model).__name__}", found, "use one device: strategy.type=single")
    placed = {name: device for name, device in wanted.items() if name in modules}
    for name, module in modules.items():
        has_tensors = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if has_tensors and _place_of(name, placed) is None:
            placed[name] = wanted[known.embedding]
    return placed


def to_train(model: Any, plan: Plan, placed: Places) -> Any:
    """The model, adapter and all, made ready: layers computed again where the plan says so, and connected over its devices."""
    if plan.gradient_checkpointing:
        _checkpoint_layers(model, plan)
    if len(placed) > 1:
        _hand_over(model, plan)
    return connect(model, placed)


def connect(model: Any, placed: Places) -> Any:
    """Have accelerate move what goes from one device to the next; the same model.

    Args:
        placed: a module on the CPU is fetched to the first device each time it computes.
    """
    if len(placed) == 1:
        return model
    base = without_adapter(model)
    main = next(device for device in placed.values() if device.type != "cpu")
    keys = getattr(base, "_skip_keys_device_placement", None) or []
    stays = ["logits", *([keys] if isinstance(keys, str) else keys)]
    fetched = {type(base.get_submodule(name)).__name__ for name, device in placed.items() if device.type == "cpu"}
    # A layer is fetched as a whole: adapters take weights of others.
    dispatch_model(
        base, dict(placed), main_device=main, skip_keys=stays, preload_module_classes=sorted(fetched) or None
    )
    copies = _Copies()
    for name, device in placed.items():
        if device not in (main, torch.device("cpu")):
            base.get_submodule(name).register_forward_pre_hook(copies.on(device), with_kwargs=True)
    base.register_forward_hook(copies.forget)
    return model


class _Copies:
    """One copy a device of what all layers are handed, masks and positions; accelerate would make one for every layer."""

    def __init__(self) -> None:
        self._made: dict[
            tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]
        ] = {}  # the original, too: its id stays taken

    def on(self, device: torch.device) -> Callable[..., tuple[Any, Any]]:
        """A hook that has a module's named arguments on a device."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device == device:
                return tensor
            if (id(tensor), device) not in self._made:
                self._made[id(tensor), device] = (tensor, tensor.to(device))
            return self._made[id(tensor), device][1]

        return lambda module, args, named: (args, recursively_apply(copy, named))

    def forget(self, *_: Any) -> None:
        """The model's forward pass is over."""
        self._made.clear()


def disconnect(model: Any) -> Any:
    """Undo what from_pretrained has connected; modules that were to be fetched each time are ordinary ones on the CPU again."""
    remove_hook_from_submodules(model)
    model.__dict__.pop("hf_device_map", None)
    return model


def _checkpoint_layers(model: Any, plan: Plan) -> None:
    """Have those layers computed again in the backward pass whose stages the plan says so of."""
    base = without_adapter(model)
    # transformers 5.17 has the old name only.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": plan.recipe.model.quantization == "int8"})  # see training_arguments
    for stage in plan.stages:
        for layer in range(stage.first, stage.stop) if not stage.recompute else ():
            base.get_submodule(f"{family(plan.shape.family).layers}.{layer}").gradient_checkpointing = False


def _hand_over(model: Any, plan: Plan) -> None:
    """Have the last layer of each stage put its output where the next stage is.

    Before transformers 5.23 a layer's hooks ran inside of what checkpointing repeats. What it keeps as the layer's input has to lie on
    the layer's own device: it is that device's random numbers that are repeated.
    """
    base, devices = without_adapter(model), stage_devices(plan)
    for stage, device in zip(plan.stages, devices[1:], strict=False):
        if stage.stop > stage.first:
            layer = base.get_submodule(f"{family(plan.shape.family).layers}.{stage.stop - 1}")
            layer.register_forward_hook(lambda _, given, output, to=device: _moved(output, to))


def _moved(output: Any, device: torch.device) -> Any:
    """A layer's output with its first tensor, the hidden states, on a device."""
    if isinstance(output, tuple):
        return (send_to_device(output[0], device), *output[1:])
    return send_to_device(output, device)


def without_adapter(model: Any) -> Any:
    """The transformers model, in which PEFT has put the adapter's layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def what_is_wrong(model: Any, plan: Plan, wrapped: Any) -> str | None:
    """What keeps the model from being spread as planned: the first parameter that lies elsewhere, or a copy of it all on each device."""
    if isinstance(wrapped, torch.nn.DataParallel):
        return "the model is wrapped into DataParallel, which copies it to every device"
    known, devices = family(plan.shape.family), stage_devices(plan)
    layer_of = {f"{known.layers}.{layer}": at for at, s in enumerate(plan.stages) for layer in range(s.first, s.stop)}
    ends = {known.norm: "head", known.head: "head"}
    for name, parameter in model.named_parameters():
        above = list(_above(name.removeprefix(_PEFT_PREFIX)))
        at = next((layer_of[module] for module in above if module in layer_of), None)
        if at is None:
            end = next((ends[module] for module in above if module in ends), "embedding")
            at = next(place for place, stage in enumerate(plan.stages) if getattr(stage, end))
        if parameter.device != devices[at]:
            return f"{name} lies on {parameter.device}, planned is {devices[at]}"
    return None


def write_rng(folder: Path, devices: Sequence[torch.device]) -> None:
    """The random states of all devices; the Trainer keeps that of the current one alone."""
    if len(devices) > 1:
        states = [torch.get_device_module(device).get_rng_state(device) for device in devices]
        torch.save(states, folder / _RNG_FILE)


def read_rng(folder: Path, devices: Sequence[torch.device]) -> None:
    """Put them back, where the checkpoint is one of several devices."""
    file = folder / _RNG_FILE
    if len(devices) > 1 and file.is_file():
        for device, state in zip(devices, torch.load(file, weights_only=True), strict=False):
            torch.get_device_module(device).set_rng_state(state, device)


def _place_of(name: str, placed: Places) -> torch.device | None:
    """The device of a module or parameter: that of the innermost module around it that is placed."""
    return next((placed[above] for above in _above(name) if above in placed), None)


def _above(name: str) -> Iterator[str]:
    """The name, then those of the modules around it from the inside out."""
    while name:
        yield name
        name = name.rpartition(".")[0]
