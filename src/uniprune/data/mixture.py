"""Windows from all over a text of several parts: as many of each part as of any other, as far as it has them.

A part that is small is tokenised as a whole and cut. Of a larger one passages are drawn, each about as long as a window,
and only they are tokenised; what is left of them, and parts that are shorter than a window, are joined.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uniprune.data.bos import WHOLE, Encoder
from uniprune.data.documents import JOIN
from uniprune.data.parts import UNKNOWN, Part
from uniprune.data.text import Sample

PROBE = 20_000  # characters on which it is seen how many make a token


@dataclass(frozen=True)
class Wanted:
    """``count`` windows, None for all, of ``length`` tokens, ``room`` of which are text."""

    use: str
    count: int | None
    length: int
    room: int
    seed: int

    @property
    def whole(self) -> int:
        """How many characters a text may have that is read as a whole; calibration needs a fraction of a large corpus."""
        return WHOLE if self.count is None else max(WHOLE, 48 * self.count * self.length)

    @property
    def share(self) -> int:
        """Characters that may be held at once of a text that is sampled, of all parts together."""
        return max(1_000_000, 16 * (self.count or 0) * self.length)


@dataclass(frozen=True)
class Drawn:
    """``windows``: ``[n, room]``. rest: tokens that were too few for one more; available: about how many there are."""

    windows: Tensor
    rest: int
    available: int
    sample: Sample


def draw(parts: Sequence[Part], encoder: Encoder, wanted: Wanted) -> Drawn:
    """The windows that are wanted, or fewer if there are no more.

    Only the first begins with BOS, if the encoder says so. Part after part gives one window, in an order drawn by the seed.
    """
    assert wanted.count is not None
    share = max(even_share([part.size for part in parts], wanted.share), 64 * wanted.room)
    sources = [_Source(part, encoder, wanted.room, share, f"{wanted.seed} {number}") for number, part in enumerate(parts)]
    turns = random.Random(wanted.seed).sample(sources, len(sources))
    found: list[list[int]] = []
    rest: list[int] = []  # of every part what was too little for a window
    while turns and len(found) < wanted.count:
        for source in list(turns):
            tokens = next(source.windows)
            if len(tokens) < wanted.room:
                turns.remove(source)
                rest += tokens
                if len(rest) < wanted.room:
                    continue
                tokens, rest = rest[: wanted.room], rest[wanted.room :]
            found.append(tokens)
            if len(found) == wanted.count:
                break
    windows = torch.tensor(found, dtype=torch.int64).view(len(found), wanted.room)
    if encoder.bos == "first" and found:
        windows[0] = torch.cat([torch.tensor([encoder.token]), windows[0, :-1]])
    return Drawn(windows, len(rest), *_facts(sources))


def even_share(sizes: Sequence[int], total: int) -> int:
    """What each may have of ``total``: all alike, except that who has less leaves the rest to the others."""
    left, share = total, 0
    for number, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - number)
        left -= min(size, share)
    return share


class _Source:
    """The windows of one part: whole ones in random order, then what is left, which is shorter than one."""

    def __init__(self, part: Part, encoder: Encoder, room: int, share: int, seed: str) -> None:
        self.part, self.whole, self.passages, self.characters, self.available = part, True, 0, 0, 0
        self.windows = self._windows(encoder, room, share, seed)

    def _windows(self, encoder: Encoder, room: int, share: int, seed: str) -> Iterator[list[int]]:
        head, self.whole = beginning(self.part.texts(), share)
        if self.whole:
            self.passages, self.characters = 1, len(head)
            ids = encoder.plain(head + JOIN)
            self.available = len(ids) // room
            for index in random.Random(seed).sample(range(self.available), self.available):
                yield ids[index * room : (index + 1) * room]
            yield ids[self.available * room :]
            return
        probe = head[:PROBE]
        of_a_token = len(probe) / max(1, len(encoder.plain(probe)))
        if self.part.size < UNKNOWN:
            self.available = int(self.part.size / of_a_token) // room
        rest: list[int] = []
        # Mostly a little longer than a window: what it lacks would come from another place.
        for passage in self.part.passages(math.ceil(1.15 * room * of_a_token), share, seed):
            self.passages += 1
            self.characters += len(passage)
            rest = encoder.plain(passage + JOIN) + rest
            while len(rest) >= room:
                yield rest[:room]
                rest = rest[room:]
        yield rest


def beginning(pieces: Iterator[str], limit: int) -> tuple[str, bool]:
    """A text up to about ``limit`` characters, and whether that is all of it."""
    found, size = [], 0
    for piece in pieces:
        found.append(piece)
        size += len(piece)
        if size > limit:
            return "".join(found), False
    return "".join(found), True


def _facts(sources: Sequence[_Source]) -> tuple[int, Sample]:
    """About how many windows there are, and what was read."""
    read = [source for source in sources if source.characters]
    available = sum(source.available for source in read) * len(sources) // max(1, len(read))
    return available, Sample(
        whole=all(source.whole for source in sources),
        files=len(sources),
        files_read=len(read),
        documents=sum(source.part.seen for source in read),
        passages=sum(source.passages for source in read),
        characters=sum(source.characters for source in read),
    )
