"""A plan and this machine in, Findings out: what stands in the way of a start, each with what to type. Nothing is changed.

    finding      what a check answers with
    packages     installed versions against the ranges of this product; torch's wheel against the cards
    machine      cards, host memory, /dev/shm, limits, the cache
    files        the model's files: all there, and whole
    disk         room for checkpoints, a converted copy, a download
    devices      the cards that a plan is for
    plan         the rest of what one plan needs here
    trial        processes that copy between the cards and add up a tensor, with a time limit
    environment  what is written down in every run

`check` reads files and asks nvidia-smi: milliseconds, before every start. `tried` starts processes that import torch: seconds, for
`launch check` and `launch doctor`.
"""

from __future__ import annotations

from launcher.preflight.devices import placed_cards
from launcher.preflight.environment import environment
from launcher.preflight.finding import Finding, require
from launcher.preflight.machine import diagnose, room_in_host
from launcher.preflight.plan import check
from launcher.preflight.trial import tried

__all__ = ["Finding", "check", "diagnose", "environment", "placed_cards", "require", "room_in_host", "tried"]
