"""RUN/plan.json in, RUN/prepared.json out: model, tokenizer and token ids on local disk, once a node, before any rank exists.

Everything is kept in a cache by content: the same data, tokenizer, template and lengths are tokenised once, whatever the run. A folder
of the cache is written under a temporary name and renamed, so it is whole or not there, and two launchers may prepare at once.
Heavy libraries are imported only where something has to be made: with everything cached this takes a third of a second.

Prints one JSON object a line: progress, or the error that ended it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import signal
import sys
import traceback
from pathlib import Path

from launcher.command import worker_environment
from launcher.compat import fix_named
from launcher.errors import DataError, LaunchError, PreflightError
from launcher.plan import Plan
from launcher.remotecode import Staged
from launcher.rundir import RunDir, cache_folder, read_json, write_json
from launcher.worker.cache import hash_files, key_of, made, say
from launcher.worker.data.rows import data_files, named
from launcher.worker.data.source import described, stream_files
from launcher.worker.modelfiles import WEIGHT_PATTERNS, find_model
from launcher.worker.operators import DISK, compile_apart, is_compiled, operators
from launcher.worker.prepared import DataReport, Prepared, write_prepared
from launcher.worker.pulse import die_with_parent


def main(plan_path: str, node: int = 0) -> int:
    """Prepare the run that a plan belongs to, on a node; the exit code."""
    die_with_parent()
    # As an exception, so that a half-made folder of the cache goes with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run = RunDir(Path(plan_path).resolve().parent)
    try:
        plan = Plan.model_validate_json(run.plan.read_text(encoding="utf-8"))
        write_prepared(run, prepare(plan, run), node)
    except LaunchError as error:
        say(event="error", you_set=error.you_set, found=error.found, to_type=error.to_type, exit_code=error.exit_code)
        return error.exit_code
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        # safetensors has an error of its own for a full disk.
        if not isinstance(error, OSError) and "No space left on device" not in reason:
            raise
        traceback.print_exc()
        say(
            event="error",
            you_set=f"prepare, into {cache_folder()}",
            found=reason,
            to_type="make room there, or set LAUNCH_CACHE to another folder",
            exit_code=4,
        )
        return 4
    return 0


def prepare(plan: Plan, run: RunDir) -> Prepared:
    """Make or find everything the ranks need.

    Raises:
        DataError: rows that cannot be read.
        PreflightError: a model that is not there.
    """
    recipe, cached = plan.recipe, []
    data_hash = _data_hash(plan, run)
    model = find_model(plan, run, data_hash, cached)
    model_dir, code = model.model_dir, model.code

    selection = recipe.data.model_dump(mode="json", exclude={"path", "batching", "questions"})
    data_key = key_of(
        "data",
        "with places of rows",
        data_hash,
        selection,
        recipe.train.seed,
        model.tokenizer_key,
        plan.shape.prompts,
        plan.shape.template,
    )
    data_dir = made("data", data_key, cached, lambda into: _make_dataset(plan, model.tokenizer_dir, into, code))
    _try_model(plan, model_dir, code, cached)
    left = read_json(data_dir / "report.json")
    if code is not None:
        code = _tried(plan, model_dir, data_dir, code, cached)
    return Prepared(
        model_dir=str(model_dir),
        tokenizer_dir=str(model.tokenizer_dir),
        data_dir=str(data_dir),
        rows_key=_rows_key(plan, data_hash),
        data_hash=data_hash,
        source_dir=str(model.source_dir) if plan.shape.native is not None else None,
        code=code,
        cached=tuple(cached),
        template=left["template"],
        pad_token_id=left["pad_token_id"],
        eos_token_ids=left["eos_token_ids"],
        report=DataReport.model_validate(left["report"]),
    )


def _data_hash(plan: Plan, run: RunDir) -> str:
    """Of the recipe's rows. A node with a copy of the run directory may be without them: they were sent as they are prepared.

    Raises:
        DataError: they are not here, and were not sent either.
    """
    data = plan.recipe.data
    eval_path = data.eval.path if data.eval else None
    try:
        # What is streamed is too much to be read for a checksum.
        streamed = [described(file) for file in stream_files(data)] if data.streaming else None
        files = data_files(data.path) if streamed is None else []
        with named("data.eval.path"):
            hashed = hash_files([*files, *(data_files(eval_path) if eval_path else [])])
        return hashed if streamed is None else key_of("stream", hashed, streamed, data.shuffle_rows)
    except DataError:
        sent = read_json(run.prepared) if run.copy.exists() else None
        if sent is None:
            raise
        return str(sent["data_hash"])


def _try_model(plan: Plan, model_dir: Path, code: Staged | None, cached: list[str]) -> None:
    """What is tried on a small copy of the model, once for its config and these libraries; and what is compiled for it."""
    tried_on = importlib.metadata.version("transformers"), importlib.metadata.version("torch")
    config = hash_files([model_dir / "config.json"])
    if plan.batching == "packed":
        packing_key = key_of("packing", config, tried_on, code and code.code.sha256)
        made("packing", packing_key, cached, lambda into: _try_packing(plan, model_dir, code))
    if plan.pipeline is not None:
        cut_key = key_of("pipeline", config, tried_on, plan.shape.family)
        made("pipeline", cut_key, cached, lambda into: _try_cut(plan, model_dir))
    if plan.deepspeed is not None:
        _compile(plan)


def _compile(plan: Plan) -> None:
    """DeepSpeed's C++ operators that this plan uses. Otherwise the first step of every rank would compile them, for minutes and silently.

    Raises:
        PreflightError: a compiler or ninja is missing, or they do not compile.
    """
    variables = worker_environment(plan)
    for name in operators(plan.deepspeed or {}):
        if is_compiled(name, Path(variables["TORCH_EXTENSIONS_DIR"])):
            say(event="prepare", what="deepspeed", state="cached")
            continue
        say(event="prepare", what="deepspeed", state=f"compiling {name}, once, which takes minutes")
        exit_code, output = compile_apart(name, {**os.environ, **variables}, functools.partial(_compiling, name))
        if exit_code:
            print(output, file=sys.stderr)
            lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()[-1:]
            needed, instead = "a C++ compiler and ninja (pip install ninja)", "strategy.offload=none"
            if name == DISK:
                needed, instead = f"libaio (apt-get install libaio-dev), {needed}", "strategy.nvme_path=null"
            raise PreflightError(
                f"DeepSpeed's {name}",
                f"does not compile: {lines[0].strip() if lines else 'no word why'}",
                f"install {needed}, or set {instead}",
            )
        say(event="prepare", what="deepspeed", state=f"{name} is compiled")


def _compiling(name: str, done: int, total: int) -> None:
    say(event="prepare", what="deepspeed", state=f"compiling {name}", done=done, total=total)


def _try_cut(plan: Plan, model_dir: Path) -> None:
    """Leaves an empty folder in the cache where a model can be cut into stages."""
    from launcher.worker.pipeline.trial import try_cut
    from launcher.worker.quiet import quiet_libraries

    say(event="prepare", what="pipeline", state="trying a small copy cut in two")
    quiet_libraries()
    try_cut(plan, model_dir)


def _tried(plan: Plan, model_dir: Path, data_dir: Path, code: Staged, cached: list[str]) -> Staged:
    """The code, with how its model has to be loaded, found on a small copy; once for this code, config and weights.

    Raises:
        PreflightError: it cannot be loaded rightly, or ignores what the plan counts on.
    """
    tried_on = importlib.metadata.version("transformers"), importlib.metadata.version("torch")
    weights = sorted(path for pattern in (*WEIGHT_PATTERNS, "*.bin") for path in model_dir.glob(pattern))
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    decided = plan.gradient_checkpointing, plan.recipe.adapter.type, plan.recipe.model.quantization
    key = key_of(
        "trial", code.code.sha256, code.fixes, hash_files([model_dir / "config.json"]), found, decided, tried_on
    )
    folder = made("trial", key, cached, lambda into: _try_small(plan, model_dir, data_dir, code, into))
    fixes: dict[str, str] = read_json(folder / "trial.json")
    for name, because in fixes.items():
        say(event="prepare", what="fix", state=f"{name} ({fix_named(name).range}): {because}")
    return code.model_copy(update={"fixes": tuple(dict.fromkeys((*code.fixes, *fixes)))})


def _try_small(plan: Plan, model_dir: Path, data_dir: Path, code: Staged, into: Path) -> None:
    from launcher.worker.code_trial import batch_of, try_small
    from launcher.worker.quiet import quiet_libraries

    say(event="prepare", what="trial", state="trying a small copy of the model")
    quiet_libraries()
    write_json(into / "trial.json", try_small(plan, model_dir, batch_of(plan, data_dir), code))


def _make_dataset(plan: Plan, tokenizer_dir: Path, into: Path, code: Staged | None) -> None:
    from launcher.worker.data.dataset import tokenize

    def progress(done: int, total: int) -> None:
        say(event="prepare", what="data", state="tokenizing", done=done, total=total)

    tokenize(plan, tokenizer_dir, into, progress, code)


def _try_packing(plan: Plan, model_dir: Path, code: Staged | None) -> None:
    """Leaves an empty folder in the cache where packing is sound, nothing where it is not."""
    from launcher.worker.data.leak import refuse_leaks

    say(event="prepare", what="packing", state="trying on two layers")
    refuse_leaks(plan, model_dir, code)


def _rows_key(plan: Plan, data_hash: str) -> str:
    """Hash of the training rows; how long they are is part of it only where longer ones are dropped."""
    data = plan.recipe.data
    chosen = data.model_dump(mode="json", include={"format", "fields", "max_rows", "bad_rows", "eval"})
    if data.eval is not None and data.eval.path is not None:
        chosen["eval"] = "a file of its own"
    return key_of(
        "rows", data_hash, chosen, plan.recipe.train.seed, data.max_length if data.overlong == "drop" else None
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
