"""What parts of tensors come to in bytes, and which parts may not be taken as blocks."""

import pytest
import torch

from core.errors import ModelError
from core.interfaces.weights import Shard
from core.weights.manifest import FP8, TensorRequest, require_whole_blocks


@pytest.mark.parametrize(("bits", "num_bytes"), [(4, 5120), (8, 10240)])
def test_groups_count_their_scales_and_minimums(bits: int, num_bytes: int) -> None:
    """Of 32 values: 16 bytes, and 2 each for a scale and a minimum; twice that for 8 bits."""
    take = TensorRequest("w", (128, 64), None, torch.uint8, group_bits=bits)
    assert take.num_local_bytes == num_bytes


def test_padded_parts_are_no_whole_blocks() -> None:
    """Though their bounds are edges of blocks: what lies past the end has no scales."""
    require_whole_blocks(TensorRequest("w", (384, 128), Shard(0, 0, 3), FP8, as_blocks=True))
    with pytest.raises(ModelError, match="inside its blocks"):
        require_whole_blocks(
            TensorRequest("w", (384, 128), Shard(0, 0, 3, True), FP8, as_blocks=True)
        )
