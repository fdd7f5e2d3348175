"""Data files in, conversations out, every bad row named with file and line.

A conversation is a list of {role, content} messages; plain text is one message of the role `text`. Reads JSON (an array, or one object
a line), Parquet, text files and folders of them.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.recipe.schema import Data

Message = dict[str, str]
_ENDINGS = (".json", ".jsonl", ".parquet", ".txt")
_ROLES = ("system", "user", "assistant")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_MANY = 20


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in a file; `where` is file:line, `problem` why it is no JSON."""

    where: str
    value: Any
    problem: str | None = None


class BadRowError(Exception):
    """A row that is no conversation; the message says why."""


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Give errors about files the recipe's key that names them, where it is not data.path."""
    try:
        yield
    except DataError as error:
        you_set, to_type = (text.replace("data.path", key, 1) for text in (error.you_set, error.to_type))
        raise DataError(you_set, error.found, to_type) from None


def data_files(paths: str | Sequence[str]) -> list[Path]:
    """The files behind a path, a folder or a list of both, in name order.

    Raises:
        DataError: a path is not there, or a folder has no data file.
    """
    files: list[Path] = []
    for name in [paths] if isinstance(paths, str) else paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.suffix.lower() in _ENDINGS and item.is_file())
            if not inside:
                raise DataError(
                    f"data.path: {path}",
                    "the folder holds no data file",
                    f"put files there that end in {', '.join(_ENDINGS)}",
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(
                f"data.path: {path}", "there is no such file or folder", "give the path of your data: data.path=FILE"
            )
    return files


def read_conversations(
    data: Data, paths: str | Sequence[str], places: list[str] | None = None
) -> tuple[list[list[Message]], list[str]]:
    """All conversations of the files, and a line for every row that was left out under `bad_rows: skip`.

    Args:
        places: where each conversation stands is added to it, as `alpaca.json 8812`: of an array, which may be one line, the element,
            else the line that is not empty; counted from 1.

    Raises:
        DataError: rows are bad and `bad_rows` is `error` (names the first ones), or nothing is left.
    """
    conversations: list[list[Message]] = []
    bad: list[str] = []
    numbered = ((file, *each) for file in data_files(paths) for each in enumerate(read_rows(file), 1))
    for file, number, row in numbered:
        try:
            if row.problem is not None:
                raise BadRowError(row.problem)
            conversations.append(to_conversation(row.value, data))
            if places is not None:
                places.append(f"{file.name} {number}")
        except BadRowError as error:
            bad.append(f"{row.where}  {error}")
        if len(conversations) == data.max_rows:
            break
    refuse_bad(data, paths, conversations, bad)
    return conversations, bad


def refuse_bad(
    data: Data, paths: str | Sequence[str], conversations: Sequence[list[Message]], bad: Sequence[str]
) -> None:
    """Raise where rows are bad and `bad_rows` is `error` (names the first ones), or nothing is left.

    Raises:
        DataError: so it is.
    """
    shown_paths = paths if isinstance(paths, str) else ", ".join(paths)
    if bad and data.bad_rows == "error":
        shown = "\n".join(f"    {line}" for line in bad[:_MANY])
        more = f"\n    … and {len(bad) - _MANY:,} more" if len(bad) > _MANY else ""
        raise DataError(
            f"data.path: {shown_paths}",
            f"{len(bad):,} bad row{'s' if len(bad) > 1 else ''}\n{shown}{more}",
            "mend them, or leave them out with: data.bad_rows=skip",
        )
    if not conversations:
        found = f"none of its {len(bad):,} rows can be used; the first: {bad[0]}" if bad else "holds no rows"
        raise DataError(f"data.path: {shown_paths}", found, "check data.path and data.format")


def read_rows(file: Path) -> Iterator[RawRow]:
    """The rows of one file with their places.

    Raises:
        DataError: the file is no text, or an array that is no JSON, at a line that is named.
    """
    ending = file.suffix.lower()
    if ending == ".parquet":
        yield from _read_parquet(file)
        return
    text = _read_text(file)
    if ending == ".txt":
        yield from (
            RawRow(f"{file}:{number}", {"text": line.removesuffix("\r")})
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        )
    elif text.lstrip()[:1] == "[":
        yield from _read_array(file, text)
    else:
        yield from _read_lines(file, text)


def to_conversation(value: Any, data: Data) -> list[Message]:
    """A row of the recipe's format as a conversation.

    Raises:
        BadRowError: a field is missing, of the wrong type or empty.
    """
    if not isinstance(value, dict):
        raise BadRowError(f"is {_kind(value)}, not an object with fields")
    fields = data.fields
    if data.format == "context_target":
        return [
            {"role": "user", "content": _text(value, fields.context)},
            {"role": "assistant", "content": _text(value, fields.target)},
        ]
    if data.format == "text":
        return [{"role": "text", "content": _text(value, fields.text)}]
    system = _text(value, fields.system, required=False) or data.system
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    if data.format == "alpaca":
        user = {
            "role": "user",
            "content": _text(value, fields.instruction),
            "input": _text(value, fields.input, required=False),
        }
        return [*start, user, {"role": "assistant", "content": _text(value, fields.output)}]
    if data.format == "prompt_response":
        user = {"role": "user", "content": _text(value, fields.prompt)}
        return [*start, user, {"role": "assistant", "content": _text(value, fields.response)}]
    return _messages(value, fields.messages, start)


def _messages(row: dict[str, Any], name: str, start: list[Message]) -> list[Message]:
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        found = "empty" if turns == [] else _kind(turns)
        raise BadRowError(f"field {name!r} is {found}, not a list of messages")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRowError(f"{name}[{number}] is {_kind(turn)}, not an object with role and content")
        written = turn.get("role", turn.get("from"))
        role = _OTHER_NAMES.get(written, written) if isinstance(written, str) else written
        if role not in _ROLES:
            raise BadRowError(f"{name}[{number}].role is {role!r}, not one of {', '.join(_ROLES)}")
        try:
            content = _text(turn, "value" if "value" in turn and "content" not in turn else "content")
        except BadRowError as error:
            raise BadRowError(f"{name}[{number}]: {error}") from None
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError(f"field {name!r} has no message of the assistant: nothing to learn")
    if next(message["role"] for message in messages if message["role"] != "system") == "assistant":
        raise BadRowError("the first message is of the assistant: no question stands before it")
    if messages[-1]["role"] != "assistant":
        raise BadRowError(f"the last message is of the {messages[-1]['role']}, not of the assistant")
    return messages if messages[0]["role"] == "system" else [*start, *messages]


def _text(row: dict[str, Any], name: str, required: bool = True) -> str:
    value = row.get(name)
    if value is None and not required:
        return ""
    if name not in row:
        raise BadRowError(f"field {name!r} is missing; it has {', '.join(map(repr, row)) or 'no fields'}")
    if not isinstance(value, str):
        raise BadRowError(f"field {name!r} is {_kind(value)}, not text")
    if required and not value.strip():
        raise BadRowError(f"field {name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRowError(f"field {name!r} holds half a character ({half}), which no tokenizer takes") from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        encoding = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "GB18030"
        raise DataError(
            f"data.path: {file}",
            f"is not UTF-8: byte 0x{data[error.start]:02x} in line {line}",
            f"convert it: iconv -f {encoding} -t UTF-8 -o {file.with_stem(file.stem + '-utf8')} {file}",
        ) from None


def _read_array(file: Path, text: str) -> Iterator[RawRow]:
    """The items of a JSON array, one at a time so that each has its line."""
    decoder, line, seen = json.JSONDecoder(), 1, 0
    position = _skip(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        line, seen = line + text.count("\n", seen, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _no_json(file, error.lineno, error.msg) from None
        yield RawRow(f"{file}:{line}", value)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise _no_json(file, text.count("\n", 0, position) + 1, "expected ',' or the end of the array")
    rest = _skip(text, position + 1)
    if rest < len(text):
        raise _no_json(file, text.count("\n", 0, rest) + 1, "something follows the array")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_lines(file: Path, text: str) -> Iterator[RawRow]:
    """One object a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield RawRow(f"{file}:{number}", json.loads(line))
        except json.JSONDecodeError as error:
            yield RawRow(f"{file}:{number}", None, f"is no valid JSON: {error.msg}")


def _no_json(file: Path, line: int, message: str) -> DataError:
    return DataError(f"data.path: {file}", f"line {line} is no valid JSON: {message}", "mend that line")


def _read_parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        number = 0
        for batch in table.iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield RawRow(f"{file}:row {number}", value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data.path: {file}", f"is no valid Parquet: {str(error).strip()}", "write it again") from None
