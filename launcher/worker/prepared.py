"""The plan of a run, and what prepare leaves for the ranks, chat and export: folders, template, token ids and counts."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.errors import UsageError
from launcher.remotecode import Staged
from launcher.rundir import RunDir, read_json, write_json


class DataReport(BaseModel):
    """What became of the rows.

    Args:
        rows_read, rows_dropped, rows_truncated, rows_bad: counts; the truncated ones are part of what is trained on.
        tokens, supervised_tokens: sums over the training rows.
        length_mean, length_p50, length_p90, length_max: tokens a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows_read: int
    rows_bad: int
    rows_dropped: int
    rows_truncated: int
    train_rows: int
    eval_rows: int
    tokens: int
    supervised_tokens: int
    length_mean: float
    length_p50: int
    length_p90: int
    length_max: int


class Prepared(BaseModel):
    """Everything a rank needs beside the plan.

    Args:
        model_dir, tokenizer_dir, data_dir: local folders; no rank looks anywhere else.
        template: `chat` or a name of families.yaml, never `auto`.
        rows_key: hash of which rows are trained on, in which order; a checkpoint is continued only on the same one.
        data_hash: of the files that the rows were made of.
        source_dir: the folder in its original layout, of a model that was converted.
        code: the model's own code, staged in the run directory; None where it has none.
        cached: which of them were there already.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_dir: str
    tokenizer_dir: str
    data_dir: str
    template: str
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    rows_key: str
    report: DataReport
    data_hash: str = ""
    source_dir: str | None = None
    code: Staged | None = None
    cached: tuple[str, ...] = ()


def read_prepared(run: RunDir, node: int = 0) -> Prepared:
    """What prepare left in this run directory, for the ranks of that node.

    Raises:
        UsageError: nothing: the run ended before its data were prepared.
    """
    value = read_json(run.prepared_on(node)) or read_json(run.prepared)
    if value is None:
        raise UsageError(f"run {run.path}", "ended before it was prepared", f"go on with it: launch resume {run.path}")
    try:
        return Prepared.model_validate(value)
    except ValidationError:
        raise UsageError(
            f"run {run.path}",
            "its prepared.json is not what prepare writes",
            f"write it again: launch resume {run.path}",
        ) from None


def write_prepared(run: RunDir, prepared: Prepared, node: int = 0) -> None:
    """Leave it for the ranks of a node."""
    value: Any = prepared.model_dump(mode="json")
    write_json(run.prepared_on(node), value)
