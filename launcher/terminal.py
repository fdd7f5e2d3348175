"""Letters that a terminal cannot show (PYTHONIOENCODING=ascii, LANG=C): one that is like them instead of a traceback."""

from __future__ import annotations

import codecs
import io
import sys

_LIKE = str.maketrans(
    {"█": "#", "▒": "=", "░": ".", "×": "x", "·": "|", "–": "-", "…": "...", "→": "->", "←": "<-", "✓": "v"}
)


def plain_letters() -> None:
    """Make both streams write what they can."""
    codecs.register_error("plainly", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plainly")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """The error handler of a codec: what is written instead, and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end].translate(_LIKE)
    return letters.encode("ascii", "replace").decode(), error.end
