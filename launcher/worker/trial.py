"""One rank of a trial: on rank 0 a tensor copied between every two cards, then on all of them one all-reduce, compared exactly.

python -m launcher.worker.trial KIND STORE [--no-copies], with RANK and WORLD_SIZE as torchrun sets them. STORE is a file in which the
ranks find one another: no port can be taken. Prints a JSON object a line, each thing before it is done, so that a rank that hangs has
said where.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from launcher.worker.pulse import die_with_parent, first_line

_COPIED_ELEMENTS = 2**20  # 4 MiB of int32
_SUMMED_ELEMENTS = 2**20  # 4 MiB of float32, whole numbers, so that the sum is exact in any order
_PATTERN = 251  # a prime: no power of two of bytes repeats it
NO_COPIES = "--no-copies"
# The launcher ends a trial that stands still long before; this is for a launcher that is itself stopped.
_TIMEOUT = datetime.timedelta(minutes=5)


def main(kind: str, store: str, copies: bool) -> int:
    """Take part in a trial; 0, or 1 after saying what went wrong."""
    die_with_parent()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _say(state="import")
    try:
        _take_part(kind, store, rank, num_ranks, copies)
    except Exception as error:  # noqa: BLE001 - whatever torch or a driver thinks of this machine
        traceback.print_exc()
        _say(state="failed", time=time.time(), error=first_line(error) or type(error).__name__)
        return 1
    return 0


def _take_part(kind: str, store: str, rank: int, num_ranks: int, copies: bool) -> None:
    import torch
    import torch.distributed as dist

    _say(state="device")
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if torch.cuda.device_count() < num_ranks:
            raise RuntimeError(f"torch sees {torch.cuda.device_count()} of {num_ranks} cards")
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1)  # a kernel: fails at once where torch was built for other cards
    if rank == 0 and kind == "cuda" and copies:
        wrong = wrong_copies([torch.device("cuda", index) for index in range(num_ranks)])
        _say(state="copied", wrong=wrong, num_pairs=num_ranks * (num_ranks - 1))
    _say(state="connect")
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=dist.FileStore(store, num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=_TIMEOUT,
    )
    _say(state="all-reduce")
    pattern = torch.arange(_SUMMED_ELEMENTS, dtype=torch.float32, device=device) % _PATTERN
    summed = pattern + rank
    dist.all_reduce(summed)
    expected = num_ranks * pattern + num_ranks * (num_ranks - 1) / 2
    _say(state="done", right=bool(torch.equal(summed.cpu(), expected.cpu())))


def wrong_copies(devices: Sequence[Any], copy: Callable[[Any, Any], Any] | None = None) -> list[tuple[int, int]]:
    """Ordered pairs of devices between which a copy arrives other than it was sent.

    Args:
        copy: (tensor, device) -> the tensor on that device; torch's own copy where it is not given.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    wrong = []
    for source, target in itertools.permutations(range(len(devices)), 2):
        _say(state="copy", pair=(source, target))
        sent = torch.randint(-(2**31), 2**31 - 1, (_COPIED_ELEMENTS,), dtype=torch.int32, generator=generator)
        lying = sent.to(devices[source])  # from and to the host there is no card in between
        arrived = lying.to(devices[target]) if copy is None else copy(lying, devices[target])
        if not torch.equal(arrived.cpu(), sent):
            wrong.append((source, target))
    return wrong


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2], NO_COPIES not in sys.argv)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # leaving a process group in good order takes seconds, and hangs where a card does
