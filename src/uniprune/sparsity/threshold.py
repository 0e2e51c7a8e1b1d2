"""The exact search for a threshold over more scores than fit into memory, with bounds on what each matrix keeps.

A radix selection: scores are mapped to integers of the same order, and histograms of their digits, from the highest on, close
in on the threshold. One pass a digit, one piece in memory at a time; nothing is sorted, copied or concatenated.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from uniprune.errors import InputError

DIGITS = ((21, 11), (10, 11), (0, 10))  # of a key: place and width in bits, highest first
HALF = 1 << 10  # the first digit is signed
INFINITE = HALF + 0x3FC  # first digit of infinity; NaN lies above, the negative ones lie as far below
INFINITY = 0x7F800000  # its key; that of -infinity is as far below -1
PIECE = 1 << 18  # scores at a time: they stay in the processor's cache

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Threshold:
    """Keeps scores above ``key`` (see :func:`ordered`) and the first ``ties`` of those equal to it, in row-major order."""

    key: int
    ties: float = math.inf

    def mask(self, scores: Tensor) -> Tensor:
        """The boolean mask of scores ``[out, in]``."""
        if self.ties == math.inf and scores.dtype == torch.float32:
            return scores >= self._lowest
        keys = ordered(scores)
        if self.ties == math.inf:
            return keys >= self.key
        mask = keys > self.key
        if self.ties:
            equal = (keys == self.key).flatten()
            mask |= (equal & (equal.cumsum(0) <= self.ties)).reshape(mask.shape)
        return mask

    @property
    def _lowest(self) -> float:
        """The score of the key. Keys below that of -infinity, and above that of infinity, would be NaN."""
        if self.key < -INFINITY - 1:
            return -math.inf
        bits = self.key ^ (self.key >> 31 & 0x7FFFFFFF)
        found: float = struct.unpack("f", struct.pack("i", bits))[0]
        return found


EVERYTHING, NOTHING = Threshold(-(1 << 31)), Threshold((1 << 31) - 1, 0)


def ordered(scores: Tensor, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
    """float32 -> int32 in the same order (IEEE floats sort as sign-magnitude integers); -0.0 counts as 0.0.

    out, scratch: float32 and int32 memory of the size of the scores to work in, fresh by default.
    """
    bits = torch.add(scores.float(), 0.0, out=out).view(torch.int32)
    flips = torch.bitwise_right_shift(bits, 31, out=scratch)
    flips &= 0x7FFFFFFF
    return bits.bitwise_xor_(flips)


def thresholds(
    saliency: Mapping[str, Tensor],
    keep: int,
    bounds: Mapping[str, Bounds] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Threshold]:
    """One threshold for all matrices, so that ``keep`` scores in all stay; of equal ones those that come first.

    bounds: matrix name -> the least and the most of its scores that may stay. A matrix that would leave its bounds stops
    there, with a threshold of its own, and the others make up for it. Masks are nested: what stays of a budget stays of every
    larger one within the same bounds. sizes: how many scores each matrix has, where that is known already.
    Raises InputError for scores that are not finite, and for a budget that the bounds do not allow.
    """
    sizes = sizes or {name: scores.numel() for name, scores in saliency.items()}
    searches = {name: _Search(name, sizes[name], *(bounds or {}).get(name, (0, sizes[name]))) for name in saliency}
    least, most = (sum(getattr(one, side) for one in searches.values()) for side in ("least", "most"))
    if not least <= keep <= most:
        total = sum(one.size for one in searches.values())
        raise InputError(f"{keep} of {total} weights cannot stay: the bounds leave between {least} and {most}")
    shared, left = list(searches.values()), keep  # whom the common threshold decides on, and what they keep together
    common, memory = 0, _Memory()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for place, width in DIGITS:
            for name, one in searches.items():
                if not one.decided:
                    one.count(saliency[name], place, width, pool, memory)
            digit = _last(torch.stack([one.within for one in shared]).sum(0) >= left) if shared else 0
            for one in shared:
                one.close_in(digit)
            common = (common << width) + digit
            left -= sum(one.keep for one in shared if one.keep is not None)
            shared = [one for one in shared if one.keep is None]
            for one in searches.values():
                if not one.decided:
                    one.descend(digit if one.keep is None else _last(one.counts[:-1] >= one.keep), width)
    # Those left all end at the same score. What they keep above it is theirs; the places that remain go to scores equal to it.
    left -= sum(max(one.least, one.above) for one in shared)
    for one in shared:
        surely = max(one.least, one.above)
        one.keep = min(surely + left, one.most, one.above + one.equal)
        left -= one.keep - surely
    return {name: Threshold(common - (1 << 31)) if one.free else one.threshold for name, one in searches.items()}


def sampled_thresholds(
    sample: Mapping[str, Tensor], keep: int, bounds: Mapping[str, Bounds], sizes: Mapping[str, int]
) -> dict[str, Threshold]:
    """As :func:`thresholds`, from a sample of the scores; of those equal to the threshold all are kept.

    Bounds that matrices can meet may be a few scores out of reach of their samples, which then keep what comes nearest.
    """
    if not bounds:  # one search over all: each search waits for the GPU
        together = torch.cat([scores.flatten() for scores in sample.values()])
        return dict.fromkeys(sample, Threshold(thresholds({"the sample": together}, keep)["the sample"].key))
    bounds = {name: (min(bound), max(bound)) for name, bound in bounds.items()}
    limits = [bounds.get(name, (0, sizes[name])) for name in sample]
    keep = min(max(keep, sum(least for least, _ in limits)), sum(most for _, most in limits))
    found = thresholds(sample, keep, bounds, sizes)
    return {name: Threshold(one.key) if 0 < one.ties < math.inf else one for name, one in found.items()}


@dataclass
class _Search:
    """The search for one matrix's threshold: the digits found so far, and how many scores lie above all that begin with them.

    keep: how many scores stay, once that is known; free: because none is near the common threshold, and not by a bound.
    counts: how many are at or above each next digit, and past the last one.
    """

    name: str
    size: int
    least: int
    most: int
    keep: int | None = None
    free: bool = False
    prefix: int = 0
    above: int = 0
    equal: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def decided(self) -> bool:
        """Whether there is nothing to search for."""
        return self.free or self.keep in (0, self.size)

    @property
    def within(self) -> Tensor:
        """How many scores would stay for each next digit of the threshold."""
        return self.counts[:-1].clamp(self.least, self.most)

    @property
    def threshold(self) -> Threshold:
        assert self.keep is not None
        if self.keep in (0, self.size):
            return EVERYTHING if self.keep else NOTHING
        return Threshold(self.prefix - (1 << 31), self.keep - self.above)

    def count(self, scores: Tensor, place: int, width: int, pool: ThreadPoolExecutor, memory: _Memory) -> None:
        """Counts the next digits of the scores that have the digits found so far."""
        first, bins = place == DIGITS[0][0], 1 << width

        def histogram(piece: Tensor) -> Tensor:
            floats, digits = memory.of(piece)
            keys = ordered(piece, floats, digits)
            if first:
                keys >>= place
                return torch.bincount(keys.add_(HALF), minlength=bins)
            torch.bitwise_right_shift(keys, place + width, out=digits)
            alike = _chosen(keys, digits == self.prefix - (1 << (31 - place - width)))
            alike >>= place
            return torch.bincount(alike.bitwise_and_(bins - 1), minlength=bins)

        flat = scores.flatten()
        if flat.device.type == "cpu":
            found = torch.stack(list(pool.map(histogram, torch.split(flat, PIECE)))).sum(0)
        else:  # whose own threads are enough
            found = histogram(flat).cpu()
        if first and int(found[INFINITE:].sum() + found[: bins - INFINITE].sum()):
            raise InputError(f"{self.name}: the scores contain NaN or infinity; recalibrate, and check the model's weights")
        from_top = found.flip(0).cumsum(0).flip(0)
        self.counts = self.above + torch.cat((from_top, torch.zeros(1, dtype=from_top.dtype)))

    def close_in(self, digit: int) -> None:
        """What stays is known if it is the same from one end of the threshold's digit to the other."""
        above, reached = self.counts[[digit + 1, digit]].tolist()
        low, high = (min(max(count, self.least), self.most) for count in (above, reached))
        self.keep, self.free = (low, above == reached == low) if low == high else (None, False)

    def descend(self, digit: int, width: int) -> None:
        self.prefix = (self.prefix << width) + digit
        self.above = int(self.counts[digit + 1])
        self.equal = int(self.counts[digit]) - self.above


class _Memory(threading.local):
    """What a thread works in, piece after piece: a fresh megabyte for each costs more than the work on it."""

    def __init__(self) -> None:
        self._floats, self._integers = torch.empty(0), torch.empty(0, dtype=torch.int32)

    def of(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """float32 and int32 memory of a piece's size."""
        if len(self._floats) < len(piece) or self._floats.device != piece.device:
            self._floats = torch.empty(len(piece), device=piece.device)
            self._integers = torch.empty_like(self._floats, dtype=torch.int32)
        return self._floats[: len(piece)], self._integers[: len(piece)]


def _chosen(keys: Tensor, flags: Tensor) -> Tensor:
    """``keys[flags]``, which on a CPU numpy has several times as fast."""
    return torch.from_numpy(np.compress(flags.numpy(), keys.numpy())) if keys.device.type == "cpu" else keys[flags]


def _last(flags: Tensor) -> int:
    """The position of the last flag that is set, of flags that are set up to there."""
    return int(flags.sum()) - 1
