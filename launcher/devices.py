"""Recipe and flags in; the devices that a plan is made for out, and those on which a trained model talks.

Who wins: `hardware=` on the command line, then the devices of a device map, then `hardware` of the recipe. A run that is gone on with
keeps its own devices and its own device map, as its plan has them, whatever has become of the files since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import Problem, RecipeError, UsageError

if TYPE_CHECKING:
    from launcher.cluster import Cluster
    from launcher.plan import ChatPlan, Decision
    from launcher.recipe import LoadedRecipe
    from launcher.recipe.device_maps import DeviceMap, LoadedMap
    from launcher.rundir import RunDir

_NOT_REHEARSED = "what is spread over cards cannot be rehearsed for a talk: to transformers a CPU is one device"


@dataclass(frozen=True)
class Where:
    """The flags that say on which devices: see `cli` for their meaning."""

    nproc: int | None = None
    hostfile: str | None = None
    device_map: str | None = None
    include: str | None = None
    exclude: str | None = None


@dataclass(frozen=True)
class Devices:
    """What a plan is made for.

    Args:
        hardware: what the recipe of the run says from here on.
        loaded: the file of the device map, where one was read.
        decisions: what is said of who has won.
    """

    cluster: Cluster
    hardware: str | tuple[str, ...]
    device_map: DeviceMap | None = None
    loaded: LoadedMap | None = None
    decisions: tuple[Decision, ...] = ()

    def locating(self) -> contextlib.AbstractContextManager[None]:
        """Give mistakes of the device map their place in its file."""
        return self.loaded.locating() if self.loaded is not None else contextlib.nullcontext()


def devices_of(loaded: LoadedRecipe, where: Where, before: RunDir | None) -> Devices:
    """The devices of a recipe with these flags.

    Raises:
        RecipeError: mistakes in the device map, or there is none of that name.
        UsageError: cards that there are not.
    """
    from launcher.cluster import cluster_of_map, on_this_machine, resolve_cluster

    recipe, typed = loaded.recipe, loaded.document.from_command_line
    named, flags = recipe.strategy.device_map, (where.nproc, where.hostfile, where.include, where.exclude)
    if before is not None and where == Where() and not typed & {"hardware", "strategy.device_map"}:
        hosts = hosts_of(before)
        if hosts is not None:
            return Devices(hosts, recipe.hardware, _map_of(before))
    if named is None:
        return Devices(resolve_cluster(recipe.hardware, *flags), recipe.hardware)
    own = _map_of(before) if before is not None and "strategy.device_map" not in typed else None
    file = None if own is not None else _load(named)
    device_map = file.device_map if file is not None else own
    assert device_map is not None
    hardware = recipe.hardware
    if file is None or "hardware" in typed:
        cluster = resolve_cluster(hardware, *flags)
    else:
        hardware, cluster = device_map.devices, cluster_of_map(file, *flags)
    if cluster.num_nodes == 1:
        cluster = on_this_machine(cluster)
    decisions = tuple(_who_has_won(loaded, device_map)) if file is not None else ()
    return Devices(cluster, hardware, device_map, file, decisions)


def _load(named: str) -> LoadedMap:
    """The device map that a recipe names."""
    from launcher.recipe.device_maps import load_device_map

    try:
        return load_device_map(named)
    except RecipeError:
        raise
    except UsageError as error:
        found = f"{error.you_set}: {error.found}. {error.to_type[0].upper()}{error.to_type[1:]}"
        raise RecipeError([Problem("strategy.device_map", found)]) from None


def _who_has_won(loaded: LoadedRecipe, device_map: DeviceMap) -> Iterator[Decision]:
    """Where recipe and device map name other devices: which are taken."""
    from launcher.plan import Decision

    named = loaded.recipe.hardware
    if _as_list(named) == device_map.devices:
        return
    of_map, of_recipe = _shown(device_map.devices), _shown(_as_list(named))
    if "hardware" in loaded.document.from_command_line:
        because = f"typed on the command line; the device map's own devices, {of_map}, are left out of account"
        yield Decision(key="hardware", value=of_recipe, because=because)
    elif named != "auto":
        because = f"the device map's, not the recipe's {of_recipe}; what is typed as hardware=… would win over both"
        yield Decision(key="hardware", value=of_map, because=because)


def _as_list(hardware: str | tuple[str, ...]) -> tuple[str, ...]:
    return (hardware,) if isinstance(hardware, str) else hardware


def _shown(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"


def hosts_of(run: RunDir) -> Cluster | None:
    """The hosts of a run that had a hostfile; None where it had none, and where its plan cannot be read any more."""
    from launcher.cluster import Cluster
    from launcher.rundir import read_json

    before = (read_json(run.plan) or {}).get("cluster") or {}
    with contextlib.suppress(ValueError):  # written by another version
        cluster = Cluster.model_validate(before)
        return cluster if cluster.nodes[0].where else None
    return None


def _map_of(run: RunDir) -> DeviceMap | None:
    """The device map of a run; None where it had none, and where its plan cannot be read any more."""
    from launcher.recipe.device_maps import DeviceMap
    from launcher.rundir import read_json

    before = (read_json(run.plan) or {}).get("device_map")
    with contextlib.suppress(ValueError):  # written by another version
        return None if before is None else DeviceMap.model_validate(before)
    return None


def chat_placement(where: RunDir, named: str | None, context: int | None, answer: int = 1) -> ChatPlan | None:
    """Where the layers of a run lie to talk to it: on a device map's cards, or those that it was trained over, where they are
    here. None without either.

    Args:
        answer: tokens that an answer may have.

    Raises:
        UsageError: there is no such device map, or no map at all for a context, or the context is longer than the model's rows may be.
        DoesNotFitError: the model does not fit on it.
        PreflightError: its cards are not here, or the host has too little memory for what is kept in it.
    """
    from launcher import preflight, show
    from launcher.cluster import cluster_of_map, found_on_this_machine, on_this_machine
    from launcher.plan import chat_plan, read_plan
    from launcher.recipe.device_maps import load_device_map

    plan = read_plan(where)
    file = load_device_map(named) if named is not None else None
    if file is None and (not plan.stages or plan.kind == "cpu" or plan.cluster.num_nodes > 1):
        if context is not None:
            raise UsageError(
                f"--context {context}", "is room that a device map is planned with", "add --device-map NAME"
            )
        return None
    cluster = on_this_machine(cluster_of_map(file) if file is not None else plan.cluster)
    if cluster.kind == "cpu":
        found = "its devices are processes on the CPU; to talk to it a model is spread over cards"
        raise UsageError(f"--device-map {named}", found, "leave --device-map out")
    screen = show.console(stderr=True)
    with file.locating() if file is not None else contextlib.nullcontext():
        chat = chat_plan(plan, cluster, file.device_map if file is not None else plan.device_map, context)
    if answer >= chat.context:
        room = f"there is room for {chat.context:,} tokens of question and answer, on these cards for {chat.longest:,} at most"
        raise UsageError(f"--max-new-tokens {answer}", room, "ask for shorter answers, or for more room with --context")
    show.show_chat(screen, chat)
    needs = [(stage.device, stage.memory_bytes) for stage in chat.stages]
    without = f"talk to it on what is here: launch chat {where.path}"
    findings = [
        *preflight.placed_cards(cluster, needs, found_on_this_machine(), f"{without}\n  {_NOT_REHEARSED}"),
        *preflight.room_in_host(chat.host_bytes),
    ]
    if named is None and any(finding.level == "error" for finding in findings):
        show.line(screen, "", f"{findings[0].found}: answers come from what is here")
        return None
    preflight.require(findings)
    return chat
