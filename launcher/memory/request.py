"""What memory is asked for, and the answer: `MemoryRequest` and `Memory`, both plain values."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from launcher.families import family
from launcher.modelshape import ModelShape
from launcher.recipe.schema import Adapter

# How the head computes a loss: logits of every token; of those that a label follows; and of these some at a time, never kept.
Logits = Literal["whole", "labels", "parts"]
# Logits that are there at once in parts: on a card a quarter GiB in fp32, on a CPU 32 MiB (smaller parts are slower).
_LOGITS_AT_ONCE = {"cuda": 2**26, "cpu": 2**23}
_TOKENS_STEP = 64


def tokens_at_once(vocab_size: int, kind: str) -> int:
    """Tokens whose logits are computed together where the loss goes in parts."""
    return max(1, _LOGITS_AT_ONCE[kind] // vocab_size // _TOKENS_STEP) * _TOKENS_STEP


def unmasked(logits: Logits, batching: str, strategy: str) -> bool:
    """Whether padded rows come without a mask: padding is right of all that looks to the left, so no token of a row sees it.

    Not where it is unknown what else a model does with a mask, and not through the stages of a device map.
    """
    return logits != "whole" and batching != "packed" and strategy != "device_map"


class MemoryRequest(BaseModel):
    """One way to train a model. Bytes are a value's; `sequence_length` in tokens, `micro_batch` in rows of that length.

    `weights_dtype_bytes` is that of the base as it lies in memory (what is quantized is counted apart), `adapter` says
    which inputs have to be kept; None is LoRA on the family's own targets without dropout. `accumulation`: micro
    batches of a step; from the second on the gradients of the first are there. Under `logits: labels` every token is counted
    as one with a label. `shares_keys`: torch's flash attention runs there, and takes heads in groups that share their keys
    (`Cluster.has_flash`). `flash`: whether attention is told where the rows of a pack begin, and needs no mask for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: ModelShape
    trainable_parameters: int
    full: bool
    adapter: Adapter | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"
    weights_dtype_bytes: int = 2
    compute_dtype_bytes: int = 2
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    micro_batch: int
    sequence_length: int
    batching: Literal["padded", "bucketed", "packed"] = "padded"
    accumulation: int = 2
    gradient_checkpointing: bool = False
    flash: bool = False
    logits: Logits = "whole"
    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "device_map"] = "single"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    num_processes: int = 1
    kind: Literal["cuda", "cpu"] = "cuda"
    shares_keys: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro batch, padding and all."""
        return self.micro_batch * self.sequence_length

    @property
    def layer_dtype_bytes(self) -> int:
        """Bytes of a weight while its layer computes: FSDP2 keeps trained weights in fp32 and gathers them in the compute dtype."""
        gathered_smaller = self.strategy == "fsdp" and self.full
        return self.compute_dtype_bytes if gathered_smaller else self.weights_dtype_bytes

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are computed with in half precision: single, DDP and device maps leave that to autocast."""
        return self.compute_dtype_bytes < self.weights_dtype_bytes and not self.hands_over

    @property
    def hands_over(self) -> bool:
        """Whether the layers, adapters too, are handed their weights in the compute dtype, and nothing casts a copy."""
        return self.strategy not in ("single", "ddp", "device_map")

    @property
    def stream_bytes(self) -> int:
        """Bytes of a value between the layers.

        fp32 weights under autocast keep it in fp32, and so does a norm of the embedding, which CUDA's autocast computes in fp32.
        """
        return 4 if self.autocast or (self.norms_embedding and self.norms_in_fp32) else self.compute_dtype_bytes

    @property
    def norms_in_fp32(self) -> bool:
        """Whether LayerNorms of half-precision values answer in fp32: CUDA's autocast does that, and RMSNorms are written out."""
        return self.kind == "cuda" and self.compute_dtype_bytes < 4 and not self.shape.rms_norm and not self.hands_over

    @property
    def norms_embedding(self) -> bool:
        """Whether a norm stands between the embedding and the layers."""
        known = family(self.shape.family)
        return any(name in self.shape.outer and "norm" in name for name in known.others)

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask. A single row needs none, and transformers then passes none.

        The longest micro batch is counted as if some row of it were padded. Rows of a known family need none for that (`unmasked`).
        """
        if self.flash and self.batching == "packed":
            return False
        return self.micro_batch > 1 and not unmasked(self.logits, self.batching, self.strategy)

    @property
    def shards(self) -> int:
        """Parts that whatever is sharded lies in."""
        return self.num_processes if self.strategy in ("zero1", "zero2", "zero3", "fsdp") else 1


class Memory(BaseModel):
    """Bytes of the fullest device at its fullest moment, in parts that are there together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    buffers_bytes: int
    context_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by the word for each: weights, adapter, gradients, …, context."""
        return {name.removesuffix("_bytes"): value for name, value in self}
