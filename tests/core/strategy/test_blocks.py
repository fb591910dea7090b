"""How launches cut their work: everything is covered once, and tiles are what products and registers want."""

from __future__ import annotations

import itertools

import pytest

from flix.core.strategy.blocks import (
    cut,
    cut_feature,
    cut_parts,
    cut_tokens,
    partial,
    parts,
    power,
    splits,
)

SHAPES = list(
    itertools.product(
        (1, 4, 300), (2, 5, 64, 1000), (1, 16, 70), (1, 530, 4096), (2, 4), (False, True)
    )
)


def _is_power(n):
    return n >= 1 and n & (n - 1) == 0


def test_powers_and_parts():
    assert [power(n) for n in (0, 1, 2, 3, 16, 17)] == [1, 1, 2, 4, 16, 32]
    assert [parts(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_chunks_and_blocks_cover_everything_once(shape):
    count, length, slots, size, *_ = shape
    blocks = cut(*shape)
    assert all(map(_is_power, (blocks.tokens, blocks.columns, blocks.slots)))
    assert min(blocks.tokens, blocks.columns, blocks.slots) >= 16
    assert (blocks.chunks - 1) * blocks.columns < size <= blocks.chunks * blocks.columns
    assert (blocks.blocks - 1) * blocks.slots < slots <= blocks.blocks * blocks.slots
    assert blocks.span % blocks.tokens == 0
    assert (blocks.pieces - 1) * blocks.span < length <= blocks.pieces * blocks.span
    # The accumulator of the gradients stays in registers.
    assert blocks.slots * blocks.columns <= max(16 * blocks.slots, 512 * 16)
    if count * blocks.chunks * blocks.blocks > 512:
        assert blocks.pieces == 1


def test_many_chunks_are_summed_by_a_launch_of_their_own():
    assert cut(4, 64, 16, 8192, 2, False).many
    assert not cut(4, 64, 16, 512, 2, False).many


def test_partial_sums_want_one_block_of_slots_and_no_more_memory_than_the_tokens():
    many = 10**6
    assert partial(many, 64, 64, 8192) and partial(many, 15, 15, 8192)
    assert not partial(many, 15, 16, 8192) and not partial(1, 65, 65, 8)
    assert partial(128, 2, 16, 8192) and not partial(129, 2, 16, 8192)  # 64 MB
    assert not partial(1, 1, 1, 8)  # a launch of its own multiplies single tokens


def test_many_tokens_are_shared_among_programs_as_far_as_memory_goes():
    assert splits(512, 40, 64) == 1 and splits(513, 40, 64) == 2 and splits(10**6, 40, 64) == 32
    assert splits(10**6, 1000, 4096) == 4  # 64 MB of sums
    assert splits(10**6, 10**5, 4096) == 1 and splits(0, 0, 0) == 1


@pytest.mark.parametrize("tokens", [1, 50, 5000])
@pytest.mark.parametrize("slots", [1, 16, 200])
@pytest.mark.parametrize("sizes", [(7, 19), (4096, 1024)])
def test_single_tokens(tokens, slots, sizes):
    blocks = cut_tokens(tokens, slots, *sizes)
    assert all(map(_is_power, (blocks.into, blocks.out_of, blocks.slots)))
    assert blocks.slots >= slots and blocks.span % blocks.out_of == 0
    assert parts(sizes[1], blocks.span) <= (1 if tokens >= 132 else 4)


def test_sums_of_gradients():
    assert cut_parts(7, 19) == 32 and cut_parts(4096, 8) == 512
    assert cut_feature(8, 4096) == (16, 128, 4)
    assert cut_feature(64, 20) == cut_feature(100, 20) == (64, 32, 8)
