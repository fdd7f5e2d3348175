"""What a check answers with: one Finding a thing that was looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from launcher.cluster import GIB, MIB
from launcher.errors import PreflightError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `to_type` is empty where all is well, and never where it is not."""

    level: Literal["ok", "warning", "error"]
    what: str
    found: str
    to_type: str = ""


def require(findings: Iterable[Finding], listed: bool = False) -> None:
    """Raise the first error among the findings.

    Args:
        listed: whether the person has seen them all.

    Raises:
        PreflightError: there is one; further ones are counted.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        if listed:
            raise PreflightError("this machine", f"is not ready: {len(errors)} of the above", "mend what is marked ✗")
        more = f"\n  and {len(errors) - 1} more, which `launch check` lists" if len(errors) > 1 else ""
        raise PreflightError(errors[0].what, errors[0].found, errors[0].to_type + more)


def size(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
