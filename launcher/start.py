"""A recipe's name and flags in; a plan, and a run that was carried out to its end. What the verbs of `cli` share."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launcher.devices import Where, chat_placement, devices_of
from launcher.errors import Problem, RecipeError, UsageError

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.recipe import LoadedRecipe
    from launcher.report import Failure
    from launcher.rundir import RunDir

__all__ = [
    "Asked",
    "Where",
    "asked",
    "attach",
    "carry_out",
    "chat_placement",
    "new_run_dir",
    "plan_recipe",
    "rehearse",
    "show_commands",
]


@dataclass(frozen=True)
class Asked:
    """What somebody has typed: a recipe's name or path, overrides, and on which devices."""

    recipe: str
    overrides: tuple[str, ...] = ()
    where: Where = field(default_factory=Where)

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

    if recipe is not None and "=" in recipe and not Path(recipe).is_file():  # the first override
        overrides, recipe = (recipe, *overrides), None
    found = load_device_map(where.device_map)
    path, own = found.path, found.device_map.recipe
    if recipe is None and own is None:
        to_type = f"name one of `launch recipes`: launch RECIPE --device-map {where.device_map}"
        raise UsageError(f"--device-map {where.device_map}", "it names no recipe of its own", to_type)
    if recipe is None and not (path.parent / str(own)).is_file():
        with found.locating():
            raise RecipeError(
                [Problem("recipe", f"there is no {path.parent / str(own)}. It counts from this file's folder")]
            )
    spread = ("strategy.type=device_map", f"strategy.device_map={path.resolve()}")
    return Asked(recipe or str(path.parent / str(own)), (*spread, *overrides), where)


def plan_recipe(asked: Asked, before: RunDir | None = None) -> tuple[LoadedRecipe, Plan]:
    """Recipe file and overrides -> checked recipe -> plan.

    Args:
        before: the run that is gone on with: it keeps its name, its device map, and its hosts where it had several and none are asked for.
    """
    from launcher.modelshape import shape_of
    from launcher.plan import make_plan, read_given
    from launcher.recipe import find_recipe, load_recipe
    from launcher.remotecode import planned_code

    path = find_recipe(asked.recipe)
    loaded = load_recipe(path, asked.overrides)
    with loaded.locating():
        on = devices_of(loaded, asked.where, before)
        with on.locating():
            shape = shape_of(loaded.recipe.model, loaded.document.folder)
            model, code = loaded.recipe.model, None
            if shape.native is None:  # nothing of the code of a converted model is executed
                model, code = planned_code(model, loaded.document.folder, path, shape.remote_code, shape.not_native)
            resolved = loaded.recipe.model_copy(update={"model": model, "hardware": on.hardware})
            given = loaded.recipe.strategy.deepspeed
            deepspeed = read_given(given) if given is not None else None
            name = name_of(before) if before is not None else loaded.name
            plan = make_plan(name, resolved, on.cluster, shape, code, on.device_map, deepspeed)
            return loaded, plan.model_copy(update={"decisions": (*on.decisions, *plan.decisions)})


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
