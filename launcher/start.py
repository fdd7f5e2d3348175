"""A recipe's name and flags in; a plan, and a run that was carried out to its end. What the verbs of `cli` share."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.cluster import Cluster
    from launcher.plan import ChatPlan, Plan
    from launcher.recipe import LoadedRecipe
    from launcher.report import Failure
    from launcher.rundir import RunDir

_WHAT_IS_HERE = "answer on what is here: leave --device-map out"


@dataclass(frozen=True)
class Where:
    """The flags that say on which devices: see `cli` for their meaning."""

    nproc: int | None = None
    hostfile: str | None = None
    device_map: str | None = None
    include: str | None = None
    exclude: str | None = None


@dataclass(frozen=True)
class Asked:
    """What somebody has typed: a recipe's name or path, overrides, and on which devices."""

    recipe: str
    overrides: tuple[str, ...] = ()
    where: Where = Where()

    def with_overrides(self, *more: str) -> Asked:
        """The same with further overrides, which win."""
        return replace(self, overrides=(*self.overrides, *more))


def asked(recipe: str | None, overrides: tuple[str, ...], where: Where) -> Asked:
    """What was typed; a device map stands for its overrides, and for the recipe that it names where none was typed.

    Raises:
        UsageError: there is no recipe, or no such device map.
    """
    if where.device_map is None:
        if recipe is None:
            raise UsageError("no recipe", "there is nothing to plan", "name one; list them: launch recipes")
        return Asked(recipe, overrides, where)
    from launcher.recipe.device_maps import load_device_map

    if recipe is not None and "=" in recipe:  # the first override
        overrides, recipe = (recipe, *overrides), None
    path, device_map = load_device_map(where.device_map)
    if recipe is None and device_map.recipe is None:
        to_type = f"name one: launch RECIPE --device-map {where.device_map}"
        raise UsageError(f"--device-map {where.device_map}", "it names no recipe of its own", to_type)
    spread = ("strategy.type=device_map", f"strategy.device_map={path.resolve()}")
    return Asked(recipe or str(path.parent / str(device_map.recipe)), (*spread, *overrides), where)


def plan_recipe(asked: Asked, before: RunDir | None = None) -> tuple[LoadedRecipe, Plan]:
    """Recipe file and overrides -> checked recipe -> plan.

    Args:
        before: the run that is gone on with: it keeps its name, and its hosts where it had several and none are asked for.
    """
    from launcher.cluster import on_this_machine, resolve_cluster
    from launcher.modelshape import shape_of
    from launcher.plan import make_plan, read_given
    from launcher.recipe import find_recipe, load_recipe
    from launcher.recipe.device_maps import load_device_map
    from launcher.remotecode import planned_code

    where, path = asked.where, find_recipe(asked.recipe)
    loaded = load_recipe(path, asked.overrides)
    with loaded.locating():
        hardware, device_map = loaded.recipe.hardware, None
        if loaded.recipe.strategy.device_map is not None:
            _, device_map = load_device_map(loaded.recipe.strategy.device_map)
            # The devices of the map, unless somebody asks for others on the command line.
            if "hardware" not in loaded.document.from_command_line:
                hardware = device_map.devices
        cluster = None
        if before is not None and where == Where() and "hardware" not in loaded.document.from_command_line:
            cluster = hosts_of(before)
        if cluster is None:
            cluster = resolve_cluster(hardware, where.nproc, where.hostfile, where.include, where.exclude)
        if device_map is not None and cluster.num_nodes == 1:
            cluster = on_this_machine(cluster)
        shape = shape_of(loaded.recipe.model, loaded.document.folder)
        model, code = loaded.recipe.model, None
        if shape.native is None:  # nothing of the code of a converted model is executed
            model, code = planned_code(model, loaded.document.folder, path, shape.remote_code, shape.not_native)
        resolved = loaded.recipe.model_copy(update={"model": model})
        given = loaded.recipe.strategy.deepspeed
        deepspeed = read_given(given) if given is not None else None
        name = name_of(before) if before is not None else loaded.name
        return loaded, make_plan(name, resolved, cluster, shape, code, device_map, deepspeed)


def hosts_of(run: RunDir) -> Cluster | None:
    """The hosts of a run that had a hostfile; None where it had none, and where its plan cannot be read any more."""
    from launcher.cluster import Cluster
    from launcher.rundir import read_json

    before = (read_json(run.plan) or {}).get("cluster") or {}
    with contextlib.suppress(ValueError):  # written by another version
        cluster = Cluster.model_validate(before)
        return cluster if cluster.nodes[0].where else None
    return None


def chat_placement(where: RunDir, named: str | None, context: int | None) -> ChatPlan | None:
    """Where the layers of a run lie to talk to it: on a device map's cards, or those of the map that it was trained with, where they are
    here. None without either.

    Raises:
        UsageError: there is no such device map, or no map at all for a context.
        DoesNotFitError: the model does not fit on it.
        PreflightError: its cards are not here, or the host has too little memory for what is kept in it.
    """
    from launcher import preflight, show
    from launcher.cluster import found_on_this_machine, on_this_machine, resolve_cluster
    from launcher.plan import CONTEXT_TOKENS, chat_plan, read_plan
    from launcher.recipe.device_maps import load_device_map

    plan = read_plan(where)
    device_map = load_device_map(named)[1] if named is not None else plan.device_map
    if device_map is None or (named is None and plan.kind == "cpu"):
        if context is not None:
            raise UsageError(
                f"--context {context}", "is room that a device map is planned with", "add --device-map NAME"
            )
        return None
    cluster = on_this_machine(resolve_cluster(device_map.devices))
    screen = show.console(stderr=True)
    chat = chat_plan(plan, cluster, device_map, context or CONTEXT_TOKENS)
    show.show_chat(screen, chat)
    needs = [(stage.device, stage.memory_bytes) for stage in chat.stages]
    findings = [
        *preflight.placed_cards(cluster, needs, found_on_this_machine(), _WHAT_IS_HERE),
        *preflight.room_in_host(chat.host_bytes),
    ]
    if named is None and any(finding.level == "error" for finding in findings):
        show.line(screen, "", f"{findings[0].found}: answers come from what is here")
        return None
    preflight.require(findings)
    return chat


def new_run_dir(loaded: LoadedRecipe) -> RunDir:
    """launch.run_dir, or runs/<recipe>-<time>."""
    from launcher.rundir import RunDir

    asked = loaded.recipe.launch.run_dir
    if asked is not None:
        return RunDir(Path(asked))
    base = Path.cwd() / "runs" / f"{loaded.name}-{time.strftime('%m%d-%H%M%S')}"
    return RunDir(base)


def name_of(where: RunDir) -> str:
    """The recipe's name that a run was started with."""
    from launcher.rundir import read_json

    return str((read_json(where.plan) or {}).get("name", where.path.name))


def rehearse(asked: Asked) -> NoReturn:
    """A recipe with a small model on this machine's CPU: a step, a checkpoint, a resume, a second step, an export; never returns."""
    from launcher import show
    from launcher.foreground import run_in_foreground
    from launcher.rehearsal import one_more_step, rehearsal_of
    from launcher.rundir import RunDir

    loaded, made = plan_recipe(asked)
    screen, where = show.console(), new_run_dir(loaded)
    show.line(screen, made.name, show.summary(made))
    if loaded.recipe.launch.run_dir is None:
        where = RunDir(where.path.with_name(f"{where.path.name}-rehearsal")).claimed()
    where.create()
    small = rehearsal_of(made, where)
    show.show_rehearsal(screen, small)
    started = time.monotonic()
    code = carried_out(False, small, where) or carried_out(True, one_more_step(small), where)
    code = code or run_in_foreground("export", where, {})
    if code == 0:
        show.show_rehearsed(screen, small, time.monotonic() - started, where.path)
    sys.exit(code)


def show_commands(plan: Plan, where: RunDir) -> None:
    """Print what would be started, each on its host, as lines that a shell runs the same way."""
    from launcher.command import by_agents, node_commands, prepare_command

    several = by_agents(plan)
    print(*(["# here, and then on every other host"] if several else []), prepare_command(plan, where), sep="\n")
    for command in node_commands(plan, where):
        print(*([f"# on {command.host}"] if several else []), command, sep="\n")


def carry_out(resuming: bool, made: Plan, where: RunDir, detach: bool = False) -> NoReturn:
    """Carry a plan out, and end with its exit code."""
    sys.exit(carried_out(resuming, made, where, detach))


def carried_out(resuming: bool, made: Plan, where: RunDir, detach: bool = False) -> int:
    """Check, make the run directory, supervise, say how it ended; the exit code.

    Args:
        detach: go on without this terminal; 0 then says that the run has begun.
    """
    from launcher import preflight, show
    from launcher.background import detached

    screen = show.console()
    show.line(screen, made.name, show.summary(made))
    show.line(screen, "plan", show.batch(made))
    show.show_stages(screen, made)
    findings = preflight.check(made, where.path)
    preflight.require(findings)
    show.show_findings(screen, [finding for finding in findings if finding.level == "warning"])
    if made.recipe.launch.run_dir is None and not resuming:
        where = where.claimed()
    where.create()
    if not detach:
        return _supervised(resuming, made, where)
    pid, code = detached(where.launcher_log, functools.partial(_supervised, resuming, made, where))
    if code == 0:
        show.show_detached(screen, pid, where.path)
    return code


def _supervised(resuming: bool, made: Plan, where: RunDir, begun: Callable[[], None] = lambda: None) -> int:
    """Write the run directory, supervise, say how it ended; the exit code.

    Args:
        begun: called when everything is written down and ranks are next.
    """
    from launcher import manifest, show
    from launcher.plan import identity
    from launcher.restarts import carry_out as carry_out_with_restarts
    from launcher.supervise import continue_from, kept_where_refused, write_run

    screen = show.console()
    with where.locked():
        if resuming:
            chosen, skipped = manifest.newest_valid(where, identity(made))
            show.show_resume(screen, chosen, skipped, where.path)
            made = continue_from(made, chosen)
            show.show_changes(screen, made)
        screen_of_run = show.RunScreen(screen, made)
        with kept_where_refused(where), contextlib.closing(screen_of_run):
            write_run(made, where, resuming)
            begun()
            outcome = carry_out_with_restarts(made, where, screen_of_run)
        if outcome.failure is None:
            show.show_done(screen, made, outcome.story, where.path)
        else:
            show_failure(where, outcome.failure, stderr=True)
    return outcome.exit_code


def show_failure(where: RunDir, failure: Failure, stderr: bool) -> None:
    """Say what failed, and which checkpoint is the newest."""
    from launcher import manifest, show

    newest = manifest.newest_whole(where)
    show.show_failure(show.console(stderr), failure, where.path, newest.name if newest else None)


def attach(where: RunDir, typed: str) -> int:
    """Show a run that is being trained until it ends, as its own launcher shows it; its exit code.

    Raises:
        UsageError: nobody works there.
    """
    from launcher import manifest, show
    from launcher.plan import read_plan
    from launcher.watching import follow, story

    if where.owner() is None:
        raise UsageError(f"attach {typed}", "no launcher works there", f"see how it ended: launch report {typed}")
    made, screen = read_plan(where), show.console()
    show.line(screen, made.name, show.summary(made))
    screen_of_run = show.RunScreen(screen, made)
    try:
        with contextlib.closing(screen_of_run):
            follow(where, screen_of_run)
    except KeyboardInterrupt:
        show.show_left(screen, where.path)
        return 0
    told = story(where)
    if told is None:
        raise UsageError(
            f"attach {typed}", "its launcher ended without a word", f"go on with it: launch resume {typed}"
        )
    numbers, failure, exit_code = told
    if failure is not None:
        show_failure(where, failure, stderr=True)
    elif exit_code:
        show.show_stopped(screen, where.path, manifest.folders(where))
    else:
        show.show_done(screen, made, numbers, where.path)
    return exit_code
