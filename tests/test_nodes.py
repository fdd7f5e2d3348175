"""Agents, connections and the handshake, with an ssh that leads back to this machine: as ssh does, it gives its words to a shell."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.agent import code_hash
from launcher.cluster import resolve_cluster
from launcher.connecting import connecting_command, travelling
from launcher.errors import LaunchError, PreflightError
from launcher.handshake import _other_cards, handshake
from launcher.modelshape import shape_of
from launcher.nodes import Connection, SeveralNodes
from launcher.plan import Plan, make_plan
from launcher.processes import NodeCommand
from launcher.recipe import find_recipe, load_recipe
from launcher.rundir import RunDir, read_json, write_atomic

SSH = """\
#!/bin/sh
while [ "$1" != "--" ]; do shift; done
case "$2" in
denied) echo "denied: Permission denied (publickey)." >&2; exit 255;;
stranger) echo "Host key verification failed." >&2; exit 255;;
down) echo "ssh: connect to host down port 22: Connection timed out" >&2; exit 255;;
esac
shift 2
echo "Welcome to a shell that talks"
exec sh -c "$*"
"""
QUICKSTART = find_recipe("quickstart").resolve()


@pytest.fixture(autouse=True)
def _ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(launcher.__file__).parents[1]))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "a 'run' of $HOME")
    made.create()
    return made


def plan_on(tmp_path: Path, hosts: str, *overrides: str) -> Plan:
    """The quickstart on the hosts of such a hostfile."""
    (tmp_path / "hosts").write_text(hosts)
    loaded = load_recipe(QUICKSTART, ["train.global_batch=60", *overrides])
    cluster = resolve_cluster("2xcpu", hostfile=str(tmp_path / "hosts"))
    return make_plan("quickstart", loaded.recipe, cluster, shape_of(loaded.recipe.model, QUICKSTART.parent))


@pytest.fixture
def opened(run: RunDir) -> Iterator[Callable[[Plan], SeveralNodes]]:
    """Nodes that are ended with the test."""
    made: list[SeveralNodes] = []

    def open_(plan: Plan) -> SeveralNodes:
        made.append(SeveralNodes(plan, run, lambda: None))
        return made[-1]

    yield open_
    for nodes in made:
        nodes.end()
        assert all(one.process.poll() is not None for one in nodes.connections)


def commands(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> None:
    """What the nodes start instead of torchrun, one shell script each."""
    made = tuple(NodeCommand("", ("sh", "-c", script), {}, "/") for script in scripts)
    monkeypatch.setattr("launcher.nodes.node_commands", lambda *_: made)


def ended_with(nodes: SeveralNodes, seconds: float = 10) -> int | None:
    deadline = time.monotonic() + seconds
    while (code := nodes.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return code


def test_what_ssh_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/it's here")
    monkeypatch.setenv("LAUNCH_CACHE", "/a cache")
    ssh = ("user=me", "port=2222", "key=~/k", "python=/opt/it's $HOME; x/python", "timeout_s=3")
    plan = plan_on(tmp_path, "localhost slots=2\nyou@[fe80::1%eth0] slots=2\n", *(f"launch.ssh.{one}" for one in ssh))
    here, there = (connecting_command(plan, node) for node in plan.cluster.nodes)
    assert here.argv == (sys.executable, "-m", "launcher.agent")
    *options, stop, host, words = there.argv
    assert shlex.join(options) == (
        "ssh -T -o BatchMode=yes -o ConnectTimeout=3 -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ControlMaster=no "
        f"-o ControlPath=none -o ClearAllForwardings=yes -o RemoteCommand=none -o LogLevel=ERROR -p 2222 -i {Path.home()}/k -l me"
    )
    assert (stop, host) == ("--", "you@fe80::1%eth0")
    assert shlex.split(words) == [
        *(
            "exec",
            "env",
            "PYTHONPATH=/it's here",
            "LAUNCH_CACHE=/a cache",
            "/opt/it's $HOME; x/python",
            "-m",
            "launcher.agent",
        )
    ]


def test_a_shell_over_there_reads_every_word_as_it_was_meant(
    tmp_path: Path, run: RunDir, opened: Callable[[Plan], SeveralNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = 'it\'s a "$(touch owned)" `touch owned`; touch owned & folder'
    folder = tmp_path / odd
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "python").chmod(0o755)
    (folder / "launcher").symlink_to(Path(launcher.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(folder)
    nodes = opened(plan_on(tmp_path, "elsewhere slots=1\n", f"launch.ssh.python={json.dumps(f'{folder}/python')}"))
    handshake(nodes, lambda event: None)
    argv = (sys.executable, "-c", "import os, sys; print(sys.argv[1], os.getcwd(), os.environ['HF_ODD'])", odd)
    command = NodeCommand("elsewhere", argv, {"HF_ODD": odd}, str(folder))
    monkeypatch.setattr("launcher.nodes.node_commands", lambda *_: (command,))
    nodes.go()
    assert ended_with(nodes) == 0
    assert run.node_log("elsewhere").read_text() == f"{odd} {folder} {odd}\n"
    assert not list(tmp_path.rglob("owned"))


def test_nodes_agree_on_where_they_meet_and_end_together(
    tmp_path: Path, run: RunDir, opened: Callable[[Plan], SeveralNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "'quoted' $HOME")
    monkeypatch.setenv("SECRET", "stays here")
    told: list[dict[str, Any]] = []
    nodes = opened(plan_on(tmp_path, "localhost slots=2\nelsewhere slots=1\n"))
    handshake(nodes, told.append)
    assert nodes.rendezvous is not None
    assert nodes.rendezvous.port > 0
    assert len(nodes.rendezvous.interfaces) == 2
    assert [(row["host"], row["slots"]) for row in told[0]["nodes"]] == [("localhost", 2), ("elsewhere", 1)]
    assert not list(run.path.glob(".word*"))

    commands(monkeypatch, "exec sleep 100", 'echo "$NCCL_DEBUG $SECRET"; exec sleep 100')
    nodes.go()
    log = run.node_log("elsewhere")
    deadline = time.monotonic() + 10
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        nodes.look_after()
        time.sleep(0.02)
    assert log.read_text() == "'quoted' $HOME stays here\n", "the environment is inherited here: it is one machine"
    assert nodes.poll() is None
    nodes.end()
    assert [one.code for one in nodes.connections] == [-signal.SIGINT, -signal.SIGINT]


def test_the_first_node_that_fails_gives_the_code_and_the_others_have_time_for_their_last_words(
    tmp_path: Path, run: RunDir, opened: Callable[[Plan], SeveralNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = opened(plan_on(tmp_path, "localhost slots=2\nelsewhere slots=1\n"))
    handshake(nodes, lambda event: None)
    commands(monkeypatch, "sleep 1; exit 5", "exit 7")
    nodes.go()
    assert ended_with(nodes) == 7
    assert [one.code for one in nodes.connections] == [5, 7]


def test_a_connection_that_breaks_is_a_lost_node(
    tmp_path: Path, run: RunDir, opened: Callable[[Plan], SeveralNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.nodes._LAST_WORDS_SECONDS", 0.1)
    nodes = opened(plan_on(tmp_path, "localhost slots=2\nelsewhere slots=1\n"))
    handshake(nodes, lambda event: None)
    commands(monkeypatch, "exec sleep 100", "exec sleep 100")
    nodes.go()
    nodes.connections[1].process.kill()
    assert ended_with(nodes) == 255
    lost = read_json(run.node_error(1))
    assert (lost["host"], lost["lost"]) == ("elsewhere", "the connection ended (exit code -9)")
    assert lost["where"].endswith("hosts:2")


def test_everything_that_is_wrong_with_any_host_is_said_at_once(
    tmp_path: Path, run: RunDir, opened: Callable[[Plan], SeveralNodes]
) -> None:
    hosts = "".join(f"{host} slots=1\n" for host in ("localhost", "denied", "stranger", "down", "elsewhere"))
    nodes = opened(plan_on(tmp_path, hosts, "launch.ssh.python=/no/python"))
    with pytest.raises(PreflightError) as caught:
        handshake(nodes, lambda event: None)
    text = str(caught.value)
    for place, found, to_type in (
        ("hosts:2: denied", "Permission denied (publickey)", "ssh-copy-id denied"),
        ("hosts:3: stranger", "Host key verification failed", "ssh stranger"),
        ("hosts:4: down", "Connection timed out", "launch.ssh.timeout_s=60"),
        ("hosts:5: elsewhere", "/no/python", "launch.ssh.python=/path/to/python"),
    ):
        assert place in text
        assert found in text.split(place)[1].splitlines()[0]
        assert to_type in text.split(place)[1].splitlines()[1]
    assert "localhost" not in text


def test_another_code_other_packages_and_another_disk_are_found(
    tmp_path: Path, run: RunDir, opened: Callable[[Plan], SeveralNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = opened(plan_on(tmp_path, "localhost slots=2\nelsewhere slots=1\n", "data.path=/no/such.json"))
    monkeypatch.setattr("launcher.handshake.code_hash", lambda: "0" * 64)
    monkeypatch.setattr("launcher.handshake.version_of", lambda name: "1.0")
    monkeypatch.setattr("launcher.agent._LONGEST_CACHE_SECONDS", 0.1)
    wrong = nodes.connect

    def elsewhere() -> None:
        write_atomic(run.word, "another word")
        wrong()

    monkeypatch.setattr(nodes, "connect", elsewhere)
    with pytest.raises(PreflightError) as caught:
        handshake(nodes, lambda event: None)
    text = str(caught.value)
    assert f"hosts:2: elsewhere: has another launcher: the same version, changed (here {launcher.__version__})" in text
    assert "there: pip install torch==1.0" in text
    assert f"run directory {run.path}: is another one of the same name; and there can be no copy of it: holds " in text
    assert "hosts:1: localhost: /no/such.json: is not there" in text


def test_a_launcher_that_waits_for_a_disk_is_not_gone(
    tmp_path: Path, run: RunDir, opened: Callable[[Plan], SeveralNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.nodes._SECONDS_BETWEEN_SIGNS", 0.2)
    patient = "import launcher.agent as a; a.SILENCE_SECONDS = 2.0; a.main()"
    (tmp_path / "bin" / "ssh").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{patient}'\n")
    nodes = opened(plan_on(tmp_path, "elsewhere slots=1\n"))
    handshake(nodes, lambda event: None)
    commands(monkeypatch, "exec sleep 100")
    nodes.go()
    time.sleep(3)
    assert nodes.poll() is None


@pytest.mark.parametrize("how", ["closed", "silent", "told"])
def test_an_agent_ends_what_it_started(run: RunDir, how: str) -> None:
    code = "import launcher.agent as a; a.SILENCE_SECONDS = 1.0; a.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    look = {
        "do": "look",
        "run": str(run.path),
        "rank": 1,
        "ranks": [2, 3],
        "word": "w",
        "kind": "cpu",
        "cwd": "/",
        "paths": [],
        "packages": [],
    }
    write_atomic(run.word, "w")
    child = {
        "do": "start",
        "argv": ["sh", "-c", "echo $$; exec sleep 60"],
        "env": {},
        "cwd": "/nowhere",
        "log": str(run.path / "log"),
    }
    process.stdin.write("".join(json.dumps(message) + "\n" for message in (look, child)).encode())
    process.stdin.flush()
    looked = json.loads(process.stdout.readline())
    assert looked["code"] == code_hash()
    assert looked["shared"] == ""
    deadline = time.monotonic() + 10
    while not (run.path / "log").exists() or not (run.path / "log").read_text():
        assert time.monotonic() < deadline
        if how == "silent":
            time.sleep(0.02)
    pid = int((run.path / "log").read_text())
    if how == "closed":
        process.stdin.close()
    if how == "told":
        process.stdin.write(b'{"do": "end"}\n')
        process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"event": "ended", "code": -signal.SIGINT}
    assert not Path(f"/proc/{pid}").exists()
    process.stdin.close()
    assert process.wait(5) == 0
    process.stdout.close()


def test_an_agent_imports_little_because_hundreds_may_start_at_once() -> None:
    code = "import sys, launcher.agent; print({'pydantic', 'ruamel', 'rich', 'psutil', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_only_what_is_listed_travels() -> None:
    given = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/hf",
        "LAUNCH_CACHE": "/c",
        "http_proxy": "p",
        "PATH": "/bin",
        "AWS_SECRET": "s",
    }
    assert travelling({**given, "CUDA_VISIBLE_DEVICES": "3"}) == {
        name: given[name] for name in ("NCCL_DEBUG", "HF_HOME", "LAUNCH_CACHE", "http_proxy")
    }


@pytest.mark.parametrize(
    "override", ["launch.ssh.user='-oProxyCommand=x'", "launch.ssh.user='a;b'", "launch.ssh.port=0"]
)
def test_no_setting_of_ssh_is_another_option_of_it(override: str) -> None:
    with pytest.raises(LaunchError, match=r"launch\.ssh\."):
        load_recipe(QUICKSTART, [override])


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ([], "has 0 cards, slot 1 is to be used\n  leave it out: --exclude elsewhere"),
        (["A800-80GB"], "has 1 cards, slot 1 is to be used\n  write: elsewhere slots=1"),
        (["A800-80GB", "RTX 4090"], "card 1 is RTX 4090, planned is A800-80GB"),
        (["A800-80GB", "A800-80GB reserved=70GiB"], "card 1 has 10.0 GiB free, 20.0 GiB are planned"),
        (["A800-80GB", "A800-80GB"], ""),
    ],
)
def test_cards_of_another_node_are_those_that_were_planned_for(tmp_path: Path, there: list[str], found: str) -> None:
    (tmp_path / "hosts").write_text("elsewhere slots=2\n")
    (node,) = resolve_cluster("2xA800-80GB", hostfile=str(tmp_path / "hosts")).nodes
    cards = resolve_cluster(tuple(there)).devices if there else ()
    one = Connection(node, 0, subprocess.Popen(["true"]), tmp_path / "log", RunDir(tmp_path))
    one.process.wait()
    problems = [str(problem) for problem in _other_cards(one, 2 * [20 * 2**30], list(cards))]
    assert found in "\n".join(problems)
    assert bool(problems) == bool(found)
