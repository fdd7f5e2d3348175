"""`launch export RUN`: a checkpoint in, a folder out that loads on its own and computes the same.

The adapter is merged into the base in full precision, never into a quantised one. Before the folder gets its name it is loaded in a
fresh process and its logits are compared with those of base and adapter side by side. Weights that were trained in full are streamed, a
tensor at a time, and compared bit by bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from launcher.compat import BUILT_FIRST
from launcher.errors import PreflightError
from launcher.plan import read_plan
from launcher.remotecode import RemoteCode, Staged, find_code, read_code, stage
from launcher.rundir import RunDir, read_json, write_json
from launcher.worker.loading import Trained, chosen_checkpoint, load_trained
from launcher.worker.original import (
    WEIGHTS,
    converted_again,
    is_original,
    merged,
    require_way_back,
    shared_and_counted,
    write_original,
)
from launcher.worker.prepared import read_prepared
from launcher.worker.pulse import die_with_parent, first_line
from launcher.worker.quiet import quiet_libraries
from launcher.worker.staged import MODEL_CLASSES, load_tokenizer, load_weights
from launcher.worker.streaming import require_same, restream

# Largest difference of a logit, as a share of the largest logit: what rounding does when two matrices are added before the product.
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_ABOUT_CODE = "code         "
_PROBE = "The quick brown fox jumps over the lazy dog. 今天天气很好。"


def main(argv: list[str]) -> int:
    """Export, or with --verify compare; the exit code."""
    options = _options(argv)
    quiet_libraries()
    if options.verify or options.whole:
        die_with_parent()
    if options.whole:
        return whole(Path(options.run))
    if options.verify:
        return verify(Path(options.run), Path(options.verify), options)
    export(RunDir(Path(options.run)), options)
    return 0


def export(run: RunDir, options: Any) -> None:
    """Write the folder.

    Raises:
        PreflightError: it is there already, cannot be written, or does not compute the same.
    """
    out = Path(options.out).expanduser().resolve() if options.out else run.export
    if out.exists():
        raise PreflightError(f"export folder {out}", "is there already", "remove it, or name another one: --out DIR")
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    if options.layout == "original":
        require_way_back(run)
    plan, prepared = read_plan(run), read_prepared(run)
    # Merging, another layout and code of the model's own want the model itself; weights as they are do not.
    as_they_are = plan.recipe.adapter.type == "full" and options.layout == "native" and prepared.code is None
    try:
        staging.mkdir(parents=True)
        num_bytes, verified = (_streamed if as_they_are else _computed)(run, staging, options)
        staging.rename(out)
    except OSError as error:
        raise PreflightError(
            f"export folder {out}", f"cannot be written: {error.strerror}", "name another one: --out DIR"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"verified     {verified}\ndone         {out}  {num_bytes / 2**20:,.1f} MiB")


def _streamed(run: RunDir, staging: Path, options: Any) -> tuple[int, str]:
    """Put the weights of a checkpoint into files of another size; their bytes, and how that was verified.

    Takes the memory of a few tensors.
    """
    plan, prepared = read_plan(run), read_prepared(run)
    checkpoint = chosen_checkpoint(run, plan, options.step)
    print(f"export       {plan.name}, {checkpoint.name}")
    num_bytes = restream(checkpoint, staging, options.max_shard_size or plan.recipe.checkpoint.max_shard_size)
    require_same(checkpoint, staging)
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, staging / name)
    ends = {"eos_token_id": list(prepared.eos_token_ids), "pad_token_id": prepared.pad_token_id}
    write_json(staging / "generation_config.json", {**(read_json(staging / "generation_config.json") or {}), **ends})
    load_tokenizer(prepared.tokenizer_dir, None).save_pretrained(staging)
    shared_and_counted(staging)
    _in_fresh_process([str(staging), "--whole"])
    return num_bytes, "every tensor is the checkpoint's; transformers finds all of them in a fresh process"


def _computed(run: RunDir, staging: Path, options: Any) -> tuple[int, str]:
    """Merge, or write in another layout, by the model in memory; the bytes, and how that was verified."""
    trained = load_trained(run, options.step, quantized=False)
    print(f"export       {trained.plan.name}, {trained.checkpoint.name}")
    probe = run.path / f".export-probe-{os.getpid()}.pt"
    torch.save(_logits(trained.model, _probe_ids(trained)), probe)
    try:
        size = options.max_shard_size or trained.plan.recipe.checkpoint.max_shard_size
        write = write_original if options.layout == "original" else _write
        num_bytes = write(trained, staging, size)
        _verify_in_fresh_process(staging, probe, trained)
    finally:
        probe.unlink()
    return num_bytes, "launch loads it in a fresh process and gets the same logits"


def _write(trained: Trained, folder: Path, max_shard_size: str) -> int:
    """Merged weights in shards, config, generation config and tokenizer; the bytes written."""
    model = merged(trained)
    model.generation_config.eos_token_id = list(trained.prepared.eos_token_ids)
    model.generation_config.pad_token_id = trained.prepared.pad_token_id
    with _code_left_out(type(model), type(model.config)):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    if trained.prepared.code is None:
        trained.tokenizer.save_pretrained(folder)
    else:
        _copy_tokenizer(Path(trained.prepared.tokenizer_dir), folder)
        _add_code(trained.prepared.code, trained.tokenizer.is_fast, folder)
    return shared_and_counted(folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer as it came: nothing trains it, and what transformers 5 saves of an old one lacks add_bos_token."""
    for file in source.iterdir():
        others = file.name.startswith(".") or file.name in ("config.json", "generation_config.json")
        if file.is_file() and not others and not file.name.endswith((*WEIGHTS, ".py")):
            shutil.copyfile(file, folder / file.name)


@contextmanager
def _code_left_out(*classes: Any) -> Iterator[None]:
    """Keep save_pretrained from copying .py files by a search of its own: it leaves out `from . import x`, and fails on sub-folders."""
    registered = {each: each._auto_class for each in classes if getattr(each, "_auto_class", None) is not None}
    for each in registered:
        each._auto_class = None
    try:
        yield
    finally:
        for each, auto in registered.items():
            each._auto_class = auto


def _add_code(staged: Staged, fast_tokenizer: bool, folder: Path) -> None:
    """Every file of the model's own code, byte by byte, and an auto_map that names this folder and no other repository."""
    for file in staged.code.files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(staged.read(Path(staged.folder, file.name)))
    classes = dict(staged.code.classes)
    tokenizer = classes.pop("AutoTokenizer", None)
    _name_classes(folder / "config.json", classes)
    # The slow class comes first, the fast one second.
    pair = [None, tokenizer] if fast_tokenizer else [tokenizer, None]
    _name_classes(folder / "tokenizer_config.json", {"AutoTokenizer": pair} if tokenizer else {})


def _name_classes(file: Path, classes: dict[str, Any]) -> None:
    """The auto_map of a config file; none where it has nothing to name."""
    config = {key: value for key, value in (read_json(file) or {}).items() if key != "auto_map"}
    write_json(file, {**config, "auto_map": classes} if classes else config)


def _verify_in_fresh_process(folder: Path, probe: Path, trained: Trained) -> None:
    arguments = [str(folder), "--verify", str(probe)]
    if trained.prepared.code is not None:
        arguments += ["--trust-remote-code", "--fixes", ",".join(trained.prepared.code.fixes)]
    _in_fresh_process(arguments)


def _in_fresh_process(arguments: list[str]) -> None:
    """Look at an exported folder as somebody does who knows nothing of this run.

    Raises:
        PreflightError: it does not load, or computes something else.
    """
    command = [sys.executable, "-m", "launcher.worker.export", *arguments]
    # A module cache of its own: transformers reads where it is when it is imported.
    with tempfile.TemporaryDirectory(prefix="launch-modules-") as modules:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(_ABOUT_CODE):  # others are of the model's code
            print(line)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PreflightError(
            "export",
            f"the folder does not load or compute as it should: {lines[-1] if lines else ''}",
            "report this, please",
        )


def whole(folder: Path) -> int:
    """Whether transformers finds every weight of a folder, without memory for any; 0 where it does."""
    import transformers

    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map="meta", dtype="auto", output_loading_info=True, local_files_only=True
    )
    transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
    print(f"{type(model).__name__}: {wrong}" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


def verify(folder: Path, probe: Path, options: Any) -> int:
    """Load a folder as anybody would and compare its logits with those kept in `probe`; 0 when they agree."""
    kept = torch.load(probe, weights_only=True)
    if is_original(folder):
        # Its own code is not run here: what is compared is what the next `launch` would make of it.
        with converted_again(folder) as native:
            return verify(native, probe, options)
    with tempfile.TemporaryDirectory(prefix="launch-verify-") as root:
        code, staged = find_code(folder) if options.trust_remote_code else None, None
        if code is not None:
            fixes = tuple(filter(None, options.fixes.split(",")))
            staged = stage(code, read_code(folder, code), Path(root), fixes)
        model = load_weights(folder, staged, dtype="auto")
        load_tokenizer(folder, staged)
    problem = _difference(model, kept)
    if problem:
        print(problem, file=sys.stderr)
        return 1
    if code is not None:
        del model
        print(_without_launch(folder, code, kept, fixes))
    return 0


def _without_launch(folder: Path, code: RemoteCode, kept: dict[str, torch.Tensor], fixes: tuple[str, ...]) -> str:
    """Whether `from_pretrained(folder, trust_remote_code=True)` alone gives the same, in a line. Some code only launch can load."""
    import transformers

    auto = next((each for each in MODEL_CLASSES if each in code.classes), MODEL_CLASSES[0])
    try:
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        model = getattr(transformers, auto).from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, weights_only=True, dtype="auto"
        )
        problem = _difference(model, kept)
    except Exception as error:  # noqa: BLE001 - whatever somebody's code and transformers make of each other
        problem = f"{type(error).__name__}: {first_line(error)}"
    if problem:
        why = problem.replace(f"{folder}/", "")[:300]
        if BUILT_FIRST in fixes:
            why = "it makes tables that no file holds, and from_pretrained of transformers 5 leaves them uninitialised"
        return f"{_ABOUT_CODE}copied. launch loads it right, transformers alone does not: {why}"
    return f"{_ABOUT_CODE}copied; from_pretrained(…, trust_remote_code=True) gives the same logits too"


def _difference(model: Any, kept: dict[str, torch.Tensor]) -> str:
    """What stands against taking two models for the same, from their logits; empty where nothing does."""
    found = _logits(model.eval(), kept["ids"])["logits"]
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]
    difference = float((found - kept["logits"]).abs().max() / kept["logits"].abs().max())
    if difference <= _TOLERANCE[name]:
        return ""
    return f"logits differ by {difference:.1e} of the largest, allowed in {name}: {_TOLERANCE[name]:.0e}"


def _probe_ids(trained: Trained) -> torch.Tensor:
    """A question as the model is asked it: some code cannot do without the special tokens around one."""
    ids = trained.prompter.prompt([{"role": "user", "content": _PROBE}])
    return torch.tensor([[token for token in ids if token is not None]])


def _logits(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """ids of shape (1, tokens) -> their logits in fp32, on the CPU."""
    with torch.no_grad():
        return {"ids": ids, "logits": model(input_ids=ids.to(model.device)).logits.float().cpu()}


def _options(argv: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="launch export")
    parser.add_argument("run")
    parser.add_argument("--out")
    parser.add_argument("--max-shard-size")
    parser.add_argument("--step")
    parser.add_argument("--layout", choices=("native", "original"), default="native")
    parser.add_argument("--verify")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--fixes", default="")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
