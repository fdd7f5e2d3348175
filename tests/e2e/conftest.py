"""The command `launch` as a person runs it: a process of its own, real torchrun, real signals, on a recipe that takes seconds.

Faults come from outside: `Sabotage` writes a sitecustomize.py that patches a module in the ranks. The product has no hook for tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest

from launcher.rundir import RunDir, read_events, read_json

RECIPE = """\
# Two CPU ranks, one layer, four steps.
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 64, tie_word_embeddings: false}}
data: {{path: {data}, max_length: 48}}
adapter: {{type: lora, r: 4, targets: all-linear}}
train: {{max_steps: 4, lr: 5e-3, global_batch: 4, micro_batch: 2, log_every_steps: 1}}
checkpoint: {{every_steps: 2}}
hardware: 2xcpu
"""
SITECUSTOMIZE = """\
import importlib.abc, importlib.util, os, sys

class _Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r} or os.environ.get("RANK") not in {ranks!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            _patch(module)
        spec.loader.exec_module = exec_module
        return spec

def _patch(module):
{code}

sys.meta_path.insert(0, _Patch())  # ranks may be copies of a process that started without a rank
"""
AT_STEP = """\
original = module.PlannedTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == {before}:
        {action}
    return original(self, *args, **kwargs)
module.PlannedTrainer.training_step = training_step
"""
Process = tuple[int, int]  # pid and start time: the pid alone may be another process's by now


@dataclass
class Launcher:
    """Starts `launch`, and ends at the test's end whatever of it is left."""

    env: Mapping[str, str]
    folder: Path
    started: list[Started] = field(default_factory=list)

    def __call__(self, *args: str | Path, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        env = {**self.env, **env}
        return subprocess.run(_command(args), cwd=self.folder, env=env, timeout=timeout, check=False, **_STREAMS)

    def start(self, *args: str | Path, nohup: bool = False, stdout: int | None = None, **env: str) -> Started:
        """Start it and go on; what it prints goes to files, or its stdout to that descriptor."""
        place = self.folder / f"launch-{len(self.started)}"
        with place.with_suffix(".out").open("w") as out, place.with_suffix(".err").open("w") as err:
            process = subprocess.Popen(
                _command(args),
                cwd=self.folder,
                env={**self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
                preexec_fn=lambda: _set_signals(nohup),
            )
        self.started.append(Started(process, place))
        return self.started[-1]

    def start_in_terminal(self, *args: str | Path, **env: str) -> Started:
        """Start it as the foreground program of a terminal of its own; what it prints there is in `Started.terminal`."""
        master, slave = pty.openpty()

        def take_terminal() -> None:
            _set_signals(nohup=False)
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            _command(args),
            cwd=self.folder,
            env={**self.env, "TERM": "xterm", **env},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.started.append(Started(process, self.folder / f"launch-{len(self.started)}", Terminal(master)))
        return self.started[-1]

    def kill_all(self) -> None:
        """What the tests started and have not ended, by pid and start time."""
        for one in self.started:
            left = [one.itself, *one.descendants()] if one.process.poll() is None else []
            for pid, _ in [process for process in left if is_alive(process)]:
                os.kill(pid, signal.SIGKILL)
            one.process.wait()
            if one.terminal:
                one.terminal.close()


class Terminal:
    """The person's side of a terminal: reads all the time, so that nobody waits for room in it."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.output = ""
        self.closing = threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def close(self) -> None:
        """Close the window: whatever runs in it gets a SIGHUP and may write no more."""
        if not self.closing.is_set():
            self.closing.set()
            self.reader.join()
            os.close(self.master)

    def _read(self) -> None:
        while not self.closing.is_set():
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.output += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # nobody has the other side open any more
                    return


@dataclass
class Started:
    """A `launch` that runs."""

    process: subprocess.Popen[bytes]
    place: Path
    terminal: Terminal | None = None

    @property
    def itself(self) -> Process:
        return self.process.pid, _start_time(self.process.pid)

    @property
    def stdout(self) -> str:
        return self.terminal.output if self.terminal else self.place.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return "" if self.terminal else self.place.with_suffix(".err").read_text()

    def descendants(self) -> set[Process]:
        """Children, their children, and so on, of this moment."""
        parents = {int(path.name): _stat(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
        found = {self.process.pid}
        while more := {pid for pid, stat in parents.items() if stat and int(stat[1]) in found and pid not in found}:
            found |= more
        return {(pid, int(parents[pid][19])) for pid in found - {self.process.pid}}

    def wait_for(self, what: Callable[[], Any], timeout: float = 120) -> Any:
        """Poll until something is true; fails at once, with what was printed, when the launcher ends before."""
        deadline = time.monotonic() + timeout
        while not (found := what()):
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"waited {timeout} s in vain\n{self.stdout}\n{self.stderr}"
            time.sleep(0.02)
        return found

    def wait_for_event(self, run_dir: Path, name: str, timeout: float = 120) -> dict[str, Any]:
        """The first event of that name in RUN/events.jsonl."""
        run = RunDir(run_dir)
        return self.wait_for(lambda: next((e for e in read_events(run)[0] if e["event"] == name), None), timeout)


def all_gone(processes: Sequence[Process] | set[Process], timeout: float) -> bool:
    """Whether these very processes end in time."""
    deadline = time.monotonic() + timeout
    while any(is_alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_alive(process: Process) -> bool:
    """Whether it is there and no zombie."""
    stat = _stat(process[0])
    return bool(stat) and stat[0] != "Z" and int(stat[19]) == process[1]


def _start_time(pid: int) -> int:
    stat = _stat(pid)
    return int(stat[19]) if stat else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: state, ppid, …; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


_STREAMS: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}


def _command(args: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "launcher.cli", *map(str, args)]


def _set_signals(nohup: bool) -> None:
    """As from a terminal: a shell starts what runs in the background with SIGINT ignored, and pytest may be such."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


@dataclass(frozen=True)
class Sabotage:
    """Breaks a module inside ranks, through an environment that makes Python read a sitecustomize.py of ours."""

    folder: Path

    def module(self, name: str, code: str, ranks: Sequence[int] = (1,)) -> dict[str, str]:
        """The environment in which `code` runs right after the import of `name`, which it knows as `module`."""
        text = SITECUSTOMIZE.format(
            module=name, code=indent(dedent(code), "    "), ranks=tuple(str(rank) for rank in ranks)
        )
        self.folder.mkdir(exist_ok=True)
        (self.folder / "sitecustomize.py").write_text(text)
        return {"PYTHONPATH": str(self.folder)}

    def step(self, step: int, action: str, rank: int = 1) -> dict[str, str]:
        """The environment in which `action`, one statement, runs in a rank's training step."""
        return self.module("launcher.worker.training", AT_STEP.format(before=step - 1, action=action), (rank,))


@pytest.fixture(scope="session")
def launch_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the session, and not the user's: tokenizer, model and data are made once."""
    cache = tmp_path_factory.mktemp("launch-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAUNCH_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 short rows."""
    rows = [{"instruction": f"Say {number}", "output": f"It is {number * 7} now."} for number in range(40)]
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def recipe(data_file: Path) -> Path:
    path = data_file.with_name("tiny.yaml")
    path.write_text(RECIPE.format(data=data_file))
    return path


@pytest.fixture(scope="session")
def launch_env(launch_cache: Path) -> dict[str, str]:
    """The environment of every launch: our cache, no user settings that change what is printed."""
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN", "PYTHONPATH")}
    # Whoever asks for a hub gets no answer, at once, with or without a network.
    return {
        **env,
        "LAUNCH_CACHE": str(launch_cache),
        "HF_HOME": str(launch_cache / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }


@pytest.fixture
def launch(launch_env: dict[str, str], tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(launch_env, tmp_path)
    yield launcher
    launcher.kill_all()


@pytest.fixture
def sabotage(tmp_path: Path) -> Sabotage:
    return Sabotage(tmp_path / "sabotage")


@pytest.fixture(scope="session")
def finished_run(launch_env: dict[str, str], recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done; tests read it, or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    done = Launcher(launch_env, folder)(recipe, "--run-dir", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def report_of(run_dir: Path) -> dict[str, Any]:
    """RUN/report.json."""
    value = read_json(RunDir(run_dir).report)
    assert isinstance(value, dict)
    return value
