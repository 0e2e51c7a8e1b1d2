"""Weights that are stored as codes of a few bits and scales: what a code stands for, and tensors of them.

A weight is its code's value times the scale of its block, computed in float32 and rounded once, to the type asked for. Zero has
a code of its own in every format here, so a weight is pruned by writing that code: no scale changes, nor any other bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from uniprune.storage.dtypes import FLOATS
from uniprune.storage.outline import Array, Piece, Shape
from uniprune.storage.safetensors_index import Entry

CHUNK = 1 << 20  # weights decoded at a time
Factor = Callable[..., Tensor]


class Code:
    """What each code of ``bits`` bits stands for. Two codes of four bits share a byte, the first in its lower half.

    name: as digests have it. values: float32 ``[2 ** bits]``; one of them is 0.
    """

    def __init__(self, name: str, bits: int, values: Tensor) -> None:
        self.name, self.bits, self.values = name, bits, values
        self.zero = int((values == 0).nonzero()[0])  # of 0.0 and -0.0, which comes later, the first
        self.nonzero: Array = (values != 0).numpy()
        each = torch.arange(256)[:, None] >> torch.arange(0, 8, bits) & (2**bits - 1)
        of_byte = values[each]  # [256, codes in a byte]
        self._table = of_byte.view(torch.int64 if bits == 4 else torch.float32)[:, 0]  # what a byte stands for, as one element
        self._finite: Array = torch.isfinite(of_byte).all(1).numpy()

    def decode(self, raw: Tensor) -> Tensor:
        """Values, float32 and flat, of bytes ``[n]``, on whatever device these are."""
        return torch.index_select(self._table.to(raw.device), 0, raw.int()).view(torch.float32)

    def unpack(self, raw: Array) -> Array:
        """The codes in bytes ``[n]``, one a byte."""
        if self.bits == 8:
            return raw
        codes = np.empty((len(raw), 2), np.uint8)
        codes[:, 0], codes[:, 1] = raw & 15, raw >> 4
        return codes.reshape(-1)

    def finite(self, raw: Array) -> bool:
        """Whether no code in bytes ``[n]`` stands for NaN or infinity."""
        return bool(self._finite.all() or self._finite[raw].all())


def _float(name: str, dtype: torch.dtype) -> Code:
    return Code(name, 8, torch.arange(256, dtype=torch.uint8).view(dtype).float())


_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = _float("F8_E4M3", torch.float8_e4m3fn)
E5M2 = _float("F8_E5M2", torch.float8_e5m2)
E2M1 = Code("F4_E2M1", 4, torch.cat([_MAGNITUDES, -_MAGNITUDES]))  # OCP Microscaling Formats, 5.3.3
INT8 = _float("I8", torch.int8)
OFFSET4 = Code("I4", 4, torch.arange(16) - 8.0)  # stored with 8 added
OFFSET8 = Code("I8", 8, torch.arange(256) - 128.0)
_EXPONENTS = torch.cat([torch.exp2(torch.arange(255) - 127.0), torch.tensor([math.nan])])


class Exponents(Entry):
    """Scales that are powers of two, a byte each (E8M0, which has no zero)."""

    @property
    def uint(self) -> Any:
        return np.uint8

    def finite(self, bits: Array) -> bool:
        return not bool((bits == 255).any())

    def values(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _EXPONENTS[torch.from_numpy(self.array().copy()).int()].view(self.shape).to(device, dtype)


def alone(scale: Tensor) -> Tensor:
    """Of formats with scales of one kind."""
    return scale


@dataclass(frozen=True)
class Coded(Entry):
    """A stored tensor of codes, as if it were one of weights: ``shape``, ``[..., rows, columns]``, is that of the weights.

    scales: ``[..., rows of blocks, columns of blocks]`` each, or a single one for all. factor: makes of them what the values in
    a block are multiplied by. block: its rows and columns. row: where in the matrix that the scales are of the codes begin.
    flipped: whether the model has the matrices transposed.
    """

    code: Code
    scales: tuple[Entry, ...]
    block: tuple[int, int]
    factor: Factor = alone
    row: int = 0
    flipped: bool = False

    @property
    def uint(self) -> Any:
        return np.uint8

    @property
    def width(self) -> int:
        return self.code.bits

    def raw(self) -> Array:
        """The bytes, mapped from the file."""
        return np.memmap(self.file, np.uint8, "r", self.start, (self.stop - self.start,))

    def array(self) -> Array:
        return self.code.unpack(self.raw())

    def pieces(self) -> Iterator[Array]:
        return self.in_pieces(self.raw())

    def finite(self, bits: Array) -> bool:
        return self.code.finite(bits)

    def nonzero(self, words: Array) -> Array:
        nonzero: Array = self.code.nonzero[words]
        return nonzero

    @property
    def auxiliary(self) -> tuple[Entry, ...]:
        return self.scales

    def part(self, offset: int, shape: Shape) -> Coded:
        """Matrices, or rows of one: what begins in the middle of a row has no scales of its own."""
        *_, rows, columns = self.shape
        number, row = divmod(offset // columns, rows)
        start = self.start + offset * self.width // 8
        scales = tuple(_scales_of(scale, number, self.shape[:-2], shape[:-2]) for scale in self.scales)
        stop = start + math.prod(shape) * self.width // 8
        return replace(self, shape=shape, start=start, stop=stop, scales=scales, row=self.row + row)

    def values(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        whole = torch.empty(self.shape, dtype=dtype, device=device)
        *_, rows, columns = self.shape
        for number, target in enumerate(whole.view(-1, rows, columns)):
            self.part(number * rows * columns, (rows, columns))._decode_into(target)
        return whole

    def _decode_into(self, target: Tensor) -> None:
        """Of a matrix the values, some rows at a time."""
        rows, columns = target.shape
        factors = self.factors(target.device)
        raw = self.raw().reshape(rows, -1)
        for start in range(0, rows, step := max(1, CHUNK // columns)):
            some = torch.from_numpy(raw[start : start + step].copy()).to(target.device)
            values = self.code.decode(some.view(-1)).view(-1, columns)
            blocks = torch.arange(self.row + start, self.row + start + len(values), device=target.device) // self.block[0]
            scale = factors[blocks]
            if self.block[1] < columns:
                scale = scale.repeat_interleave(self.block[1], 1)[:, :columns]
            target[start : start + step] = values.mul_(scale)

    def factors(self, device: torch.device) -> Tensor:
        """What the values of each block of a matrix are multiplied by, float32 ``[rows of blocks, columns of blocks]``."""
        return self.factor(*(scale.values(torch.float32, device) for scale in self.scales))

    def view(self, piece: Piece, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of the values, of which a matrix at a time is decoded if it is one of many whole ones."""
        size = math.prod(self.shape[-2:])
        if len(piece.shape) == 3 == len(self.shape) and piece.strides[0] == size and piece.offset % size == 0:
            whole = torch.empty(piece.shape, dtype=dtype, device=device)
            for number, target in enumerate(whole):
                one = self.part(piece.offset + number * size, self.shape[-2:]).values(dtype, device)
                target.copy_(one.as_strided(piece.shape[1:], piece.strides[1:]))
            return whole
        return self.values(dtype, device).as_strided(piece.shape, piece.strides, piece.offset)


def _scales_of(scale: Entry, number: int, outer: Shape, wanted: Shape) -> Entry:
    """The scales of some of the matrices in a stack, from one of them on; a single one for all stays."""
    if not outer or len(scale.shape) < len(outer) + 2:
        return scale
    rest = scale.shape[len(outer) :]
    return scale.part(number * math.prod(rest), (*wanted, *rest))


class Found(NamedTuple):
    """A tensor of codes in a checkpoint. key: the one that it would have as weights. parts: keys of what it is made of."""

    key: str
    tensor: Coded
    parts: Collection[str]


class Refused(Exception):
    """Why a checkpoint's weights cannot be pruned as codes."""


def coded(
    key: str, entry: Entry, code: Code, shape: Shape, scales: Sequence[Entry], block: Sequence[int] | None = None, **more: Any
) -> Coded:
    """A tensor of codes. shape: of its weights. scales: the first has one for each block; those that follow, one for all.

    block: rows and columns of a block, which need not divide the shape; without it they follow from the number of scales.
    Raises Refused unless codes, scales and shape go together.
    """
    first, *others = scales
    size = math.prod(shape) * code.bits
    if len(shape) < 2 or (entry.stop - entry.start) * 8 != size or shape[-1] * code.bits % 8 or not size:
        raise Refused(f"{key} is {entry.dtype} {list(entry.shape)}, which is not {list(shape)} of {code.name}")
    grid = _grid(first.shape, shape[:-2])
    found = _block(shape[-2], shape[-1], grid[-2:], block) if grid else None
    if grid is None or found is None or any(math.prod(other.shape) != 1 for other in others):
        shapes = ", ".join(str(list(scale.shape)) for scale in scales)
        raise Refused(f"{key} is {list(shape)} and its scales {shapes}, which do not go together")
    numbers = (_scale(first, grid), *(_scale(other, (1, 1)) for other in others))
    return Coded(entry.file, code.name, shape, entry.start, entry.stop, code, numbers, found, **more)


def unpacked(entry: Entry, code: Code) -> Shape:
    """The shape of the weights whose codes are the bytes of a tensor."""
    return tuple(size * (8 // code.bits if axis == len(entry.shape) - 1 else 1) for axis, size in enumerate(entry.shape))


def pair(block: Any) -> tuple[int, int] | None:
    """The rows and columns of blocks, as configurations have them; None if they have not."""
    if isinstance(block, str):  # 128x128
        block = [int(size) if size.isdecimal() else 0 for size in block.split("x")]
    fits = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    return (block[0], block[1]) if fits else None


def _scale(entry: Entry, shape: Shape) -> Entry:
    """Scales in another shape. Raises Refused if they are no numbers, or not so many."""
    powers = entry.dtype in ("U8", "F8_E8M0")
    if not powers and entry.dtype not in FLOATS:
        raise Refused(f"its scales are {entry.dtype}")
    if powers and entry.stop - entry.start != math.prod(shape):
        raise Refused(f"its scales {list(shape)} have {entry.stop - entry.start} bytes")
    return (Exponents if powers else Entry)(entry.file, entry.dtype, shape, entry.start, entry.stop)


def _grid(scales: Shape, outer: Shape) -> Shape | None:
    """The shape of scales, of each matrix in a stack one for all, one for each row or one for each block; or one for all."""
    rest = scales[len(outer) :]
    if math.prod(scales) == 1:
        return 1, 1
    return (*outer, *(*rest, 1, 1)[:2]) if scales[: len(outer)] == outer and len(rest) <= 2 else None


def _block(rows: int, columns: int, grid: Shape, block: Sequence[int] | None) -> tuple[int, int] | None:
    """The size of the blocks of which there are so many."""
    if block and (-(-rows // block[0]), -(-columns // block[1])) == grid:
        return block[0], block[1]
    return None if 0 in grid or rows % grid[0] or columns % grid[1] else (rows // grid[0], columns // grid[1])
