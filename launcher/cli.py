"""The verbs. Each reads a recipe or a run directory, calls the functions of the other modules and prints; nothing is decided here.

Only click is imported at the top: `launch --help` answers before anything else is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from launcher import __version__, start
from launcher.errors import LaunchError, PreflightError, UsageError
from launcher.runs import VERBS, run_argument
from launcher.start import Asked, Where
from launcher.terminal import plain_letters

# What a disk says that is full or may not be written; on the control side only the run directory is written to.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_ACCESS_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)


class Verbs(click.Group):
    """`launch RECIPE …` is `launch run RECIPE …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].partition("=")[0] == "--device-map":  # which names its recipe
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="launch")
def cli() -> None:
    """Train language models on the GPUs you have.

    \b
    launch RECIPE [key.path=value …]     train (the same as: launch run RECIPE)
    launch --device-map NAME             train what is meant for these devices, spread over them
    launch plan RECIPE                   see what it would do, and stop

    A recipe is a YAML file, or the name of a shipped one: launch recipes
    """


for about_runs in VERBS:
    cli.add_command(about_runs)


def on_devices(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the flags that say on which hosts and devices it works."""
    hosts = "Hosts and their slots, in DeepSpeed's format; `hardware` is then what each host has."
    for flag, more in (
        ("--exclude", {"metavar": "HOSTS", "help": "All of the hostfile but these hosts and slots."}),
        ("--include", {"metavar": "HOSTS", "help": "Only these, as in node-a@node-b:0,2."}),
        ("--hostfile", {"help": hosts}),
        ("--nproc", {"type": click.IntRange(min=1), "help": "Number of processes, where not all devices are wanted."}),
    ):
        verb = click.option(flag, **more)(verb)
    return verb


overrides_argument = click.argument("overrides", nargs=-1, metavar="[key.path=value]…")
detach_option = click.option(
    "--detach", is_flag=True, help="Go on without this terminal; come back with: launch attach RUN"
)


def asks_for_a_plan(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb everything that a plan is made from, as one `Asked`."""

    @click.argument("recipe", required=False)
    @overrides_argument
    @on_devices
    @click.option(
        "--device-map", help="Spread one model over the devices of this map; without a recipe run the one it names."
    )
    @functools.wraps(verb)
    def asked(recipe: str | None, overrides: tuple[str, ...], **given: Any) -> None:
        where = Where(**{name: given.pop(name) for name in Where.__dataclass_fields__})
        verb(start.asked(recipe, overrides, where), **given)

    return asked


@cli.command()
@asks_for_a_plan
@click.option("--run-dir", help="The run directory (the same as launch.run_dir=DIR).")
@click.option("--dry-run", is_flag=True, help="Print the commands that would be started, and stop.")
@click.option(
    "--rehearse", is_flag=True, help="Run it with a small model on this machine's CPU, ranks and strategy as planned."
)
@click.option(
    "--slurm",
    metavar="NAME=VALUE",
    help="Submit it to Slurm: options of sbatch, such as --slurm partition=gpu nodes=2 time=24:00:00.",
)
@detach_option
def run(asked: Asked, run_dir: str | None, slurm: str | None, dry_run: bool, rehearse: bool, detach: bool) -> None:
    """Train: plan, prepare, start the ranks, follow them to the end."""
    if run_dir is not None:
        asked = asked.with_overrides(f"launch.run_dir={run_dir}")
    if rehearse and (dry_run or detach):
        other, what = ("--dry-run", "starts nothing") if dry_run else ("--detach", "goes on without you")
        raise UsageError(
            f"--rehearse {other}", f"one tries everything before your eyes, the other {what}", "leave one out"
        )
    if rehearse:
        start.rehearse(asked)
    if slurm is not None:
        from launcher.slurm import submit_run

        submit_run(asked, slurm, dry_run)
        return
    loaded, plan = start.plan_recipe(asked)
    where = start.new_run_dir(loaded)
    if dry_run:
        start.show_commands(plan, where)
        return
    start.carry_out(loaded.recipe.checkpoint.resume == "auto", plan, where, detach)


@cli.command()
@run_argument
@overrides_argument
@on_devices
@click.option("--device-map", help="Go on over the devices of this map; by default over those that the run has.")
@detach_option
def resume(run_dir: str, overrides: tuple[str, ...], detach: bool, **devices: Any) -> None:
    """Go on from the newest valid checkpoint of a run, on the same hosts and devices unless others are named."""
    from launcher.rundir import open_run

    where = open_run(run_dir)
    _, plan = start.plan_recipe(start.asked(str(where.recipe), overrides, Where(**devices)), before=where)
    start.carry_out(True, plan, where, detach)


@cli.command()
@asks_for_a_plan
@click.option("--json", "as_json", is_flag=True, help="Print the plan as the workers would read it.")
@click.option(
    "--explain", "key", metavar="KEY", help="Say where the value of one key comes from, such as train.micro_batch."
)
def plan(asked: Asked, as_json: bool, key: str | None) -> None:
    """Show what a recipe would do, and stop. Needs no GPU and no network."""
    from launcher.show import console, line, show_plan

    loaded, made = start.plan_recipe(asked)
    if key is not None:
        from launcher.explain import explain

        lines = explain(loaded, made, key)
        if as_json:
            import json

            _echo_json(json.dumps([{"label": label, "text": text} for label, text in lines], ensure_ascii=False))
            return
        width = max(len(label) for label, _ in lines)
        for label, text in lines:
            line(console(), f"{label:<{width}}", text)
    elif as_json:
        _echo_json(made.model_dump_json(indent=1, by_alias=True))
    else:
        show_plan(console(), made)


def _echo_json(text: str) -> None:
    """Print JSON, which is UTF-8 whatever the terminal's encoding."""
    click.echo(text.encode())


@cli.command()
@asks_for_a_plan
def check(asked: Asked) -> None:
    """Check a recipe, and whether this machine is ready for it; devices are tried out, which takes some seconds."""
    from launcher import preflight
    from launcher.show import console, show_findings

    loaded, made = start.plan_recipe(asked)
    findings = preflight.check(made, start.new_run_dir(loaded).path)
    preflight.require(show_findings(console(), itertools.chain(findings, preflight.tried(made.cluster))), listed=True)


@cli.command()
def doctor() -> None:
    """Check this machine without a recipe: packages, cards, memory, limits; devices are tried out, which takes some seconds."""
    from launcher import preflight
    from launcher.show import console, show_findings

    preflight.require(show_findings(console(), itertools.chain(preflight.diagnose(), preflight.tried())), listed=True)


@cli.command()
@asks_for_a_plan
def prepare(asked: Asked) -> None:
    """Fetch the model and tokenise the data into the cache, without training."""
    import tempfile

    from launcher.rundir import RunDir, write_atomic
    from launcher.show import RunScreen, console
    from launcher.supervise import Supervisor

    _, made = start.plan_recipe(asked)
    with tempfile.TemporaryDirectory(prefix="launch-prepare-") as folder:
        where = RunDir(Path(folder))
        where.create()
        write_atomic(where.plan, made.model_dump_json(indent=1, by_alias=True))
        Supervisor(made, where, RunScreen(console(), made)).prepare_only()


@cli.command()
@click.argument("recipe")
@overrides_argument
def trust(recipe: str, overrides: tuple[str, ...]) -> None:
    """Show what the model's own code does that deserves a look, and pin it in a lock file beside the recipe."""
    from launcher.recipe import find_recipe, load_recipe
    from launcher.remotecode import trust_code
    from launcher.show import console, show_trust

    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides)
    show_trust(console(), trust_code(loaded.recipe.model, loaded.document.folder, path))


@cli.command()
@run_argument
@click.option("--prompt", help="Answer this one question and stop.")
@click.option("--system", help="A system prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer, in tokens."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the likeliest token.",
)
@click.option("--step", help="Which checkpoint: a step, `best` or `latest`.")
@click.option(
    "--device-map", help="Spread the model over the devices of this map; by default those that it was trained on so."
)
@click.option(
    "--context", type=click.IntRange(min=64), help="Under a device map: tokens to have room for, question and answer."
)
def chat(run_dir: str, device_map: str | None, context: int | None, **options: Any) -> None:
    """Talk to the model that a run has trained."""
    from launcher.foreground import run_in_foreground
    from launcher.rundir import open_run

    run = open_run(run_dir)
    placed = start.chat_placement(run, device_map, context, options["max_new_tokens"])
    sys.exit(run_in_foreground("chat", run, options, placed))


def _shard_size(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Checked here, before a model is loaded for it."""
    if value is not None and not re.fullmatch(r"[1-9]\d*(MB|GB)", value):
        raise click.BadParameter(f"{value!r} is no size. Write it as 500MB or 2GB.")
    return value


@cli.command()
@run_argument
@click.option("--out", help="Folder for the merged model; default RUN/export.")
@click.option(
    "--max-shard-size",
    callback=_shard_size,
    help="Largest safetensors file, such as 500MB; default as in the recipe.",
)
@click.option("--step", help="Which checkpoint: a step, `best` or `latest`.")
@click.option(
    "--layout",
    type=click.Choice(["native", "original"]),
    help="original: a converted ChatGLM2 or 3 as its authors published it, with their .py files; default native.",
)
def export(run_dir: str, **options: Any) -> None:
    """Merge the adapter into the model and write a folder that loads on its own."""
    from launcher.foreground import run_in_foreground
    from launcher.rundir import open_run

    sys.exit(run_in_foreground("export", open_run(run_dir), options))


@cli.command()
def recipes() -> None:
    """List the recipes beside you and the shipped ones, a line each, then the device maps."""
    from launcher.recipe.device_maps import device_maps
    from launcher.recipe.shipped import purpose
    from launcher.recipe.shipped import recipes as known

    found, maps = known(), device_maps()
    width = max((len(path.stem) for path in (*found, *maps)), default=0)
    for path in found:
        click.echo(f"{path.stem:<{width}}  {purpose(path)}")
    click.echo("\nDevice maps, for --device-map NAME; your own go into recipes/device_maps:")
    for path in maps:
        click.echo(f"{path.stem:<{width}}  {purpose(path)}")


@cli.command()
@click.argument("path", default="recipes/schema.json")
def schema(path: str) -> None:
    """Write the JSON Schema of recipes for editors, or a reference page where PATH ends in .md ('-' prints the schema)."""
    from launcher.recipe.describe import reference_text, schema_text

    if path == "-":
        click.echo(schema_text(), nl=False)
        return
    try:
        Path(path).write_text(reference_text() if path.endswith(".md") else schema_text(), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"schema {path}", f"cannot be written: {error.strerror}", "name another file, or print it: launch schema -"
        ) from None
    click.echo(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command `launch`: a mistake of the person's is three lines and an exit code, never a traceback."""
    plain_letters()
    code = _run(argv)
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed by whoever started this process
            continue
        try:
            stream.flush()
        except (
            OSError
        ):  # the terminal or the pipe went away: Python would try again at its end and turn the code into 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(argv: Sequence[str] | None) -> int:
    """Run the verb; the exit code."""
    try:
        os.getcwd()
    except FileNotFoundError:
        _say("error: the folder you are in is no longer there\n  go to one that is: cd ~")
        return UsageError.exit_code
    try:
        cli.main(args=list(argv) if argv is not None else None, prog_name="launch", standalone_mode=False)
    except SystemExit as ended:  # a verb ends with the code of the run
        return ended.code if isinstance(ended.code, int) else 0
    except LaunchError as error:
        _say(f"error: {error}")
        return error.exit_code
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except OSError as error:
        if error.errno not in (*_DISK_ERRORS, *_ACCESS_ERRORS):
            raise
        place = f"{error.filename}: " if error.filename else ""
        remedy = "make room there" if error.errno in _DISK_ERRORS else "make it yours to read and write"
        _say(f"error: {place}{error.strerror}\n  {remedy}, or name another run directory: launch.run_dir=DIR")
        return PreflightError.exit_code
    return 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # the terminal may be what went away, or was never there
        click.echo(text, err=True)


if __name__ == "__main__":
    main()
