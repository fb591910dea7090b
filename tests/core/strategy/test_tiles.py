"""How JAX's kernels cut their work: every tile is what products and registers want, and covers what it must."""

from __future__ import annotations

import pytest

from flix.core.strategy.tiles import gpu_columns, padded_rank, positions, tpu_columns


def test_ranks_are_padded_to_powers_of_two_of_16_or_more():
    assert [padded_rank(r) for r in (1, 15, 16, 17, 40, 256)] == [16, 16, 16, 32, 64, 256]


@pytest.mark.parametrize(
    ("length", "rank", "wanted"),
    [
        (1, 16, 16),
        (16, 16, 16),
        (17, 16, 32),
        (48, 16, 16),  # divides the length, where 64 would leave a quarter empty
        (96, 16, 32),
        (128, 16, 64),
        (128, 256, 32),  # 32 * 256 values are what a program sums at once
        (100, 16, 64),
        (100, 512, 16),
    ],
)
def test_positions_of_a_block(length, rank, wanted):
    assert positions(length, rank) == wanted


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("d", [16, 48, 96, 768, 4096])
@pytest.mark.parametrize("rank", [1, 16, 256, 1024])
def test_columns_on_a_gpu_are_powers_of_two_that_divide(d, itemsize, rank):
    size = gpu_columns(d, itemsize, rank)
    assert size >= 16 and size & (size - 1) == 0 and d % size == 0
    assert size * itemsize <= 128 and (size == 16 or rank * size <= 8192)
    wider = 2 * size
    assert d % wider or wider * itemsize > 128 or rank * wider > 8192


def test_columns_on_a_tpu():
    assert [tpu_columns(d) for d in (1024, 768, 384, 100)] == [512, 256, 128, 100]
