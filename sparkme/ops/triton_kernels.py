"""The Triton kernels of the sparse convolution; `sparkme.ops.triton_conv` chooses and launches them.

The convolution and the gradient of its kernel are implicit GEMMs: rows of the neighbour table are loaded directly into a tile
of the left operand, missing neighbours as zeros, without writing columns to memory. Sums are in float32. Only rows with few
channels are written as columns, since they are too small to load one by one.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _block_rows(block, num_rows, BLOCK: tl.constexpr, APART: tl.constexpr):
    """The rows of a block: neighbours if APART is 1, else every APART-th row, starting at each of the first APART."""
    if APART == 1:
        return block * BLOCK + tl.arange(0, BLOCK)
    return (block // APART * BLOCK + tl.arange(0, BLOCK)) * APART + block % APART


@triton.jit
def _multiply_neighbours(
    sums,
    rows,
    kernel,
    index,
    tap,
    channel,
    width,
    outs,
    out_width,
    row_stride,
    tap_stride,
    in_stride,
    out_stride,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds rows[index, channel:] @ kernel[tap, channel:, outs]."""
    channels = channel + tl.arange(0, BLOCK_IN)
    left = tl.load(
        rows + index[:, None] * row_stride + channels[None, :],
        mask=(index[:, None] >= 0) & (channels[None, :] < width),
        other=0.0,
    )
    right = tl.load(
        kernel + tap * tap_stride + channels[:, None] * in_stride + outs[None, :] * out_stride,
        mask=(channels[:, None] < width) & (outs[None, :] < out_width),
        other=0.0,
    )
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def convolve(
    out, rows, kernel, table, num_rows, taps, groups, width, out_width, tap_stride, in_stride, out_stride, group_stride,
    APART: tl.constexpr, SKIP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """out[n, g, o] = the sum over taps and c of rows[table[n, tap], g, c] * kernel[tap, c, g, o], by the kernel's strides.

    SKIP: skip a tap that no row of the block has.
    WIDE: offsets do not fit into 32 bits.
    """
    out_blocks = tl.cdiv(out_width, BLOCK_OUT)
    program = tl.program_id(0)
    tile, block = program % (out_blocks * groups), program // (out_blocks * groups)
    group, outs = tile // out_blocks, tile % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = _block_rows(block, num_rows, BLOCK, APART)
    if WIDE:
        row = row.to(tl.int64)
    exists = row < num_rows
    rows += group * width
    kernel += group * group_stride
    row_stride = groups * width
    sums = tl.zeros((BLOCK, BLOCK_OUT), tl.float32)
    if SKIP:
        for tap in range(taps):
            index = tl.load(table + row * taps + tap, mask=exists, other=-1)
            if tl.max(index, 0) >= 0:
                if WIDE:
                    index = index.to(tl.int64)
                for channel in range(0, width, BLOCK_IN):
                    sums = _multiply_neighbours(
                        sums,
                        rows,
                        kernel,
                        index,
                        tap,
                        channel,
                        width,
                        outs,
                        out_width,
                        row_stride,
                        tap_stride,
                        in_stride,
                        out_stride,
                        BLOCK_IN,
                        PRECISION,
                    )
    else:
        # One loop over taps and channels, so that the loads of the next tap start while this one is multiplied.
        in_blocks = tl.cdiv(width, BLOCK_IN)
        for step in range(taps * in_blocks):
            tap = step // in_blocks
            index = tl.load(table + row * taps + tap, mask=exists, other=-1)
            if WIDE:
                index = index.to(tl.int64)
            sums = _multiply_neighbours(
                sums,
                rows,
                kernel,
                index,
                tap,
                step % in_blocks * BLOCK_IN,
                width,
                outs,
                out_width,
                row_stride,
                tap_stride,
                in_stride,
                out_stride,
                BLOCK_IN,
                PRECISION,
            )
    place = row[:, None] * (groups * out_width) + group * out_width + outs[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=exists[:, None] & (outs[None, :] < out_width))


@triton.jit
def gather_columns(
    columns,
    rows,
    table,
    entries,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """columns[n, tap * WIDTH + c] = rows[table[n, tap], c], and zeros from TAPS * WIDTH to SPAN. `entries` of the table."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < entries
    row, tap = entry // TAPS, entry % TAPS
    index = tl.load(table + entry, mask=exists, other=-1)
    if WIDE:
        index = index.to(tl.int64)
    to = columns + row * SPAN + tap * WIDTH
    for c in tl.static_range(WIDTH):
        tl.store(to + c, tl.load(rows + index * WIDTH + c, mask=index >= 0, other=0.0), mask=exists)
    for c in tl.static_range(SPAN - TAPS * WIDTH):
        tl.store(to + WIDTH + c, tl.zeros_like(index).to(columns.dtype.element_ty), mask=exists & (tap == TAPS - 1))


@triton.jit
def correlate(
    partial,
    rows,
    grad,
    table,
    num_rows,
    taps,
    groups,
    width,
    out_width,
    chunk,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """partial[s, tap, c, g, o] = the sum over the rows n of chunk s of rows[table[n, tap], g, c] * grad[n, g, o]."""
    in_blocks, out_blocks = tl.cdiv(width, BLOCK_IN), tl.cdiv(out_width, BLOCK_OUT)
    tile, tap, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    outs = tile % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    channels = tile // out_blocks % in_blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
    group = tile // out_blocks // in_blocks
    rows += group * width
    grad += group * out_width
    end = tl.minimum(split * chunk + chunk, num_rows)
    sums = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    for first in range(split * chunk, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        if WIDE:
            row = row.to(tl.int64)
        exists = row < end
        index = tl.load(table + row * taps + tap, mask=exists, other=-1)
        if WIDE:
            index = index.to(tl.int64)
        left = tl.load(
            rows + index[:, None] * (groups * width) + channels[None, :],
            mask=(index[:, None] >= 0) & (channels[None, :] < width),
            other=0.0,
        )
        right = tl.load(
            grad + row[:, None] * (groups * out_width) + outs[None, :],
            mask=exists[:, None] & (outs[None, :] < out_width),
            other=0.0,
        )
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    plane = (split * taps + tap).to(tl.int64) * width * groups * out_width
    place = channels[:, None] * (groups * out_width) + group * out_width + outs[None, :]
    tl.store(partial + plane + place, sums, mask=(channels[:, None] < width) & (outs[None, :] < out_width))
