"""What lies where in a checkpoint of safetensors files: the header of each file is read, the tensors are not."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from uniprune.errors import InputError
from uniprune.storage import strict_json
from uniprune.storage.dtypes import BY_NAME, FLOATS
from uniprune.storage.outline import Array, Piece

PIECE = 1 << 17  # weights of a tensor that are looked at together
HEADER = 100_000_000  # bytes; the longest header, the safetensors library's own limit
LFS_POINTER = b"version https://git-lfs"  # how the text begins that stands for a file which Git LFS has not fetched


@dataclass(frozen=True)
class Entry:
    """Where one tensor's bytes lie in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def uint(self) -> Any:
        """The type of unsigned integers as large as the tensor's elements."""
        if self.dtype not in FLOATS:
            raise InputError(f"{self.file}: weights of type {self.dtype} cannot be pruned; use an unquantised model")
        return BY_NAME[self.dtype].uint

    @property
    def width(self) -> int:
        """Bits of a weight."""
        return 8 * int(np.dtype(self.uint).itemsize)

    def array(self) -> Array:
        """The tensor's bits as a flat array of unsigned integers, one a weight, mapped from the file."""
        count = (self.stop - self.start) // np.dtype(self.uint).itemsize
        return np.memmap(self.file, dtype=self.uint, mode="r", offset=self.start, shape=(count,))

    def pieces(self) -> Iterator[Array]:
        """The tensor's bits as they lie in the file, a piece at a time."""
        return self.in_pieces(self.array())

    @staticmethod
    def in_pieces(array: Array) -> Iterator[Array]:
        """An array, a piece at a time that a core's cache has room for."""
        for start in range(0, len(array), PIECE):
            yield array[start : start + PIECE]

    def values(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weights."""
        return _tensor(self.array(), self.dtype).view(self.shape).to(device, dtype)

    def view(self, piece: Piece, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of the weights."""
        return _tensor(piece.of(self.array()), self.dtype).to(device, dtype)

    def part(self, offset: int, shape: tuple[int, ...]) -> Entry:
        """So many of the tensor's elements, from one of them on, as a tensor of their own."""
        size = (self.stop - self.start) // max(1, math.prod(self.shape))
        start = self.start + offset * size
        return replace(self, shape=shape, start=start, stop=start + math.prod(shape) * size)

    def finite(self, bits: Array) -> bool:
        """Whether none of the tensor's bits are those of NaN or infinity."""
        exponent = self.uint(BY_NAME[self.dtype].exponent)
        return not bool((bits & exponent == exponent).any())

    def nonzero(self, words: Array) -> Array:
        """Which weights are not 0, from their bits. -0.0 is 0, too: it is what weight * mask leaves of negative ones."""
        nonzero: Array = words << 1 != 0  # the sign is the highest bit in every floating-point format
        return nonzero

    @property
    def auxiliary(self) -> tuple[Entry, ...]:
        """Tensors that decide on the weights, too: of plain ones, none."""
        return ()

    def hasher(self) -> Any:
        """A sha256 of what lies beside, to which the tensor's own bits are to be added."""
        bits = hashlib.sha256()
        for part in self.auxiliary:
            for piece in part.pieces():
                bits.update(piece.data)
        return bits


def _tensor(bits: Array, dtype: str) -> Tensor:
    """A tensor with the bits of an array, which are copied: they are those of a file."""
    return torch.from_numpy(bits.copy().view(f"i{bits.itemsize}")).view(BY_NAME[dtype].dtype)


def entries(shards: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of a sharded checkpoint, by its key.

    Raises InputError for a shard that is missing, that was cut off, or whose header cannot be of it: a type, a shape and a
    place in the file that do not go together, tensors on top of each other, bytes that are no tensor's, a key twice. What the
    safetensors library would not load is refused here: an output has the same header.
    """
    found: dict[str, Entry] = {}
    for shard in shards:
        try:
            with shard.open("rb") as file:
                here = _entries(shard, file)
        except OSError as error:
            raise InputError(f"{shard} cannot be read: {error.strerror}; fetch the checkpoint again") from None
        except (struct.error, ValueError) as error:
            raise InputError(f"{shard} is not a safetensors file, or damaged ({error}); fetch it again") from None
        if twice := found.keys() & here.keys():
            raise InputError(f"{shard} has {min(twice)}, which stands in another shard, too; fetch the checkpoint again")
        found |= here
    return found


def _entries(shard: Path, file: BinaryIO) -> dict[str, Entry]:
    """The tensors of one file. Raises ValueError or struct.error before memory for what its header claims is taken."""
    size, head = os.fstat(file.fileno()).st_size, file.read(8)
    if head and LFS_POINTER.startswith(head):
        raise InputError(
            f"{shard} is a pointer of Git LFS, not the file itself; run git lfs pull in its folder, or download it"
        )
    (length,) = struct.unpack("<Q", head)
    if length > min(HEADER, size - 8):
        raise ValueError(f"its header would have {length} bytes")
    header = strict_json.parse(file.read(length))
    about = header.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or any(type(value) is not str for value in about.values()):
        raise ValueError("its metadata are no text by name")
    found = {key: _entry(shard, key, item, 8 + length) for key, item in header.items()}
    end = 8 + length
    for start, stop, key in sorted((entry.start, entry.stop, key) for key, entry in found.items()):
        if start < end:
            raise ValueError(f"{key} lies on top of another tensor")
        if start > end:
            raise ValueError(f"{start - end} bytes before {key} belong to no tensor")
        end = stop
    if end > size:
        raise InputError(f"{shard} is cut off: {key} would end at byte {end} of {size}; fetch it again")
    if end < size:
        raise ValueError(f"{size - end} bytes at its end belong to no tensor")
    return found


def _entry(shard: Path, key: str, item: Any, base: int) -> Entry:
    """One tensor, as the header has it; base: where its offsets count from."""
    if not isinstance(item, dict):
        raise ValueError(f"{key} is no object")
    strict_json.check(item, {"dtype": str, "shape": list, "data_offsets": list})
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if any(type(value) is not int or value < 0 for value in (*shape, *offsets)) or len(offsets) != 2:
        raise ValueError(f"{key} has an impossible shape or place")
    start, stop = offsets
    if start > stop or (dtype in BY_NAME and math.prod(shape) * BY_NAME[dtype].size != stop - start):
        raise ValueError(f"{key} is {dtype} {shape}, which is not {stop - start} bytes"[:200])
    return Entry(shard, dtype, tuple(shape), base + start, base + stop)
