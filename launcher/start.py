"""A recipe's name and flags in; a plan, and a run that was carried out to its end. What the verbs of `cli` share."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.recipe import LoadedRecipe
    from launcher.rundir import RunDir


@dataclass(frozen=True)
class Where:
    """The flags that say on which devices: see `cli` for their meaning."""

    nproc: int | None = None
    hostfile: str | None = None


def plan_recipe(
    recipe: str, overrides: Sequence[str], where: Where, name: str | None = None
) -> tuple[LoadedRecipe, Plan]:
    """Recipe file and overrides -> checked recipe -> plan."""
    from launcher.cluster import resolve_cluster
    from launcher.modelshape import shape_of
    from launcher.plan import make_plan, read_given
    from launcher.recipe import find_recipe, load_recipe
    from launcher.remotecode import planned_code

    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides)
    with loaded.locating():
        cluster = resolve_cluster(loaded.recipe.hardware, where.nproc, where.hostfile)
        shape = shape_of(loaded.recipe.model, loaded.document.folder)
        model, code = loaded.recipe.model, None
        if shape.native is None:  # nothing of the code of a converted model is executed
            model, code = planned_code(model, loaded.document.folder, path, shape.remote_code)
        resolved = loaded.recipe.model_copy(update={"model": model})
        given = loaded.recipe.strategy.deepspeed
        deepspeed = read_given(given) if given is not None else None
        return loaded, make_plan(name or loaded.name, resolved, cluster, shape, code, deepspeed)


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


def carry_out(resuming: bool, made: Plan, where: RunDir) -> NoReturn:
    """Check, write the run directory, supervise, say how it ended; never returns."""
    from launcher import manifest, preflight, show
    from launcher.supervise import Supervisor, continue_from, kept_where_refused, write_run

    screen = show.console()
    show.line(screen, made.name, show.summary(made))
    show.line(screen, "plan", show.batch(made))
    preflight.require(preflight.check(made, where.path))
    if made.recipe.launch.run_dir is None and not resuming:
        where = where.claimed()
    where.create()
    with where.locked():
        if resuming:
            chosen, skipped = manifest.newest_valid(where)
            show.show_resume(screen, chosen, skipped, where.path)
            made = continue_from(made, chosen)
        screen_of_run = show.RunScreen(screen, made)
        with kept_where_refused(where), contextlib.closing(screen_of_run):
            write_run(made, where, resuming)
            outcome = Supervisor(made, where, screen_of_run).carry_out()
        if outcome.failure is None:
            show.show_done(screen, made, outcome, where.path)
        else:
            newest, _ = manifest.newest_valid(where)
            show.show_failure(
                show.console(stderr=True), outcome.failure, where.path, newest.folder.name if newest else None
            )
    sys.exit(outcome.exit_code)
