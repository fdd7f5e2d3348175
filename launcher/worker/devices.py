"""The torch devices of a plan's processes, and the most memory that was used on one.

Cards are asked for through torch.accelerator, and by their place among those that the process sees: the launcher shows it the cards
of the plan in the plan's order (`launcher.command`), under a device map those of the stages in the order of the layers.
"""

from __future__ import annotations

import contextlib
import resource

import torch

from launcher.errors import PreflightError
from launcher.plan import Plan


def card(index: int) -> torch.device:
    """The card of that place.

    Raises:
        PreflightError: torch sees none, or not so many.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = torch.accelerator.device_count() if accelerator is not None else 0
    if accelerator is None or index >= there:
        found = f"torch {torch.__version__} sees {there}"
        raise PreflightError(f"card {index}", found, "see what is wrong with cards, driver or wheel: launch doctor")
    return torch.device(accelerator.type, index)


def own_device(plan: Plan, local_rank: int) -> torch.device:
    """Where a rank computes; of a process with several cards the first, to which the rows go."""
    return card(local_rank) if plan.kind == "cuda" else torch.device("cpu")


def stage_devices(plan: Plan) -> tuple[torch.device, ...]:
    """The devices of a device map's stages, in the order of the layers. On a CPU there is only one."""
    return tuple(own_device(plan, place) for place in range(len(plan.stages)))


def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes of a card: `allocated` to tensors, `reserved` by torch's allocator, `free` for everybody. Empty for a CPU, and for a card that
    says nothing any more."""
    if device.type == "cpu":
        return {}
    with contextlib.suppress(RuntimeError, AttributeError):
        taken = torch.accelerator.memory_allocated(device), torch.accelerator.memory_reserved(device)
        free, total = torch.accelerator.get_memory_info(device)
        return {"allocated": taken[0], "reserved": taken[1], "free": free, "total": total}
    return {}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has had: what torch's allocator took of a card, on a CPU the whole process's."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_reserved(device))
