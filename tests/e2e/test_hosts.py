"""Two machines with an sshd each (`hosts`): a run over both, and that nothing of it is left on either, whatever goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.manifest import verify
from launcher.rundir import RunDir, read_events, read_json
from tests.e2e.conftest import RECIPE, report_of
from tests.e2e.hosts import IPV4, IPV6, Host, two_hosts

LONG = ("train.max_steps=100000", "checkpoint.every_steps=50")


@dataclass
class Head:
    """The terminal on node-a."""

    hosts: tuple[Host, Host]
    env: dict[str, str]
    folder: Path
    recipe: Path
    data: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def launch(self, *args: str) -> subprocess.Popen[str]:
        """Start `launch RECIPE --hostfile hosts …` there; the process is nsenter's, whose child is the launcher."""
        return self._start(str(self.recipe), "--hostfile", "hosts", *args)

    def resume(self, *args: str) -> subprocess.Popen[str]:
        """Start `launch resume …` there."""
        return self._start("resume", *args)

    def _start(self, *args: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "launcher.cli", *args]
        with (self.folder / "out").open("w") as out:
            process = subprocess.Popen(
                self.hosts[0].inside(argv, self.folder), env=self.env, stdout=out, stderr=out, text=True
            )
        self.started.append(process)
        return process

    def without_shared_disk(self) -> None:
        """From now on node-b has a disk of its own where everything of this test lies on node-a, rows and cache too."""
        rows = self.folder / "rows.json"
        rows.write_bytes(self.data.read_bytes())
        self.recipe.write_text(self.recipe.read_text().replace(str(self.data), json.dumps(str(rows))))
        self.env["LAUNCH_CACHE"] = str(self.folder / "cache")
        mount = ["mount", "-t", "tmpfs", "tmpfs", str(self.folder)]
        subprocess.run(self.hosts[1].inside(mount), check=True)

    @property
    def said(self) -> str:
        return (self.folder / "out").read_text()

    def signal(self, process: subprocess.Popen[str], number: int) -> None:
        """Send a signal to the launcher itself."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def wait_for(self, process: subprocess.Popen[str], what: Callable[[], Any], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert process.poll() is None, f"ended with {process.returncode}\n{self.said}"
            assert time.monotonic() < deadline, f"waited {seconds} s in vain\n{self.said}"
            time.sleep(0.05)

    def left(self, seconds: float) -> set[int]:
        """What still runs on either host after so many seconds at most."""
        deadline = time.monotonic() + seconds
        while (alive := self.hosts[0].processes() | self.hosts[1].processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive


@pytest.fixture
def head(launch_env: dict[str, str], data_file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Head]:
    folder = tmp_path / "it's a $HOME"
    folder.mkdir()
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(data=data_file).replace("global_batch: 4", "global_batch: 6"))
    (folder / "hosts").write_text("node-a slots=2\nnode-b slots=1  # one is busy\n")
    (tmp_path / "net").mkdir()
    with two_hosts(tmp_path / "net", getattr(request, "param", IPV4)) as hosts:
        made = Head(hosts, {**launch_env, "OMP_NUM_THREADS": "1"}, folder, recipe, data_file)
        yield made
    for process in made.started:  # its host is switched off, and everything on it
        process.wait(10)


def trains(run: Path) -> bool:
    return any(event["event"] == "log" for event in read_events(RunDir(run))[0])


@pytest.mark.parametrize(
    "shared", [True, pytest.param(False, marks=pytest.mark.cluster)], ids=["shared disk", "own disks"]
)
def test_a_killed_launcher_leaves_nothing_on_any_node(head: Head, shared: bool) -> None:
    if not shared:
        head.without_shared_disk()
    run = head.folder / "a run"
    process = head.launch("--run-dir", "a run", *LONG)
    head.wait_for(process, lambda: trains(run))
    told = head.said
    assert "nodes        node-a   2 × cpu   10.231.7.1 on lan0" in told
    assert "node-b   1 × cpu   10.231.7.2 on lan0" in told
    assert (run / "logs" / "node-b-rank2.log").exists()
    assert all(len(host.processes()) >= 3 for host in head.hosts), "an agent, torchrun and ranks on both"

    head.signal(process, signal.SIGKILL)

    assert not head.left(15)
    with RunDir(run).locked():
        pass


@pytest.mark.cluster
def test_a_run_to_its_end_and_on_with_one_host(head: Head) -> None:
    assert head.launch("--run-dir", "run").wait(120) == 0, head.said
    assert report_of(head.folder / "run")["result"] == "done", head.said
    assert not head.left(1)
    told = "resume       step-4: complete, verified"
    assert head.resume("run", "train.max_steps=6").wait(120) == 0, head.said
    assert told in head.said
    assert "nodes        node-a" in head.said
    only = ("--hostfile", "hosts", "--include", "node-b:0")
    assert head.resume("run", *only, "train.max_steps=8").wait(120) == 0, head.said
    assert (head.folder / "run" / "logs" / "node-b-rank0.log").exists(), "by ssh, on the other host alone"


@pytest.mark.cluster
@pytest.mark.parametrize("head", [IPV6], ids=["IPv6"], indirect=True)
def test_hosts_that_have_addresses_of_ipv6_alone(head: Head) -> None:
    (head.folder / "hosts").write_text("fd00:231::1 slots=2\n[fd00:231::2] slots=1\n")
    assert head.launch("--run-dir", "run").wait(120) == 0, head.said
    assert "[fd00:231::2]   1 × cpu   fd00:231::2 on lan0" in head.said
    only = ("--hostfile", "hosts", "--include", "[fd00:231::2]:0")
    assert head.resume("run", *only, "train.max_steps=6").wait(120) == 0, head.said


@pytest.mark.cluster
def test_a_host_whose_cable_is_pulled_out_ends_by_itself_and_is_named(head: Head) -> None:
    run = head.folder / "run"
    process = head.launch("--run-dir", "run", *LONG)
    head.wait_for(process, lambda: trains(run))
    pulled = time.time()

    head.hosts[1].unplug()

    assert process.wait(45) == 255, head.said
    assert time.time() - pulled < 30
    assert report_of(run)["failure"]["time"] - pulled < 20.5, "found within the limit"
    assert "the connection to node-b is lost: " in head.said
    assert not head.left(15)


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_node(head: Head, number: signal.Signals) -> None:
    run = head.folder / "run"
    process = head.launch("--run-dir", "run", *LONG)
    head.wait_for(process, lambda: trains(run))

    head.signal(process, number)

    assert process.wait(30) == 130, head.said
    assert not head.left(0.5)
    assert ("is saved" in head.said) == (number == signal.SIGTERM)


@pytest.mark.cluster
def test_a_rank_that_is_killed_on_the_other_host_is_named(head: Head) -> None:
    run = RunDir(head.folder / "run")
    process = head.launch("--run-dir", "run", *LONG)
    head.wait_for(process, lambda: trains(run.path))
    rank = read_json(run.heartbeat(2))["pid"]  # as node-b counts
    kill = head.hosts[1].inside(["kill", "-9", str(rank)])
    subprocess.run(kill, check=True)

    assert process.wait(30) == 137, head.said
    assert "rank 2 (node-b, cpu)" in head.said
    assert not head.left(0.5)


@pytest.mark.cluster
def test_a_host_with_a_disk_of_its_own_gets_what_it_needs_and_gives_back_what_it_writes(head: Head) -> None:
    head.without_shared_disk()
    run = RunDir(head.folder / "run")
    assert head.launch("--run-dir", "refused", "strategy.type=fsdp").wait(60) == 4
    assert "hosts:2: node-b: run directory" in head.said
    assert "under strategy fsdp its ranks write a part of every checkpoint that no other rank has" in head.said

    assert head.launch("--run-dir", "run").wait(120) == 0, head.said
    assert "run directory staged" in head.said
    assert (run.logs / "node-b-rank2.log").read_text()
    assert read_json(run.heartbeat(2))["phase"] == "done"
    verdict = verify(run.checkpoints / "step-4")
    assert verdict.problem is None
    assert verdict.manifest is not None
    assert {"rng_state_2.pth", "optimizer-rank2.safetensors"} <= set(verdict.manifest.files)
    assert not head.left(1)

    assert head.resume("run", "train.max_steps=6").wait(120) == 0, head.said
    assert verify(run.checkpoints / "step-6").problem is None


@pytest.mark.cluster
@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "own disks"])
def test_a_rank_of_the_other_host_is_killed_and_all_start_again_then_one_is_stopped_and_named(
    head: Head, shared: bool
) -> None:
    if not shared:
        head.without_shared_disk()
    run = RunDir(head.folder / "run")
    process = head.launch("--run-dir", "run", "launch.max_restarts=1", "launch.stall_seconds=5", *LONG)

    def signal_rank_2(name: str) -> None:
        rank = read_json(run.heartbeat(2))["pid"]  # as node-b counts
        subprocess.run(head.hosts[1].inside(["kill", f"-{name}", str(rank)]), check=True)

    head.wait_for(process, lambda: any(event["event"] == "save" for event in read_events(run)[0]))
    signal_rank_2("KILL")
    head.wait_for(process, lambda: "restart 1 of 1 from step-" in head.said)
    head.wait_for(process, lambda: sum(event["event"] == "train" for event in read_events(run)[0]) == 2)
    head.wait_for(process, lambda: (read_json(run.heartbeat(2)) or {}).get("phase") == "train")
    signal_rank_2("STOP")
    stopped = time.monotonic()

    assert process.wait(40) == 124, head.said
    assert time.monotonic() - stopped < 25
    assert "rank 2 (node-b, cpu) at step " in head.said
    assert "its process is stopped (SIGSTOP, Ctrl-Z or a debugger)" in head.said
    report = report_of(run.path)
    assert [attempt["exit_code"] for attempt in report["attempts"]] == [137, 124]
    assert sum("waiting for others at" in where for where in report["failure"]["waits"]) >= 1
    assert not head.left(0.5)


@pytest.mark.cluster
def test_deepspeeds_launcher_ends_on_both_hosts_and_nothing_of_its_name_elsewhere(head: Head) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    # What DeepSpeed's own runner would end, on every host, at Ctrl-C.
    namesake = [sys.executable, "-c", "import time; time.sleep(300)", "-u -m deepspeed.launcher.launch"]
    canaries = [subprocess.Popen(namesake), subprocess.Popen(head.hosts[1].inside(namesake))]
    try:
        head.wait_for(canaries[1], lambda: len(head.hosts[1].processes()) == 1)
        run = head.folder / "run"
        process = head.launch("--run-dir", "run", "launch.backend=deepspeed", *LONG)
        head.wait_for(process, lambda: trains(run))

        head.signal(process, signal.SIGINT)

        assert process.wait(30) == 130, head.said
        assert len(head.left(0.5)) == 1, "the canary on node-b"
        assert [canary.poll() for canary in canaries] == [None, None]
    finally:
        for canary in canaries:
            canary.kill()
            canary.wait()
