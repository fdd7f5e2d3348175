"""What the launcher starts on every node of several, by ssh or srun: it looks around, starts the node's command, and ends it.

Both sides write JSON, a line each; the launcher on this process's input, this process on its output. When the input closes, because the
launcher was killed or the connection broke, or nothing comes for `SILENCE_SECONDS`, because the network was cut, everything that was
started here ends. Nothing that comes in is ever given to a shell.

look      what is here: versions, code, devices, clock, and whether the run directory is the launcher's   -> looked
mirror    it is not, and a copy is there by now: from now on bring back what changes in it      -> file, again and again
stacks    the same for the wish that ranks write down where they are, which stands in the launcher's
listen    take a port, and answer there with a word for `reach` while the node is prepared                -> listening
reach     whether an address of the first node answers with that word, and by which interface             -> reached
start     a command, with its log; if it is not the one that prepares, the port is its own now            -> ended
end       end what was started                                                                            -> ended
(empty)   the launcher is there                                                                           -> alive

Only the standard library and a few small modules are imported: this runs before anything else can be relied on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import select
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import launcher
from launcher.installed import version_of
from launcher.mirror import Mirror, occupied
from launcher.processes import NodeCommand, end, recorded, start
from launcher.rundir import RunDir

# Longer than a network takes to find its way around a broken link, shorter than anybody wants to wait.
SILENCE_SECONDS = 20.0
# A shared file system may remember for so long that a file was not there.
_LONGEST_CACHE_SECONDS = 5.0
_REACH_SECONDS = 5.0
_POLL_SECONDS = 0.1
# As often as ranks write their heartbeats.
_SECONDS_BETWEEN_MIRRORINGS = 0.5
_MOST_UNSAID_BYTES = 2**20
_LAST_ROUNDS = 16


class Agent:
    """One node's end of the connection."""

    def __init__(self) -> None:
        self.run = RunDir(Path())
        self.rank, self.ranks = 0, range(0)
        self.word = ""
        self.heard = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self.listener: socket.socket | None = None
        self.callers: list[socket.socket] = []
        self.mirror: Mirror | None = None
        self._mirrored = 0.0
        self._unsaid = bytearray()

    def serve(self) -> None:
        """Do what the launcher says until it is gone; nothing that was started outlives this."""
        for descriptor in (0, 1):  # nobody may wait here for a network that is cut
            os.set_blocking(descriptor, False)
        rest = b""
        try:
            while time.monotonic() - self.heard < SILENCE_SECONDS:
                waits_for: list[Any] = [0] + ([self.listener] if self.listener else [])
                ready, _, _ = select.select(waits_for, [1] if self._unsaid else [], [], _POLL_SECONDS)
                self._speak()
                if self.listener in ready:
                    self._answer()
                if 0 in ready:
                    data = os.read(0, 65536)
                    if not data:
                        return
                    self.heard = time.monotonic()
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._obey(json.loads(line) if line else {})
                if self.process is not None and self.process.poll() is not None:
                    self._end()
                elif time.monotonic() - self._mirrored > _SECONDS_BETWEEN_MIRRORINGS:
                    self._bring_back()
        finally:
            self._end()
            self._last_words()

    def _obey(self, message: dict[str, Any]) -> None:
        what = message.pop("do", None)
        if what is None:
            self.say(event="alive")
        elif what == "look":
            self.say(event="looked", **self.look(message))
        elif what == "listen":
            self.say(event="listening", **self.listen(**message))
        elif what == "reach":
            self.say(event="reached", **reach(**message))
        elif what == "mirror":
            self.mirror = Mirror(self.run)
        elif what == "stacks":
            self.run.stacks_asked.touch()
        elif what == "start":
            self.start(**message)
        elif what == "end":
            self._end()

    def look(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What is here.

        Args:
            asked: `run`, the run directory; `rank` of this node, and the first of its `ranks` and the first
                of the next node's; `word`, which stands in a file that the launcher has just written there;
                `kind`, cuda or cpu; `cwd`, from which relative paths count; `paths` of data and model, which have to be here, too;
                `packages`, whose versions are wanted.
        """
        self.run, self.rank, self.word = RunDir(Path(asked["run"])), asked["rank"], asked["word"]
        self.ranks = range(*asked["ranks"])
        with contextlib.suppress(OSError):
            os.chdir(asked["cwd"])
        return {
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "launcher": launcher.__version__,
            "code": code_hash(),
            "packages": {name: version_of(name) or "none" for name in asked["packages"]},
            "shared": (problem := shared_by(self.run, self.rank, self.word)),
            "occupied": occupied(self.run) if problem else "",
            "missing": [path for path in asked["paths"] if not os.path.exists(path)],
            "clock": time.time(),
            "devices": _devices() if asked["kind"] == "cuda" else None,
            "connection": os.environ.get("SSH_CONNECTION", ""),
        }

    def listen(self, port: int) -> dict[str, Any]:
        """Take a port, 0 for a free one, on every address."""
        try:
            self.listener = socket.create_server(("", port), backlog=1024, family=_family(), dualstack_ipv6=_dual())
        except OSError as error:
            return {"port": 0, "error": str(error.strerror)}
        return {"port": self.listener.getsockname()[1], "interfaces": dict(_interfaces())}

    def _answer(self) -> None:
        assert self.listener is not None
        caller, _ = self.listener.accept()
        with contextlib.suppress(OSError):
            caller.sendall(self.word.encode())
        self.callers.append(caller)  # closed by the other side first, so that the port is free at once

    def start(self, argv: list[str], env: dict[str, str], cwd: str, log: str) -> None:
        """Start a command; the port is kept while the node is prepared."""
        if "launcher.worker.prepare" not in argv:
            self._give_port()
        command = NodeCommand("", tuple(argv), env, cwd if os.path.isdir(cwd) else os.getcwd())
        try:
            with open(log, "ab") as file:
                self.process = start(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        except OSError as error:
            self.say(event="ended", code=127, why=f"{error.filename or argv[0]}: {error.strerror}")

    def _give_port(self) -> None:
        for one in (*self.callers, self.listener):
            if one is not None:
                one.close()
        self.listener = None

    def _end(self) -> None:
        """End what was started, by pid and start time, and say how it ended."""
        if self.process is None:
            return
        process, self.process = self.process, None
        code = process.poll()
        end(process, recorded(self.run, self.rank, self.ranks))
        self._bring_back(_LAST_ROUNDS)
        self.say(event="ended", code=process.returncode if code is None else code)

    def _bring_back(self, rounds: int = 1) -> None:
        """What has changed in a copy of the run directory; later, where the launcher has not taken in the last of it.

        Args:
            rounds: at most so many pieces of each log.
        """
        self._mirrored = time.monotonic()
        if self.mirror is None or (len(self._unsaid) > _MOST_UNSAID_BYTES and rounds == 1):
            return
        for _ in range(rounds):
            changes = list(self.mirror.changes())
            for change in changes:
                self.say(event="file", **change)
            if not changes:
                break

    def say(self, **message: Any) -> None:
        """Tell the launcher; where it is gone, the closed input says so."""
        self._unsaid += json.dumps(message).encode() + b"\n"
        self._speak()

    def _speak(self) -> None:
        try:
            while self._unsaid:
                del self._unsaid[: os.write(1, self._unsaid)]
        except BlockingIOError:
            return  # more when there is room
        except OSError:
            self._unsaid.clear()  # nobody listens any more, and the closed input will say so

    def _last_words(self) -> None:
        deadline = time.monotonic() + 1.0
        while self._unsaid and time.monotonic() < deadline:
            self._speak()
            time.sleep(_POLL_SECONDS / 4)


def code_hash() -> str:
    """sha256 over every .py and .yaml file of this launcher, with its name."""
    folder, digest = Path(launcher.__file__).parent, hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
        if path.relative_to(folder).parts[0] != "_recipes":
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def shared_by(run: RunDir, rank: int, word: str) -> str:
    """Whether the run directory is the launcher's: empty, or what is wrong with it. Leaves a file there that the launcher looks for."""
    deadline = time.monotonic() + _LONGEST_CACHE_SECONDS
    while True:
        try:
            found = run.word.read_text(encoding="utf-8")
            break
        except OSError as error:
            if time.monotonic() > deadline:
                return f"cannot be read: {error.strerror}" if run.path.is_dir() else "is not there"
            time.sleep(_POLL_SECONDS)
    if found != word:
        return "is another one of the same name"
    try:
        run.word_of(rank).write_text(word, encoding="utf-8")
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def reach(address: str, port: int, word: str) -> dict[str, Any]:
    """Whether an address of the first node answers with the word, and the interface by which it is reached."""
    try:
        with socket.create_connection((address, port), _REACH_SECONDS) as connection:
            own, said = connection.getsockname()[0], connection.recv(len(word)).decode(errors="replace")
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    if said != word:
        return {"problem": "somebody else answers"}
    return {"own": own, "interface": interface_of(own), "problem": f"no interface has {own}"}


def interface_of(address: str) -> str | None:
    """The network interface that has an address."""
    return dict(_interfaces()).get(address.partition("%")[0])


def _interfaces() -> list[tuple[str, str]]:
    """(address, name) of every interface; accelerate brings psutil."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return [
        (one.address.partition("%")[0], name)
        for name, found in psutil.net_if_addrs().items()
        for one in found
        if one.family in families
    ]


def _dual() -> bool:
    return socket.has_dualstack_ipv6()


def _family() -> socket.AddressFamily:
    return socket.AF_INET6 if _dual() else socket.AF_INET


def _devices() -> list[dict[str, Any]]:
    """The cards of this node."""
    from launcher.cluster import found_on_this_machine

    found = found_on_this_machine()
    return [device.model_dump(mode="json") for device in found.devices] if found.kind == "cuda" else []


def main() -> None:
    """Serve the launcher at the other end of this process's input and output."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # sent by schedulers to every process of a job: ranks save then
    Agent().serve()


if __name__ == "__main__":
    main()
