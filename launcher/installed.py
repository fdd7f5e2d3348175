"""Which packages are installed here. By itself, because agents on hundreds of nodes ask before they import anything else."""

from __future__ import annotations

import importlib.metadata


def version_of(package: str) -> str | None:
    """The installed version of a package, which is not imported for that; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
