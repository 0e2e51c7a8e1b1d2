"""The types of tensors in safetensors files: the one table of what is to be known of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class DType(NamedTuple):
    """A type of elements.

    name: safetensors' own. size: bytes of one element. dtype: PyTorch's. exponent: of a floating-point type the bits that are
    all set in NaN, and in infinity where it has one. word: how an archive takes it apart (``archive_codec.WORDS``).
    """

    name: str
    size: int
    dtype: torch.dtype
    exponent: int | None = None
    word: str = "u8"

    @property
    def uint(self) -> Any:
        """NumPy's unsigned integers as large as an element."""
        return np.dtype(f"u{self.size}").type


TABLE = (
    DType("F64", 8, torch.float64, 0x7FF << 52, "u64"),
    DType("F32", 4, torch.float32, 0x7F800000, "f32"),
    DType("F16", 2, torch.float16, 0x7C00, "u16"),
    DType("BF16", 2, torch.bfloat16, 0x7F80, "bf16"),
    DType("F8_E4M3", 1, torch.float8_e4m3fn, 0x7F),
    DType("F8_E5M2", 1, torch.float8_e5m2, 0x7C),
    DType("BOOL", 1, torch.bool),
    DType("U8", 1, torch.uint8),
    DType("I8", 1, torch.int8),
    DType("U16", 2, torch.uint16, word="u16"),
    DType("I16", 2, torch.int16, word="u16"),
    DType("U32", 4, torch.uint32, word="u32"),
    DType("I32", 4, torch.int32, word="u32"),
    DType("U64", 8, torch.uint64, word="u64"),
    DType("I64", 8, torch.int64, word="u64"),
)
BY_NAME = {entry.name: entry for entry in TABLE}
BY_DTYPE = {entry.dtype: entry for entry in TABLE}
PLAIN = {entry.name: entry.dtype for entry in TABLE[:4]}  # what models are computed in
FLOATS = {entry.name for entry in TABLE if entry.exponent is not None}


def word(name: str) -> str:
    """How an archive takes a type apart; one that is not in the table is bytes."""
    return BY_NAME[name].word if name in BY_NAME else "u8"
