"""After which failures a run is started again. With real ranks: tests/e2e/test_restarts.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.report import Failure
from launcher.restarts import why_no_restart

KILLED = Failure(
    rank=1,
    host="a",
    device="cpu",
    step=7,
    phase="train",
    time=1.0,
    cause="killed by somebody (SIGKILL)",
    where="",
    traceback="",
    exit_code=137,
    log="",
    parts={},
    echoes=(0,),
)
NAN = replace(KILLED, parts={"you_set": "train.lr: 1", "found": "the loss is nan", "to_type": "train.lr=0.1"})
STALLED = replace(KILLED, cause="no sign of life for 12 s", parts={"you_set": "", "found": "…", "to_type": "…"})
MEMORY = replace(KILLED, cause="torch.OutOfMemoryError: tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("failure", "before", "why"),
    [
        (KILLED, [], None),
        (STALLED, [], None),
        (NAN, [], "the same settings would fail again"),
        (MEMORY, [], "as much memory again"),
        (KILLED, [KILLED], "at step 7 for the second time"),
        (replace(STALLED, cause="no sign of life for 14 s"), [STALLED], "for the second time"),
        (replace(KILLED, step=8), [KILLED], None),
        (STALLED, [KILLED], None),
        (replace(KILLED, step=9), [KILLED, STALLED], "launch.max_restarts: 2 are used up"),
    ],
)
def test_what_is_worth_a_restart(failure: Failure, before: list[Failure], why: str | None) -> None:
    said = why_no_restart(failure, before, most=2)
    assert said is None if why is None else said is not None and said.endswith(why)
