"""What all tests share: `pytest --update-golden` writes tests/golden/*.txt anew, to be read in the diff."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

# Tests run two at a time; torch's threads would get into each other's way. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Write tests/golden/*.txt anew instead of comparing.")


@pytest.fixture(scope="session")
def benchmark_named() -> Callable[[str], ModuleType]:
    """A script of benchmarks/, which imports its neighbours as one that is started does."""

    def imported(name: str) -> ModuleType:
        folder = str(Path(__file__).parents[1] / "benchmarks")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)

    return imported


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text is that of tests/golden/<name>.txt, word for word."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"{file} is missing: pytest --update-golden writes it"
        assert text == file.read_text(encoding="utf-8"), f"{file} differs; if that is meant: pytest --update-golden"

    return compare


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory on a new folder: `mounted("ro")`, `mounted("size=64k")`."""
    folders = []

    def mount(options: str) -> Path:
        folder = tmp_path / options
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)
