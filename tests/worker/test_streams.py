"""Rows that are read while training: from any place on, the same on any number of ranks, and nothing of them on the disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.errors import DataError
from launcher.recipe.schema import Data
from launcher.worker.data.source import Place, Source
from launcher.worker.data.windows import WindowOrder, Windows
from tests.worker.conftest import Job
from tests.worker.test_training import copy_until, curve, weights


def rows_of(num: int, file: str = "") -> list[dict[str, Any]]:
    return [{"instruction": f"{file}{at}", "output": f"é{at}" * (at % 5 + 1)} for at in range(num)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["output"] for row in rows) + "\n\n")
    else:
        path.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    return path


def source(*paths: Path | str, **data: Any) -> Source:
    return Source(Data(path=tuple(map(str, paths)), streaming=True, **data), seed=1)


def taken(stream: Iterator[Any], num: int) -> list[Any]:
    return [(row.value, place) for row, place in itertools.islice(stream, num)]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".txt"])
def test_a_stream_goes_on_from_every_row_of_it_as_if_it_had_never_stopped(tmp_path: Path, ending: str) -> None:
    files = [write(tmp_path / f"{name}{ending}", rows_of(num, name)) for name, num in (("a", 9), ("b", 4))]
    stream = source(*files)
    whole = taken(stream.rows(Place()), 30)
    expected = [{"text": row["output"]} if ending == ".txt" else row for row in (*rows_of(9, "a"), *rows_of(4, "b"))]
    for start in (0, 13):  # two whole rounds, each with all rows
        values = [value for value, _ in whole[start : start + 13]]
        assert sorted(values, key=str) == sorted(expected, key=str)
    for at, (_, place) in enumerate(whole):
        assert taken(stream.rows(Place(**place.as_json())), 29 - at) == whole[at + 1 :]


def test_the_files_of_a_round_come_in_an_order_of_their_own(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", rows_of(1, name)) for name in "abcdef"]
    names = [value["instruction"][0] for value, _ in taken(source(*files).rows(Place()), 24)]
    rounds = [tuple(names[at : at + 6]) for at in range(0, 24, 6)]
    assert len(set(rounds)) > 1
    assert {tuple(sorted(each)) for each in rounds} == {tuple("abcdef")}


def test_max_rows_ends_a_round(tmp_path: Path) -> None:
    stream = source(write(tmp_path / "a.jsonl", rows_of(9)), max_rows=4)
    assert [place.round for _, place in taken(stream.rows(Place()), 9)] == [0] * 4 + [1] * 4 + [2]


def test_an_array_cannot_be_streamed_and_says_how_it_could(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(" \n[{}]")
    with pytest.raises(DataError, match=r"is one JSON array, which can only be read whole") as caught:
        source(tmp_path / "rows.json")
    assert "jq -c '.[]'" in caught.value.to_type


def test_a_file_without_rows_and_one_that_is_no_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_text("PAR1 not really")
    for name, found in (("empty.jsonl", "holds no rows"), ("broken.parquet", "is no valid Parquet")):
        with pytest.raises(DataError, match=found):
            next(source(tmp_path / name).rows(Place()))


def test_an_address_is_read_as_a_file_is(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", rows_of(9))
    with fsspec.open("memory://far/away/a.jsonl", "wb") as far:
        far.write(file.read_bytes())
    here, there = source(file), source("memory://far/away/a.jsonl")
    whole = taken(there.rows(Place()), 12)
    assert whole == taken(here.rows(Place()), 12)
    assert taken(there.rows(whole[3][1]), 8) == whole[4:]
    with pytest.raises(DataError, match="cannot be read"):
        next(source("memory://far/away/b.jsonl").rows(Place()))


@pytest.fixture(scope="session")
def streamed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides: the rows of the tiny recipe in two files, as a stream; windows of two steps of 8, the third of which begins a round."""
    folder = tmp_path_factory.mktemp("stream")
    rows = json.loads(tiny_data.read_text())
    for name, part in (("a", rows[:26]), ("b", [{"instruction": "no answer"}, *rows[26:40]]), ("eval", rows[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    paths = ", ".join(str(folder / f"{name}.jsonl") for name in "ab")
    return (
        f"data.path=[{paths}]",
        f"data.eval={{path: {folder / 'eval.jsonl'}}}",
        "data.streaming=true",
        "data.shuffle_rows=16",
        "data.bad_rows=skip",
    )


def test_a_stream_is_learned_from_the_same_on_one_rank_and_two_and_after_a_resume(
    job: Job, streamed: tuple[str, ...], tmp_path: Path
) -> None:
    exact = (*streamed, "adapter.dropout=0", "model.config.attention_dropout=0.0")
    alone = Job(job.server, job.recipe, tmp_path / "alone")
    assert alone.start(*exact, "hardware=1xcpu") == [0], alone.logs()
    assert job.start(*exact, "checkpoint.every_steps=5") == [0, 0], job.logs()
    assert list(job.losses()) == list(range(1, 9)), "eight steps of eight rows, of a file with 40"
    assert curve(job) == pytest.approx(curve(alone), abs=2e-5)
    assert job.losses()[8] < job.losses()[1]

    # Step 5 is within the third window, which began in the first round and ended in the second.
    resumed = Job(job.server, job.recipe, tmp_path / "resumed")
    copy_until(job, resumed, 5)
    assert json.loads((resumed.run.checkpoints / "step-5" / "stream.json").read_text())["window"] == 2
    assert resumed.start(*exact, "checkpoint.every_steps=5", resume=True) == [0, 0], resumed.logs()
    assert resumed.losses() == {step: job.losses()[step] for step in (6, 7, 8)}
    assert weights(resumed, 8).read_bytes() == weights(job, 8).read_bytes()


class Words:
    """A prompter whose tokens are words; the first of a row is not learned, and long rows are cut."""

    def tokens(self, row: Any, max_length: int) -> Any:
        from launcher.worker.data.tokens import IGNORED, Tokens

        ids = list(range(len(row[-1]["content"].split()) + 1))
        labels = [IGNORED, *ids[1:]]
        return Tokens(ids[:max_length], labels[:max_length], cut=len(ids) > max_length)


def windows(job: Job, folder: Path, words: list[int], *overrides: str, start: Any = None) -> Windows:
    """The windows of a file whose rows have so many words."""
    file = folder / "words.jsonl"
    file.write_text("".join(json.dumps({"instruction": "a", "output": "b " * num}) + "\n" for num in words))
    settings = (f"data.path={file}", "data.eval=null", "data.streaming=true", "hardware=1xcpu")
    return Windows(job.plan(*settings, *overrides), Words(), start)  # type: ignore[arg-type]


def test_rows_that_are_too_long_make_room_for_others_in_a_window(job: Job, tmp_path: Path) -> None:
    words = [at % 7 + 1 for at in range(30)]
    made = windows(job, tmp_path, words, "data.shuffle_rows=16", "data.max_length=8", "data.overlong=drop")
    kept = [num + 1 for num in words if num < 8]
    order = WindowOrder(made, job.plan("hardware=1xcpu"))
    for window in (0, 1):
        order.go_to(window)
        assert made.lengths == (kept * 2)[16 * window :][:16]
        steps = order.steps()
        assert sorted(row for step in steps for row in step) == list(range(16))
        assert [made[row]["length"] for row in steps[0]] == [made.lengths[row] for row in steps[0]]
    again = windows(job, tmp_path, words, "data.shuffle_rows=16", "data.max_length=8", start=made.as_json(5))
    again.go_to(2)
    made.go_to(2)
    assert again.lengths == made.lengths


def test_a_stream_of_which_nothing_is_left_ends(job: Job, tmp_path: Path) -> None:
    made = windows(job, tmp_path, [20, 30], "data.shuffle_rows=16", "data.max_length=8", "data.overlong=drop")
    with pytest.raises(DataError, match="no answer is left of any row"):
        made.go_to(0)


def test_rows_of_a_stream_that_are_bad_are_named_or_passed_over(job: Job, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    settings = (f"data.path={tmp_path / 'bad.jsonl'}", "data.eval=null", "data.streaming=true", "data.shuffle_rows=8")
    made = Windows(job.plan(*settings, "hardware=1xcpu"), Words())  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a bad row\n    .*bad.jsonl:2  field 'output' is missing"):
        made.go_to(0)
    made = Windows(job.plan(*settings, "hardware=1xcpu", "data.bad_rows=skip"), Words())  # type: ignore[arg-type]
    made.go_to(0)
    assert made.lengths == [2] * 8
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}\n')
    with pytest.raises(DataError, match="none of its rows can be used"):
        made.go_to(9)
