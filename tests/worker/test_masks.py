"""What transformers is told of packs is what it would have found itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import masking_utils

from launcher.worker.masks import tell_of_packs


@pytest.fixture(autouse=True)
def asked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
        yield


def test_rows_of_a_pack_are_numbered_as_transformers_numbers_them() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2, 3]])
    found = masking_utils.find_packed_sequence_indices(positions)
    tell_of_packs(packed=True)
    assert torch.equal(masking_utils.find_packed_sequence_indices(positions), found)


def test_rows_that_are_not_packed_are_none() -> None:
    positions = torch.arange(5).expand(3, -1)
    assert masking_utils.find_packed_sequence_indices(positions) is None
    tell_of_packs(packed=False)
    assert masking_utils.find_packed_sequence_indices(positions) is None
