"""The ordered sum that ends every reduction over tokens."""

import pytest
import torch

from moe_kernels.partial_sums import range_rows, sum_partials


@pytest.mark.parametrize(("count", "width"), [(0, 5), (1, 1), (255, 40), (700, 33)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_sums_of_columns(count, width, dtype, device):
    """More partials than one step takes, columns that no block divides; whole numbers, whose fp32 sums are exact."""
    partials = torch.randint(-99, 99, (count, width), device=device).to(dtype)
    assert torch.equal(sum_partials(partials, dtype), partials.sum(0).to(dtype))


@pytest.mark.parametrize(("tokens", "rows"), [(1, 32), (32 * 16, 32), (32 * 16 + 1, 64), (16_384, 1024)])
def test_ranges_are_whole_tiles_and_not_too_many(tokens, rows):
    assert range_rows(tokens, ranges=16, tile_rows=32) == rows
