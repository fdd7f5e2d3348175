"""Machines that are reached by ssh, made of this one: each a network namespace with its own names, processes and sshd; one disk for all.

Every host has a PID namespace of its own, so that nothing which is ended on one by its name could reach another, or this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

IPV4, IPV6 = ("10.231.7.1", "10.231.7.2"), ("fd00:231::1", "fd00:231::2")
NEEDED = ("ip", "unshare", "nsenter", "mount", "ssh", "ssh-keygen", "sshd")
SSHD = """\
Port 22
HostKey {key}
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PasswordAuthentication no
"""
# As a machine sees itself and others after Debian's installer: its own name is 127.0.1.1.
BOOT = """\
set -e
hostname {name}
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind {folder}/hosts /etc/hosts
mkdir -p ~root/.ssh
mount --bind {folder}/ssh ~root/.ssh
exec {sshd} -D -e -f {folder}/sshd_config
"""


@dataclass
class Host:
    """One of them; `process` is the unshare whose end is the end of the host."""

    name: str
    address: str
    space: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def init(self) -> int:
        """The pid, as this machine counts, of the first process of the host."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def inside(self, argv: Sequence[str], folder: Path = Path("/")) -> list[str]:
        """The command that runs another one on this host, in a folder."""
        enter = ["nsenter", "--target", str(self.init), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return [*enter, "--", "env", f"--chdir={folder}", *argv]

    def processes(self) -> set[int]:
        """The pids, as this machine counts, of everything on the host but its sshd: what is started there, by whom ever."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(folder / "ns" / "pid") == space and "sshd" not in (folder / "comm").read_text():
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    found |= {int(folder.name)} if state != "Z" else set()
        return found

    def unplug(self) -> None:
        """Take the network cable out."""
        subprocess.run(["ip", "-n", self.space, "link", "set", "lan0", "down"], check=True)


def why_not() -> str:
    """Why there can be no hosts here; empty where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"hosts want {', '.join(missing)}"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    probe = f"launch-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return f"no network namespace can be made: {made.stderr.strip()}" if made.returncode else ""


@contextlib.contextmanager
def two_hosts(folder: Path, addresses: tuple[str, str] = IPV4) -> Iterator[tuple[Host, Host]]:
    """node-a and node-b, joined by a cable; each knows the other's name and key."""
    if reason := why_not():
        pytest.skip(reason)
    names = ("node-a", "node-b")
    spaces = [f"launch-{os.getpid()}-{name}" for name in names]
    with contextlib.ExitStack() as cleanup:
        for space in spaces:
            subprocess.run(["ip", "netns", "add", space], check=True)
            cleanup.callback(subprocess.run, ["ip", "netns", "del", space], check=True)
        cable = ["link", "add", "lan0", "type", "veth", "peer", "name", "lan0", "netns", spaces[1]]
        subprocess.run(["ip", "-n", spaces[0], *cable], check=True)
        _keys(folder)
        hosts = []
        for place in (0, 1):
            others = {names[1 - place]: addresses[1 - place]}
            host = _boot(folder, names[place], addresses[place], spaces[place], others)
            cleanup.callback(_switch_off, host)
            hosts.append(host)
        for host in hosts:
            _wait_for_sshd(host)
        yield hosts[0], hosts[1]


def _keys(folder: Path) -> None:
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)


def _boot(folder: Path, name: str, address: str, space: str, others: dict[str, str]) -> Host:
    own = folder / name
    (own / "ssh").mkdir(parents=True)
    own_key = (folder / "host_key.pub").read_text()
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *(f"{where} {other}" for other, where in others.items())]
    (own / "hosts").write_text("\n".join(lines) + "\n")
    (own / "ssh" / "config").write_text(f"IdentityFile {folder / 'key'}\nUserKnownHostsFile {own / 'ssh' / 'known'}\n")
    (own / "ssh" / "known").write_text("".join(f"{other},{where} {own_key}" for other, where in others.items()))
    (own / "sshd_config").write_text(SSHD.format(key=folder / "host_key", folder=folder))
    own_address = [f"{address}/64", "dev", "lan0", "nodad"] if ":" in address else [f"{address}/24", "dev", "lan0"]
    for command in (["addr", "add", *own_address], ["link", "set", "lan0", "up"]):
        subprocess.run(["ip", "-n", space, *command], check=True)
    boot = BOOT.format(name=name, folder=own, sshd=shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin"))
    apart = ["unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (own / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", space, *apart, "bash", "-c", boot], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    return Host(name, address, space, own, process)


def _wait_for_sshd(host: Host) -> None:
    deadline = time.monotonic() + 10
    while "Server listening" not in (said := (host.folder / "sshd.log").read_text()):
        if host.process.poll() is not None or time.monotonic() > deadline:
            pytest.skip(f"no sshd in a namespace here: {said.strip()[-300:]}")
        time.sleep(0.02)


def _switch_off(host: Host) -> None:
    """sshd as the first process of a namespace ignores SIGTERM; with it everything on the host goes."""
    if host.process.poll() is None:
        host.process.send_signal(signal.SIGKILL)
    host.process.wait()
