"""A hostfile in DeepSpeed's format in, hosts and their slots out; every mistake with file and line.

node-a slots=8      # a host that ssh reaches, and how many of its devices are used
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Problem, RecipeError, UsageError

# What ssh takes as a host: a name, an address, user@ before either. Nothing that a shell or an option parser would read otherwise.
_HOST = re.compile(r"(?:[A-Za-z_][\w.-]*@)?(?:[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.%\w]+\]|[0-9A-Fa-f:]+:[0-9A-Fa-f:.]+)")


@dataclass(frozen=True)
class Slots:
    """A host and how many of its devices are used; `where` is file:line."""

    host: str
    num: int
    where: str


def read_hostfile(path: str) -> tuple[Slots, ...]:
    """The hosts of a file, in its order.

    Raises:
        UsageError: there is no such file, or no host in it.
        RecipeError: lines that are wrong, all of them.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"--hostfile {path}", "is no text", "write a line for each host: node-a slots=8") from None
    except OSError as error:
        to_type = "write it, a line for each host: node-a slots=8"
        raise UsageError(f"--hostfile {path}", f"cannot be read: {error.strerror}", to_type) from None
    hosts: dict[str, Slots] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.partition("#")[0].strip()
        if not bare:
            continue
        found = _slots(bare, f"{path}:{number}")
        if isinstance(found, str):
            problems.append(Problem("hostfile", found, where=f"{path}:{number}:1"))
        elif found.host in hosts:
            first = hosts[found.host].where
            message = f"{found.host} stands in {first} already. Give it one line with all its slots"
            problems.append(Problem("hostfile", message, where=f"{path}:{number}:1"))
        else:
            hosts[found.host] = found
    if problems:
        raise RecipeError(problems)
    if not hosts:
        raise UsageError(f"--hostfile {path}", "there is no host in it", "write a line for each: node-a slots=8")
    return tuple(hosts.values())


def _slots(line: str, where: str) -> Slots | str:
    """The host of a line, or what is wrong with it."""
    host, *options = line.split()
    if not _HOST.fullmatch(host):
        return f"{host!r} is no host name. Write it as: node-a slots=8"
    if len(options) != 1 or not re.fullmatch(r"slots=\d{1,6}", options[0]):
        return f"expected `slots=NUMBER` after {host}, found {' '.join(options) or 'nothing'!r}. Write: {host} slots=8"
    num = int(options[0].removeprefix("slots="))
    if num < 1:
        return f"{host} has no slots. Leave the line out, or write: {host} slots=8"
    return Slots(host, num, where)
