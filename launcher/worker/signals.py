"""SIGTERM and SIGUSR1 to a rank: noted, for the end of the step (`requests`).

torchrun ends ranks by SIGTERM too, where another one has failed. Such a rank may wait for that one and would never come to the end of a
step; so who has sent a signal is looked at, and a SIGTERM of torchrun ends a rank as ever.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection

_NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[int] = []


def hold() -> None:
    """Let the two signals wait."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


def listen(enders: Collection[int]) -> None:
    """Take SIGTERM and SIGUSR1 over for the rest of this process. Call it before there is any other thread.

    Args:
        enders: pids of those whose SIGTERM ends this process at once.
    """
    for number in (signal.SIGINT, *_NUMBERS):
        signal.signal(
            number, signal.SIG_DFL
        )  # whatever was inherited; SIGINT comes from the supervisor and ends a rank
    hold()
    threading.Thread(target=_wait, args=(frozenset(enders),), daemon=True).start()


def _wait(enders: frozenset[int]) -> None:
    while True:
        found = signal.sigwaitinfo(_NUMBERS)
        if found.si_signo == signal.SIGTERM and found.si_pid in enders:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            os.kill(os.getpid(), signal.SIGTERM)
        _received.append(found.si_signo)


def received() -> int:
    """The number of the first signal, 0 for none."""
    return _received[0] if _received else 0
