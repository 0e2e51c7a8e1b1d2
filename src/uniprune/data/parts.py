"""The parts of a corpus: files, datasets and built-in text, each read as a whole or by passages from all over it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from uniprune.data import sampling, wikitext
from uniprune.data.documents import JOIN, Reader
from uniprune.data.formats import Format, blocks_of, decoded, decompressed, readable, recognise
from uniprune.data.rows import is_lines, lines_of, parse_line, reachable, read_rows

Item = TypeVar("Item")
SHUFFLED = 10_000  # rows of a Hub dataset that are shuffled at once while it is streamed
UNKNOWN = 1 << 40
DENSE = 4  # bytes of text, about, in a byte that is compressed


class Part(Protocol):
    """What is read by itself: a file, or all of a source that has none. ``seen``: how many documents were, so far."""

    join: str
    seen: int

    @property
    def size(self) -> int:
        """About the bytes of its text."""

    def texts(self) -> Iterator[str]:
        """Its text in consecutive pieces."""

    def passages(self, length: int, budget: int, seed: str) -> Iterator[str]:
        """Passages of about ``length`` characters from all over it, in random order; ``budget`` characters in all."""

    def pages(self) -> Iterator[tuple[str, str]]:
        """Its documents, each with the text whose words and bytes count: the same, but for WikiText."""


class _Counting:
    seen = 0

    def _begin(self) -> None:
        """Counts from 0: a source is read once for its beginning, and again for passages from all over it."""
        self.seen = 0

    def _counted(self, items: Iterable[Item]) -> Iterator[Item]:
        self._begin()
        for item in items:
            self.seen += 1
            yield item


class _CountingRows(_Counting):
    reader: Reader

    def _begin(self) -> None:
        super()._begin()
        self.reader.skipped = self.reader.refused = 0


@dataclass
class Listed(_Counting):
    """A source that gives its documents one by one. ``articles``: whether they are the lines of WikiText."""

    documents: Callable[[], Iterator[str]]
    join: str = JOIN
    articles: bool = False
    size: int = UNKNOWN

    def texts(self) -> Iterator[str]:
        return joined(self._counted(self.documents()), self.join)

    def passages(self, length: int, budget: int, seed: str) -> Iterator[str]:
        return sampling.draw(self._counted(self.documents()), length, budget, seed)

    def pages(self) -> Iterator[tuple[str, str]]:
        return _articles(self.documents()) if self.articles else _themselves(self.documents())


@dataclass
class File(_CountingRows):
    """A file of any kind that :mod:`uniprune.data.formats` knows."""

    path: Path
    reader: Reader
    join: str = JOIN
    format: Format = field(init=False)

    def __post_init__(self) -> None:
        self.format = recognise(self.path, "text")

    @property
    def size(self) -> int:
        return self.path.stat().st_size * (DENSE if self.format.compression or self.format.columnar else 1)

    def texts(self) -> Iterator[str]:
        if self.format.kind != "plain":
            return joined(self._counted(self._documents()), self.join)
        self.seen = 1
        return self._plain()

    def pages(self) -> Iterator[tuple[str, str]]:
        if self.format.kind == "wikitext":
            return _articles(lines_of(self._plain()))
        return _themselves(iter(["".join(self._plain())]) if self.format.kind == "plain" else self._documents())

    def passages(self, length: int, budget: int, seed: str) -> Iterator[str]:
        lines = self.format.kind == "json" and is_lines(self.path, self.format, self.reader.wanted)
        if self.format.compression is None and (lines or self.format.kind == "plain"):
            return self._sought(lines, length, budget, seed)
        if lines:
            return self._drawn(length, budget, seed)
        documents = sampling.stretches(self._plain(), length) if self.format.kind == "plain" else self._documents()
        return sampling.draw(self._counted(documents), length, budget, seed)

    def _plain(self) -> Iterator[str]:
        with readable(self.path, "text"), closing(decompressed(self.path, self.format.compression)) as stream:
            yield from decoded(blocks_of(stream))

    def _documents(self) -> Iterator[str]:
        if self.format.kind == "wikitext":
            return wikitext.rows(lines_of(self._plain()))
        return self.reader(read_rows(self.path, "text", self.reader.choose, self.reader.wanted))

    def _drawn(self, length: int, budget: int, seed: str) -> Iterator[str]:
        """From compressed lines, most of which are skipped without being parsed."""
        self._begin()
        with readable(self.path, "text"), closing(decompressed(self.path, self.format.compression)) as stream:

            def written(lines: bytes) -> str | None:
                return self._written(lines, f"before line {self.seen}")

            yield from sampling.draw_lines(self._blocks(stream), written, length, budget, seed)

    def _blocks(self, stream: BinaryIO) -> Iterator[bytes]:
        """Whole lines, about a megabyte of them."""
        for block in blocks_of(stream):
            found = block + stream.readline()
            self.seen += found.count(b"\n")
            yield found

    def _sought(self, lines: bool, length: int, budget: int, seed: str) -> Iterator[str]:
        """From places all over a file of lines, or of plain text, which is not read through."""
        with readable(self.path, "text"):
            head = sampling.plain_at(self.path, 0, 1 << 16)
            in_bytes = max(1, length * len(head.encode()) // max(1, len(head)))
            met = set[tuple[int, int]]()
            size = self.path.stat().st_size
            self._begin()
            # Lines may have little text among their fields: as many places as are wanted, all of the file's if need be.
            for offset in sampling.places(size, in_bytes, size if lines else budget, seed):
                self.seen += 1
                if not lines:
                    yield sampling.plain_at(self.path, offset, in_bytes)
                    continue
                start, found, index, count = sampling.lines_at(self.path, offset, in_bytes)
                text = None if (start, index) in met else self._written(found, f"at byte {start}")
                met.add((start, index))
                if text is not None:
                    yield sampling.piece(text, index, count)

    def _written(self, lines: bytes, where: str) -> str | None:
        """The documents of some lines, joined."""
        where = f"text {self.path}, {where}"
        rows = ((where, parse_line(line, where)) for line in lines.split(b"\n") if line.strip())
        return self.join.join(self.reader(rows)) or None


@dataclass
class HubShard(_CountingRows):
    """A shard of a dataset of ``datasets``. streamed: whether it is downloaded while it is read; commit: of the dataset."""

    name: str
    data: Any
    reader: Reader
    streamed: bool
    commit: str | None = None
    join: str = JOIN
    size: int = UNKNOWN

    def texts(self) -> Iterator[str]:
        return joined(self._documents(self.data), self.join)

    def pages(self) -> Iterator[tuple[str, str]]:
        return _themselves(self._documents(self.data))

    def passages(self, length: int, budget: int, seed: str) -> Iterator[str]:
        rng = random.Random(seed)
        options = {"buffer_size": SHUFFLED} if self.streamed else {}
        shuffled = self.data.shuffle(seed=rng.randrange(1 << 30), **options)
        return (sampling.one_of(document, length, rng) for document in self._documents(shuffled))

    def _documents(self, data: Any) -> Iterator[str]:
        with reachable(self.name, "text"):
            if names := data.column_names:
                data = data.select_columns(self.reader.choose(f"text {self.name}", names))
            rows = ((f"text {self.name}, row {number}", row) for number, row in enumerate(data, 1))
            yield from self._counted(self.reader(rows))


def joined(documents: Iterator[str], join: str) -> Iterator[str]:
    """The documents, and what stands between them."""
    for number, document in enumerate(documents):
        yield join + document if number else document


def _articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((wikitext.detokenised(page), page) for page in wikitext.pages(lines))


def _themselves(documents: Iterator[str]) -> Iterator[tuple[str, str]]:
    return ((document, document) for document in documents)
