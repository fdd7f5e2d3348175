"""Faults inside of a save: code that runs in a rank and strikes at its n-th operation of a kind. The product has no hook for it.

Operations are `open`, `write`, `fsync`, `rename`, `mkdir` and `rmtree` of anything below checkpoints/. `KILL` ends the rank there,
`KILL_ALL` the launcher and everything it has started, an `error(…)` is what the system answers, once or from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
KILL_ALL = "kill_all()"
_CODE = '''
import os, pathlib, shutil, signal
from launcher.worker.checkpoint import files

done = 0

def kill_all():
    """The launcher and all that it has started, as a machine does that loses power."""
    stats = {{}}
    for entry in os.listdir("/proc"):
        try:
            stats[int(entry)] = open(f"/proc/{{entry}}/stat").read().rpartition(")")[2].split()
        except (ValueError, OSError):
            pass
    top = os.getpid()
    while b"launcher.cli" not in open(f"/proc/{{top}}/cmdline", "rb").read():
        top = int(stats[top][1])
    family = {{top}}
    while more := {{pid for pid, stat in stats.items() if int(stat[1]) in family}} - family:
        family |= more
    for pid in sorted(family - {{os.getpid()}}):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    os.kill(os.getpid(), signal.SIGKILL)

def error(number):
    raise OSError(number, os.strerror(number))

def watched(name, original, path_of):
    def call(*args, **kwargs):
        global done
        if name == {kind!r} and "/checkpoints/" in str(path_of(args)):
            done += 1
            if done == {number} or ({lasting} and done > {number}):
                if name == "write":
                    original(args[0], memoryview(args[1]).cast("B")[: len(memoryview(args[1]).cast("B")) // 2])
                {action}
        return original(*args, **kwargs)
    return call

def of_descriptor(args):
    try:
        return os.readlink(f"/proc/self/fd/{{args[0]}}")
    except OSError:
        return ""

first = lambda args: args[0]
files.HashedFile.__init__ = watched("open", files.HashedFile.__init__, lambda args: args[1])
files.HashedFile.write = watched("write", files.HashedFile.write, lambda args: args[0]._file.name)
os.fsync = watched("fsync", os.fsync, of_descriptor)
pathlib.Path.rename = watched("rename", pathlib.Path.rename, first)
pathlib.Path.mkdir = watched("mkdir", pathlib.Path.mkdir, first)
shutil.rmtree = watched("rmtree", shutil.rmtree, first)
'''


@dataclass(frozen=True)
class Fault:
    """What happens at which operation.

    Args:
        kind, number: the how manieth of a kind in this rank, from 1 on.
        action: a statement.
        lasting: whether it happens at all later ones too.
    """

    kind: str
    number: int
    action: str
    lasting: bool = False

    @property
    def code(self) -> str:
        """What the rank has to run."""
        return _CODE.format(kind=self.kind, number=self.number, action=self.action, lasting=self.lasting)
