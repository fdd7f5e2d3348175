"""A Slurm cluster of this machine's own, from Debian's packages, and a run in its queue."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.rundir import RunDir, read_events
from tests.e2e.conftest import Launcher, report_of

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONF = """\
ClusterName=launch
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def why_not() -> str:
    """Why there can be no cluster here; empty where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"a Slurm cluster wants {', '.join(missing)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root here"


@dataclass
class Cluster:
    """Two nodes, n1 and n2, which are both this machine."""

    folder: Path
    env: dict[str, str]

    def slurm(self, *argv: str) -> str:
        """What one of Slurm's commands prints."""
        env = {**os.environ, **self.env}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env, timeout=30)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.slurm("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, done: Callable[[dict[str, str]], bool], seconds: float = 150) -> dict[str, str]:
        """Poll until a job is so."""
        deadline = time.monotonic() + seconds
        while not done(state := self.state(job)):
            assert time.monotonic() < deadline, f"job {job} is {state['JobState']} ({state['Reason']})"
            time.sleep(0.2)
        return state


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    with contextlib.ExitStack() as taken:
        probes = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [probe.getsockname()[1] for probe in probes]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=ports))
    made = Cluster(folder, {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"})
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    daemons = [munge, ["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", name] for name in ("n1", "n2"))]
    with contextlib.ExitStack() as running:
        for argv in daemons:
            with (folder / f"{argv[0]}.out").open("ab") as out:
                env = {**os.environ, **made.env}
                process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            running.callback(_end, process)
            time.sleep(0.3)  # munge's socket is there before the others ask for it
        deadline = time.monotonic() + 20
        while made.slurm("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            if time.monotonic() > deadline:
                pytest.skip(f"Slurm's nodes do not come up for {getpass.getuser()}: {_last(folder / 'slurmctld.log')}")
            time.sleep(0.2)
        yield made


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    process.kill()
    process.wait()


def _last(log: Path) -> str:
    return log.read_text()[-300:] if log.exists() else "no log"


def submit(launch: Launcher, cluster: Cluster, recipe: Path, *words: str) -> str:
    """The number of the job."""
    done = launch(
        recipe,
        "--run-dir",
        "run",
        "--slurm",
        "partition=debug",
        "nodes=2",
        "train.global_batch=8",
        *words,
        **cluster.env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("job ")[1].split(";")[0]


def log_of(folder: Path, job: str) -> str:
    return (folder / "run" / "logs" / f"slurm-{job}.log").read_text()


def wait_until_it_trains(folder: Path, job: str) -> RunDir:
    """The run of a job, once its ranks have done a step."""
    run, deadline = RunDir(folder / "run"), time.monotonic() + 120
    while not any(event["event"] == "log" for event in read_events(run)[0]):
        assert time.monotonic() < deadline, log_of(folder, job)
        time.sleep(0.2)
    return run


@pytest.mark.cluster
def test_a_job_trains_on_both_nodes(launch: Launcher, cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    job = submit(launch, cluster, recipe)
    state = cluster.wait(job, lambda state: state["JobState"] in ("COMPLETED", "FAILED"))
    said = log_of(tmp_path, job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert report_of(tmp_path / "run")["result"] == "done"
    assert "4 × cpu, ddp over gloo" in said
    assert "n2   2 × cpu" in said


@pytest.mark.cluster
def test_a_job_whose_time_is_up_saves_and_stands_in_the_queue_again(
    launch: Launcher, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    job = submit(launch, cluster, recipe, "train.max_steps=100000", "checkpoint.every_steps=100000")
    wait_until_it_trains(tmp_path, job)

    cluster.slurm("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@120 does before the end

    state = cluster.wait(job, lambda state: state["Restarts"] == "1")
    assert state["Requeue"] == "1"
    assert "SIGUSR1: every process of this run has ended; step-" in log_of(tmp_path, job)
    cluster.slurm("scancel", job)


@pytest.mark.cluster
def test_the_code_of_the_first_failing_rank_is_the_jobs(
    launch: Launcher, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    job = submit(launch, cluster, recipe, "requeue=no", "train.max_steps=100000")
    run = wait_until_it_trains(tmp_path, job)
    beat = json.loads(run.heartbeat(3).read_text())
    os.kill(beat["pid"], signal.SIGKILL)
    state = cluster.wait(job, lambda state: state["JobState"] in ("COMPLETED", "FAILED"), 60)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "137:0"), log_of(tmp_path, job)
