"""Writes and reads checkpoints/step-N: a staging folder, every rank's part with its checksums, the manifest last, one rename.

    adapter_model.safetensors  or  model-0000k-of-0000n.safetensors    weights, readable by PEFT and transformers
    optimizer-rank<k>.safetensors                                      the share of optimizer state that rank k wrote, by parameter name
    optimizer.json                                                     the scheduler's step, a loss scaler
    rng_state*.pth, rng-rank<k>.safetensors                            random states, of the Trainer's ranks and of a pipeline's
    trainer_state.json, adalora.safetensors                            the Trainer's counters, AdaLoRA's scores
    manifest.json                                                      the commit marker

`files` writes bytes and their checksums, `slices` is the layout of optimizer state that any set of ranks can read, `optimizer` fills
it, `saving` commits.
"""

from launcher.worker.checkpoint.files import Staging
from launcher.worker.checkpoint.optimizer import put_back, read_optimizer, set_schedule, write_optimizer
from launcher.worker.checkpoint.saving import NotSavedError, Position, Saver, gathered, save_checkpoint

__all__ = [
    "NotSavedError",
    "Position",
    "Saver",
    "Staging",
    "gathered",
    "put_back",
    "read_optimizer",
    "save_checkpoint",
    "set_schedule",
    "write_optimizer",
]
