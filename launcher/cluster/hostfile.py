"""A hostfile in DeepSpeed's format in, hosts and their slots out; every mistake with file and line.

node-a slots=8      # a host that ssh reaches, and how many of its devices are used

Of these a run takes all, or those that --include and --exclude leave, in DeepSpeed's words: `node-a@node-b:0,2` is all of node-a and two
devices of node-b.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import Problem, RecipeError, UsageError

# What ssh takes as a host: a name, an address, user@ before either. Nothing that a shell or an option parser would read otherwise.
_HOST = re.compile(r"(?:[A-Za-z_][\w.-]*@)?(?:[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.%\w]+\]|[0-9A-Fa-f:]+:[0-9A-Fa-f:.]+)")


@dataclass(frozen=True)
class Slots:
    """A host and how many slots it has; `where` is file:line, `chosen` the numbers of those that are used, None for all of them."""

    host: str
    num: int
    where: str
    chosen: tuple[int, ...] | None = None

    @property
    def used(self) -> tuple[int, ...]:
        """The numbers of the slots that are used."""
        return tuple(range(self.num)) if self.chosen is None else self.chosen


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


def choose(hosts: Sequence[Slots], include: str | None, exclude: str | None) -> tuple[Slots, ...]:
    """The hosts and slots that are left, in the order of the file.

    Raises:
        UsageError: a host or slot that the file does not have, both at once, or nothing left.
    """
    if include is None and exclude is None:
        return tuple(hosts)
    flag = f"--include {include}" if include is not None else f"--exclude {exclude}"
    if include is not None and exclude is not None:
        raise UsageError(f"{flag} --exclude {exclude}", "both say which hosts are used", "leave one of them out")
    named = _named(include or exclude or "", hosts, flag)
    kept = []
    for slots in hosts:
        if include is not None:
            used = named.get(slots.host, ())
        else:
            used = tuple(number for number in slots.used if number not in named.get(slots.host, ()))
        if used:
            kept.append(replace(slots, chosen=used))
    if not kept:
        raise UsageError(flag, "no slot of any host is left", "leave it out, or name fewer")
    return tuple(kept)


def _named(text: str, hosts: Sequence[Slots], flag: str) -> dict[str, tuple[int, ...]]:
    """`node-a@node-b:0,2` -> the slots that are meant. A host is one of the file, so an @ or a colon of its name is no riddle."""
    known = {slots.host: slots for slots in hosts}
    names = "|".join(re.escape(host) for host in sorted(known, key=len, reverse=True))
    one = rf"({names})(?::(\d{{1,6}}(?:,\d{{1,6}})*))?"
    if not re.fullmatch(rf"{one}(?:[@\s]+{one})*", text.strip()):
        write = f"{hosts[0].host}, {hosts[0].host}:0 or {hosts[0].host}:0@{hosts[-1].host}"
        raise UsageError(flag, f"is not made of hosts of the hostfile: {', '.join(known)}", f"write it as {write}")
    named: dict[str, tuple[int, ...]] = {}
    for host, numbers in re.findall(rf"{one}(?=[@\s]|$)", text.strip()):
        slots = known[host]
        chosen = tuple(sorted({int(number) for number in numbers.split(",")})) if numbers else slots.used
        if chosen[-1] >= slots.num:
            last = f"{host} has slots 0 to {slots.num - 1} ({slots.where})"
            raise UsageError(flag, f"there is no slot {chosen[-1]}: {last}", "count them from 0")
        named[host] = tuple(sorted({*named.get(host, ()), *chosen}))
    return named


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
