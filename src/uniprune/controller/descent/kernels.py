"""Work on every weight and token of a step, on a GPU in a few kernels (Triton).

What they compute stands in plain PyTorch in ``update`` and ``token_weighting``. Only ``fused`` imports this module, where
Triton is. Tested on a CPU by Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniprune.controller.descent import token_weighting, update

ROWS, COLUMNS = 16, 128  # of a tile
CHANNELS = 1024  # of a token at a time
# Of other modules, as kernels can see them.
TINY, LOUDEST = tl.constexpr(token_weighting.TINY), tl.constexpr(token_weighting.LOUDEST)
LEAST_RMS = tl.constexpr(update.LEAST_RMS)
LEVELS = tl.constexpr(float(update.LEVELS))
MANTISSA, SMALLEST = tl.constexpr(update.MANTISSA), tl.constexpr(update.SMALLEST)
GOLDEN = tl.constexpr(update.GOLDEN)
PLACES, TO_PLACES = tl.constexpr(1 << update.MANTISSA), tl.constexpr(32 - update.MANTISSA)  # of the dither


def updated(
    gradient: Tensor, dual: Tensor, ratio: Tensor, rms: Tensor, before: Tensor, *, step: update.Step
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dual, ratio, RMS and the largest gradient after a step, as ``update.updated`` has them."""
    rows, columns = dual.shape
    state = [*(tensor.contiguous() for tensor in (gradient, ratio, rms)), before]
    facts, noise = (*step.decays, step.rescale, step.level), (step.noise or 0.0, step.least)
    bands, blocks = -(-rows // ROWS), -(-columns // COLUMNS)
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    # Of the direction's squares: sums of rows and of columns, the latter band by band at first; and shares of signal, summed.
    # The largest gradient of each band comes along.
    by_row, by_column, partly, some, others, largest = (
        torch.empty(size, device=dual.device) for size in (rows, columns, bands * columns, bands, blocks, bands)
    )
    if step.noise is None:
        largest = gradient.abs().amax()[None]
    else:
        energies[(bands,)](*state, by_row, partly, some, largest, rows, columns, *facts, *noise, **tile)
        summed[(blocks,)](partly, by_column, others, bands, rows, columns, *noise, COLUMNS=COLUMNS)
    moved, dual = torch.empty_like(state[0]), dual.contiguous()
    next_ratio, next_rms, top = torch.empty_like(state[1]), torch.empty_like(state[2]), torch.empty_like(before)
    moving[(bands, blocks)](
        *state, dual, by_row, by_column, some, others, largest, moved, next_ratio, next_rms, top,
        rows, columns, len(largest), *facts, *noise, step.most, step.unit, step.size, step.offset,
        FOCUS=step.noise is not None, BANDS=_power(bands), BLOCKS=_power(blocks), LARGEST=_power(len(largest)), **tile,
    )  # fmt: skip
    return moved, next_ratio, next_rms, top


def weighted(x: Tensor, gradient: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The gradient, weighted, as ``token_weighting.weighted`` has it."""
    x, gradient = x.contiguous(), gradient.contiguous()
    weighed, sizes = torch.empty_like(gradient), (x.shape[1], gradient.shape[1])
    weighing[(len(x),)](x, gradient, inputs.contiguous(), outputs.contiguous(), weighed, *sizes, BLOCK=CHANNELS)
    return weighed


def _power(count: int) -> int:
    """The power of two that a block of so many has."""
    return 1 << (count - 1).bit_length()


# Annotated with nothing but constexpr: Triton evaluates annotations as if they were its own code.
@triton.jit  # type: ignore[untyped-decorator]
def lerp(start, end, weight):  # type: ignore[no-untyped-def]
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit  # type: ignore[untyped-decorator]
def direction(gradient, ratio, rms, before, mean_decay, rms_decay, level):  # type: ignore[no-untyped-def]
    """New RMS, and the new mean over it."""
    root = ((rms.to(tl.int32) + SMALLEST) << MANTISSA).to(tl.float32, bitcast=True) * before  # UE5M3
    mean = lerp(gradient, root * ratio.to(tl.float32) * level, mean_decay)
    rms = tl.sqrt(lerp(gradient * gradient, root * root, rms_decay))
    return rms, mean / tl.maximum(rms, LEAST_RMS)


@triton.jit  # type: ignore[untyped-decorator]
def share(total, count, noise, least):  # type: ignore[no-untyped-def]
    return tl.maximum(total / count - noise, least)


@triton.jit  # type: ignore[untyped-decorator]
def energies(  # type: ignore[no-untyped-def]
    gradients, ratios, roots, before, by_row, partly, some, largest, rows, columns,
    mean_decay, rms_decay, rescale, level, noise, least, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Squares of the direction: summed over each row of a band, and over the band in each column. And its largest gradient."""
    band = tl.program_id(0)
    row = band * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    unit, loudest = tl.load(before), tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        there = row[:, None].to(tl.int64) * columns + column[None, :]
        gradient = tl.load(gradients + there, mask=inside, other=0.0)
        ratio, rms = tl.load(ratios + there, mask=inside, other=0), tl.load(roots + there, mask=inside, other=0)
        _, move = direction(gradient, ratio, rms, unit, mean_decay, rms_decay, level)
        move *= rescale
        loudest = tl.maximum(loudest, tl.max(tl.abs(gradient), 1))
        energy = tl.where(inside, move * move, 0.0)
        total += tl.sum(energy, 1)
        tl.store(partly + band.to(tl.int64) * columns + column, tl.sum(energy, 0), mask=column < columns)
    tl.store(by_row + row, total, mask=row < rows)
    tl.store(largest + band, tl.max(loudest, 0))
    tl.store(some + band, tl.sum(tl.where(row < rows, share(total, columns, noise, least), 0.0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def summed(partly, by_column, others, bands, rows, columns, noise, least, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of columns over all bands."""
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for band in range(0, bands):
        total += tl.load(partly + tl.cast(band, tl.int64) * columns + column, mask=column < columns, other=0.0)
    tl.store(by_column + column, total, mask=column < columns)
    tl.store(others + block, tl.sum(tl.where(column < columns, share(total, rows, noise, least), 0.0), 0))


@triton.jit(do_not_specialize=["offset"])  # type: ignore[untyped-decorator]
def moving(  # type: ignore[no-untyped-def]
    gradients, ratios, roots, before, duals, by_row, by_column, some, others, largest, moved, next_ratios, next_roots,
    top, rows, columns, parts, mean_decay, rms_decay, rescale, level, noise, least, most, unit, size, offset,
    FOCUS: tl.constexpr, BANDS: tl.constexpr, BLOCKS: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    there = row[:, None].to(tl.int64) * columns + column[None, :]
    gradient = tl.load(gradients + there, mask=inside, other=0.0)
    ratio, rms = tl.load(ratios + there, mask=inside, other=0), tl.load(roots + there, mask=inside, other=0)
    part, earlier = tl.arange(0, LARGEST), tl.load(before)
    peak = tl.maximum(earlier, tl.max(tl.load(largest + part, mask=part < parts, other=0.0), 0))
    tl.store(top, peak)
    rms, move = direction(gradient, ratio, rms, earlier, mean_decay, rms_decay, level)
    places = (((there.to(tl.int32) + offset) * GOLDEN) >> TO_PLACES) & (PLACES - 1)
    kept = tl.floor(move / level + places.to(tl.float32) * (1.0 / PLACES))
    tl.store(next_ratios + there, tl.minimum(tl.maximum(kept, -LEVELS), LEVELS).to(tl.int8), mask=inside)
    code = (((rms / tl.maximum(peak, TINY)).to(tl.int32, bitcast=True) + places) >> MANTISSA) - SMALLEST
    tl.store(next_roots + there, tl.minimum(tl.maximum(code, 0), 255).to(tl.uint8), mask=inside)
    move *= rescale
    if FOCUS:
        above = share(tl.load(by_row + row, mask=row < rows, other=0.0), columns, noise, least)
        across = share(tl.load(by_column + column, mask=column < columns, other=0.0), rows, noise, least)
        band, block = tl.arange(0, BANDS), tl.arange(0, BLOCKS)
        rowwise = tl.sum(tl.load(some + band, mask=band < tl.num_programs(0), other=0.0), 0) / rows
        columnwise = tl.sum(tl.load(others + block, mask=block < tl.num_programs(1), other=0.0), 0) / columns
        move *= tl.minimum(above[:, None] * across[None, :] / (rowwise * columnwise), most)
    move *= unit
    dual = tl.load(duals + there, mask=inside, other=0.0)
    tl.store(moved + there, dual - size * move, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def power(values, scales, token, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mean square of a token's channels, each in its own unit."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        inside = channel < size
        value = tl.load(values + token.to(tl.int64) * size + channel, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(scales + channel, mask=inside, other=0.0).to(tl.float32)
        total += value * value
    return tl.maximum(tl.sum(total, 0) / size, TINY)


@triton.jit  # type: ignore[untyped-decorator]
def weighing(x, gradients, inputs, outputs, weighed, columns, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0)
    entering = power(x, inputs, token, columns, BLOCK)
    leaving = power(gradients, outputs, token, rows, BLOCK)
    weight = tl.exp(-0.5 * tl.log(entering) - 0.25 * tl.log(leaving))
    for first in range(0, rows, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        there = token.to(tl.int64) * rows + channel
        gradient = tl.load(gradients + there, mask=channel < rows, other=0.0).to(tl.float32)
        product = gradient * weight
        if weighed.dtype.element_ty == tl.float16:
            product = tl.clamp(product, -LOUDEST, LOUDEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(weighed + there, product.to(weighed.dtype.element_ty), mask=channel < rows)
