"""Tells transformers what the host knows of a batch: whether rows are packed into one sequence.

Where a batch has no mask, transformers looks for packed rows in the position ids, which are on the card, and the host waits for the answer
in every micro batch. A plan packs all of its batches or none.
"""

from __future__ import annotations

import torch
from transformers import masking_utils


def tell_of_packs(packed: bool) -> None:
    """Answer that question for all models of this process from here on."""
    masking_utils.find_packed_sequence_indices = _numbered if packed else _none


def _none(position_ids: torch.Tensor) -> None:
    """No row stands behind another one."""


def _numbered(position_ids: torch.Tensor) -> torch.Tensor:
    """Which row each token belongs to, of shape (1, tokens): a row begins where positions do not go on."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)
