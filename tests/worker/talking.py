"""`launcher.worker.chat` in a rank of the rank server: what it says goes to a file, with the most memory of every device."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from launcher.worker import chat


def talk(argument: dict[str, Any]) -> None:
    """Chat with `argv`; {said, peaks} into the file `out`."""
    out = Path(argument["out"])
    with out.with_suffix(".txt").open("w") as said, contextlib.redirect_stdout(said):
        chat.main(argument["argv"])
    peaks = [torch.accelerator.max_memory_allocated(at) for at in range(argument["devices"])]
    out.write_text(json.dumps({"said": out.with_suffix(".txt").read_text(), "peaks": peaks}))
