"""Ranks that load the same remote code at once: how often that fails, and how often other code runs than was meant.

    python benchmarks/remote_code_race.py [--processes 16] [--rounds 100] [--out benchmarks/results/remote_code_race_<hardware>_<date>.md]

Every round two runs start at the same time, each with half of the processes, from two folders that have the same name and different
code; the code is new in every round, so no cache has it yet. In each run one process is killed in the middle of writing, and one
begins only after somebody has changed the code in the folder for the next experiment. Each process loads config, tokenizer and model.

    ours    prepare stages the code, as `launch` does; one preparation is killed in the middle and done again; then the ranks load
    harder  every process stages for itself what the plan names, all at once and without a lock, then loads
    plain   from_pretrained(trust_remote_code=True) with one HF_MODULES_CACHE for all, transformers' default

The processes are forked from one that has imported transformers, so they really start together. A killed process is no failure.
That a late process runs other code under `plain` is no race: it reads the folder when it gets there, so every one of them does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from page import Page

from launcher.remotecode import RemoteCode, Staged, find_code, read_code, stage
from launcher.remotecode import staging as staging_module
from tests.worker.remote_models import write_model

_KILLED = 137
_VARIANTS = ("ours", "harder", "plain")


@dataclass
class Count:
    """What became of the processes of one variant."""

    processes: int = 0
    killed: int = 0
    failed: int = 0
    wrong: int = 0
    wrong_late: int = 0
    rounds_failed: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


@dataclass
class Run:
    """One of the two runs of a round."""

    folder: Path
    mark: str
    root: Path
    staged: Staged | None = None
    planned: tuple[RemoteCode, dict[str, bytes]] | None = None


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--variants", nargs="+", choices=_VARIANTS, default=list(_VARIANTS))
    parser.add_argument("--json", action="store_true", help="print the counts instead of a page")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    page = Page("Ranks that load remote code at once", __doc__.split("\n\n")[0])  # type: ignore[union-attr]
    import torch

    torch.set_num_threads(1)
    for module in (
        "modeling_utils",
        "generation",
        "tokenization_utils_base",
        "models.auto.modeling_auto",
        "models.auto.tokenization_auto",
    ):
        importlib.import_module(f"transformers.{module}")
    _warm_up()
    counts = {}
    for variant in options.variants:
        with tempfile.TemporaryDirectory(prefix="race-") as place:
            counts[variant] = measure(variant, options.processes, options.rounds, Path(place))
    if options.json:
        print(json.dumps({name: vars(count) for name, count in counts.items()}))
        return
    _write(page, counts, options)
    page.finish(options.out)


def _warm_up() -> None:
    """Load once here, so that the forked processes import nothing more and spend their time on what is measured."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="race-") as place:
        run = Run(write_model(Path(place, "model"), "warm"), "warm", Path(place, "code"))
        code = find_code(run.folder)
        assert code is not None
        run.planned = code, read_code(run.folder, code)
        _load_ours(run)
    gc.collect()
    gc.freeze()


def measure(variant: str, processes: int, rounds: int, place: Path) -> Count:
    """All rounds of one variant."""
    count = Count()
    started = time.monotonic()
    import transformers.dynamic_module_utils as dynamic

    dynamic.HF_MODULES_CACHE = str(place / "modules")
    for number in range(rounds):
        runs = [
            Run(write_model(place / side / "model", f"{side}-{number}"), f"{side}-{number}", place / f"{side}-{number}")
            for side in ("a", "b")
        ]
        for run in runs:
            _pad(run.folder)
            code = find_code(run.folder)
            assert code is not None
            run.planned = code, read_code(run.folder, code)
        if variant == "ours":
            for run in runs:
                run.staged = _prepared(run)
                count.killed += 1
        before = count.failed + count.wrong
        _round(variant, runs, processes // 2, count)
        count.rounds_failed += count.failed + count.wrong > before
    count.seconds = time.monotonic() - started
    return count


def _pad(folder: Path) -> None:
    """Real modelling files have 40 to 120 kB; comments cost no time to run and as much to copy.

    `from . import x` goes: transformers' own search does not see it, and plain would fail every time for that alone.
    """
    file = folder / "modeling_tiny.py"
    text = file.read_text().replace("from . import layers_tiny", "from .layers_tiny import Block")
    file.write_text(text.replace("layers_tiny.Block", "Block") + f"#{'y' * 78}\n" * 750)


def _round(variant: str, runs: list[Run], ranks: int, count: Count) -> None:
    """Start all ranks of both runs at once; count how they end."""
    gates = {name: os.pipe() for name in ("all", "late")}
    answers = os.pipe()
    children = {}
    for run in runs:
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os._exit(_rank(variant, run, rank, ranks, gates, answers[1]))
            children[pid] = (run, rank)
    for name in ("all", "late"):
        os.close(gates[name][0])
    os.close(answers[1])
    os.close(gates["all"][1])  # everybody goes
    late = {pid for pid, (_, rank) in children.items() if rank == ranks - 1}
    ends = {pid: os.waitpid(pid, 0)[1] for pid in children if pid not in late}
    for run in runs:  # somebody goes on working in the folder
        write_model(run.folder, f"{run.mark}-changed", weights=False)
        _pad(run.folder)
    os.close(gates["late"][1])
    ends |= {pid: os.waitpid(pid, 0)[1] for pid in late}
    told = _answers(answers[0])
    for pid, (run, _) in children.items():
        _count(count, run, os.waitstatus_to_exitcode(ends[pid]), told.get(pid, ""), pid in late)


def _count(count: Count, run: Run, code: int, told: str, late: bool) -> None:
    count.processes += 1
    if code in (-signal.SIGKILL, _KILLED):
        count.killed += 1
    elif code != 0:
        count.failed += 1
        count.errors[told or f"exit code {code}"] += 1
    elif told != run.mark:
        count.wrong += 1
        count.wrong_late += late


def _answers(pipe: int) -> dict[int, str]:
    with os.fdopen(pipe) as lines:
        return {int(pid): text for pid, _, text in (line.rstrip("\n").partition(" ") for line in lines)}


def _rank(variant: str, run: Run, rank: int, ranks: int, gates: dict[str, tuple[int, int]], answer: int) -> int:
    """One process: wait, load, say which code it runs."""
    for _, writing in gates.values():
        os.close(writing)
    os.read(gates["late" if rank == ranks - 1 else "all"][0], 1)
    if rank == 0:
        _die_while_writing()
    try:
        mark = _load_plain(run.folder) if variant == "plain" else _load_ours(run)
    except Exception as error:  # noqa: BLE001 - every failure is counted by its name
        text = (str(error).splitlines() or [""])[0]
        os.write(answer, f"{os.getpid()} {type(error).__name__}: {_shortened(text, run)}\n".encode())
        return 1
    os.write(answer, f"{os.getpid()} {mark}\n".encode())
    return 0


def _shortened(text: str, run: Run) -> str:
    """The message without what is another one in every round."""
    words = [
        word
        for word in text.split()
        if "transformers_modules" not in word and str(run.folder.parent.parent) not in word
    ]
    return " ".join(words)[:90]


def _die_while_writing() -> None:
    """This process is killed when it has written half of a file, whoever writes it."""

    def half_a_copy(source: Any, target: Any, **_: Any) -> None:
        data = Path(source).read_bytes()
        with open(target, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def half_a_folder(sources: Any, into: Path, final: Path) -> None:
        into.mkdir()
        name, data = next(iter(sources.items()))
        half_a_copy(_File(data), into / name)

    shutil.copyfile = half_a_copy  # type: ignore[assignment]
    staging_module._write = half_a_folder


class _File:
    """Bytes that can be read like a path."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __fspath__(self) -> str:
        file = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115 - the process is killed before it could be closed
        file.write(self.data)
        file.flush()
        return file.name


def _prepared(run: Run) -> Staged:
    """What `launch` does before any rank: one process stages. Here the first one is killed in the middle of it."""
    pid = os.fork()
    if pid == 0:
        _die_while_writing()
        _stage(run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return _stage(run)


def _stage(run: Run) -> Staged:
    assert run.planned is not None
    return stage(*run.planned, run.root)


def _load_ours(run: Run) -> str:
    from launcher.worker.staged import load_tokenizer, load_weights

    staged = run.staged or _stage(run)
    load_tokenizer(run.folder, staged)
    return str(load_weights(run.folder, staged).mark)


def _load_plain(folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    return str(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True).mark)


def _write(page: Page, counts: dict[str, Count], options: Any) -> None:
    columns: dict[str, Callable[[Count], object]] = {
        "processes": lambda count: count.processes,
        "killed on purpose": lambda count: count.killed,
        "failed": lambda count: count.failed,
        "ran other code": lambda count: count.wrong,
        "of these started late": lambda count: count.wrong_late,
        "rounds with either": lambda count: f"{count.rounds_failed} of {options.rounds}",
        "seconds": lambda count: f"{count.seconds:.0f}",
    }
    page.section("How it was measured", *(__doc__ or "").split("\n\n")[2:])
    page.section("Result")
    page.table(
        ["variant", *columns], [[name, *(read(count) for read in columns.values())] for name, count in counts.items()]
    )
    page.section("What the failed ones said")
    said = [[name, error, number] for name, count in counts.items() for error, number in count.errors.most_common(8)]
    page.table(["variant", "error", "processes"], said or [["all", "nothing failed", 0]])


if __name__ == "__main__":
    main()
