"""A matrix without its zeros: of each row the weights that are not 0, one after the other, and one bit a weight.

Such bitmasks are what SpInfer (EuroSys 2025) and SparseDecoding (2026) decode with on GPUs; unlike indices they pay at 50 %.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from uniprune.runtime.native import PADDING, TYPES, Handle, library

Array = np.ndarray[Any, Any]

WORDS = {2: torch.int16, 4: torch.int32}  # integers of as many bytes
PAST = "bits past the last column are set"


class Packed:
    """values: ``[kept + PADDING]`` or more, in float32, bfloat16 or float16; the padding has no meaning. bits: uint8
    ``[rows, ceil(columns / 8)]``, the first weight in the lowest bit of the first byte. Neither is ever changed.

    Kept is what is neither 0 nor -0, which masks by multiplication leave behind: :meth:`dense` gives back every bit of what was
    packed, with each -0 as 0.
    Raises ValueError unless values, bits and shape go together: nothing is ever read beyond them.
    """

    def __init__(self, values: Tensor, bits: Tensor, shape: tuple[int, int]) -> None:
        _check_forms(values, bits, shape)
        rows, columns = shape
        self.values, self.bits, self.shape = values, bits, shape
        self.offsets = torch.empty(rows + 1, dtype=torch.int64)  # of each row's first value
        self._elsewhere: dict[torch.device, Tensor] = {}
        here = bits.cpu()
        kept = library().offsets(here.data_ptr(), rows, columns, self.offsets.data_ptr())
        if kept < 0:
            raise ValueError(PAST)
        if kept + PADDING > len(values):
            raise ValueError(f"there are {len(values)} values, {PADDING} of padding among them, but {kept} bits")

    def offsets_on(self, device: torch.device) -> Tensor:
        """The offsets on a device, copied there once."""
        if device not in self._elsewhere:
            self._elsewhere[device] = self.offsets.to(device)
        return self._elsewhere[device]

    @property
    def kept(self) -> int:
        return int(self.offsets[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory, the offsets among them."""
        return self.values.nbytes + self.bits.nbytes + self.offsets.nbytes

    def handle(self, bias: Tensor | None = None, path: str | None = None) -> Handle:
        """What the kernel takes. path: of instructions, one of ``library().paths``; by default the fastest."""
        if bias is not None and (bias.dtype != self.values.dtype or bias.shape != self.shape[:1] or not bias.is_contiguous()):
            raise ValueError(f"a bias of {bias.dtype} {tuple(bias.shape)} for {self.shape[0]} rows of {self.values.dtype}")
        assert self.values.is_cpu
        return Handle((self.values, self.bits, self.offsets, bias), self.shape, self.values.dtype, path)

    def rows(self, first: int, last: int, room: Tensor | None = None, path: str | None = None) -> Tensor:
        """Some rows as a dense matrix, ``[last - first, columns]``; in ``room``, which has this shape, if that is given."""
        assert 0 <= first <= last <= self.shape[0]
        if not self.values.is_cpu:
            values = self.values[int(self.offsets[first]) : int(self.offsets[last])]
            return unpack(values, self.bits[first:last], (last - first, self.shape[1]))
        found = self.values.new_empty(last - first, self.shape[1]) if room is None else room
        assert found.shape == (last - first, self.shape[1])
        assert found.is_contiguous()
        assert found.dtype == self.values.dtype
        handle = self.handle(path=path)
        library().unpack(handle.address, first, last, found.data_ptr(), torch.get_num_threads())
        return found

    def dense(self, path: str | None = None) -> Tensor:
        """The matrix with its zeros."""
        return self.rows(0, self.shape[0], path=path)


def unpack(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense matrix ``[rows, columns]``, by PyTorch alone: on any device, and where the kernel is not there.

    values and bits as :class:`Packed` has them, but they need no padding. Raises ValueError unless they go together.
    """
    _check_forms(values, bits, shape)
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    mask = (bits[:, :, None] >> places & 1).bool().flatten(1)
    if bool(mask[:, shape[1] :].any()):
        raise ValueError(PAST)
    kept = int(mask.sum())
    if kept > len(values):
        raise ValueError(f"there are {len(values)} values, but {kept} bits")
    found = values.new_zeros(shape)
    found[mask[:, : shape[1]]] = values[:kept]
    return found


def _check_forms(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> None:
    rows, columns = shape
    if values.dtype not in TYPES or values.dim() != 1 or not values.is_contiguous():
        raise ValueError(f"values are {values.dtype} {tuple(values.shape)}")
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-columns // 8)) or not bits.is_contiguous():
        raise ValueError(f"bits are {bits.dtype} {tuple(bits.shape)}, which is not one for each of {rows} x {columns} weights")


def count(weights: Array, dtype: torch.dtype, path: str | None = None) -> tuple[int, bool]:
    """How many of some weights, given as their bits, are kept, and whether all are finite."""
    found = int(library().count(weights.ctypes.data, weights.size, TYPES[dtype], library().path(path)))
    return (found, True) if found >= 0 else (~found, False)


def pack(weight: Tensor, path: str | None = None) -> Packed:
    """A matrix ``[out, in]`` on the CPU, packed. Raises ValueError for a type that cannot be."""
    if weight.dtype not in TYPES:
        raise ValueError(f"its weights are {weight.dtype}")
    words = bits_of(weight)
    kept, _ = count(words, weight.dtype, path)
    values = weight.new_empty(kept + PADDING)
    return Packed(values, pack_into(words, values, kept, path), (weight.shape[0], weight.shape[1]))


def pack_into(words: Array, values: Tensor, kept: int, path: str | None = None) -> Tensor:
    """Packs a matrix, given as its bits ``[out, in]``, of which ``kept`` are kept; returns the mask's bits.

    values: room for them and PADDING more, or a few more than that; what they do not fill is zeroed.
    Raises ValueError if others are kept than were counted: the file that they are mapped from may have changed.
    """
    assert len(values) >= kept + PADDING
    (rows, columns), bits = words.shape, torch.empty(words.shape[0], -(-words.shape[1] // 8), dtype=torch.uint8)
    at = TYPES[values.dtype], library().path(path), bits.data_ptr(), values.data_ptr()
    if library().pack(words.ctypes.data, rows, columns, *at, kept) != kept:
        raise ValueError("its weights changed while they were packed")
    values[kept:] = 0
    return bits


def bits_of(weight: Tensor) -> Array:
    """A tensor on the CPU as unsigned integers, in one piece."""
    return weight.detach().contiguous().view(WORDS[weight.itemsize]).numpy()
