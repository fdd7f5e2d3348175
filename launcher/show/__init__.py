"""Plans, findings, events and failures in, what a person reads out.

`lines` is the layout, `plan` shows a plan, `run` what happens to it, `checkpoints` what it has saved, `status` how it
stands from outside.
"""

from __future__ import annotations

from launcher.show.checkpoints import show_checkpoints
from launcher.show.lines import console, line
from launcher.show.plan import batch, show_chat, show_code, show_plan, show_stages, show_trust, summary
from launcher.show.run import (
    RunScreen,
    show_changes,
    show_done,
    show_failure,
    show_findings,
    show_rehearsal,
    show_rehearsed,
    show_resume,
    show_stopped,
    show_submitted,
)
from launcher.show.status import show_detached, show_left, show_report, show_status

__all__ = [
    "RunScreen",
    "batch",
    "console",
    "line",
    "show_changes",
    "show_chat",
    "show_checkpoints",
    "show_code",
    "show_detached",
    "show_done",
    "show_failure",
    "show_findings",
    "show_left",
    "show_plan",
    "show_rehearsal",
    "show_rehearsed",
    "show_report",
    "show_resume",
    "show_stages",
    "show_status",
    "show_stopped",
    "show_submitted",
    "show_trust",
    "summary",
]
