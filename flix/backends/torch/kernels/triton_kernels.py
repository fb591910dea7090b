# mypy: ignore-errors
"""Triton kernels of the routed sum. Shapes and grids are chosen in ``launch``.

Common names: tokens are numbered m = n * length + position, with n the row of the routing; a row has ``slots`` slots;
``rows[n, slot]`` is the slot's row in the layer's bank, -1 where the slot is unused. The bank is reached through
tables of addresses, since every feature's vector is a tensor of its own: at ``at[u]`` begins row u of A, or of B
transposed. A program reads its part of the bank once and then streams tokens. Products accumulate in float32. No
program adds to what another writes, and sums run in a fixed order, so results are the same bits in every run. Sizes
that change between batches are not specialised on: other lengths compile nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _bank(at, u, cols, size, source: tl.constexpr):
    """Bank values ``[cols, u]``; 0 for unused slots and beyond the size."""
    used = u >= 0
    base = tl.load(at + u, mask=used, other=0).to(tl.pointer_type(source))
    inside = (cols < size)[:, None] & used[None, :]
    return tl.load(base[None, :] + cols[:, None], mask=inside, other=0.0)


@triton.jit
def _dot(a, b, acc, precision: tl.constexpr, widen: tl.constexpr):
    """acc + a b. The interpreter multiplies bfloat16's bits as integers: there, ``widen`` the factors first."""
    if widen:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def _scaled(c, factor):
    """c times factor, which selects: 0 times whatever is 0, so that a slot's values reach no row that is not theirs."""
    return tl.where(factor != 0, c * factor, 0.0)


@triton.jit(do_not_specialize=["tokens", "length", "span", "pieces"])
def down(
    v,
    at,
    rows,
    scale,
    h,
    z,
    part,
    tokens,
    length,
    span,
    pieces,
    slots,
    size,
    source: tl.constexpr,
    grad: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_t: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """Into the ranks: z[chunk, m, slot] = Σ_cols v[m, col] · bank[u(slot), col], over one chunk of columns.

    With ``grad`` (v is then the output's gradient), also the gradient of the other factor for this piece of a row's
    tokens, part[piece, slot, col] = Σ_m scale · h[m, slot] · v[m, col], from the same read of v.
    Grid: (pieces of all rows, chunks of columns, blocks of slots).
    """
    piece = tl.program_id(0)
    chunk = tl.program_id(1)
    n = piece // pieces
    begin = (piece % pieces) * span
    end = tl.minimum(begin + span, length)
    slot = tl.program_id(2) * block_s + tl.arange(0, block_s)
    live = slot < slots
    u = tl.load(rows + n * slots + slot, mask=live, other=-1)
    cols = chunk * block_c + tl.arange(0, block_c)
    inside = cols < size
    w = _bank(at, u, cols, size, source).to(v.dtype.element_ty)
    if grad:
        factor = tl.load(scale + n * slots + slot, mask=live, other=0.0)
        acc = tl.zeros([block_s, block_c], dtype=tl.float32)
    for t in range(begin, end, block_t):
        place = t + tl.arange(0, block_t)
        here = place < end
        m = (n * length + place).to(tl.int64)
        tile = tl.load(
            v + m[:, None] * size + cols[None, :], mask=here[:, None] & inside[None, :], other=0.0
        )
        both = here[:, None] & live[None, :]
        out = tl.zeros([block_t, block_s], dtype=tl.float32)
        out = _dot(tile, w, out, precision, widen)
        row = chunk.to(tl.int64) * tokens + m
        tl.store(z + row[:, None] * slots + slot[None, :], out, mask=both)
        if grad:
            c = tl.load(h + m[:, None] * slots + slot[None, :], mask=both, other=0.0)
            c = _scaled(c, factor[None, :]).to(v.dtype.element_ty)
            acc = _dot(tl.trans(c), tile, acc, precision, widen)
    if grad:
        row = piece.to(tl.int64) * slots + slot
        tl.store(
            part + row[:, None] * size + cols[None, :],
            tl.where((factor != 0)[:, None], acc, 0.0),
            mask=live[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["tokens", "length", "span", "pieces"])
def up(
    z,
    at,
    rows,
    scale,
    bias,
    x,
    h,
    out,
    part,
    tokens,
    length,
    span,
    pieces,
    slots,
    size,
    chunks: tl.constexpr,
    blocks: tl.constexpr,
    source: tl.constexpr,
    biased: tl.constexpr,
    keep: tl.constexpr,
    grad: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_t: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """Out of the ranks: out[m, col] = bias[col] + Σ_slot scale · (Σ_chunk z[chunk, m, slot]) · bank[u(slot), col].

    The base's product is added to ``out`` afterwards, by the matrix product itself. With ``keep``, the sum over the
    chunks is written to h. With ``grad`` (one block of slots only), also part[piece, slot, col] =
    Σ_m scale · z[m, slot] · x[m, col], as in ``down``.
    Grid: (pieces of all rows, chunks of columns).
    """
    piece = tl.program_id(0)
    chunk = tl.program_id(1)
    n = piece // pieces
    begin = (piece % pieces) * span
    end = tl.minimum(begin + span, length)
    cols = chunk * block_c + tl.arange(0, block_c)
    inside = cols < size
    dtype = out.dtype.element_ty
    first = tl.arange(0, block_s)
    if blocks == 1:
        u = tl.load(rows + n * slots + first, mask=first < slots, other=-1)
        factor = tl.load(scale + n * slots + first, mask=first < slots, other=0.0)
        w = tl.trans(_bank(at, tl.where(factor != 0, u, -1), cols, size, source).to(dtype))
    if biased:
        shift = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    if grad:
        acc = tl.zeros([block_s, block_c], dtype=tl.float32)
    for t in range(begin, end, block_t):
        place = t + tl.arange(0, block_t)
        here = place < end
        m = (n * length + place).to(tl.int64)
        tile_at = m[:, None] * size + cols[None, :]
        both = here[:, None] & inside[None, :]
        total = tl.zeros([block_t, block_c], dtype=tl.float32)
        for block in tl.static_range(blocks):
            slot = block * block_s + first
            live = slot < slots
            if blocks > 1:
                u = tl.load(rows + n * slots + slot, mask=live, other=-1)
                factor = tl.load(scale + n * slots + slot, mask=live, other=0.0)
                w = tl.trans(_bank(at, tl.where(factor != 0, u, -1), cols, size, source).to(dtype))
            z_in = here[:, None] & live[None, :]
            c = tl.zeros([block_t, block_s], dtype=tl.float32)
            for k in tl.static_range(chunks):
                row = m + k * tokens
                c += tl.load(z + row[:, None] * slots + slot[None, :], mask=z_in, other=0.0)
            if keep and chunk == 0:
                tl.store(h + m[:, None] * slots + slot[None, :], c, mask=z_in)
            c = _scaled(c, factor[None, :]).to(dtype)
            total = _dot(c, w, total, precision, widen)
            if grad:
                tile = tl.load(x + tile_at, mask=both, other=0.0)
                acc = _dot(tl.trans(c), tile, acc, precision, widen)
        if biased:
            total += shift[None, :]
        tl.store(out + tile_at, total.to(dtype), mask=both)
    if grad:
        row = piece.to(tl.int64) * slots + first
        tl.store(
            part + row[:, None] * size + cols[None, :],
            tl.where((factor != 0)[:, None], acc, 0.0),
            mask=(first < slots)[:, None] & inside[None, :],
        )


@triton.jit
def _reduced(
    part,
    order,
    begin,
    entries,
    pieces,
    slots,
    cols,
    size,
    block_e: tl.constexpr,
    width: tl.constexpr,
):
    """Σ of the partial gradients of one bank row, in the order of its entries."""
    acc = tl.zeros([width], dtype=tl.float32)
    total = entries * pieces
    for e in range(0, total, block_e):
        item = e + tl.arange(0, block_e)
        here = item < total
        entry = tl.load(order + begin + item // pieces, mask=here, other=0)
        row = ((entry // slots) * pieces + item % pieces).to(tl.int64) * slots + entry % slots
        values = tl.load(
            part + row[:, None] * size + cols[None, :],
            mask=here[:, None] & (cols < size)[None, :],
            other=0.0,
        )
        acc += tl.sum(values, axis=0)
    return acc


@triton.jit(do_not_specialize=["pieces_a", "pieces_b", "chunks_a"])
def gather_parts(
    part_a,
    part_b,
    order,
    starts,
    d_a,
    d_b,
    pieces_a,
    pieces_b,
    slots,
    size_a,
    size_b,
    chunks_a,
    block_e: tl.constexpr,
    block_c: tl.constexpr,
):
    """Partial gradients of pieces summed to the bank's rows; rows that no slot uses get zeros.

    ``order[starts[u]:starts[u + 1]]`` are the entries (n * slots + slot) of bank row u.
    d_a is ``[bank rows, size_a]``, d_b ``[bank rows, size_b]``.
    Grid: (bank rows, chunks of A's columns, then chunks of B's).
    """
    u = tl.program_id(0)
    chunk = tl.program_id(1)
    begin = tl.load(starts + u)
    entries = tl.load(starts + u + 1) - begin
    if chunk < chunks_a:
        cols = chunk * block_c + tl.arange(0, block_c)
        acc = _reduced(
            part_a, order, begin, entries, pieces_a, slots, cols, size_a, block_e, block_c
        )
        at = u.to(tl.int64) * size_a + cols
        tl.store(d_a + at, acc.to(d_a.dtype.element_ty), mask=cols < size_a)
    else:
        cols = (chunk - chunks_a) * block_c + tl.arange(0, block_c)
        acc = _reduced(
            part_b, order, begin, entries, pieces_b, slots, cols, size_b, block_e, block_c
        )
        at = u.to(tl.int64) * size_b + cols
        tl.store(d_b + at, acc.to(d_b.dtype.element_ty), mask=cols < size_b)


@triton.jit(do_not_specialize=["length", "bank", "splits"])
def gather_tokens(
    v,
    coefficient,
    scale,
    ranks,
    first,
    order,
    starts,
    out,
    length,
    slots,
    size,
    bank,
    splits,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_t: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """A feature's gradient straight from its tokens, for rows with too many slots for partial sums.

    out[split, u, col] = Σ over entries and their tokens of scale · coefficient[m, slot] · v[m, col]. Blocks of tokens
    are dealt out to the splits, so that no program goes through all of those of a feature that every row has.
    Grid: (bank rows, of which a feature's first works for all of its rows; chunks of columns; blocks of ranks of each
    split in turn).
    """
    u = tl.program_id(0)
    start = tl.load(first + u)
    rank = tl.load(ranks + u)
    split = tl.program_id(2) % splits
    block = tl.program_id(2) // splits * block_s
    if (start == u) & (block < rank):
        j = block + tl.arange(0, block_s)
        cols = tl.program_id(1) * block_c + tl.arange(0, block_c)
        inside = cols < size
        begin = tl.load(starts + u)
        total = (tl.load(starts + u + 1) - begin) * length
        acc = tl.zeros([block_s, block_c], dtype=tl.float32)
        for e in range(split * block_t, total, splits * block_t):
            item = e + tl.arange(0, block_t)
            here = item < total
            entry = tl.load(order + begin + item // length, mask=here, other=0)
            n = entry // slots
            slot = (entry % slots)[:, None] + j[None, :]
            m = (n * length + item % length).to(tl.int64)
            both = here[:, None] & (j < rank)[None, :]
            c = tl.load(coefficient + m[:, None] * slots + slot, mask=both, other=0.0)
            factor = tl.load(scale + n[:, None] * slots + slot, mask=both, other=0.0)
            c = _scaled(c, factor)
            acting = tl.sum((factor != 0).to(tl.int32), axis=1) > 0
            tile = tl.load(
                v + m[:, None] * size + cols[None, :],
                mask=acting[:, None] & inside[None, :],
                other=0.0,
            )
            acc = _dot(tl.trans(c.to(tile.dtype)), tile, acc, precision, widen)
        row = split.to(tl.int64) * bank + start + j
        at = row[:, None] * size + cols[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=(j < rank)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["length", "span"])
def single_tokens(
    v,
    at_in,
    at_out,
    rows,
    scale,
    bias,
    h,
    out,
    length,
    slots,
    size_in,
    size_out,
    span,
    source: tl.constexpr,
    biased: tl.constexpr,
    block_i: tl.constexpr,
    block_o: tl.constexpr,
    block_s: tl.constexpr,
):
    """Both products for tokens with slots of their own (decoding, routing per token): one launch, float32 throughout.

    h[m, slot] = Σ v[m, col] · bank_in[u, col]; out[m, col] = bias[col] + Σ_slot scale · h · bank_out[u, col].
    Grid: (tokens, parts of the output); each part computes h again, which is cheaper than another launch.
    """
    m = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    n = m // length
    slot = tl.arange(0, block_s)
    live = slot < slots
    u = tl.load(rows + n * slots + slot, mask=live, other=-1)
    total = tl.zeros([block_s], dtype=tl.float32)
    for k in range(0, size_in, block_i):
        cols = k + tl.arange(0, block_i)
        x = tl.load(v + m * size_in + cols, mask=cols < size_in, other=0.0).to(tl.float32)
        w = _bank(at_in, u, cols, size_in, source).to(tl.float32)
        total += tl.sum(w * x[:, None], axis=0)
    if part == 0:
        tl.store(h + m * slots + slot, total, mask=live)
    factor = tl.load(scale + n * slots + slot, mask=live, other=0.0)
    c = _scaled(total, factor)
    u = tl.where(factor != 0, u, -1)
    begin = part * span
    end = tl.minimum(begin + span, size_out)
    for k in range(begin, end, block_o):
        cols = k + tl.arange(0, block_o)
        w = _bank(at_out, u, cols, size_out, source).to(tl.float32)
        y = tl.sum(w * c[None, :], axis=1)
        if biased:
            y += tl.load(bias + cols, mask=cols < size_out, other=0.0).to(tl.float32)
        tl.store(out + m * size_out + cols, y.to(out.dtype.element_ty), mask=cols < end)
