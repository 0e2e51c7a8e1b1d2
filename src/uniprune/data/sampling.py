"""Passages from all over a source that is too large to be read as a whole, in an order drawn by a seed.

An uncompressed file of lines is not read through: places all over it are sought. What can only be read from its start is read
once, by reservoir sampling in bounded memory. Both give each part of the text the same chance.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from uniprune.data.formats import decoded

GOLDEN = (5**0.5 - 1) / 2  # steps of this much of a circle keep away from each other


class _Reservoir:
    """A random sample of passages, ``budget`` characters in all: the passages with the lowest random keys.

    What has no chance is skipped unseen, by a geometric number of passages (Li, algorithm L, 1994).
    """

    def __init__(self, budget: int, seed: str) -> None:
        self._random, self._budget = random.Random(seed), budget
        self._kept: list[tuple[float, int, str]] = []  # (-key, number, passage), the highest key first
        self._held, self._worst, self._number = 0, 1.0, 0

    def next_place(self, unit: int, passage: int) -> int:
        """Somewhere in the next stretch of ``passage`` bytes that is kept, after that number ``unit``."""
        return int((unit + 1 + self.skips() + self._random.random()) * passage)

    def skips(self) -> int:
        """How many passages are skipped before the next one that is kept."""
        if self._worst >= 1:
            return 0
        return int(math.log(1 - self._random.random()) / math.log1p(-self._worst))

    def keep(self, passage: str) -> None:
        self._number += 1
        heapq.heappush(self._kept, (-self._worst * self._random.random(), self._number, passage))
        self._held += len(passage)
        while self._held - len(self._kept[0][2]) >= self._budget:
            self._held -= len(heapq.heappop(self._kept)[2])
        self._worst = -self._kept[0][0] if self._held >= self._budget else 1.0

    def kept(self) -> Iterator[str]:
        return (passage for _, _, passage in sorted(self._kept, reverse=True))


def draw(documents: Iterable[str], passage: int, budget: int, seed: str) -> Iterator[str]:
    """Passages of about ``passage`` characters, drawn at random from documents that can only be read once.

    Long documents take part with as many passages as they have. ``budget``: characters in all that are held.
    """
    reservoir = _Reservoir(budget, seed)
    left = reservoir.skips()
    for document in documents:
        pieces = len(document) // passage or 1
        while left < pieces:
            reservoir.keep(piece(document, left, pieces))
            left += 1 + reservoir.skips()
        left -= pieces
    yield from reservoir.kept()


def draw_lines(
    blocks: Iterable[bytes], text: Callable[[bytes], str | None], passage: int, budget: int, seed: str
) -> Iterator[str]:
    """The same of the lines of a stream, most of which are skipped unseen: places are drawn, and what is there is read.

    blocks: whole lines. text: what is written in lines, None to leave them out. passage: in bytes here.
    """
    reservoir = _Reservoir(budget, seed)
    place, done = reservoir.next_place(-1, passage), 0
    for block in blocks:
        while place < done + len(block):
            start, end, index, count = lines_around(block, max(0, place - done), passage)
            found = text(block[start:end])
            if found is not None:
                reservoir.keep(piece(found, index, count))
            place = reservoir.next_place(place // passage, passage)
        done += len(block)
    yield from reservoir.kept()


def lines_around(block: bytes, at: int, passage: int) -> tuple[int, int, int, int]:
    """The lines at a place: where they begin and end, and, of one long line, which of how many passages is meant.

    They are those from the next beginning of a line on that are about ``passage`` bytes together, or the long line around the
    place.
    """
    start = block.find(b"\n", at - 1, at + passage) + 1 if at else 0
    if start == len(block):
        start = block.rfind(b"\n", 0, start - 1) + 1  # the last line, where no other begins
    if at and not start:
        start, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at) + 1 or len(block)
        count = (end - start) // passage or 1
        return start, end, (at - start) * count // (end - start), count
    end = block.find(b"\n", min(start + passage, len(block)) - 1) + 1 or len(block)
    last = block.rfind(b"\n", start, end - 1) + 1
    if last <= start:
        return start, end, 0, (end - start) // passage or 1
    return start, last if end - last > passage else end, 0, 1


def one_of(document: str, passage: int, rng: random.Random) -> str:
    """The document, or one passage of a long one."""
    pieces = len(document) // passage or 1
    return piece(document, rng.randrange(pieces), pieces)


def piece(text: str, index: int, count: int) -> str:
    """One of ``count`` equal parts of a text, whole lines or words."""
    return cut(text, len(text) * index // count, len(text) * (index + 1) // count)


def places(size: int, passage: int, budget: int, seed: str) -> Iterator[int]:
    """Offsets into ``size`` bytes for passages, ``budget`` bytes in all; however many are taken, they are evenly spread."""
    start = random.Random(seed).random()
    for number in range(max(1, min(size, budget) // passage)):
        yield int((start + number * GOLDEN) % 1 * max(1, size - passage))


def stretches(blocks: Iterable[str], passage: int) -> Iterator[str]:
    """A text that comes in blocks as pieces of about ``passage`` characters, whole lines or words."""
    left = ""
    for block in blocks:
        left, at = left + block, 0
        while len(left) - at > 2 * passage:
            end = max(_boundary(left, at + passage), at + 1)
            yield left[at:end]
            at = end
        left = left[at:]
    yield left


def plain_at(path: Path, offset: int, passage: int) -> str:
    """About ``passage`` characters of a UTF-8 text from an offset in bytes on, whole words or lines."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(passage + 4)
    skipped = next((i for i, byte in enumerate(block[:4]) if byte & 0xC0 != 0x80), 0) if offset else 0
    text = "".join(decoded(_without_torn_end(block[skipped:]), offset + skipped))
    return cut(text, 1 if offset else 0, len(text) - 1)


def lines_at(path: Path, offset: int, passage: int) -> tuple[int, bytes, int, int]:
    """The lines of a file at an offset, as :func:`lines_around`: where they begin, what they are, which passage is meant."""
    with path.open("rb") as file:
        before, block = 0, b""
        while before < offset and b"\n" not in block[:before]:  # back to where a line begins
            before = min(offset, max(passage, 4 * before))
            file.seek(offset - before)
            block = file.read(before + 2 * passage) + file.readline()
        if offset == 0:
            block = file.read(2 * passage) + file.readline()
    torn = block.find(b"\n") + 1 if before < offset else 0
    start, end, index, count = lines_around(block[torn:], before - torn, passage)
    return offset - before + torn + start, block[torn + start : torn + end], index, count


def cut(text: str, start: int, end: int) -> str:
    """``text[start:end]``, moved on to where lines begin if they do near there, else words."""
    return text[_boundary(text, start) : _boundary(text, end)]


def _boundary(text: str, at: int) -> int:
    """The next place after a line's end, or else after a space, within 256 characters; else the place itself."""
    if 0 < at < len(text):
        for mark in ("\n", " "):
            if (found := text.find(mark, at - 1, at + 256)) >= 0:
                return found + 1
    return at


def _without_torn_end(block: bytes) -> Iterator[bytes]:
    """The block without the beginning of a character at its end."""
    for back in range(1, min(4, len(block)) + 1):
        byte = block[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            yield block[:-back] if back < needed else block
            return
    yield block
