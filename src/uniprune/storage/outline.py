"""Of which pieces of which stored tensors a tensor is made: followed through operations that only move elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from uniprune.errors import InputError

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A view of a stored tensor, and where it begins in the tensor that it is a part of; strides and offset are in elements."""

    key: str
    offset: int
    shape: Shape
    strides: Shape
    start: Shape

    @property
    def box(self) -> tuple[slice, ...]:
        """Where it lies in the tensor that it is a part of."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))

    def of(self, array: Array) -> Array:
        """The view, of the stored tensor's flat array."""
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if not 0 <= self.offset <= last < len(array):
            raise InputError(f"{self.key} is smaller than its conversion needs; fetch the checkpoint again")
        strides = [stride * array.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(array[self.offset :], self.shape, strides, writeable=array.flags.writeable)


class Outline:
    """What a tensor is made of. PyTorch's functions that only move elements take it as if it were a tensor."""

    __slots__ = ("pieces", "shape")

    def __init__(self, shape: Shape, pieces: list[Piece]) -> None:
        self.shape, self.pieces = shape, pieces

    @staticmethod
    def of(key: str, shape: Shape) -> Outline:
        """A stored tensor as it is."""
        return Outline(shape, [Piece(key, 0, shape, contiguous(shape), (0,) * len(shape))])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if function not in MOVES:
            raise TypeError(f"{function} may do more than move elements")
        return MOVES[function](*arguments, **(keywords or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> Outline:
        return self

    def narrow(self, dim: int, start: int, length: int) -> Outline:
        axis, pieces = dim % self.ndim, []
        for piece in self.pieces:
            first = max(start, piece.start[axis])
            count = min(start + length, piece.start[axis] + piece.shape[axis]) - first
            if count > 0:
                offset = piece.offset + (first - piece.start[axis]) * piece.strides[axis]
                shape, begin = _put(piece.shape, axis, count), _put(piece.start, axis, first - start)
                pieces.append(Piece(piece.key, offset, shape, piece.strides, begin))
        return Outline(_put(self.shape, axis, length), pieces)

    def thinned(self, step: int) -> Outline:
        """One in so many of the first axis, as ``[::step]`` takes them."""
        pieces = []
        for piece in self.pieces:
            first, end = (-(-place // step) for place in (piece.start[0], piece.start[0] + piece.shape[0]))
            if end > first:
                offset = piece.offset + (first * step - piece.start[0]) * piece.strides[0]
                shape, strides = _put(piece.shape, 0, end - first), _put(piece.strides, 0, step * piece.strides[0])
                pieces.append(Piece(piece.key, offset, shape, strides, _put(piece.start, 0, first)))
        return Outline(_put(self.shape, 0, -(-self.shape[0] // step)), pieces)

    def transpose(self, dim0: int, dim1: int) -> Outline:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]

        def turned(values: Shape) -> Shape:
            return tuple(values[axis] for axis in order)

        pieces = [Piece(p.key, p.offset, turned(p.shape), turned(p.strides), turned(p.start)) for p in self.pieces]
        return Outline(turned(self.shape), pieces)

    def squeeze(self, dim: int | None = None) -> Outline:
        if dim is None:  # as transformers 5.17 takes experts out of a stack of them
            ones = [axis for axis in reversed(range(self.ndim)) if self.shape[axis] == 1]
            return reduce(Outline.squeeze, ones, self)
        axis = dim % self.ndim

        def without(values: Shape) -> Shape:
            return values[:axis] + values[axis + 1 :]

        if self.shape[axis] != 1:
            return self
        pieces = [Piece(p.key, p.offset, without(p.shape), without(p.strides), without(p.start)) for p in self.pieces]
        return Outline(without(self.shape), pieces)

    def reshape(self, *shape: Any) -> Outline:
        """Of one piece: axes are split, or axes next to each other merged, in as many pieces as the new axis has strides."""
        wanted: Shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        (piece,) = self.pieces
        pieces = [Piece(piece.key, piece.offset, (), (), ())]
        for old, new in _paired(self.shape, wanted):
            sizes, strides = [piece.shape[axis] for axis in old], [piece.strides[axis] for axis in old]
            runs = list(_runs(sizes, strides))
            if len(new) > 1 and len(runs) > 1:
                raise TypeError("axes are merged and split at once")
            pieces = [_with(before, run, [wanted[axis] for axis in new]) for before in pieces for run in runs]
        return Outline(wanted, pieces)

    view = reshape


def contiguous(shape: Shape) -> Shape:
    """The strides of a tensor in memory order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])


def _put(values: Shape, axis: int, value: int) -> Shape:
    return (*values[:axis], value, *values[axis + 1 :])


def _paired(old: Shape, new: Shape) -> Iterator[tuple[range, range]]:
    """The fewest axes of two shapes next to each other that have the same number of elements."""
    a = b = 0
    while a < len(old) or b < len(new):
        i, j = a + 1, b + 1
        while math.prod(old[a:i]) != math.prod(new[b:j]):
            if math.prod(old[a:i]) < math.prod(new[b:j]):
                i += 1
            else:
                j += 1
            if i > len(old) or j > len(new):
                raise TypeError(f"{old} is no reshaped {new}")
        yield range(a, i), range(b, j)
        a, b = i, j


def _runs(sizes: Sequence[int], strides: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Axes merged into one, as runs of even strides: where a run begins in the new axis, offset, length and stride."""
    inner = len(sizes) - 1
    while inner and strides[inner - 1] == sizes[inner] * strides[inner]:
        inner -= 1
    length = math.prod(sizes[inner:])
    for number, place in enumerate(product(*map(range, sizes[:inner]))):
        yield number * length, sum(i * stride for i, stride in zip(place, strides, strict=False)), length, strides[-1]


def _with(piece: Piece, run: tuple[int, int, int, int], sizes: list[int]) -> Piece:
    """A piece with the axes that a run is to be seen as."""
    begin, offset, length, stride = run
    shape = (length,) if len(sizes) == 1 else tuple(sizes)
    strides = tuple(stride * step for step in contiguous(shape))
    start = (begin,) + (0,) * (len(shape) - 1)
    return Piece(piece.key, piece.offset + offset, piece.shape + shape, piece.strides + strides, piece.start + start)


def _cat(tensors: Sequence[Outline], dim: int = 0) -> Outline:
    axis, length, pieces = dim % tensors[0].ndim, 0, []
    for tensor in tensors:
        pieces += [p._replace(start=_put(p.start, axis, p.start[axis] + length)) for p in tensor.pieces]
        length += tensor.shape[axis]
    return Outline(_put(tensors[0].shape, axis, length), pieces)


def _stack(tensors: Sequence[Outline], dim: int = 0) -> Outline:
    pieces = []
    for number, tensor in enumerate(tensors):
        for key, offset, shape, strides, start in tensor.pieces:
            wider = (*shape[:dim], 1, *shape[dim:]), (*strides[:dim], 0, *strides[dim:])
            pieces.append(Piece(key, offset, *wider, (*start[:dim], number, *start[dim:])))
    first = tensors[0].shape
    return Outline((*first[:dim], len(tensors), *first[dim:]), pieces)


def _split(tensor: Outline, sizes: int | Sequence[int], dim: int = 0) -> list[Outline]:
    total, parts, start = tensor.shape[dim], [], 0
    lengths = [min(sizes, total - begin) for begin in range(0, total, sizes)] if isinstance(sizes, int) else sizes
    for length in lengths:
        parts.append(tensor.narrow(dim, start, length))
        start += length
    return parts


def _chunk(tensor: Outline, chunks: int, dim: int = 0) -> list[Outline]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


MOVES: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.transpose: Outline.transpose,
}
