"""The layouts of an archive's chunks: weights as planes of bytes that compress. docs/archive.md specifies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uniprune.errors import InputError

SPARSE = 0.02  # from this fraction of zeros on, a bit for each weight is cheaper than zeros among the weights
GROUP = 32  # weights that share a scale in a chunk of `scaled`
BLOCK = 1 << 11  # groups handled at a time: their float32 values fit a core's cache

# Bytes of each kind of word, and two bits of it that change places before it is cut into bytes. In bfloat16 and float32 these
# are the exponent's highest bit, the same for all weights below 2, and its lowest: so the first byte has all that is uneven.
WORDS = {"u8": (1, 0, 0), "u16": (2, 0, 0), "u32": (4, 0, 0), "u64": (8, 0, 0), "bf16": (2, 14, 7), "f32": (4, 30, 23)}
# Planes have uneven bytes, but no phrases: the match-finder would spend bits and time on chance repeats. With a table of 64
# entries it finds next to none, and what is left of zstandard is its Huffman coder.
HUFFMAN = {"min_match": 7, "hash_log": 6, "chain_log": 6}

Array = np.ndarray[Any, Any]


@dataclass
class Chunk:
    """A piece of a file. ``words`` locate what a chunk of `bits` is compared with: file, offset, number, bytes of each."""

    layout: str
    word: str
    size: int
    pieces: list[int] = field(default_factory=list)
    words: tuple[int, ...] = ()


# ------------------------------------------------------------------------------------------------------------- chunks


class Zstd:
    """The two compressors and the bounded decompressor; InputError if the package is missing."""

    def __init__(self, level: int = 3) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError("archives need the zstandard package; pip install zstandard") from None
        if not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise InputError(f"level {level} is not one of zstandard's; use 1 to {zstandard.MAX_COMPRESSION_LEVEL}")
        huffman = zstandard.ZstdCompressionParameters.from_level(1, **HUFFMAN)
        self.bytes = zstandard.ZstdCompressor(level=level).compress
        self.plane: Callable[[Any], bytes] = zstandard.ZstdCompressor(compression_params=huffman).compress
        self.error = zstandard.ZstdError
        self._size = zstandard.frame_content_size
        self._expand = zstandard.ZstdDecompressor().decompress

    def expand(self, piece: bytes, size: int) -> bytes:
        """What one frame holds; ValueError unless that is ``size`` bytes, before memory for it is taken."""
        if self._size(piece) != size:
            raise ValueError("its size is wrong")
        return self._expand(piece, max_output_size=size, allow_extra_data=False)


def encode(chunk: Chunk, raw: bytes, zstd: Zstd) -> tuple[str, list[bytes]]:
    """The layout that a chunk's bytes get, and its pieces, compressed."""
    if chunk.layout == "bytes":
        return "dense", [zstd.bytes(raw)]
    words = np.frombuffer(raw, f"<u{WORDS[chunk.word][0]}")
    if chunk.word == "bf16" and (scaled := fit_scales(words)):
        return "scaled", [zstd.plane(part) for part in scaled]
    mask = words != 0
    kept = np.flatnonzero(mask)  # places: an index several times faster than a mask
    if len(kept) > (1 - SPARSE) * len(words):
        return "dense", [zstd.plane(plane) for plane in _planes(words, chunk.word)]
    return "sparse", [zstd.plane(plane) for plane in (np.packbits(mask, bitorder="little"), *_planes(words[kept], chunk.word))]


def decode(chunk: Chunk, pieces: list[bytes], zstd: Zstd, words: Array | None = None) -> bytes:
    """The bytes of a chunk; ``words`` are what a chunk of `bits` is compared with. Raises ValueError or ZstdError."""
    width = WORDS[chunk.word][0]
    count = chunk.size // width
    if words is not None:
        return xor(zstd.expand(pieces[0], chunk.size), words)
    if chunk.layout == "scaled":
        scales = np.frombuffer(zstd.expand(pieces[0], 2 * count // GROUP), "<f2")
        return _scaled(scales, np.frombuffer(zstd.expand(pieces[1], count), np.int8).reshape(-1, GROUP)).tobytes()
    if chunk.layout == "dense":
        return _joined([zstd.expand(piece, count) for piece in pieces], chunk.word).tobytes()
    bits = np.frombuffer(zstd.expand(pieces[0], -(-count // 8)), np.uint8)
    kept = np.flatnonzero(np.unpackbits(bits, count=count, bitorder="little").view(np.bool_))
    whole = np.zeros(count, f"<u{width}")
    whole[kept] = _joined([zstd.expand(piece, len(kept)) for piece in pieces[1:]], chunk.word)
    return whole.tobytes()


def _swapped(words: Array, word: str) -> Array:
    """Words with two bits in each other's place; its own inverse."""
    width, high, low = WORDS[word]
    if high == low:
        return words
    unequal = ((words >> high) ^ (words >> low)) & 1
    swapped: Array = words ^ (unequal << high) ^ (unequal << low)
    return swapped.astype(f"<u{width}", copy=False)


def _planes(words: Array, word: str) -> Iterator[bytes]:
    """The words' highest bytes, then their second highest, and so on."""
    for column in _swapped(words, word).view(np.uint8).reshape(-1, WORDS[word][0]).T[::-1]:
        yield column.tobytes()


def _joined(planes: list[bytes], word: str) -> Array:
    """The words that :func:`_planes` cut."""
    columns = np.empty((len(planes[0]), len(planes)), np.uint8)
    for column, plane in zip(columns.T[::-1], planes, strict=True):
        column[:] = np.frombuffer(plane, np.uint8)
    return _swapped(columns.view(f"<u{len(planes)}").ravel(), word)


def xor(raw: bytes, words: Array) -> bytes:
    """``raw``, a bit for each word, xor whether that word is other than zero; its own inverse."""
    return (np.frombuffer(raw, np.uint8) ^ np.packbits(words != 0, bitorder="little")).tobytes()


def fit_scales(words: Array) -> tuple[Array, Array] | None:
    """Scales (float16) and integers (int8 ``[groups, 32]``) that give these bfloat16 words bit for bit, or None.

    They exist for weights that were dequantised from eight bits (Q8_0 of GGUF), where a group still has its largest.
    """
    if len(words) % GROUP:
        return None
    grid, found = words.reshape(-1, GROUP), []
    for start in range(0, len(grid), BLOCK):  # other weights fail on the first block
        part = grid[start : start + BLOCK]
        with np.errstate(all="ignore"):
            values = (part.astype(np.uint32) << 16).view(np.float32)
            scales = (np.abs(values).max(axis=1) / np.float32(127)).astype("<f2")
            integers = np.rint(values / np.where(scales > 0, scales, 1).astype(np.float32)[:, None]).astype(np.int8)
        if not np.array_equal(_scaled(scales, integers), part):
            return None
        found.append((scales, integers))
    return np.concatenate([scales for scales, _ in found]), np.concatenate([integers for _, integers in found])


def _scaled(scales: Array, integers: Array) -> Array:
    """Scale times integer (exact in float32) rounded to bfloat16, ties to even; as words."""
    with np.errstate(all="ignore"):
        bits = (integers.astype(np.float32) * scales.astype(np.float32)[:, None]).view(np.uint32)
    rounded: Array = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2")
