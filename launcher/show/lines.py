"""The column of labels, and numbers as people read them. The only place where bytes become GiB."""

from __future__ import annotations

import os

from rich.console import Console
from rich.markup import escape

from launcher.cluster import GIB

LABEL = 12


def console(stderr: bool = False) -> Console:
    """The console to print on; obeys NO_COLOR, and wraps nothing that goes to a file or a pipe."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def line(screen: Console, label: str, text: str) -> None:
    """`label   text`, the label in a column of its own."""
    screen.print(f"[bold]{escape(label):<{LABEL}}[/bold] {escape(text)}")


def gib(num_bytes: float) -> str:
    """Bytes as GiB with three figures, without the unit."""
    return f"{num_bytes / GIB:.2f}" if num_bytes < 10 * GIB else f"{num_bytes / GIB:.1f}"


def count(number: float) -> str:
    """6,243,584,000 -> 6.24 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """`40 s`, `14 min`, `3 h 20 min`, for an estimate."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def as_typed(path: str) -> str:
    """A path as a person would type it from here."""
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else path
