"""The nodes of a run: started, asked, followed and ended. One node is a process of ours; of several each has an agent (`launcher.agent`).

A connection is one ssh, srun, or, for this machine, the agent itself; agent and launcher write JSON to each other through it. The
connection is the lifeline: whichever side goes, the other ends what it has started.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.agent import SILENCE_SECONDS
from launcher.cluster import Node, is_here
from launcher.command import Rendezvous, node_commands, prepare_command
from launcher.connecting import connecting_command, travelling
from launcher.errors import PreflightError
from launcher.mirror import put
from launcher.plan import Plan
from launcher.processes import NodeCommand, end, recorded, start
from launcher.report import last_lines
from launcher.rundir import GO, WAIT, RunDir, read_json, write_json
from launcher.sending import Sending, parcel, size_of

_SECONDS_BETWEEN_SIGNS = 2.0
_POLL_SECONDS = 0.05
# After the first node has failed, for the others to notice it and say how their ranks ended.
_LAST_WORDS_SECONDS = 3.0
# An agent takes up to eight to end what it started.
_END_SECONDS = 10.0
_ERRORS_SHOWN = 12
Listener = Callable[[dict[str, Any]], None]


class OneNode:
    """This machine alone: its command is a process of ours."""

    def __init__(self, plan: Plan, run: RunDir) -> None:
        (command,) = node_commands(plan, run)
        self.run = run
        command = replace(command, argv=(*command.argv, WAIT))
        with run.node_log(command.host).open("ab") as log:
            self.process = start(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)

    def look_after(self) -> None:
        """Nothing: it is a child of this process."""

    def prepare(self, tell: Listener) -> None:
        """Nothing: what was prepared here is all there is."""

    def go(self) -> None:
        """Let the ranks start."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin:  # it has ended: its exit code says why
            self.process.stdin.write(GO)

    def poll(self) -> int | None:
        """The exit code of the node's command; None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """End it, and ranks that outlive it."""
        end(self.process, recorded(self.run))
        assert self.process.stdin is not None
        self.process.stdin.close()


@dataclass
class Connection:
    """One node's agent, seen from here.

    Args:
        run: the launcher's directory of the run, to which a node without it brings back what its ranks write.
        said: what it has said and nobody has looked at yet, by event.
        code: exit code of the node's command, once it has ended; `ended`: when it did, or was lost.
        lost: why the connection is no more; empty while it is. lost_at: when that was noticed, seconds since the epoch.
    """

    node: Node
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    run: RunDir
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: int | None = None
    ended: float = 0.0
    lost: str = ""
    lost_at: float = 0.0
    started: bool = False
    heard: float = field(default_factory=time.monotonic)
    _told: float = 0.0
    _rest: bytes = b""

    @classmethod
    def opened(cls, plan: Plan, run: RunDir, rank: int) -> Connection:
        """Start the agent of a node."""
        node = plan.cluster.nodes[rank]
        log = run.logs / f"{node.host}-connection.log"
        with log.open("ab") as errors:
            process = start(
                connecting_command(plan, node), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
        assert process.stdin is not None
        assert process.stdout is not None
        for stream in (process.stdin, process.stdout):
            os.set_blocking(stream.fileno(), False)
        return cls(node, rank, process, log, run)

    @property
    def name(self) -> str:
        """The host, with its line in the hostfile."""
        return f"{self.node.where}: {self.node.host}" if self.node.where else self.node.host

    def tell(self, **message: Any) -> None:
        """Write a line; nothing to say is a sign of life."""
        self._told = time.monotonic()
        line = json.dumps(message).encode() + b"\n" if message else b"\n"
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # a pipe that is full or closed: `hear` finds out which
            self.process.stdin.write(line)

    def hear(self) -> None:
        """Take in what was said, give a sign of life, and notice where there is none from the other side."""
        if self.lost:
            return
        assert self.process.stdout is not None
        now = time.monotonic()
        while data := self.process.stdout.read(65536):
            self.heard = now
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)
        if data == b"" and self.process.poll() is not None:
            words = last_lines(self.log, 1)
            self._lose(f"{words[0].strip() if words else 'the connection ended'} (exit code {self.process.returncode})")
        elif now - self.heard > SILENCE_SECONDS:
            self._lose(f"no sign of life for {SILENCE_SECONDS:.0f} s")
        elif now - self._told > _SECONDS_BETWEEN_SIGNS:
            self.tell()

    def _take(self, line: bytes) -> None:
        message = _message(line)
        if message.get("event") == "file":
            put(self.run, message)
        elif message:
            message["heard"] = time.time()
            self.said[message["event"]] = message
        if message.get("event") == "ended":
            self.code, self.ended = message["code"], time.monotonic()

    def _lose(self, why: str) -> None:
        self.lost, self.lost_at, self.ended = why, time.time(), self.ended or time.monotonic()


def _message(line: bytes | str) -> dict[str, Any]:
    """What a line says; nothing where it is what a shell over there prints at its start."""
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict) and "event" in message:
            return message
    return {}


def all_of(problems: Sequence[PreflightError]) -> PreflightError:
    """Several errors as one; of very many the first."""
    first, *others = problems
    more = [f"and {len(others) - _ERRORS_SHOWN} more"] if len(others) > _ERRORS_SHOWN else []
    lines = [first.to_type, *map(str, others[:_ERRORS_SHOWN]), *more]
    return PreflightError(first.you_set, first.found, "\n".join(lines))


class SeveralNodes:
    """Nodes with an agent each, in the order of the plan.

    Args:
        asked: called while something is waited for; raises where somebody wants the run to end.
    """

    def __init__(self, plan: Plan, run: RunDir, asked: Callable[[], None]) -> None:
        self.plan, self.run, self.asked = plan, run, asked
        self.word = secrets.token_hex(16)
        self.connections: list[Connection] = []
        self.copies: dict[int, bool] = {}  # nodes that need a copy of the run directory; whether of the data, too
        self._asked_for_stacks = False
        self.rendezvous: Rendezvous | None = None
        self._failed: float | None = None
        self._over = threading.Event()
        self._signs = threading.Thread(target=self._give_signs, daemon=True)

    def connect(self) -> None:
        """Start all agents at once."""
        for rank in range(self.plan.cluster.num_nodes):
            self.connections.append(Connection.opened(self.plan, self.run, rank))
            self.asked()

    def ask(self, event: str, seconds: float, messages: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """Tell nodes something each and wait for their answers; those that did not answer are left out.

        Args:
            event: what the answer is called.
        """
        for rank, message in messages.items():
            self.connections[rank].said.pop(event, None)
            self.connections[rank].tell(**message)
        deadline = time.monotonic() + seconds
        waiting = [self.connections[rank] for rank in messages]
        while waiting and time.monotonic() < deadline:
            self.look_after()
            waiting = [one for one in waiting if event not in one.said and not one.lost]
            self.asked()
            time.sleep(0.02 if waiting else 0)
        return {rank: self.connections[rank].said[event] for rank in messages if event in self.connections[rank].said}

    def prepare(self, tell: Listener) -> None:
        """Have every other machine prepare itself, too: with the same cache that is a look, with disks of its own the whole work.

        Raises:
            PreflightError: one of them cannot, or there is no room for a copy of the run directory.
        """
        self._send_copies(tell)
        others = [one for one in self.connections if not is_here(one.node.host)]
        logs = {one.rank: self.run.logs / f"{one.node.host}-prepare.log" for one in others}
        for one in others:
            self.start_on(one, prepare_command(self.plan, self.run, one.rank), logs[one.rank])
        while any(one.code is None and not one.lost for one in others):
            self.look_after()
            self.asked()
            time.sleep(_POLL_SECONDS)
        problems = [problem for one in others if (problem := self._not_prepared(one, logs[one.rank]))]
        if problems:
            raise all_of(problems)

    def _send_copies(self, tell: Listener) -> None:
        """Give the nodes that do not see the run directory what their ranks read of it."""
        parcels = {rank: parcel(self.plan, self.run, lacks_data) for rank, lacks_data in self.copies.items()}
        on_the_way: dict[int, Sending] = {}
        try:
            for rank, names in parcels.items():
                one = self.connections[rank]
                tell({"event": "sending", "host": one.node.host, "bytes": size_of(self.run, names)})
                on_the_way[rank] = Sending.begun(self.plan, self.run, one.node, names)
            while not all(sending.is_over for sending in on_the_way.values()):
                self.look_after()
                self.asked()
                time.sleep(_POLL_SECONDS)
        finally:
            for sending in on_the_way.values():
                sending.end()
        where = f"its copy of {self.run.path.absolute()}"
        to_type = "mend that, or name a run directory that all hosts share: launch.run_dir=DIR"
        if problems := [
            PreflightError(f"{self.connections[rank].name}: {where}", sending.problem, to_type)
            for rank, sending in on_the_way.items()
            if sending.problem
        ]:
            raise all_of(problems)
        for rank in parcels:
            self.connections[rank].tell(do="mirror")

    def _not_prepared(self, one: Connection, log: Path) -> PreflightError | None:
        if one.lost:
            return PreflightError(one.name, one.lost, f"see {one.log}")
        said = [event for line in last_lines(log) if (event := _message(line)).get("event") == "error"]
        if one.code and said:
            return PreflightError(f"{one.name}: {said[-1]['you_set']}", said[-1]["found"], said[-1]["to_type"])
        if one.code:
            return PreflightError(f"{one.name}: prepare", f"ended with {one.code}", f"see {log}")
        here, there = read_json(self.run.prepared) or {}, read_json(self.run.prepared_on(one.rank)) or {}
        if here.get("rows_key") != there.get("rows_key"):
            return PreflightError(one.name, "its training rows are others than here", "put the same file there")
        return None

    def start_on(self, connection: Connection, command: NodeCommand, log: Path) -> None:
        """Start a command on one node."""
        connection.code, connection.started = None, True
        env = travelling(os.environ) | command.env
        connection.tell(do="start", argv=command.argv, env=env, cwd=command.cwd, log=str(log.absolute()))

    def look_after(self) -> None:
        """Hear all nodes, and give signs of life; to be called every few seconds at least."""
        for connection in self.connections:
            connection.hear()
        if self.copies and not self._asked_for_stacks and self.run.stacks_asked.exists():
            self._asked_for_stacks = True
            for rank in self.copies:
                self.connections[rank].tell(do="stacks")

    def go(self) -> None:
        """Start the ranks, on all nodes."""
        assert self.rendezvous is not None, "made by the handshake"
        commands = node_commands(self.plan, self.run, self.rendezvous)
        with self.run.commands.open("a", encoding="utf-8") as file:
            file.writelines(f"# on {command.host}\n{command}\n" for command in commands)
        for connection, command in zip(self.connections, commands, strict=True):
            self.start_on(connection, command, self.run.node_log(connection.node.host))
        self._signs.start()

    def _give_signs(self) -> None:
        """While ranks run, also where the launcher waits for a shared disk that stands still: no run is to end because of that."""
        while not self._over.wait(_SECONDS_BETWEEN_SIGNS):
            for connection in self.connections:
                connection.tell()

    def poll(self) -> int | None:
        """None while the run goes on; 0 when all nodes have ended well; else the code of the first that did not, 255 for a lost one."""
        self.look_after()
        failed = [one for one in self.connections if one.code or (one.lost and one.code is None)]
        if failed:
            self._failed = self._failed or time.monotonic()
            running = [one for one in self.connections if one.code is None and not one.lost]
            if running and time.monotonic() - self._failed < _LAST_WORDS_SECONDS:
                return None
            self._note_lost()
            return min(failed, key=lambda one: one.ended).code or 255
        return 0 if all(one.code == 0 for one in self.connections) else None

    def _note_lost(self) -> None:
        """Write down which nodes are gone; `report` finds it there."""
        for one in self.connections:
            if one.lost and one.code is None and not self.run.node_error(one.rank).exists():
                told = {"lost": one.lost, "host": one.node.host, "where": one.node.where, "time": one.lost_at}
                with contextlib.suppress(OSError):
                    write_json(self.run.node_error(one.rank), told)

    def end(self) -> None:
        """End everything on all nodes."""
        self._over.set()
        if self._signs.is_alive():
            self._signs.join()
        for connection in self.connections:
            if not connection.lost and connection.code is None:
                connection.tell(do="end")
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline and any(self._is_busy(one) for one in self.connections):
            self.look_after()
            time.sleep(0.02)
        for connection in self.connections:
            for stream in (connection.process.stdin, connection.process.stdout):
                if stream is not None:
                    stream.close()
        # With its input closed an agent ends, and what it started: by itself, also where nobody here can see it.
        deadline = time.monotonic() + 1.0
        for connection in self.connections:
            with contextlib.suppress(subprocess.TimeoutExpired):
                connection.process.wait(max(0.0, deadline - time.monotonic()))
            if connection.process.poll() is None:
                connection.process.kill()
                connection.process.wait()

    @staticmethod
    def _is_busy(connection: Connection) -> bool:
        return connection.started and connection.code is None and not connection.lost
