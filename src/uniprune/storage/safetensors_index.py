"""What lies where in a checkpoint of safetensors files: the header of each file is read, the tensors are not."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from uniprune.errors import InputError
from uniprune.storage import strict_json

UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
PIECE = 1 << 17  # weights of a tensor that are looked at together
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
WIDTHS = ITEMSIZE | {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
HEADER = 100_000_000  # bytes; the longest header, the safetensors library's own limit
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Bits that are all set in NaN, and in infinity where a type has it.
EXPONENTS = {"F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C}

DTYPES = {name: dtype for dtype, name in NAMES.items()}


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
        if self.dtype not in ITEMSIZE:
            raise InputError(f"{self.file}: weights of type {self.dtype} cannot be pruned; use an unquantised model")
        return UINTS[ITEMSIZE[self.dtype]]

    def array(self) -> np.ndarray[Any, Any]:
        """The tensor's bits as a flat array of unsigned integers, mapped from the file."""
        count = (self.stop - self.start) // np.dtype(self.uint).itemsize
        return np.memmap(self.file, dtype=self.uint, mode="r", offset=self.start, shape=(count,))

    def pieces(self) -> Iterator[np.ndarray[Any, Any]]:
        """The array, a piece at a time that a core's cache has room for."""
        array = self.array()
        for start in range(0, len(array), PIECE):
            yield array[start : start + PIECE]

    def finite(self, bits: np.ndarray[Any, Any]) -> bool:
        """Whether none of the tensor's bits are those of NaN or infinity."""
        exponent = self.uint(EXPONENTS[self.dtype])
        return not bool((bits & exponent == exponent).any())


class Entries(dict[str, Entry]):
    """Tensors by key. A stack of matrices ``[n, rows, columns]`` has each by ``KEY.3.weight`` too, found but not listed."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._inside(str(key)) is not None

    def __missing__(self, key: str) -> Entry:
        found = self._inside(key)
        if found is None:
            raise KeyError(key)
        return found[1]

    def unstacked(self, wanted: Iterable[str]) -> dict[str, Entry]:
        """All tensors, those stacks as their matrices of which one is among the ``wanted`` keys."""
        stacks = {found[0] for key in wanted if not super(Entries, self).__contains__(key) and (found := self._inside(key))}
        whole = {key: entry for key, entry in self.items() if key not in stacks}
        names = (f"{stack.removesuffix('.weight')}.{n}.weight" for stack in stacks for n in range(self[stack].shape[0]))
        return whole | {name: self[name] for name in names}

    def _inside(self, key: str) -> tuple[str, Entry] | None:
        """The stack that a key means a matrix of, and where in it that lies."""
        base, _, number = key.removesuffix(".weight").rpartition(".")
        for stack in (base, f"{base}.weight") if number.isdigit() else ():
            entry = self.get(stack)
            if entry is not None and len(entry.shape) == 3 and int(number) < entry.shape[0]:
                size = (entry.stop - entry.start) // entry.shape[0]
                start = entry.start + int(number) * size
                return stack, Entry(entry.file, entry.dtype, entry.shape[1:], start, start + size)
        return None


def entries(shards: Iterable[Path]) -> Entries:
    """Every tensor of a sharded checkpoint, by its key.

    Raises InputError for a shard that is missing, that was cut off, or whose header cannot be of it: a type, a shape and a
    place in the file that do not go together, tensors on top of each other, a key twice.
    """
    found = Entries()
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
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(HEADER, size - 8):
        raise ValueError(f"its header would have {length} bytes")
    header = strict_json.parse(file.read(length))
    header.pop("__metadata__", None)
    found = {key: _entry(shard, key, item, 8 + length) for key, item in header.items()}
    ordered = sorted((entry.start, entry.stop, key) for key, entry in found.items())
    for (_, stop, _), (start, _, key) in pairwise(ordered):
        if start < stop:
            raise ValueError(f"{key} lies on top of another tensor")
    if ordered and ordered[-1][1] > size:
        _, stop, key = ordered[-1]
        raise InputError(f"{shard} is cut off: {key} would end at byte {stop} of {size}; fetch it again")
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
    if start > stop or (dtype in WIDTHS and math.prod(shape) * WIDTHS[dtype] != stop - start):
        raise ValueError(f"{key} is {dtype} {shape}, which is not {stop - start} bytes"[:200])
    return Entry(shard, dtype, tuple(shape), base + start, base + stop)


def find_key(name: str, keys: Mapping[str, Any]) -> str | None:
    """The checkpoint key of a parameter: its name, which some checkpoints store without the outermost prefix."""
    return next((key for key in (name, name.partition(".")[2]) if key in keys), None)


def key_of(name: str, keys: Mapping[str, Any]) -> str:
    """As :func:`find_key`; raises InputError if the checkpoint has no such tensor."""
    key = find_key(name, keys)
    if key is None:
        raise InputError(f"the checkpoint has no tensor {name}; its keys are like {list(keys)[:3]}")
    return key
