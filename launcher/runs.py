"""The verbs about runs that are there: list, look, follow, stop. Like `cli`, which has the others, nothing is decided here."""

from __future__ import annotations

import contextlib
import sys

import click

from launcher import start

run_argument = click.argument("run_dir", metavar="RUN")


@click.command()
@click.argument("folder", default="runs")
def runs(folder: str) -> None:
    """List the runs of a folder and how they stand or ended."""
    from pathlib import Path

    from launcher.rundir import RunDir
    from launcher.watching import status as status_of

    for path in sorted(Path(folder).glob("*/plan.json")):
        found = status_of(RunDir(path.parent))
        loss, _ = found.losses
        steps = f"step {found.step}/{found.max_steps}"
        click.echo(f"{path.parent}  {found.state}  {steps}{f'  loss {loss:.3f}' if loss is not None else ''}")


@click.command()
@run_argument
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def status(run_dir: str, as_json: bool) -> None:
    """Show how a run stands: step, loss, speed, time left, every rank, the newest checkpoint."""
    from launcher.plan import read_plan
    from launcher.rundir import open_run
    from launcher.show import console, show_status
    from launcher.watching import status as status_of

    where = open_run(run_dir)
    found = status_of(where)
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps(asdict(found), indent=1))
    else:
        show_status(console(), read_plan(where), found, where.path)


@click.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank's.")
def logs(run_dir: str, follow: bool, rank: int | None) -> None:
    """Print what the launcher, prepare and the ranks have written."""
    from launcher.rundir import open_run
    from launcher.watching import lines_of

    last = None
    with contextlib.suppress(KeyboardInterrupt):
        for name, text in lines_of(open_run(run_dir), rank, run_dir, follow):
            if name != last and rank is None:
                click.echo(f"{'' if last is None else chr(10)}== {name} ==")
            last = name
            click.echo(text)


@click.command()
@run_argument
def attach(run_dir: str) -> None:
    """Watch a run that is being trained, from any terminal; Ctrl-C leaves it running."""
    from launcher.rundir import open_run

    sys.exit(start.attach(open_run(run_dir), run_dir))


@click.command()
@run_argument
def report(run_dir: str) -> None:
    """Tell what a run did: phases, predicted against measured, failures."""
    from launcher.errors import UsageError
    from launcher.plan import read_plan
    from launcher.rundir import open_run, read_json
    from launcher.show import console, show_report
    from launcher.watching import story

    where = open_run(run_dir)
    told = story(where)
    if told is None:
        raise UsageError(f"report {run_dir}", "the run has not ended", f"see how it stands: launch status {run_dir}")
    show_report(console(), read_plan(where), read_json(where.report), told[0])
    if told[1] is not None:
        start.show_failure(where, told[1], stderr=False)


@click.command()
@run_argument
@click.option("--save", is_flag=True, help="Have it save first, when the step is done that is being worked on.")
def stop(run_dir: str, save: bool) -> None:
    """End a run that is being trained; `launch resume RUN` goes on with it."""
    from launcher import manifest
    from launcher.rundir import open_run
    from launcher.show import console, show_stopped
    from launcher.stopping import stop_run

    where = open_run(run_dir)
    stop_run(where, run_dir, save)
    show_stopped(console(), where.path, manifest.folders(where))


@click.command()
@run_argument
@click.option("--verify", "every_byte", is_flag=True, help="Read every byte; without it sizes have to do.")
def checkpoints(run_dir: str, every_byte: bool) -> None:
    """List the checkpoints of a run: step, size, age, evaluation loss, ranks, and whether each is whole."""
    from launcher import manifest
    from launcher.rundir import open_run
    from launcher.show import console, show_checkpoints

    where = open_run(run_dir)
    verdicts = (manifest.verify(folder, every_byte) for folder in manifest.folders(where))
    show_checkpoints(console(), where.path, verdicts, every_byte)


VERBS = (runs, status, logs, attach, report, stop, checkpoints)
