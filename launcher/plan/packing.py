"""Rows of like length padded to each other, or rows packed into one sequence? In: both, priced. Out: the one that costs less, and why.

A pack has no padding. But unless attention is told where its rows begin, every token is held against every other one of the pack, and a
mask takes away what is of other rows: that grows with the square of the pack. Flash attention is told.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

from launcher.families import family
from launcher.plan.model import Attention, Decision
from launcher.plan.searching import Choice, Question

# What buckets leave of padding on rows as Alpaca's (benchmarks/results/throughput_vs_peers_*): a pack saves that.
PADDED_SHARE = 0.05


def attention_for(question: Question) -> tuple[Attention, str]:
    """What computes attention in a pack, and why."""
    shape, cluster = question.shape, question.cluster
    if cluster.kind == "cpu":
        return "sdpa", "no kernel for a CPU is told where rows begin"
    if shape.remote_code or family(shape.family).eager_attention or question.dtype == "fp32":
        return "sdpa", "flash attention is not for this model or its precision"
    if not all(device.bf16 for device in cluster.devices):
        return "sdpa", "flash attention has no kernels for one of the cards"
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "sdpa", "flash-attn is not installed here"
    return "flash_attention_2", f"flash-attn {version} is told where rows begin"


def cheaper(question: Question, choice: Choice) -> tuple[Question, Choice, Decision]:
    """Buckets, for which the choice was made, or packs of as many tokens, where those are faster and fit."""
    chosen, known = choice.chosen, family(question.shape.family)
    kept = None
    if chosen.option.strategy == "device_map":
        kept = "stages of a device map get no packs"
    elif question.shape.remote_code or not known.packing:
        kept = f"rows of a pack would see each other in {known.name}"
    elif chosen.option.micro_batch == 1:
        kept = "a micro batch is one row, so none is padded"
    if kept is not None:
        return question, choice, _bucketed(kept)
    packs = replace(question, batching="packed")
    packed = packs.price(chosen.option)
    # With its padding a bucket takes so many times as long as the plan's rows of full length, of which none is padded.
    ratio = packed.time.total_s * (1 - PADDED_SHARE) / chosen.time.total_s
    times = f"{ratio:.2f} × the time of rows of like length with {PADDED_SHARE:.0%} padding"
    if ratio >= 1 or not packed.fits:
        because = f"a pack takes {times}{'' if packed.fits else ', and does not fit'}"
        if packs.attention == "sdpa":
            because += f", because its mask grows with the square of its length ({attention_for(packs)[1]})"
        return question, choice, _bucketed(because)
    decision = Decision(key="data.batching", value="packed", because=f"takes {times}: {attention_for(packs)[1]}")
    return packs, replace(choice, chosen=packed), decision


def _bucketed(because: str) -> Decision:
    return Decision(key="data.batching", value="bucketed", because=because)
