"""What every results page begins with: the question, the hardware, the versions, the date and the command that repeats it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

_PACKAGES = ("launch-trainer", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")


class Page:
    """A results page that grows while the script measures; `finish` prints it or writes it to a file."""

    def __init__(self, title: str, question: str) -> None:
        self.lines = [f"# {title}", "", question.strip(), ""]
        self.load_before = os.getloadavg()[0]
        self.started = time.monotonic()

    def section(self, title: str, *text: str) -> None:
        """A heading and paragraphs below it."""
        self.lines += [f"## {title}", ""]
        for paragraph in text:
            self.lines += [paragraph, ""]

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table: words to the left, everything behind them to the right."""
        self.lines += [_row(columns), _row([":--", *["--:"] * (len(columns) - 1)])]
        self.lines += [_row(row) for row in rows]
        self.lines += [""]

    def finish(self, out: Path | None) -> None:
        """Add where and when it was measured; print the page, or write it."""
        self.section("Where and when")
        self.table(["what", "value"], self._circumstances())
        text = "\n".join(self.lines)
        if out is None:
            print(text)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        print(f"wrote {out}", file=sys.stderr)

    def _circumstances(self) -> list[tuple[str, str]]:
        versions = [f"{name} {found}" for name in _PACKAGES if (found := _version(name))]
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        load = (
            f"{self.load_before:.1f} before, {os.getloadavg()[0]:.1f} after (one minute's average, with what ran here)"
        )
        command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
        return [
            ("processor", f"{_processor()}, {len(os.sched_getaffinity(0))} cores"),
            ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"),
            ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
            ("versions", ", ".join(versions)),
            ("commit", commit.stdout.strip() or "no git here"),
            ("load", load),
            ("date", time.strftime("%Y-%m-%d %H:%M %Z")),
            ("measured for", f"{time.monotonic() - self.started:.0f} s"),
            ("to repeat", f"`{command}`"),
        ]


def environment() -> dict[str, str]:
    """The environment for what is measured: Python may keep its bytecode, as in every ordinary installation."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def seconds(values: Iterable[float], digits: int = 3) -> str:
    """Raw numbers for a cell."""
    return " ".join(f"{value:.{digits}f}" for value in values)


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The model name that Linux gives the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
