"""What only a device map has to be asked: its ranges, whether the model can be cut into stages, how its micro batches flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from launcher.cluster import Cluster
from launcher.errors import Problem
from launcher.families import family
from launcher.modelshape import ModelShape
from launcher.pipeline import in_flight
from launcher.placement import Schedule
from launcher.plan.model import Decision
from launcher.plan.searching import FREE_SHARE, Candidate, Choice, Question
from launcher.recipe import Recipe
from launcher.recipe.device_maps import DeviceMap


def range_problems(device_map: DeviceMap | None, cluster: Cluster, shape: ModelShape) -> Iterator[Problem]:
    """Layers that are placed by hand have to be those of this model, on devices that there are. Keys are those of the device map."""
    ranges = device_map.ranges() if device_map is not None else None
    if not ranges:
        return
    num, last = len(ranges), ranges[-1][1]
    if last != shape.num_layers - 1:
        found = f"places layers 0 to {last}, {shape.name} has {shape.num_layers} layers"
        yield Problem("placement", f"{found}. End with {shape.num_layers - 1}, or set placement: auto")
    if num > cluster.num_devices:
        found = f"has ranges for {num} devices, there are {cluster.num_devices}"
        yield Problem("placement", f"{found}. Leave ranges out, or set placement: auto")


# Unlike devices, and sets of them, that a placement is searched among.
_MOST_KINDS = 10
_BETTER = 0.99  # of the time: less is no difference
_MOST_SETS = 2**_MOST_KINDS


def map_problems(
    recipe: Recipe, device_map: DeviceMap | None, cluster: Cluster, shape: ModelShape, strategies: Sequence[str]
) -> Iterator[Problem]:
    """What keeps a model from being spread over these devices at all."""
    yield from range_problems(device_map, cluster, shape)
    if strategies != ["device_map"]:
        return
    if cluster.num_nodes > 1:
        found = f"a device map spreads a model over the devices of one machine, there are {cluster.num_nodes}"
        to_type = "strategy.type=fsdp" + " strategy.device_map=null" * (recipe.strategy.device_map is not None)
        yield Problem("strategy.type", f"{found}. Leave --hostfile out, or set {to_type}")
    kinds = Counter((device.name, device.memory_bytes, device.reserved_bytes) for device in cluster.devices)
    by_hand = device_map is not None and device_map.ranges() is not None
    if not by_hand and prod(num + 1 for num in kinds.values()) > _MOST_SETS:
        found = f"{len(kinds)} kinds of devices are more than a placement can be searched for"
        yield Problem("devices", f"{found}. Write ranges under placement, or name at most {_MOST_KINDS} unlike devices")
    asked, order = asked_schedule(recipe, device_map), recipe.strategy.pipeline
    if order != "auto" and asked == "naive" and recipe.strategy.schedule == "auto":
        found = f"{order} is an order of pipelined stages, the device map says schedule: naive"
        yield Problem("strategy.pipeline", f"{found}. Set strategy.schedule=pipelined, or remove it")


def asked_schedule(recipe: Recipe, device_map: DeviceMap | None) -> str:
    """What the recipe says, or where it leaves that open its device map; else auto."""
    asked = recipe.strategy.schedule
    return device_map.schedule if asked == "auto" and device_map is not None else asked


def not_pipelined(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> str | None:
    """What keeps this model on these devices from being a pipeline; None where nothing does."""
    if cluster.num_devices == 1:
        return "a pipeline has two stages or more, and there is one device"
    if shape.remote_code:
        return f"the code that comes with {shape.name} cannot be cut into stages"
    if shape.tie_word_embeddings:
        return f"embedding and head of {shape.name} are one matrix, which cannot lie on the first stage and on the last"
    if recipe.model.quantization != "none":
        return f"weights stored in {recipe.model.quantization} are not cut into stages"
    if recipe.adapter.type == "adalora":
        return "adalora shares its ranks out over all layers, of which a stage has some"
    if recipe.launch.backend == "python":
        return "launch.backend=python starts one process, and a pipeline has one for each stage"
    if recipe.data.questions:
        return "data.questions are answered by a rank that holds the whole model"
    return None


def uncertain(shape: ModelShape) -> str | None:
    """What keeps `auto` from a pipeline: only prepare's trial of a small copy tells whether layers hand on hidden states alone."""
    if shape.family == "unknown" or family(shape.family).layout == "bloom":
        return f"whether {shape.name} can be cut into stages shows when that is tried: strategy.schedule=pipelined"
    return None


def schedules(recipe: Recipe, shape: ModelShape, cluster: Cluster, device_map: DeviceMap | None) -> list[Schedule]:
    """The schedules that are open."""
    asked = asked_schedule(recipe, device_map)
    if asked == "naive" or (asked == "auto" and (not_pipelined(recipe, shape, cluster) or uncertain(shape))):
        return ["naive"]
    return ["pipelined"] if asked == "pipelined" else ["naive", "pipelined"]


def enough_micro_batches(
    recipe: Recipe, cluster: Cluster, device_map: DeviceMap | None, sizes: Sequence[int]
) -> tuple[list[int], Problem | None]:
    """The sizes of a micro batch that give every stage of a pipeline work; what to change where none does."""
    rows, ranges = recipe.train.global_batch, device_map.ranges() if device_map is not None else None
    least = len(ranges) if ranges else 2  # devices for which there is no micro batch are left out
    enough = [size for size in sizes if rows // size >= least]
    if enough or not sizes:
        return enough, None
    key = "train.global_batch" if recipe.train.micro_batch == "auto" else "train.micro_batch"
    found = f"a global batch of {rows} holds {rows // min(sizes)} of micro batch {min(sizes)}"
    smaller = [size for size in range(rows // least, 0, -1) if rows % size == 0]
    remedies = [f"train.micro_batch={smaller[0]}"] if smaller and recipe.train.micro_batch != "auto" else []
    remedies += [f"train.global_batch={least * min(sizes)}", "strategy.schedule=naive"]
    over = f"over {least} devices" if ranges or cluster.num_devices == 2 else "of two stages"
    message = f"{found}, a pipeline {over} needs {least}. Set {', '.join(remedies[:-1])} or {remedies[-1]}"
    return [], Problem(key, message)


def explanations(question: Question, choice: Choice) -> Iterator[Decision]:
    """Why this schedule and this order, and whether one device alone would do better."""
    recipe, chosen = question.recipe, choice.chosen
    option, seconds = chosen.option, chosen.time.total_s
    if option.schedule == "naive" and recipe.launch.backend != "python":
        yield Decision(
            key="launch.backend", value="python", because="one process drives all devices of a naive schedule"
        )
    if asked_schedule(recipe, question.device_map) == "auto":
        other = next((c for c in choice.others if c.option.schedule not in (None, option.schedule)), None)
        if other is None:
            because = (
                not_pipelined(recipe, question.shape, question.cluster)
                or uncertain(question.shape)
                or "it is what fits"
            )
        elif other.fits:
            because = f"{other.time.total_s / seconds:.2f} × as fast as {other.option.schedule}"
        else:
            because = f"not {other.option.schedule}: {other.because}"
        yield Decision(key="strategy.schedule", value=str(option.schedule), because=because)
    if len(chosen.stages) > 1:
        yield Decision(key="placement", value=_layers_of(chosen), because=_why_so(question, chosen))
    if option.schedule == "pipelined" and recipe.strategy.pipeline == "auto":
        micro_batches, last = question.accumulation(option), len(chosen.stages) - 1
        most = in_flight("1f1b", last, micro_batches)
        because = f"a device holds at most {most} micro batches at once; gpipe would hold all {micro_batches}"
        yield Decision(key="strategy.pipeline", value="1f1b", because=because)
    better = [c for c in choice.others if c.device is not None and c.fits and c.time.total_s < _BETTER * seconds]
    if better:
        best = min(better, key=lambda candidate: candidate.time.total_s)
        alone = f"strategy.type=single strategy.device_map=null hardware='{best.device}'"
        because = f"{seconds / best.time.total_s:.2f} × as fast by itself: {alone}"
        yield Decision(key="warning", value=f"one {best.device} is enough", because=because)


def _layers_of(chosen: Candidate) -> str:
    """`16 | 12 layers`, in the order of the stages."""
    return " | ".join(str(stage.stop - stage.first) for stage in chosen.stages) + " layers"


def _why_so(question: Question, chosen: Candidate) -> str:
    """How the layers came to lie where they do."""
    if question.device_map is not None and question.device_map.ranges() is not None:
        return "written down in the device map"
    devices = [question.cluster.devices[stage.device] for stage in chosen.stages]
    left = [
        device.memory_bytes - device.reserved_bytes - stage.memory_bytes
        for device, stage in zip(devices, chosen.stages, strict=True)
    ]
    free = all(
        spare >= FREE_SHARE * (device.memory_bytes - device.reserved_bytes)
        for device, spare in zip(devices, left, strict=True)
    )
    what = (
        f"that leaves {FREE_SHARE:.0%} of every card free"
        if free
        else "that fits; no card could be left with room to spare"
    )
    return f"the fastest {what}"


def why_micro_batches(question: Question, chosen: Candidate, sizes: Sequence[int]) -> str:
    """Why a step is cut into so many micro batches: what the stages wait, beside the next larger and smaller micro batch."""
    others = []
    for size in _beside(chosen.option.micro_batch, sizes):
        other = question.price(replace(chosen.option, micro_batch=size))
        cut = f"{question.accumulation(other.option)} of {size} rows"
        if not other.fits:
            others.append(f"{cut} do not fit")
            continue
        ratio = other.time.total_s / chosen.time.total_s
        others.append(f"{cut} wait {waiting(other):.0%} and take {ratio:.2f} × the time")
    beside = f"; {'; '.join(others)}" if others else ""
    return f"{question.accumulation(chosen.option)} micro batches, in which stages wait {waiting(chosen):.0%} of a step{beside}"


def waiting(candidate: Candidate) -> float:
    """The share of a step in which its devices have nothing to compute, their mean."""
    return sum(stage.waits for stage in candidate.stages) / max(1, len(candidate.stages))


def _beside(size: int, sizes: Sequence[int]) -> list[int]:
    """The next larger and the next smaller one."""
    larger, smaller = (min((s for s in sizes if s > size), default=0), max((s for s in sizes if s < size), default=0))
    return [found for found in (larger, smaller) if found]
