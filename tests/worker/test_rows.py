"""Data files -> conversations: every format from every kind of file, and every bad row named with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.errors import DataError
from launcher.recipe.schema import Data
from launcher.worker.data.rows import data_files, read_conversations, read_rows

# Format -> two rows in it and the conversations that they are.
FORMATS: dict[str, tuple[list[dict[str, Any]], list[list[dict[str, str]]]]] = {
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "id": 7},
            {"instruction": "问", "output": " 答\n", "system": "Be brief."},
        ],
        [
            [{"role": "user", "content": "Add.", "input": "1 and 2"}, {"role": "assistant", "content": "3"}],
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "问", "input": ""},
                {"role": "assistant", "content": " 答\n"},
            ],
        ],
    ),
    "context_target": (
        [{"context": "Instruction: a\nAnswer: ", "target": "b"}, {"context": "c", "target": "d"}],
        [
            [{"role": "user", "content": "Instruction: a\nAnswer: "}, {"role": "assistant", "content": "b"}],
            [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
        ],
    ),
    "prompt_response": (
        [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d", "system": "s"}],
        [
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ],
        ],
    ),
    "messages": (
        [
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                    {"role": "user", "content": "e"},
                    {"role": "assistant", "content": "f"},
                ]
            },
        ],
        [
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
                {"role": "user", "content": "e"},
                {"role": "assistant", "content": "f"},
            ],
        ],
    ),
    "text": (
        [{"text": "one"}, {"text": "two"}],
        [[{"role": "text", "content": "one"}], [{"role": "text", "content": "two"}]],
    ),
}


def as_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[Any], num_rows: int | None = None) -> bytes:
    """The rows, or the first so many of them under the columns of all."""
    values = {name: value for row in rows for name, value in row.items()}
    schema = pa.schema([(name, pa.array([value]).type) for name, value in values.items()])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema).slice(0, num_rows), sink)
    return sink.getvalue().to_pybytes()


WRITERS = {".json": as_array, ".jsonl": as_lines, ".parquet": as_parquet}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a file and reads its conversations as a recipe with these `data:` keys would; places are relative."""
    monkeypatch.chdir(tmp_path)

    def conversations(name: str, content: bytes | str, **data: Any):
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read_conversations(Data.model_validate({"path": name, **data}), name)

    return conversations


@pytest.fixture
def bad_rows(read):
    """The bad rows that a file is refused for, a line each."""

    def named(name: str, content: bytes | str, **data: Any) -> list[str]:
        with pytest.raises(DataError) as caught:
            read(name, content, **data)
        assert caught.value.exit_code == 4
        assert caught.value.you_set == f"data.path: {name}"
        first, *lines = caught.value.found.splitlines()
        assert first == f"{len(lines)} bad row{'s' if len(lines) > 1 else ''}"
        assert caught.value.to_type == "mend them, or leave them out with: data.bad_rows=skip"
        return [line.removeprefix("    ") for line in lines]

    return named


@pytest.mark.parametrize("ending", list(WRITERS))
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_read_from_every_kind_of_file(read, name, ending):
    rows, conversations = FORMATS[name]
    assert read(f"rows{ending}", WRITERS[ending](rows), format=name) == (conversations, [])


def test_a_text_file_is_a_row_a_line(read):
    text = "one\r\n\n  two  \r\n三"
    rows, _ = read("rows.txt", text, format="text")
    assert [row[0]["content"] for row in rows] == ["one", "  two  ", "三"]
    assert [row.where for row in read_rows(Path("rows.txt"))] == ["rows.txt:1", "rows.txt:3", "rows.txt:4"]


def test_line_separators_inside_of_a_row_do_not_end_it(read):
    rows, _ = read("rows.jsonl", '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\r\n', format="text")
    assert [row[0]["content"] for row in rows] == ["a\u2028b\u0085c", "d"]


def test_json_lines_in_a_file_called_json_and_an_array_in_one_called_jsonl(read):
    rows, conversations = FORMATS["text"]
    assert read("rows.json", as_lines(rows), format="text")[0] == conversations
    assert read("rows.jsonl", as_array(rows), format="text")[0] == conversations
    assert read("rows", as_array(rows), format="text")[0] == conversations
    assert read("ROWS.PARQUET", as_parquet(rows), format="text")[0] == conversations


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".txt"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(read, ending):
    content = b"one" if ending == ".txt" else WRITERS[ending]([{"text": "one"}])
    assert read(f"rows{ending}", b"\xef\xbb\xbf" + content, format="text")[0] == [[{"role": "text", "content": "one"}]]


def test_a_folder_is_all_data_files_below_it_in_the_order_of_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows/deep/deeper").mkdir(parents=True)
    Path("rows/b.jsonl").write_text('{"text": "b"}')
    Path("rows/a.txt").write_text("a")
    Path("rows/deep/deeper/c.json").write_text('[{"text": "c"}]')
    Path("rows/deep/d.PARQUET").write_bytes(as_parquet([{"text": "d"}]))
    Path("rows/readme.md").write_text("not data")
    Path("rows/folder.json").mkdir()
    Path("more.txt").write_text("more")
    data = Data(path=("rows", "more.txt"), format="text")
    assert [str(path) for path in data_files(data.path)] == [
        "rows/a.txt", "rows/b.jsonl", "rows/deep/d.PARQUET", "rows/deep/deeper/c.json", "more.txt",
    ]  # fmt: skip
    assert [row[0]["content"] for row in read_conversations(data, data.path)[0]] == ["a", "b", "d", "c", "more"]


def test_columns_may_have_other_names(read):
    row = {"Q": "a", "Extra": "i", "A": "b", "S": "s"}
    fields = {"instruction": "Q", "input": "Extra", "output": "A", "system": "S"}
    assert read("rows.json", as_array([row]), fields=fields)[0] == [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a", "input": "i"},
            {"role": "assistant", "content": "b"},
        ]
    ]


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("context_target", {"context": "x", "target": "y"}),
        ("prompt_response", {"prompt": "x", "response": "y"}),
        ("messages", {"messages": "conversations"}),
        ("text", {"text": "body"}),
    ],
)
def test_columns_of_every_format_may_have_other_names(read, name, renamed):
    rows, conversations = FORMATS[name]
    other = [{renamed.get(key, key): value for key, value in row.items()} for row in rows]
    assert read("rows.json", as_array(other), format=name, fields=renamed)[0] == conversations


def test_the_roles_and_keys_of_sharegpt_are_understood(read):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows, _ = read("rows.json", as_array([{"messages": turns}]), format="messages")
    assert rows == [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]


def test_the_recipes_system_prompt_stands_before_every_conversation_that_has_none(read):
    for name in ("alpaca", "prompt_response", "messages"):
        rows, _ = read("rows.json", as_array(FORMATS[name][0]), format=name, system="From the recipe.")
        systems = [[m["content"] for m in row if m["role"] == "system"] for row in rows]
        assert systems == [["From the recipe."], [{"alpaca": "Be brief."}.get(name, "s")]]


@pytest.mark.parametrize("name", ["text", "context_target"])
def test_a_column_called_system_means_nothing_where_there_is_no_system_prompt(read, name):
    rows, conversations = FORMATS[name]
    assert read("rows.json", as_array([{**row, "system": 7} for row in rows]), format=name)[0] == conversations


ROW = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "a"}, "field 'output' is missing; it has 'instruction'"),
        ({}, "field 'instruction' is missing; it has no fields"),
        ({**ROW, "output": 3}, "field 'output' is of type int, not text"),
        ({**ROW, "output": ["b"]}, "field 'output' is of type list, not text"),
        ({**ROW, "output": None}, "field 'output' is null, not text"),
        ({**ROW, "input": 3}, "field 'input' is of type int, not text"),
        ({**ROW, "system": 3}, "field 'system' is of type int, not text"),
        ({**ROW, "output": ""}, "field 'output' is empty"),
        ({**ROW, "output": " \n"}, "field 'output' is empty"),
        ({**ROW, "instruction": ""}, "field 'instruction' is empty"),
        ("just text", "is of type str, not an object with fields"),
        (["a", "b"], "is of type list, not an object with fields"),
        (None, "is null, not an object with fields"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(bad_rows, row, problem):
    assert bad_rows("rows.jsonl", as_lines([ROW, row, ROW])) == [f"rows.jsonl:2  {problem}"]
    if not isinstance(row, list):  # a list as the first thing of a line would be an array
        assert bad_rows("rows.json", as_array([ROW, row])) == [f"rows.json:6  {problem}"]


def test_half_a_character_is_a_bad_row(bad_rows):
    lines = '{"instruction": "a", "output": "\\ud83d\\ude00"}\n{"instruction": "a", "output": "b\\ud83d"}\n'
    problem = "field 'output' holds half a character (\\ud83d), which no tokenizer takes"
    assert bad_rows("rows.jsonl", lines) == [f"rows.jsonl:2  {problem}"]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "field 'messages' is null, not a list of messages"),
        ("a", "field 'messages' is of type str, not a list of messages"),
        ([], "field 'messages' is empty, not a list of messages"),
        (["a"], "messages[0] is of type str, not an object with role and content"),
        ([{"role": "tool", "content": "a"}], "messages[0].role is 'tool', not one of system, user, assistant"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role is ['user'], not one of system, user, assistant"),
        ([{"content": "a"}], "messages[0].role is None, not one of system, user, assistant"),
        ([{"role": "user"}], "messages[0]: field 'content' is missing; it has 'role'"),
        (["u:a", {"role": "assistant", "content": None}], "messages[1]: field 'content' is null, not text"),
        (["u:a", "a: "], "messages[1]: field 'content' is empty"),
        (["u:a"], "field 'messages' has no message of the assistant: nothing to learn"),
        (["u:a", "a:b", "u:c"], "the last message is of the user, not of the assistant"),
        (["s:x", "a:b"], "the first message is of the assistant: no question stands before it"),
        (["a:b", "u:c", "a:d"], "the first message is of the assistant: no question stands before it"),
    ],
)
def test_a_bad_conversation_is_named_with_file_and_line(bad_rows, messages, problem):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    if isinstance(messages, list) and len(messages) > 0 and messages != ["a"]:
        messages = [{"role": roles[m[0]], "content": m[2:]} if isinstance(m, str) else m for m in messages]
    rows = [FORMATS["messages"][0][0], {"messages": messages}]
    assert bad_rows("rows.jsonl", as_lines(rows), format="messages") == [f"rows.jsonl:2  {problem}"]


def test_a_bad_row_of_a_parquet_file_is_named_with_its_number(bad_rows):
    rows = [ROW, {"instruction": "a", "output": None}, {"instruction": "", "output": "b"}]
    assert bad_rows("rows.parquet", as_parquet(rows)) == [
        "rows.parquet:row 2  field 'output' is null, not text",
        "rows.parquet:row 3  field 'instruction' is empty",
    ]


def test_a_line_that_is_no_json_is_a_bad_row_among_the_others(bad_rows):
    text = '{"text": "a"}\n\n{"text": "b"\n{"txt": "c"}\nText: d\n{"text": "e"'
    assert bad_rows("rows.jsonl", text, format="text") == [
        "rows.jsonl:3  is no valid JSON: Expecting ',' delimiter",
        "rows.jsonl:4  field 'text' is missing; it has 'txt'",
        "rows.jsonl:5  is no valid JSON: Expecting value",
        "rows.jsonl:6  is no valid JSON: Expecting ',' delimiter",
    ]


def test_of_many_bad_rows_the_first_twenty_are_shown(read):
    with pytest.raises(DataError) as caught:
        read("rows.jsonl", as_lines([{}] * 1234))
    first, *lines = caught.value.found.splitlines()
    assert first == "1,234 bad rows"
    assert len(lines) == 21
    assert lines[-1] == "    … and 1,214 more"


def test_bad_rows_skip_leaves_them_out_and_says_which(read):
    text = '{"text": "a"}\n{"text": 3}\n{"text":\n"b"\n{"text": "c"}\n'
    rows, bad = read("rows.jsonl", text, format="text", bad_rows="skip")
    assert [row[0]["content"] for row in rows] == ["a", "c"]
    assert bad == [
        "rows.jsonl:2  field 'text' is of type int, not text",
        "rows.jsonl:3  is no valid JSON: Expecting value",
        "rows.jsonl:4  is of type str, not an object with fields",
    ]


def test_where_all_rows_are_bad_skipping_is_no_help(read):
    with pytest.raises(DataError) as caught:
        read("rows.jsonl", '{"txt": 1}\n{"txt": 2}\n', format="text", bad_rows="skip")
    assert str(caught.value) == (
        "data.path: rows.jsonl: none of its 2 rows can be used; "
        "the first: rows.jsonl:1  field 'text' is missing; it has 'txt'\n  check data.path and data.format"
    )


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[\n {"text": "a"},\n {"text": b}\n]', 3, "Expecting value"),
        ('[\n {"text": "a"}\n {"text": "b"}\n]', 3, "expected ',' or the end of the array"),
        ('[\n {"text": "a"},\n', 3, "Expecting value"),
        ('[\n {"text": "a"}', 2, "expected ',' or the end of the array"),
        ('[\n {"text": "a"}\n]\n[]', 4, "something follows the array"),
        ('[\n {"text": "a\n"}\n]', 2, "Invalid control character at"),
    ],
)
def test_an_array_that_is_torn_is_refused_at_its_line_even_when_bad_rows_are_skipped(read, text, line, message):
    with pytest.raises(DataError) as caught:
        read("rows.json", text, format="text", bad_rows="skip")
    expected = f"data.path: rows.json: line {line} is no valid JSON: {message}\n  mend that line"
    assert str(caught.value) == expected


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".txt"])
def test_another_encoding_is_named_with_its_first_byte_and_line(read, ending):
    content = '[{"text": "a"},\n\n{"text": "数"}]'.encode("gb18030")
    with pytest.raises(DataError) as caught:
        read(f"rows{ending}", content, format="text", bad_rows="skip")
    assert str(caught.value) == (
        f"data.path: rows{ending}: is not UTF-8: byte 0xca in line 3\n"
        f"  convert it: iconv -f GB18030 -t UTF-8 -o rows-utf8{ending} rows{ending}"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-40],
        lambda content: b"",
        lambda content: b"text",
        lambda content: content[:100] + bytes(60) + content[160:],
    ],
    ids=["cut", "empty", "text", "overwritten"],
)
def test_a_damaged_parquet_file_is_refused(read, damage):
    content = as_parquet([{"text": f"row {number}"} for number in range(500)])
    with pytest.raises(DataError, match=r"^data\.path: rows\.parquet: is no valid Parquet: .+\n  write it again$"):
        read("rows.parquet", damage(content), format="text")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", ""),
        ("rows.json", "[]"),
        ("rows.json", "[ \n ]"),
        ("rows.jsonl", "\n\n"),
        ("rows.txt", " \n"),
        ("rows.parquet", as_parquet([{"text": "a"}], 0)),
    ],
)
def test_a_file_without_rows_is_refused(read, name, content):
    with pytest.raises(DataError) as caught:
        read(name, content, format="text")
    assert str(caught.value) == f"data.path: {name}: holds no rows\n  check data.path and data.format"


def test_several_paths_are_shown_as_they_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("")
    with pytest.raises(DataError, match=r"^data\.path: a\.txt, b\.txt: holds no rows"):
        read_conversations(Data(path=("a.txt", "b.txt"), format="text"), ("a.txt", "b.txt"))


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        data_files([str(tmp_path / "none.json")])
    assert str(caught.value) == (
        f"data.path: {tmp_path}/none.json: there is no such file or folder\n"
        "  give the path of your data: data.path=FILE"
    )


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(DataError) as caught:
        data_files(str(tmp_path))
    assert str(caught.value) == (
        f"data.path: {tmp_path}: the folder holds no data file\n"
        "  put files there that end in .json, .jsonl, .parquet, .txt"
    )


def test_max_rows_takes_the_first_good_rows_over_all_files_and_opens_no_further_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("1\n2\n")
    Path("b.jsonl").write_text('{"txt": 0}\n{"text": "3"}\n{"text": "4"}\n{"text": 0}\n')
    Path("c.jsonl").write_bytes(b"\xff")
    data = Data(path=("a.txt", "b.jsonl", "c.jsonl"), format="text", max_rows=3, bad_rows="skip")
    rows, bad = read_conversations(data, data.path)
    assert [row[0]["content"] for row in rows] == ["1", "2", "3"]
    assert bad == ["b.jsonl:1  field 'text' is missing; it has 'txt'"]
