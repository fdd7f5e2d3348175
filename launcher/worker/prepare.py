"""RUN/plan.json in, RUN/prepared.json out: model, tokenizer and token ids on local disk, once a node, before any rank exists.

Everything is kept in a cache by content: the same data, tokenizer, template and lengths are tokenised once, whatever the run. A folder
of the cache is written under a temporary name and renamed, so it is whole or not there, and two launchers may prepare at once.
Heavy libraries are imported only where something has to be made: with everything cached this takes a third of a second.

Prints one JSON object a line: progress, or the error that ended it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.command import worker_environment
from launcher.compat import fix_named
from launcher.errors import LaunchError, PreflightError
from launcher.plan import Plan
from launcher.remotecode import Staged, checked_code, read_code, stage
from launcher.rundir import RunDir, cache_folder, read_json, write_json
from launcher.worker.cache import made, say
from launcher.worker.data.rows import data_files, named
from launcher.worker.operators import compile_apart, is_compiled, operators
from launcher.worker.prepared import DataReport, Prepared, write_prepared
from launcher.worker.pulse import die_with_parent

# Part of every key: raise it when the same input no longer gives the same folder.
_FORMAT = 2
_FORMAT_NATIVE = 2  # the same for converted models alone
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
    "generation_config.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_OTHER_PATTERNS = ("*.json", "*.model", "*.txt", "*.py", "*.jinja", "*.tiktoken", "tokenizer*")


def main(plan_path: str) -> int:
    """Prepare the run that a plan belongs to; the exit code."""
    die_with_parent()
    # As an exception, so that a half-made folder of the cache goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run = RunDir(Path(plan_path).resolve().parent)
    try:
        plan = Plan.model_validate_json(run.plan.read_text(encoding="utf-8"))
        write_prepared(run, prepare(plan, run))
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
    recipe, cached, source_dir, code = plan.recipe, [], None, None
    files = data_files(recipe.data.path)
    eval_path = recipe.data.eval.path if recipe.data.eval else None
    with named("data.eval.path"):
        eval_files = data_files(eval_path) if eval_path else []
    data_hash = _hash_files([*files, *eval_files])

    if recipe.model.config is not None:
        read = recipe.data.model_dump(mode="json", include={"format", "fields", "max_rows", "bad_rows", "system"})
        tokenizer_key = _key("tokenizer", data_hash, read, recipe.model.config.get("vocab_size"))
        tokenizer_dir = made("tokenizer", tokenizer_key, cached, lambda into: _make_tokenizer(plan, into))
        model_key = _key("model", recipe.model.config, recipe.train.seed, tokenizer_key)
        model_dir = made("model", model_key, cached, lambda into: _make_model(plan, tokenizer_dir, into))
    else:
        model_dir = tokenizer_dir = source_dir = _existing_model(plan)
        if plan.shape.native is not None:
            key = _key("native", _FORMAT_NATIVE, plan.shape.native.model_dump(), hash_model(source_dir))
            model_dir = tokenizer_dir = made("native", key, cached, lambda into: _convert(plan, source_dir, into))
        found = sorted({path for pattern in _TOKENIZER_FILES for path in model_dir.glob(pattern)})
        tokenizer_key = _hash_files([path for path in found if path.is_file()])
        code = _staged_code(plan, run, model_dir, cached)
        if code is not None:
            tokenizer_key = _key(tokenizer_key, code.code.sha256)

    selection = recipe.data.model_dump(mode="json", exclude={"path", "batching", "questions"})
    data_key = _key(
        "data", data_hash, selection, recipe.train.seed, tokenizer_key, plan.shape.prompts, plan.shape.template
    )
    data_dir = made("data", data_key, cached, lambda into: _make_dataset(plan, tokenizer_dir, into, code))
    _try_model(plan, model_dir, code, cached)
    left = read_json(data_dir / "report.json")
    if code is not None:
        code = _tried(plan, model_dir, data_dir, code, cached)
    return Prepared(
        model_dir=str(model_dir),
        tokenizer_dir=str(tokenizer_dir),
        data_dir=str(data_dir),
        rows_key=_rows_key(plan, data_hash),
        source_dir=str(source_dir) if plan.shape.native is not None else None,
        code=code,
        cached=tuple(cached),
        template=left["template"],
        pad_token_id=left["pad_token_id"],
        eos_token_ids=left["eos_token_ids"],
        report=DataReport.model_validate(left["report"]),
    )


def _try_model(plan: Plan, model_dir: Path, code: Staged | None, cached: list[str]) -> None:
    """What is tried on a small copy of the model, once for its config and these libraries; and what is compiled for it."""
    tried_on = importlib.metadata.version("transformers"), importlib.metadata.version("torch")
    config = _hash_files([model_dir / "config.json"])
    if plan.batching == "packed":
        packing_key = _key("packing", config, tried_on, code and code.code.sha256)
        made("packing", packing_key, cached, lambda into: _try_packing(plan, model_dir, code))
    if plan.pipeline is not None:
        cut_key = _key("pipeline", config, tried_on, plan.shape.family)
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
        say(event="prepare", what="deepspeed", state=f"compiling {name}, which takes a minute or two")
        exit_code, output = compile_apart(name, {**os.environ, **variables})
        if exit_code:
            print(output, file=sys.stderr)
            lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()[-1:]
            raise PreflightError(
                f"DeepSpeed's {name}",
                f"does not compile: {lines[0].strip() if lines else 'no word why'}",
                "install a C++ compiler and ninja (pip install ninja), or set strategy.offload=none",
            )
        say(event="prepare", what="deepspeed", state=f"{name} is compiled")


def _staged_code(plan: Plan, run: RunDir, model_dir: Path, cached: list[str]) -> Staged | None:
    """The model's own code in the run directory, tried once for this code, config and libraries; None where it has none.

    Raises:
        PreflightError: it is not the plan's, cannot be loaded, or writes into the module cache.
    """
    if plan.shape.native is not None:
        return None
    model = plan.recipe.model
    code = plan.code or (checked_code(model, model_dir) if model.trust_remote_code else None)
    if code is None:
        return None
    staged = stage(code, read_code(model_dir, code), run.code, plan.fixes)
    run.module_cache.mkdir(mode=0o555, exist_ok=True)
    tried_on = importlib.metadata.version("transformers"), importlib.metadata.version("torch")
    key = _key("code", code.sha256, code.classes, _hash_files(sorted(model_dir.glob("*.json"))), plan.fixes, tried_on)
    made("code", key, cached, lambda into: _try_code(staged, model_dir, run))
    return staged


def _try_code(staged: Staged, model_dir: Path, run: RunDir) -> None:
    """Leaves an empty folder in the cache where the code can be loaded, nothing where it cannot."""
    from launcher.worker.quiet import quiet_libraries
    from launcher.worker.staged import try_out

    say(event="prepare", what="code", state="trying to load it")
    quiet_libraries()
    try_out(staged, model_dir, run.code)


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
    weights = sorted(path for pattern in (*_WEIGHT_PATTERNS, "*.bin") for path in model_dir.glob(pattern))
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    decided = plan.gradient_checkpointing, plan.recipe.adapter.type, plan.recipe.model.quantization
    key = _key(
        "trial", code.code.sha256, code.fixes, _hash_files([model_dir / "config.json"]), found, decided, tried_on
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


def _make_tokenizer(plan: Plan, into: Path) -> None:
    from launcher.worker.fresh import train_tokenizer

    train_tokenizer(plan, into)


def _make_model(plan: Plan, tokenizer_dir: Path, into: Path) -> None:
    from launcher.worker.fresh import random_model

    say(event="prepare", what="model", state="building from config")
    random_model(plan, tokenizer_dir, into)


def _convert(plan: Plan, source_dir: Path, into: Path) -> None:
    from launcher.worker.convert import convert_model
    from launcher.worker.native_tokenizer import convert_tokenizer

    def progress(done: int, total: int) -> None:
        say(event="prepare", what="native", state="converting", done=done, total=total)

    assert plan.shape.native is not None
    # The tokenizer first: it takes seconds, the weights minutes.
    convert_tokenizer(source_dir, into, plan.shape.native, plan.shape.name)
    convert_model(source_dir, into, plan.shape.name, progress)


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
    return _key("rows", data_hash, chosen, plan.recipe.train.seed, data.max_length if data.overlong == "drop" else None)


def _existing_model(plan: Plan) -> Path:
    """The folder of the recipe's model, fetched from the hub where it is none.

    Raises:
        PreflightError: it is neither here nor to be had.
    """
    name = plan.recipe.model.path
    assert name is not None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    say(event="prepare", what="download", state=f"fetching {name}")
    revision = plan.recipe.model.revision
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_WEIGHT_PATTERNS, *_OTHER_PATTERNS]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=["*.bin", "*.bin.index.json", *_OTHER_PATTERNS]
                )
            )
    except RepositoryNotFoundError:
        raise PreflightError(
            f"model.path: {name}",
            "is no folder here and no model on the hub that you may read",
            "check the name, or log in: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:160]
        raise PreflightError(
            f"model.path: {name}",
            f"is no folder here, and the hub cannot be reached: {reason}",
            "give the folder of a copy: model.path=/path/to/model",
        ) from None
    return folder


def _hash_files(files: Sequence[Path]) -> str:
    """One checksum over names and bytes, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def hash_model(folder: Path) -> str:
    """Checksum over all that a conversion reads.

    A file of the hub's cache is called by its own checksum. Others are read once: 12 GiB are half a minute of every start,
    so what was found is kept for as long as size, time and inode stay.
    """
    kept_in = cache_folder() / "checksums.json"
    kept: dict[str, Any] = read_json(kept_in) or {}
    num_kept = len(kept)
    patterns = (*_WEIGHT_PATTERNS, "*.bin", "*.bin.index.json", "*config.json", *_TOKENIZER_FILES, "*.tiktoken")
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        file, stat = path.resolve(), path.stat()
        checksum = file.name
        if not (path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", checksum)):
            stamp = f"{file} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
            checksum = kept[stamp] = kept.get(stamp) or _hash_files([file])
        digest.update(f"{path.name}\0{checksum}\0".encode())
    if len(kept) > num_kept:
        kept_in.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept_in, kept)
    return digest.hexdigest()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True, ensure_ascii=False).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
