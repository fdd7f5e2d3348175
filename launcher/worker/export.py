"""`launch export RUN`: a checkpoint in, a folder out that loads on its own and computes the same.

The adapter is merged into the base in full precision, never into a quantised one. Before the folder gets its name it is loaded in a
fresh process and its logits are compared with those of base and adapter side by side.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from launcher.errors import PreflightError
from launcher.remotecode import Staged, find_code, read_code, stage
from launcher.rundir import RunDir, read_json, write_json
from launcher.worker.loading import Trained, load_trained
from launcher.worker.original import (
    WEIGHTS,
    converted_again,
    is_original,
    merged,
    require_way_back,
    shared_and_counted,
    write_original,
)
from launcher.worker.pulse import die_with_parent
from launcher.worker.quiet import quiet_libraries
from launcher.worker.staged import load_tokenizer, load_weights

# Largest difference of a logit, as a share of the largest logit: what rounding does when two matrices are added before the product.
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_PROBE = "The quick brown fox jumps over the lazy dog. 今天天气很好。"


def main(argv: list[str]) -> int:
    """Export, or with --verify compare; the exit code."""
    options = _options(argv)
    quiet_libraries()
    if options.verify:
        die_with_parent()
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
    trained = load_trained(run, options.step, quantized=False)
    print(f"export       {trained.plan.name}, {trained.checkpoint.name}")
    try:
        staging.mkdir(parents=True)
        probe = run.path / f".export-probe-{os.getpid()}.pt"
        torch.save(_logits(trained.model, _probe_ids(trained)), probe)
        try:
            size = options.max_shard_size or trained.plan.recipe.checkpoint.max_shard_size
            write = write_original if options.layout == "original" else _write
            num_bytes = write(trained, staging, size)
            _verify_in_fresh_process(staging, probe, trained)
        finally:
            probe.unlink()
        staging.rename(out)
    except OSError as error:
        raise PreflightError(
            f"export folder {out}", f"cannot be written: {error.strerror}", "name another one: --out DIR"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(
        f"verified     loads in a fresh process and gives the same logits\ndone         {out}  {num_bytes / 2**20:,.1f} MiB"
    )


def _write(trained: Trained, folder: Path, max_shard_size: str) -> int:
    """Merged weights in shards, config, generation config and tokenizer; the bytes written."""
    model = merged(trained)
    model.generation_config.eos_token_id = list(trained.prepared.eos_token_ids)
    model.generation_config.pad_token_id = trained.prepared.pad_token_id
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if trained.prepared.code is None:
        trained.tokenizer.save_pretrained(folder)
    else:
        _copy_tokenizer(Path(trained.prepared.tokenizer_dir), folder)
        _add_code(trained.prepared.code, folder)
    return shared_and_counted(folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer as it came: nothing trains it, and what transformers 5 saves of an old one lacks add_bos_token."""
    for file in source.iterdir():
        others = file.name.startswith(".") or file.name in ("config.json", "generation_config.json")
        if file.is_file() and not others and not file.name.endswith((*WEIGHTS, ".py")):
            shutil.copyfile(file, folder / file.name)


def _add_code(staged: Staged, folder: Path) -> None:
    """Every file of the model's own code: save_pretrained leaves out those imported by `from . import x`."""
    for file in staged.code.files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(staged.read(Path(staged.folder, file.name)))
    config, tokenizer = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json") or {}
    config["auto_map"] = {auto: name for auto, name in staged.code.classes.items() if auto != "AutoTokenizer"}
    if "AutoTokenizer" in staged.code.classes and "AutoTokenizer" not in tokenizer.get("auto_map", {}):
        config["auto_map"]["AutoTokenizer"] = [staged.code.classes["AutoTokenizer"], None]
    write_json(folder / "config.json", config)


def _verify_in_fresh_process(folder: Path, probe: Path, trained: Trained) -> None:
    command = [sys.executable, "-m", "launcher.worker.export", str(folder), "--verify", str(probe)]
    if trained.prepared.code is not None:
        command += ["--trust-remote-code", "--fixes", ",".join(trained.prepared.code.fixes)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PreflightError(
            "export",
            f"the folder does not load or compute as it should: {lines[-1] if lines else ''}",
            "report this, please",
        )


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
    found = _logits(model.eval(), kept["ids"])["logits"]
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]
    difference = float((found - kept["logits"]).abs().max() / kept["logits"].abs().max())
    if difference > _TOLERANCE[name]:
        print(
            f"logits differ by {difference:.1e} of the largest, allowed in {name}: {_TOLERANCE[name]:.0e}",
            file=sys.stderr,
        )
        return 1
    return 0


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
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--fixes", default="")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
