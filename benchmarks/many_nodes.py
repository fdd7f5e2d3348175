"""What does a launcher with 256 hosts of 8 ranks cost? Goals: start-up at most 20 s, 200 MiB, one thread.

    python benchmarks/many_nodes.py [--hosts 256] [--seconds 10] [--out benchmarks/results/many_nodes_<hardware>_<date>.md]

The hosts are this machine: an `ssh` of our own, first on PATH, starts the real agent here, so all 256 share its cores; on real hosts each
agent starts on its own. In place of torchrun every agent starts a script that writes the heartbeats of its eight ranks. The launcher is
the real one: plan, connections, handshake (every node compared and asked whether it reaches the first), commands, and the supervisor's
loop, which looks after all connections ten times a second and reads all heartbeats as often as it does in a run.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

from page import Page

from launcher.cluster import resolve_cluster
from launcher.handshake import handshake
from launcher.modelshape import shape_of
from launcher.nodes import SeveralNodes
from launcher.plan import Plan, make_plan
from launcher.processes import NodeCommand
from launcher.recipe import find_recipe, load_recipe
from launcher.rundir import RunDir, read_json

GOAL_SECONDS, GOAL_MIB = 20.0, 200.0
RANKS = 8
_SSH = """\
#!/bin/sh
while [ "$1" != "--" ]; do shift; done
shift 2
exec sh -c "$*"
"""
_BEATS = """\
for local in 0 1 2 3 4 5 6 7; do
  rank=$((NODE * 8 + local))
  echo '{"pid": '$$', "started": 1, "rank": '$rank', "node": '$NODE', "phase": "train", "step": 1, "time": 1}' > "$BEATS/$rank.json"
done
exec sleep 600
"""
_POLL_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="How long the supervisor's loop is measured.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    page = Page("Many nodes", __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="launch-many-") as name:
        rows = measure(Path(name), options.hosts, options.seconds)
    page.table(["what", "value"], rows)
    page.finish(options.out)


def measure(folder: Path, num_hosts: int, loop_seconds: float) -> list[tuple[str, str]]:
    """Start, follow, end; rows of the table."""
    (folder / "ssh").write_text(_SSH)
    (folder / "ssh").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    started = time.monotonic()
    run, plan = RunDir(folder / "run"), _plan(folder, num_hosts)
    run.create()
    planned = time.monotonic() - started
    nodes = SeveralNodes(plan, run, lambda: None)
    try:
        handshake(nodes, lambda event: None)
        shaken = time.monotonic() - started
        _go(nodes, run)
        while len(list(run.heartbeats.glob("*.json"))) < num_hosts * RANKS:
            nodes.look_after()
            time.sleep(_POLL_SECONDS)
        up = time.monotonic() - started
        share = _loop(nodes, run, loop_seconds)
        ending = time.monotonic()
    finally:
        nodes.end()
    ended = time.monotonic() - ending
    assert all(one.code is not None for one in nodes.connections), "an agent did not say how its command ended"
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    threads = len(list(Path("/proc/self/task").iterdir()))
    verdict = "met" if up <= GOAL_SECONDS and mib <= GOAL_MIB and threads == 1 else "MISSED"
    return [
        ("hosts × ranks", f"{num_hosts} × {RANKS}"),
        ("planned after", f"{planned:.1f} s"),
        ("handshake done after", f"{shaken:.1f} s"),
        ("all ranks up after", f"{up:.1f} s (goal {GOAL_SECONDS:.0f} s)"),
        ("memory of the launcher, most", f"{mib:.0f} MiB (goal {GOAL_MIB:.0f} MiB)"),
        ("threads of the launcher", f"{threads}"),
        ("one core's share while it follows", f"{share:.0%}"),
        ("all ended after", f"{ended:.1f} s"),
        ("goals", verdict),
    ]


def _plan(folder: Path, num_hosts: int) -> Plan:
    hosts = "".join(f"node-{number} slots={RANKS}\n" for number in range(num_hosts))
    (folder / "hosts").write_text(hosts)
    loaded = load_recipe(find_recipe("quickstart").resolve(), [f"train.global_batch={num_hosts * RANKS}"])
    cluster = resolve_cluster(f"{RANKS}xcpu", hostfile=str(folder / "hosts"))
    return make_plan("many", loaded.recipe, cluster, shape_of(loaded.recipe.model, folder))


def _go(nodes: SeveralNodes, run: RunDir) -> None:
    """Start the script on every node in place of torchrun."""
    for connection in nodes.connections:
        env = {"NODE": str(connection.rank), "BEATS": str(run.heartbeats)}
        command = NodeCommand(connection.node.host, ("sh", "-c", _BEATS), env, "/")
        nodes.start_on(connection, command, run.node_log(connection.node.host))


def _loop(nodes: SeveralNodes, run: RunDir, loop_seconds: float) -> float:
    """CPU seconds a second of the loop that follows a run."""
    until, before = time.monotonic() + loop_seconds, time.process_time()
    looked = 0.0
    while time.monotonic() < until:
        assert nodes.poll() is None, "a node has ended"
        if time.monotonic() - looked > 1.0:
            looked = time.monotonic()
            assert all(read_json(path) for path in run.heartbeats.glob("*.json"))
        time.sleep(_POLL_SECONDS)
    return (time.process_time() - before) / loop_seconds


if __name__ == "__main__":
    main()
