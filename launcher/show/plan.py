"""A plan in, what a person reads of it out: where every byte and second goes, why, and what else was possible."""

from __future__ import annotations

import json

from rich.console import Console

from launcher.cluster import GIB, named
from launcher.errors import DoesNotFitError, counted
from launcher.plan import Alternative, ChatPlan, Plan, StagePlan, budget_bytes, chat_plan
from launcher.remotecode import RemoteCode, Trusted
from launcher.show.lines import as_typed, count, gib, line

_BAR = 24
_MOST_OTHERS = 6


def summary(plan: Plan) -> str:
    """Model, adapter and devices in one line."""
    adapter = plan.recipe.adapter
    targets = plan.targets if isinstance(plan.targets, str) else ",".join(plan.targets)
    how = "full" if adapter.type == "full" else f"{adapter.type} r={adapter.r} on {targets}"
    transport = f" over {'nccl' if plan.kind == 'cuda' else 'gloo'}" if plan.num_processes > 1 else ""
    base = f"{plan.shape.name} {count(plan.shape.num_parameters)}, {plan.dtype}"
    stored = "" if plan.recipe.model.quantization == "none" else f" ({plan.recipe.model.quantization} base)"
    how_spread = " ".join(filter(None, (plan.strategy, plan.schedule, plan.pipeline)))
    return f"{base}{stored} · {how} ({count(plan.trainable_parameters)} trained) · {plan.cluster.named}, {how_spread}{transport}"


def batch(plan: Plan) -> str:
    """How a step is made up, and how much memory it takes."""
    ranks = f"{counted(plan.num_processes, 'rank')} × accumulation {plan.accumulation}"
    if plan.pipeline is not None:
        ranks = f"{plan.accumulation} through {counted(len(plan.stages), 'stage')}"
    each, room = f"on {counted(plan.cluster.num_devices, 'device')}", budget_bytes(plan.strategy, plan.cluster)
    if plan.strategy != "device_map":
        device = plan.cluster.devices[plan.tightest]
        room = device.memory_bytes - device.reserved_bytes
        each = f"on {device.name}" if plan.shares else "a device"
    return (
        f"micro batch {plan.micro_batch}{' on average' if plan.shares else ''} × {ranks} = {plan.global_batch} rows a step · "
        f"{gib(plan.memory.total_bytes)} of {gib(room)} GiB {each}"
    )


def show_plan(screen: Console, plan: Plan) -> None:
    """The whole plan: what, where every byte goes, and why each decision was made."""
    line(screen, plan.name, summary(plan))
    line(screen, "step", batch(plan))
    data = plan.recipe.data
    paths = data.path if isinstance(data.path, str) else ", ".join(data.path)
    line(
        screen,
        "data",
        f"{as_typed(paths)} ({data.format}), at most {data.max_length:,} tokens, {data.overlong}, {plan.batching}"
        f"{', streamed' if data.streaming else ''}",
    )
    train = plan.recipe.train
    epochs = f"{train.epochs:g} epoch{'' if train.epochs == 1 else 's'}"
    length = counted(train.max_steps, "step") if train.max_steps else epochs
    how = f"lr {train.lr:g} {train.schedule}, {train.optimizer}, seed {train.seed}"
    line(screen, "train", f"{length}, {how}{', compiled' if train.compile else ''}")
    if plan.deepspeed is not None:
        line(screen, "deepspeed", json.dumps(plan.deepspeed))
    show_stages(screen, plan)
    if plan.stages:
        line(screen, "waiting", _waiting(plan))
    else:
        line(screen, "memory", _memory_bar(plan))
    line(screen, "time", _step_time(plan))
    for place, other in enumerate(plan.alternatives[1 : 1 + _MOST_OTHERS]):
        line(screen, "instead" if place == 0 else "", _alternative(plan, other))
    if plan.stages and plan.kind == "cuda":
        try:
            show_chat(screen, chat_plan(plan, plan.cluster, plan.device_map))
        except DoesNotFitError as error:
            line(screen, "chat", f"{error.found}; launch chat RUN would need {error.to_type}")
    for place, decision in enumerate(plan.decisions):
        line(screen, "why" if place == 0 else "", f"{decision.key} = {decision.value}: {decision.because}")
    line(screen, "model", f"shape from {as_typed(plan.shape.source)}")
    if plan.code is not None:
        show_code(screen, plan.code)


def show_stages(screen: Console, plan: Plan) -> None:
    """The devices of a device map, in the order of the layers; nothing of another plan."""
    for place, stage in enumerate(plan.stages):
        line(screen, "layers" if place == 0 else "", _stage(plan, stage))


def show_chat(screen: Console, chat: ChatPlan) -> None:
    """Where a trained model lies to talk to it, and how much can be said."""
    where = " · ".join(_chat_stage(chat, stage) for stage in chat.stages)
    line(screen, "chat", where)
    most = f", for {chat.longest:,} at most" if chat.longest > chat.context else ""
    room = f"{gib(chat.cache_bytes)} GiB for {chat.context:,} tokens of question and answer{most}"
    speed = f"{chat.tokens_per_second:,.0f}" if chat.tokens_per_second >= 10 else f"{chat.tokens_per_second:.2g}"
    fetched = f"; layers 0–{chat.in_host - 1} in host memory ({gib(chat.host_bytes)} GiB), fetched for each token"
    line(screen, "", f"cache {room}; about {speed} tokens/s{fetched if chat.in_host else ''}")


def _chat_stage(chat: ChatPlan, stage: StagePlan) -> str:
    """A device: what lies on it, how full it is."""
    device = chat.cluster.devices[stage.device]
    free = device.memory_bytes - device.reserved_bytes
    return f"{device.name} {', '.join(_parts(stage))} {gib(stage.memory_bytes)} of {gib(free)} GiB"


def _parts(stage: StagePlan) -> list[str]:
    """What of the model lies on a device."""
    num = stage.stop - stage.first
    layers = f"layers {stage.first}–{stage.stop - 1}" if num > 1 else f"layer {stage.first}" if num else "no layer"
    return [*(["embedding"] if stage.embedding else []), layers, *(["norm, head"] if stage.head else [])]


def show_code(screen: Console, code: RemoteCode, executed: bool = True) -> None:
    """The model's own files that are executed, each with its checksum."""
    pinned = f"pinned by {code.pinned_by}" if code.pinned_by else "nothing pins it: launch trust RECIPE"
    line(
        screen, "code", f"comes with the model{' and is executed' if executed else ''}; sha256 {code.sha256}, {pinned}"
    )
    for file in code.files:
        line(screen, "", f"{file.sha256}  {file.name}, {file.num_bytes:,} bytes")


def show_trust(screen: Console, trusted: Trusted) -> None:
    """What was pinned, what deserves a look in it, and what changed since it was pinned before."""
    if trusted.converted is not None:
        line(screen, "converted", f"the model is trained as {trusted.converted}: none of the files below is executed")
    show_code(screen, trusted.code, executed=trusted.converted is None)
    found = trusted.remarks
    for place, remark in enumerate(found):
        line(screen, "look at" if place == 0 else "", f"{remark.file}:{remark.line}  {remark.what}: {remark.why}")
    if not found:
        line(
            screen,
            "look at",
            "nothing stands out: no exec, no programs, no network, no files written (by syntax; read it all the same)",
        )
    for place, text in enumerate(trusted.changes):
        line(screen, "changed" if place == 0 else "", text)
    line(screen, "lock", f"wrote {as_typed(str(trusted.lock.resolve()))}; other code is refused from now on")
    if not trusted.asked_for and trusted.converted is None:
        line(
            screen, "", "the recipe does not allow it to be executed yet; if you trust it: model.trust_remote_code=true"
        )


def _step_time(plan: Plan) -> str:
    """Seconds of a step with every row at its longest, where they go, and how sure that is."""
    parts = "  ".join(
        f"{name} {value:.3g}" for name, value in plan.time.parts().items() if value >= plan.time.total_s / 200
    )
    return (
        f"{plan.time.total_s:.3g} s a step of {plan.time.tokens:,} tokens, {plan.time.tokens_per_second:,.0f} tokens/s"
        f"  ({parts}; {plan.time.basis})"
    )


def _alternative(plan: Plan, other: Alternative) -> str:
    """A way that was not taken, with its figures."""
    alone = (other.device or "").partition(" reserved=")[0]
    name = f"one {alone} alone" if other.device else other.schedule or other.strategy
    how = f"{name}{', checkpointing' if other.gradient_checkpointing else ''}, micro batch {other.micro_batch}"
    if other.because:
        return f"{name:<44} cannot be: {other.because}"
    cost = f"{other.step_s / plan.time.total_s:.2f} × the time" if other.fits else "does not fit"
    if plan.stages and other.fits:
        cost = f"{other.step_s:.3g} s a step, {cost}"
    return f"{how:<44} {gib(other.memory_bytes):>5} GiB  {cost}"


def _stage(plan: Plan, stage: StagePlan) -> str:
    """One device of a device map: how full, which layers, how long a micro batch stays."""
    device = plan.cluster.devices[stage.device]
    bar = _bar(stage.memory_bytes, device.reserved_bytes, device.memory_bytes)
    again = ", computed again" if stage.recompute else ""
    free = device.memory_bytes - device.reserved_bytes - stage.memory_bytes
    return (
        f"{device.name:<14} {device.memory_bytes / GIB:4.1f} GiB  {bar}  {', '.join(_parts(stage))}{again}  "
        f"{gib(stage.memory_bytes)} GiB, free {gib(free)}  {stage.seconds:.3g} s a micro batch, waits {stage.waits:.0%}"
    )


def _waiting(plan: Plan) -> str:
    """How much of a step a device has nothing to compute, and why."""
    if len(plan.stages) == 1:
        return f"nothing: {plan.cluster.devices[plan.stages[0].device].name} holds the whole model"
    why = "the pipeline fills and empties, and waits for its slowest stage"
    if plan.schedule == "naive":
        why = "one device computes after the other"
    return f"{plan.waiting:.0%} of a step on average: {why}"


def _bar(used: int, reserved: int, whole: int) -> str:
    """Used, taken by others, free."""
    filled = min(_BAR, round(_BAR * used / whole))
    taken = min(_BAR - filled, round(_BAR * reserved / whole))
    return "█" * filled + "▒" * taken + "░" * (_BAR - filled - taken)


def _memory_bar(plan: Plan) -> str:
    """The fullest device and where its bytes go; under a device map all devices together."""
    devices = plan.cluster.devices
    if plan.strategy != "device_map":
        devices = (devices[plan.tightest],)
    whole = sum(device.memory_bytes for device in devices)
    bar = _bar(plan.memory.total_bytes, sum(device.reserved_bytes for device in devices), whole)
    parts = "  ".join(f"{name} {gib(value)}" for name, value in plan.memory.parts().items() if value)
    return f"{named(devices) if len(devices) > 1 else devices[0].name}  {gib(whole)} GiB  {bar}  {parts}"
