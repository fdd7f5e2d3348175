"""Plans, findings, events and failures in, what a person reads out.

`lines` is the layout, `plan` shows a plan, `run` what happens to it.
"""

from __future__ import annotations

from launcher.show.lines import console, line
from launcher.show.plan import batch, show_code, show_plan, show_stages, show_trust, summary
from launcher.show.run import RunScreen, show_done, show_failure, show_findings, show_resume

__all__ = [
    "RunScreen",
    "batch",
    "console",
    "line",
    "show_code",
    "show_done",
    "show_failure",
    "show_findings",
    "show_plan",
    "show_resume",
    "show_stages",
    "show_trust",
    "summary",
]
