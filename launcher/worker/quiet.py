"""Keeps what says nothing about this run out of logs and terminals. Call before the libraries are imported."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from launcher.plan import Plan


def quiet_libraries() -> None:
    """Silence progress bars of single files, advice to developers and deprecations inside libraries; errors and real warnings stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # "Failed to load CPU gemm_4bit_forward" and "MatMul8bitLt: inputs will be cast": true on every CPU, hundreds of times.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    # accelerate says that what lies in host memory is on the meta device; so it is meant.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    # PEFT warns when it reads its own AdaLoRA file; the weights are right.
    warnings.filterwarnings("ignore", message=".*rank_pattern.*")
    # transformers deprecates names that PEFT and its own Trainer still use.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def leave_out_what_is_unused(plan: Plan) -> None:
    """Hide bitsandbytes from PEFT where the plan has no use for it. Call before PEFT is imported.

    PEFT imports it wherever it is installed, and with it torch's compiler: a second of CPU time on every rank, and talk of
    kernels that nobody asked for.
    """
    if not plan.needs_bitsandbytes:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
