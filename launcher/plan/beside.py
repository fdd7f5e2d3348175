"""What a device map is shown beside: the schedule that was not taken, or why it cannot be, and each device alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.cluster import MIB, Device
from launcher.memory import estimate
from launcher.placement import Schedule
from launcher.plan.mapped import enough_micro_batches, not_pipelined, uncertain
from launcher.plan.searching import Candidate, Choice, Option, Question, choose
from launcher.steptime import StepTime


def beside(question: Question, choice: Choice, options: Sequence[Option], sizes: Sequence[int]) -> Choice:
    """The same choice with what it has to show itself against.

    Args:
        options: that were open.
        sizes: micro batches that are.
    """
    other: Schedule = "naive" if choice.chosen.option.schedule == "pipelined" else "pipelined"
    found = choice.others
    if not any(candidate.option.schedule == other for candidate in found):
        found = (*found, _at_its_best(question, other, options, sizes))
    return replace(choice, others=(*found, *_alone(question, sizes)))


def _at_its_best(question: Question, schedule: Schedule, options: Sequence[Option], sizes: Sequence[int]) -> Candidate:
    """The best way of a schedule that no option that fits has."""
    reason, of_it = None, sizes
    if schedule == "pipelined":
        reason = not_pipelined(question.recipe, question.shape, question.cluster) or uncertain(question.shape)
        of_it, problem = enough_micro_batches(question.recipe, question.cluster, question.device_map, sizes)
        if reason is None and problem is not None:
            reason = problem.message.partition(". Set ")[0]
    modes = list(dict.fromkeys(option.gradient_checkpointing for option in options)) or [None]
    if reason is None and not any(option.schedule == schedule for option in options):
        best = choose(question, [Option("device_map", again, size, schedule) for again in modes for size in of_it])
        if best.chosen.fits:
            return best.chosen
    option = Option("device_map", modes[0], min(of_it or sizes), schedule)
    return Candidate(option, estimate(question.request(option)), _NO_TIME, False, because=reason or "it does not fit")


_NO_TIME = StepTime(forward_s=0, backward_s=0, recompute_s=0, optimizer_s=0, communication_s=0, tokens=1, basis="")


def _alone(question: Question, sizes: Sequence[int]) -> list[Candidate]:
    """The best way on each kind of device by itself."""
    found = []
    for device in {_typed(device): device for device in question.cluster.devices}.values():
        node = question.cluster.nodes[0].model_copy(update={"devices": (device,)})
        one = replace(question, cluster=question.cluster.model_copy(update={"nodes": (node,)}), device_map=None)
        options = [Option("single", checkpointing, size) for checkpointing in (False, True) for size in sizes]
        found.append(replace(choose(one, options).chosen, device=_typed(device)))
    return found


def _typed(device: Device) -> str:
    """A device as `hardware` of a recipe names it."""
    return f"{device.name} reserved={device.reserved_bytes / MIB:.0f}MiB" if device.reserved_bytes else device.name
