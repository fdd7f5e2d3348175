"""A plan and a tokenizer in, token ids on disk and a report about the rows out; `prepare` calls it where the cache has nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from launcher.errors import DataError, PreflightError
from launcher.families import family
from launcher.families import template as named_template
from launcher.plan import Plan
from launcher.remotecode import Staged
from launcher.rundir import read_json, write_json
from launcher.worker.data.encoding import Encoder, Progress
from launcher.worker.data.rows import BadRowError, Message, named, read_conversations, refuse_bad, to_conversation
from launcher.worker.data.source import Place, Source
from launcher.worker.data.tokens import IGNORED, Prompter, Tokens
from launcher.worker.prepared import DataReport
from launcher.worker.quiet import quiet_libraries
from launcher.worker.staged import load_tokenizer

# Rows of a stream that prepare looks at: a wrong column shows in the first of them, and their lengths are about those of all.
_TRIED_OF_A_STREAM = 1000


def tokenize(plan: Plan, tokenizer_dir: Path, into: Path, progress: Progress, code: Staged | None = None) -> None:
    """Write train/, eval/ (where there are such rows) and report.json into a folder.

    Args:
        progress: called with (rows done, rows in all) now and then.
        code: the model's own code, where the tokenizer is part of it.

    Raises:
        DataError: rows that cannot be read, or no answer is left of them.
        PreflightError: a tokenizer that cannot be used.
    """
    quiet_libraries()
    data = plan.recipe.data
    places: list[str] | None = None if data.streaming else []
    rows, eval_rows, bad = conversations(plan, places)
    tokenizer = _tokenizer(plan, tokenizer_dir, code)
    template = _template(plan, tokenizer)
    ends = end_ids(plan.shape.prompts, tokenizer, tokenizer_dir, template)
    encoder = Encoder(Prompter(tokenizer, template, ends), data, len(rows) + len(eval_rows), progress)
    train, evaluation = encoder.encode(rows, places), encoder.encode(eval_rows)
    if not train:
        raise DataError(
            f"data.max_length: {data.max_length}",
            f"no answer is left of {len(rows):,} rows",
            "allow longer rows: data.max_length=1024",
        )
    for name, part, where in (("train", train, places), ("eval", evaluation, None)):
        if part:  # datasets writes an empty one but cannot read it back
            _write(part, where, into / name)
    left: dict[str, Any] = {
        "template": template,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        "eos_token_ids": ends,
        "report": _report(train, evaluation, encoder, len(bad)).model_dump(),
        "bad_rows": bad[:1000],
    }
    write_json(into / "report.json", left)


def conversations(
    plan: Plan, places: list[str] | None = None
) -> tuple[list[list[Message]], list[list[Message]], list[str]]:
    """Training rows (of a stream the first ones, to try them), evaluation rows and the lines about bad ones.

    Args:
        places: where each training row stands is added to it; not for a stream.
    """
    data, evaluation = plan.recipe.data, plan.recipe.data.eval
    rows, bad = first_conversations(plan) if data.streaming else read_conversations(data, data.path, places)
    if evaluation is None:
        return rows, [], bad
    if evaluation.path is not None:
        with named("data.eval.path"):
            eval_rows, eval_bad = read_conversations(data, evaluation.path)
        return rows, eval_rows, bad + eval_bad
    num = evaluation.rows or max(1, round(len(rows) * (evaluation.fraction or 0)))
    if num >= len(rows):
        raise DataError(
            f"data.eval: {num} rows",
            f"there are only {len(rows)} rows in all",
            f"keep fewer: data.eval.rows={max(1, len(rows) // 10)}",
        )
    kept = set(random.Random(plan.recipe.train.seed).sample(range(len(rows)), num))
    if places is not None:
        places[:] = [where for place, where in enumerate(places) if place not in kept]
    return [row for place, row in enumerate(rows) if place not in kept], [rows[place] for place in sorted(kept)], bad


def first_conversations(plan: Plan) -> tuple[list[list[Message]], list[str]]:
    """The first rows of a stream, and a line for each before them that is none.

    Raises:
        DataError: one is bad and `bad_rows` is `error`, or all are.
    """
    data = plan.recipe.data
    rows: list[list[Message]] = []
    bad: list[str] = []
    for row, place in Source(data, plan.recipe.train.seed).rows(Place()):
        if place.round or len(rows) + len(bad) == min(_TRIED_OF_A_STREAM, data.shuffle_rows):
            break
        try:
            if row.problem is not None:
                raise BadRowError(row.problem)
            rows.append(to_conversation(row.value, data))
        except BadRowError as error:
            bad.append(f"{row.where}  {error}")
    refuse_bad(data, data.path, rows, bad)
    return rows, bad


def _tokenizer(plan: Plan, folder: Path, code: Staged | None) -> Any:
    """The tokenizer of a folder.

    Raises:
        PreflightError: it cannot be loaded, or does not know how a text ends.
    """
    you_set = f"model {plan.shape.name}"
    try:
        tokenizer = load_tokenizer(folder, code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if "trust_remote_code" in str(error):
            found = "its tokenizer is code that comes with the weights"
            to_type = "look at it (launch trust RECIPE); if you trust it: model.trust_remote_code=true"
            raise PreflightError(you_set, found, to_type) from None
        reason = f"its tokenizer cannot be loaded: {str(error).splitlines()[0]}"
        raise PreflightError(you_set, reason, f"check the tokenizer files in {folder}") from None
    if tokenizer.eos_token_id is None:
        found = "its tokenizer has no eos token, so answers would never end"
        raise PreflightError(you_set, found, "add one to its tokenizer_config.json")
    return tokenizer


def _write(rows: list[Tokens], places: list[str] | None, folder: Path) -> None:
    """One Arrow table with input_ids, labels and length, and where each row stands, where that is known."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    columns = {
        "input_ids": [tokens.input_ids for tokens in rows],
        "labels": [tokens.labels for tokens in rows],
        "length": [len(tokens.input_ids) for tokens in rows],
        **({"where": places} if places is not None else {}),
    }
    Dataset.from_dict(columns).save_to_disk(str(folder))


def _report(train: list[Tokens], evaluation: list[Tokens], encoder: Encoder, num_bad: int) -> DataReport:
    lengths = sorted(len(tokens.input_ids) for tokens in train)
    return DataReport(
        rows_read=encoder.total + num_bad,
        rows_bad=num_bad,
        rows_dropped=encoder.dropped,
        rows_truncated=encoder.truncated,
        train_rows=len(train),
        eval_rows=len(evaluation),
        tokens=sum(lengths),
        supervised_tokens=sum(label != IGNORED for tokens in train for label in tokens.labels),
        length_mean=round(sum(lengths) / len(lengths), 1),
        length_p50=lengths[len(lengths) // 2],
        length_p90=lengths[int(len(lengths) * 0.9)],
        length_max=lengths[-1],
    )


def _template(plan: Plan, tokenizer: Any) -> str:
    """The recipe's template, or what `auto` means for this tokenizer and this kind of rows."""
    asked = plan.recipe.data.template
    if plan.recipe.data.format in ("context_target", "text"):
        return "plain" if asked == "auto" else asked
    if asked == "auto":
        return "chat" if tokenizer.chat_template else plan.shape.template
    if asked == "chat" and not tokenizer.chat_template:
        raise PreflightError(
            "data.template: chat", f"the tokenizer of {plan.shape.name} has no chat template", "set data.template=auto"
        )
    return asked


def end_ids(prompts: str, tokenizer: Any, folder: Path, template: str) -> list[int]:
    """Every token that ends an answer: the tokenizer's, those of generation_config.json, the family's and the template's.

    Args:
        prompts: the family whose prompts the model knows; end tokens that the tokenizer lacks are those of its other models.
    """
    config = read_json(folder / "generation_config.json") or {}
    more = config.get("eos_token_id") or []
    ends = {tokenizer.eos_token_id, *([more] if isinstance(more, int) else more)}
    names = [*family(prompts).end_tokens]
    if template != "chat":
        names.append(named_template(template).end or tokenizer.eos_token)
    known = (tokenizer.convert_tokens_to_ids(name) for name in names)
    return sorted(ends | {token for token in known if token not in (None, tokenizer.unk_token_id)})
