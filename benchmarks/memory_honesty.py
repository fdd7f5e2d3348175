"""How far is the planner's memory from what training keeps?      goal: 3 % of the oracle at real size, 5 % of real ranks

    python benchmarks/memory_honesty.py [real-size] [ranks] [--kept FILE [--minutes 4]]
                                        [--out benchmarks/results/memory_honesty_<hardware>_<date>.md]

real-size: models of 6B to 70B as recipes would train them, `plan.memory` without its context against `oracle.observe`, which is
as on CUDA: bf16 weights under an adapter, fp32 weights under autocast for full training, masks of padded rows; int8 and nf4
bases are bitsandbytes' own modules.

ranks: three families, five strategies, LoRA and full training, with and without checkpointing, in real gloo ranks on CPU
tensors: the same ledger on tensors that have data, real DDP buckets, real FSDP2 and DeepSpeed collectives. Two models each: a
tiny and a small one. ZeRO needs DeepSpeed, and is left out where it is not installed. What the process grew by, as the kernel saw
it, stands beside it: it holds gemm workspaces and gloo's buffers too, a few MB of which no tensor knows.

Takes ten minutes on a quiet machine of two cores. With `--kept` what the oracle or the ranks saw is written down case by case; what
is there is compared with the plan of today without being measured again. One GPU and its allocator: `gpu_memory.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from kept import Kept
from page import Page, environment

from launcher.memory import Memory
from launcher.modelshape.files import catalogue_config
from launcher.native import Refusal, native_config

GIB, MIB = 2**30, 2**20
GOALS = {"real-size": 0.03, "ranks": 0.05}
_NEUTRAL = ("torch_dtype", "auto_map", "_name_or_path")
_ENDS: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"
)  # fmt: skip


def _config(model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(_SIZES, sizes, strict=True)), **_ENDS, **more}


def catalogued(name: str) -> dict[str, Any]:
    """A config of the shipped catalogue, as that of its native class."""
    config = catalogue_config(name)
    assert config is not None
    native = native_config(config)
    assert not isinstance(native, Refusal)
    found = dict(config if native is None else native.config)
    return {key: value for key, value in found.items() if key not in _NEUTRAL}


def models() -> dict[str, dict[str, Any]]:
    """6B to 70B, one of every kind of layer that the families have."""
    return {
        "Llama-2-7B": catalogued("meta-llama/Llama-2-7b-hf"),
        "Llama-3.1-8B": catalogued("meta-llama/Llama-3.1-8B"),
        "Llama-3.1-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256),
        "Mistral-7B-v0.3": catalogued("mistralai/Mistral-7B-v0.3") | {"sliding_window": None},
        "Qwen2.5-7B": catalogued("Qwen/Qwen2.5-7B-Instruct"),
        "Qwen3-8B": _config("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
        "ChatGLM2-6B (native)": catalogued("THUDM/chatglm2-6b"),
        "Gemma-7B": _config("gemma", 3072, 24576, 28, 16, 16, 256000, head_dim=256, tie_word_embeddings=True),
        "Phi-3-medium 14B": _config("phi3", 5120, 17920, 40, 40, 10, 32064),
        "Mixtral-8x7B": _config("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, sliding_window=None),
        "BLOOM-7B1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    }


LORA: dict[str, Any] = {"type": "lora"}
WIDE: dict[str, Any] = {"type": "lora", "targets": "all-linear", "dropout": 0.1}
FULL: dict[str, Any] = {"type": "full"}


class Way(NamedTuple):
    """How a model is trained: rows and tokens of each are those of a micro batch."""

    adapter: dict[str, Any]
    checkpointing: bool
    rows: int
    length: int
    strategy: str
    devices: int
    batching: str
    accumulation: int
    quantization: str = "none"
    dtype: str = "auto"


WAYS: dict[str, Way] = {
    "LoRA, 1 × 512": Way(LORA, False, 1, 512, "single", 1, "padded", 1),
    "LoRA all-linear, dropout, 2 × 1024": Way(WIDE, False, 2, 1024, "single", 1, "padded", 1),
    "LoRA, 4 × 1024 packed": Way(LORA, False, 4, 1024, "single", 1, "packed", 1),
    "LoRA all-linear, dropout, checkpointing, 1 × 8192": Way(WIDE, True, 1, 8192, "single", 1, "padded", 2),
    "full, checkpointing, ddp on 8, 2 × 2048": Way(FULL, True, 2, 2048, "ddp", 8, "padded", 2),
    "full, 2 × 2048": Way(FULL, False, 2, 2048, "single", 1, "padded", 1),
    "full, checkpointing, fsdp on 8, 4 × 2048": Way(FULL, True, 4, 2048, "fsdp", 8, "padded", 1),
    "full, fsdp on 8, 1 × 2048": Way(FULL, False, 1, 2048, "fsdp", 8, "padded", 2),
    "LoRA, fsdp on 8, 1 × 512": Way(LORA, False, 1, 512, "fsdp", 8, "padded", 1),
    "LoRA, fp16 without flash attention, 2 × 1024": Way(LORA, False, 2, 1024, "single", 1, "padded", 1, dtype="fp16"),
    "LoRA over int8, 1 × 512": Way(LORA, False, 1, 512, "single", 1, "padded", 1, "int8"),
    "LoRA all-linear over int8, checkpointing, 2 × 2048": Way(WIDE, True, 2, 2048, "single", 1, "padded", 1, "int8"),
    "LoRA over nf4, checkpointing, 1 × 512": Way(LORA, True, 1, 512, "single", 1, "padded", 1, "nf4"),
    "LoRA all-linear over nf4, dropout, 2 × 1024": Way(WIDE, False, 2, 1024, "single", 1, "padded", 1, "nf4"),
}


def recipe_of(config: dict[str, Any], way: Way) -> dict[str, Any]:
    """The recipe of a case, but for its data and its hardware."""
    return {
        "model": {"config": config, "dtype": way.dtype, "quantization": way.quantization},
        "data": {"max_length": way.length, "batching": way.batching},
        "adapter": way.adapter,
        "strategy": {"type": way.strategy},
        "train": {
            "micro_batch": way.rows, "global_batch": way.rows * way.devices * way.accumulation, "max_steps": 2,
            "gradient_checkpointing": way.checkpointing,
        },
    }  # fmt: skip


def main() -> None:
    """Compare, and write the page."""
    parser = argparse.ArgumentParser(description="Hold the planner's memory against the oracle and against real ranks.")
    parser.add_argument("parts", nargs="*", choices=[*GOALS, []], help="which comparisons (default: both)")
    parser.add_argument("--models", nargs="*", help="only models of which the name begins so")
    parser.add_argument("--ways", nargs="*", help="only ways of which the name begins so")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    parser.add_argument("--kept", type=Path, help="append what is seen to this file, and leave out what is there")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    parser.add_argument("--minutes", type=float, help="begin nothing later than this; the page then has what is there")
    options = parser.parse_args()
    kept = Kept(options.kept)
    page = Page("Honesty of the memory plan", "How far is the memory of a plan from what training keeps?")
    if "real-size" in (options.parts or GOALS):
        observe_all(kept, chosen_cases(options.models, options.ways), options.jobs, options.minutes)
        real_size(page, kept, chosen_cases(options.models, options.ways))
    if "ranks" in (options.parts or GOALS):
        ranks(page, kept)
    page.finish(options.out)


def chosen_cases(chosen: list[str] | None, ways: list[str] | None) -> list[tuple[str, dict[str, Any], int]]:
    """(label, recipe, devices) of every model in every way."""
    return [
        (f"{name}, {what}", recipe_of(config, way), way.devices)
        for name, config in models().items()
        if not chosen or name.startswith(tuple(chosen))
        for what, way in WAYS.items()
        if not ways or what.startswith(tuple(ways))
    ]


def observe_all(kept: Kept, cases: list[tuple[str, dict[str, Any], int]], jobs: int, minutes: float | None) -> None:
    """Let the oracle see what is not kept yet, on tensors without data."""
    missing, started = [case for case in cases if case[0] not in kept], time.monotonic()
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for at in range(0, len(missing), 2 * jobs):
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return
            batch = missing[at : at + 2 * jobs]
            answers = [(label, pool.submit(observed, recipe, devices)) for label, recipe, devices in batch]
            for label, answer in answers:
                try:
                    kept.add(label, {"seen": answer.result().model_dump()})
                except Exception as error:  # noqa: BLE001 - a way that a model cannot go is a finding, not the end
                    kept.add(label, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"})
                print(label, file=sys.stderr, flush=True)


def real_size(page: Page, kept: Kept, cases: list[tuple[str, dict[str, Any], int]]) -> None:
    """Plan against oracle, of everything that was seen."""
    from oracle import planned

    rows, ratios, failed = [], [], []
    for label, recipe, devices in cases:
        found = kept.get(label, {"failed": "not run"})
        if "failed" in found:
            failed.append(f"- {label}: {found['failed']}")
            continue
        predicted, seen = planned(recipe, devices).memory, Memory.model_validate(found["seen"])
        ratios.append(without_context(predicted) / seen.total_bytes)
        rows.append([label, *_cells(predicted, seen, GIB)])
    page.section("Real size, against the oracle", _summary("real-size", ratios))
    page.table(["model and way", "predicted, GiB", "oracle, GiB", "off by", "largest difference of a part"], rows)
    if failed:
        page.section("What could not be compared", "\n".join(failed))


def observed(recipe: dict[str, Any], devices: int) -> Memory:
    """What the oracle sees of a recipe."""
    if recipe["model"]["quantization"] == "none":
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # as a rank does: PEFT would import it for a second
    elif sys.modules.get("bitsandbytes", ...) is None:
        del sys.modules["bitsandbytes"]
    from oracle import observe, planned

    return observe(planned(recipe, devices))


def without_context(memory: Memory) -> int:
    """What tensors take; the context is a constant that no tensor shows."""
    return memory.total_bytes - memory.context_bytes


def _cells(predicted: Memory, seen: Memory, unit: int) -> list[str]:
    """Totals, their ratio, and the part that is farthest off, as a share of the total."""
    total = seen.total_bytes
    parts = {name: size - seen.parts()[name] for name, size in predicted.parts().items() if name != "context"}
    name, difference = max(parts.items(), key=lambda pair: abs(pair[1]))
    off = f"{without_context(predicted) / total - 1:+.2%}"
    return [f"{without_context(predicted) / unit:.2f}", f"{total / unit:.2f}", off, f"{name} {difference / total:+.1%}"]


def _summary(part: str, ratios: list[float]) -> str:
    offs = sorted(abs(ratio - 1) for ratio in ratios)
    if not offs:
        return "Nothing was compared."
    within = sum(off <= GOALS[part] for off in offs)
    return (
        f"{within} of {len(offs)} within {GOALS[part]:.0%}; median {offs[len(offs) // 2]:.2%}, largest {offs[-1]:.2%}. "
        "A part may be off where the total is not: predicted and real fullest moment can be two that are nearly the same."
    )


FAMILIES = {"llama": {}, "gemma": {"head_dim": 32, "tie_word_embeddings": True}, "phi": {}}
WIDTHS = {"tiny": (128, 384, 3, 4, 2, 2048), "small": (256, 768, 6, 8, 2, 4096)}


def rank_ways(strategy: str) -> Iterator[tuple[str, Way]]:
    """LoRA and full training, with and without checkpointing."""
    devices = 1 if strategy == "single" else 2
    for adapter in (WIDE, FULL):
        for checkpointing in (False, True):
            name = f"{'full' if adapter is FULL else 'LoRA'}{', checkpointing' if checkpointing else ''}"
            yield name, Way(adapter, checkpointing, 4, 128, strategy, devices, "padded", 1)


def ranks(page: Page, kept: Kept) -> None:
    """Every family and strategy in real ranks; one torchrun a strategy."""
    rows, ratios = [], []
    strategies = ["single", "ddp", "fsdp"]
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    strategies += ["zero2", "zero3"] if has_deepspeed else []
    for strategy in strategies:
        cases = [
            (
                f"{strategy}, {family}, {width}, {name}",
                recipe_of(_small(family, width, more), way._replace(dtype="fp32")),
            )
            for family, more in FAMILIES.items()
            for width in WIDTHS
            for name, way in rank_ways(strategy)
        ]
        devices = 1 if strategy == "single" else 2
        if strategy not in kept:
            kept.add(strategy, measured([recipe for _, recipe in cases], devices))
        for (name, recipe), found in zip(cases, kept[strategy], strict=True):
            from oracle import planned

            predicted, seen = planned(recipe, devices, "cpu").memory, Memory.model_validate(found["memory"])
            ratios.append(without_context(predicted) / seen.total_bytes)
            cells = _cells(predicted, seen, MIB)
            rows.append([name, *cells[:3], f"{found['grown_bytes'] / MIB:.1f}"])
        print(f"{strategy}: done", file=sys.stderr)
    note = "" if has_deepspeed else " DeepSpeed is not installed here: ZeRO was not measured."
    page.section("Real gloo ranks on CPU tensors", _summary("ranks", ratios) + note)
    page.table(["strategy, family, size, way", "predicted, MiB", "measured, MiB", "off by", "process grew, MiB"], rows)


def _small(family: str, width: str, more: dict[str, Any]) -> dict[str, Any]:
    config = _config(family, *WIDTHS[width]) | more
    return config | ({"num_key_value_heads": config["num_attention_heads"]} if family == "phi" else {})


def measured(recipes: list[dict[str, Any]], devices: int) -> list[dict[str, Any]]:
    """What `oracle/ranks.py` saw of these recipes in a world of that size."""
    with tempfile.TemporaryDirectory(prefix="launch-honesty-") as name:
        cases, out = Path(name) / "cases.json", Path(name) / "out.json"
        cases.write_text(json.dumps(recipes))
        script = Path(__file__).parent / "oracle" / "ranks.py"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        # Every large block of memory goes back to the kernel at once: else a peak is that of the case before.
        quiet = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        env = environment() | quiet | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
        done = subprocess.run(
            [*torchrun, str(script), str(cases), str(out)],
            env=env, capture_output=True, text=True, timeout=3600, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{done.stderr[-4000:]}\nthe ranks ended with {done.returncode}")
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


if __name__ == "__main__":
    main()
