"""Every error that a person can cause, and the exit code that goes with it.

    LaunchError                 1   (never raised itself)
    ├── UsageError              2   a command line that cannot be carried out
    │   └── RecipeError         2   a recipe with mistakes, all of them at once
    ├── DoesNotFitError         3   the plan needs more memory than a device has
    ├── PreflightError          4   this machine, its files or its ports are not ready
    │   └── DataError           4   rows that cannot be read, with file and line
    ├── RunFailedError          code of the first failing rank (128 + signal when killed)
    └── InterruptedRunError     130 Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, launch stop

A run that stands still (`launcher.stalls`) ends with 124.

An error has three parts: what you set, what was found, what to type. `ValueError` and `assert` are for our own mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LaunchError(Exception):
    """An error with something to type.

    Args:
        you_set: what the person asked for, in their words (`train.global_batch: 100`).
        found: what stands against it.
        to_type: what makes it right, as something that can be typed.
    """

    exit_code = 1

    def __init__(self, you_set: str, found: str, to_type: str) -> None:
        super().__init__(f"{you_set}: {found}\n  {to_type}")
        self.you_set = you_set
        self.found = found
        self.to_type = to_type


class UsageError(LaunchError):
    """A command line that cannot be carried out."""

    exit_code = 2


def counted(num: int, what: str) -> str:
    """`1 device`, `8 devices`, `8,000 devices`."""
    return f"{num:,} {what}{'' if num == 1 else 's'}"


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    Args:
        key: dotted key (`train.lr`), empty where the file as a whole is meant.
        message: what is wrong and what to type.
        where: `file:line:column`, or the override as it was typed; empty until somebody who knows fills it in.
    """

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return "  ".join(
            part for part in (self.where, f"{self.key}: {self.message}" if self.key else self.message) if part
        )


class RecipeError(UsageError):
    """All mistakes of a recipe, one line each: `file:line:column  key: what is wrong. What to type.`"""

    def __init__(self, problems: Sequence[Problem]) -> None:
        num = len(problems)
        super().__init__("recipe", f"{counted(num, 'error')}, nothing was started", "mend the lines above")
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.problems), self.found])


class DoesNotFitError(LaunchError):
    """The plan needs more memory than a device has."""

    exit_code = 3


class PreflightError(LaunchError):
    """This machine, its files or its ports are not ready for the plan."""

    exit_code = 4


class DataError(PreflightError):
    """Rows that cannot be read."""


class RunFailedError(LaunchError):
    """A rank failed; carries that rank's exit code."""

    def __init__(self, you_set: str, found: str, to_type: str, exit_code: int) -> None:
        super().__init__(you_set, found, to_type)
        self.exit_code = exit_code


class InterruptedRunError(LaunchError):
    """Somebody stopped the run."""

    exit_code = 130
