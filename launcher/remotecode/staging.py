"""Remote code in; a folder of the run that holds exactly it, compiled and read-only, out.

    RUN/code/<first 16 of its sha256>/configuration_x.py, modeling_x.py, __pycache__/…

Written under a temporary name and renamed, so the folder is whole or not there: no lock is needed, two preparations at once may
both work, and one that is killed leaves only a temporary name. Ranks read; `Staged.read` gives them no byte that is not in the table.
"""

from __future__ import annotations

import hashlib
import os
import py_compile
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from launcher.errors import PreflightError
from launcher.remotecode.finding import RemoteCode
from launcher.rundir import rename_or_yield


class Staged(BaseModel):
    """Code that was staged.

    Args:
        folder: where it is.
        code: what was found in the model folder, and checked against the pin.
        table: sha256 of every file in the folder, compiled ones included.
        fixes: names of what `launcher.compat` mends about its classes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    code: RemoteCode
    table: dict[str, str]
    fixes: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """The Python package that the folder is imported as: another one for other code."""
        return f"launch_code_{self.code.sha256[:16]}"

    def read(self, path: str | os.PathLike[str]) -> bytes:
        """The bytes of a file of the folder.

        Raises:
            OSError: it is not there.
            PreflightError: it is not what was staged.
        """
        data = Path(path).read_bytes()
        name = Path(os.path.relpath(path, self.folder)).as_posix()
        if self.table.get(name) != hashlib.sha256(data).hexdigest():
            raise PreflightError(
                f"code of this run in {self.folder}",
                f"{name} is not what was staged there",
                f"remove it, then go on: chmod -R u+w {self.folder}; rm -r {self.folder}; launch resume RUN",
            )
        return data


def stage(code: RemoteCode, sources: Mapping[str, bytes], root: Path, fixes: tuple[str, ...] = ()) -> Staged:
    """Put code below `root`, which is read-only afterwards.

    Raises:
        PreflightError: the folder is there already and holds something else.
    """
    target = root / code.sha256[:16]
    root.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        temporary = root / f".{target.name}.{os.getpid()}.tmp"
        _forget(temporary)  # of a process that had this pid before and was killed
        try:
            _write(sources, temporary, target)
            rename_or_yield(temporary, target)  # somebody else's is held against the same checksums below
        finally:
            _forget(temporary)
    staged = Staged(folder=str(target), code=code, table=listing(target), fixes=fixes)
    for file in code.files:
        if staged.table.get(file.name) != file.sha256:
            raise PreflightError(
                f"code of this run in {target}",
                f"{file.name} is not what the plan names",
                f"remove it, then go on: chmod -R u+w {target}; rm -r {target}; launch resume RUN",
            )
    return staged


def listing(folder: Path) -> dict[str, str]:
    """Path below a folder -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write(sources: Mapping[str, bytes], into: Path, final: Path) -> None:
    for name, source in sources.items():
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())
        compiled = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
        # By hash of the source, not by its time: a copy of the run directory keeps one and not the other.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        py_compile.compile(
            str(path), cfile=str(compiled), dfile=str(final / name), doraise=True, invalidation_mode=mode
        )
    for path in [*into.rglob("*"), into]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def _forget(folder: Path) -> None:
    """Remove a temporary folder, which may be read-only already."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
