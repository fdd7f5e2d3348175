"""Whether a port can be listened on, and who does so where /proc shows it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from launcher.preflight.finding import Finding

_LISTENS = "0A"  # TCP_LISTEN in include/net/tcp_states.h of Linux, as /proc/net/tcp writes it


def port(number: int | None) -> Iterator[Finding]:
    """`launch.port`; nothing where none is asked for: a free one is taken then."""
    if number is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))  # as torch binds it: on every address
        except OSError as error:
            pid = owner(number)
            by = f" by process {pid} ({_name(pid)})" if pid is not None else ""
            end = f"; or end that process: kill {pid}" if pid is not None else ""
            found = f"cannot be used: {error.strerror}{by}"
            yield Finding("error", f"launch.port: {number}", found, f"take a free one: launch.port=null{end}")
        else:
            yield Finding("ok", f"launch.port: {number}", "is free")


def owner(number: int, proc: Path = Path("/proc")) -> int | None:
    """The process that listens on a port; None where there is none, or it is somebody else's, whose files we may not see."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(number, proc)}
    for folder in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)) if sockets else ():
        if not sockets.isdisjoint(_open_files(folder)):
            return int(folder.name)
    return None


def _open_files(process: Path) -> Iterator[str]:
    """What the descriptors of a process lead to; nothing of one that has ended or is not ours."""
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                yield os.readlink(link)


def _inodes(number: int, proc: Path) -> Iterator[str]:
    """Sockets that listen on a port, as /proc/net/tcp and tcp6 number them."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == number:
                yield fields[9]


def _name(pid: int) -> str:
    try:
        return re.sub(r"\s+", " ", Path(f"/proc/{pid}/comm").read_text()).strip()
    except OSError:
        return "gone by now"
