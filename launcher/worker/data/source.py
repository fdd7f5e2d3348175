"""Data files in, their rows out one after the other, endlessly and from any place on; never more than a line or a row group is in memory.

Files lie on a disk or wherever fsspec can open them (`https://…`, `hf://datasets/…`). JSON Lines and text are gone on with at a byte,
Parquet at a row group. When all files are through they come again, in another order: that is a round.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from launcher.errors import DataError
from launcher.recipe.schema import Data
from launcher.worker.data.rows import RawRow, data_files

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Place:
    """Where a stream is: before the row that comes next.

    Args:
        round: how often all files have been through; file: in the order of this round.
        at: the byte of a text file, the row of a Parquet file; line: how many lines came before it.
        taken: rows of this round so far.
    """

    round: int = 0
    file: int = 0
    at: int = 0
    line: int = 0
    taken: int = 0

    def as_json(self) -> dict[str, int]:
        return asdict(self)


class Source:
    """The rows of a recipe whose `data.streaming` is true.

    Args:
        seed: decides the order of the files in each round.

    Raises:
        DataError: a file is not there, or cannot be read bit by bit.
    """

    def __init__(self, data: Data, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.files = stream_files(data)

    def rows(self, place: Place) -> Iterator[tuple[RawRow, Place]]:
        """Every row from a place on, with the place behind it; there is no end.

        Raises:
            DataError: no file holds any row, or one of them cannot be read.
        """
        while True:
            files = list(self.files)
            random.Random(f"{self.seed} {place.round}").shuffle(files)
            for row, at in self._round(files, place):
                place = at
                yield row, at
                if at.taken == self.data.max_rows:
                    break
            if place.taken == 0:
                raise DataError(f"data.path: {_named(self.data)}", "holds no rows", "check data.path and data.format")
            place = Place(round=place.round + 1)

    def _round(self, files: list[str], place: Place) -> Iterator[tuple[RawRow, Place]]:
        taken = place.taken
        for number in range(place.file, len(files)):
            at, line = (place.at, place.line) if number == place.file else (0, 0)
            for row, at, line in _rows_of(files[number], at, line):  # noqa: B020 - each says where the next one begins
                taken += 1
                yield row, Place(place.round, number, at, line, taken)


def is_remote(path: str) -> bool:
    """Whether a data path is an address and no file of this machine."""
    return "://" in path


def stream_files(data: Data) -> list[str]:
    """The files and addresses behind data.path, in name order.

    Raises:
        DataError: a path is not there, or a file can only be read whole.
    """
    files: list[str] = []
    for path in [data.path] if isinstance(data.path, str) else data.path:
        files += [path] if is_remote(path) else [str(file) for file in data_files(path)]
    for file in files:
        if _ending(file) == ".json" and _begins_array(file):
            lines = Path(file).with_suffix(".jsonl").name
            raise DataError(
                f"data.path: {file}",
                "is one JSON array, which can only be read whole",
                f"write one object a line (jq -c '.[]' {file} > {lines}), or set data.streaming=false",
            )
    return files


def _rows_of(file: str, at: int, line: int) -> Iterator[tuple[RawRow, int, int]]:
    """The rows of a file from a place on, each with the place behind it."""
    try:
        if _ending(file) == ".parquet":
            yield from _parquet(file, at)
        else:
            yield from _lines(file, at, line)
    except (
        OSError,
        ImportError,
        ValueError,
    ) as error:  # of fsspec: a package that is missing, a protocol that it does not know
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"data.path: {file}", f"cannot be read: {reason}", "check that it can be read from here"
        ) from None


def _lines(file: str, at: int, line: int) -> Iterator[tuple[RawRow, int, int]]:
    """JSON Lines, or text with a row a line."""
    is_text = _ending(file) == ".txt"
    with _open(file) as stream:
        stream.seek(at)
        for raw in stream:
            begin, at, line = at, at + len(raw), line + 1
            text = (raw.removeprefix(_BOM) if begin == 0 else raw).strip()
            if not text:
                continue
            where = f"{file}:{line}"
            try:
                decoded = text.decode("utf-8")
                yield RawRow(where, {"text": decoded} if is_text else json.loads(decoded)), at, line
            except UnicodeDecodeError:
                yield RawRow(where, None, "is not UTF-8"), at, line
            except json.JSONDecodeError as error:
                yield RawRow(where, None, f"is no valid JSON: {error.msg}"), at, line


def _parquet(file: str, at: int) -> Iterator[tuple[RawRow, int, int]]:
    """Parquet, a row group at a time; those before the place are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(file) as stream:
            table = pq.ParquetFile(stream)
            begin = 0
            for group in range(table.num_row_groups):
                end = begin + table.metadata.row_group(group).num_rows
                if at < end:
                    values = table.read_row_group(group).slice(at - begin).to_pylist()
                    for at, value in enumerate(values, at + 1):  # noqa: B020
                        yield RawRow(f"{file}:row {at}", value), at, 0
                begin = end
    except pa.ArrowException as error:
        raise DataError(f"data.path: {file}", f"is no valid Parquet: {str(error).strip()}", "write it again") from None


def _open(file: str) -> IO[bytes]:
    if not is_remote(file):
        return Path(file).open("rb")
    import fsspec

    opened: IO[bytes] = fsspec.open(file, "rb").open()
    return opened


def _begins_array(file: str) -> bool:
    """Whether it is one JSON array; one that cannot be opened is found out when it is read."""
    with suppress(OSError), _open(file) as stream:
        return stream.read(4096).removeprefix(_BOM).lstrip()[:1] == b"["
    return False


def _ending(file: str) -> str:
    return Path(file.partition("?")[0]).suffix.lower()


def _named(data: Data) -> str:
    return data.path if isinstance(data.path, str) else ", ".join(data.path)


def described(file: str) -> list[Any]:
    """What tells a file from another without reading it: name, size and time of the last change; an address by itself."""
    if is_remote(file):
        return [file]
    found = Path(file).stat()
    return [Path(file).name, found.st_size, found.st_mtime_ns]
