"""Sparsity patterns: which scores survive. They see scores, never a model.

A pattern is called with a saliency (matrix name -> scores ``[out, in]``, higher = keep) and yields one boolean mask per
matrix (True = keep). Counts are exact, ``keep = n - floor(sparsity * n)`` per budget group, and among equal scores the
lower index is kept, so that masks do not depend on the sorting algorithm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from uniprune.errors import InputError

Saliency = Mapping[str, Tensor]
Masks = Mapping[str, Tensor]
Scope = Literal["row", "matrix", "model"]
SHORT = 16  # longest row that is ranked pair by pair
PIECE = 1 << 18  # such rows at a time


class Pattern(Protocol):
    """Cuts masks from scores. ``sparsity`` is the fraction of weights removed."""

    @property
    def sparsity(self) -> float: ...

    @property
    def local(self) -> bool:
        """Whether each matrix is cut on its own, without looking at the others."""
        ...

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape cannot have the pattern, or None."""
        ...

    def __call__(self, saliency: Saliency) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Unstructured:
    """Removes ``floor(sparsity * n)`` weights of each budget group, wherever they are.

    scope: the budget group. ``row``: each output row by itself (Wanda, arXiv 2306.11695); ``matrix``: each matrix;
    ``model``: all matrices share one budget, so their scores must be on one scale (``metrics.comparable``).
    """

    sparsity: float
    scope: Scope = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1 or math.isnan(self.sparsity):
            raise InputError(f"sparsity {self.sparsity} is not between 0 and 1; give the fraction to remove, e.g. 0.5")
        if self.scope not in get_args(Scope):
            raise InputError(f"scope {self.scope!r} is unknown; use one of {', '.join(get_args(Scope))}")

    def __str__(self) -> str:
        return f"{self.sparsity:g} by {self.scope}"

    @property
    def local(self) -> bool:
        return self.scope != "model"

    def misfit(self, rows: int, columns: int) -> str | None:
        return None

    def keep(self, size: int) -> int:
        """How many of ``size`` weights survive. Exact: 0.29 of 100 removes 29, though 0.29 * 100 < 29 in floats."""
        return size - math.floor(Fraction(str(self.sparsity)) * size)

    def __call__(self, saliency: Saliency) -> Iterator[tuple[str, Tensor]]:
        if self.scope == "model":
            yield from _model_wide(saliency, self.keep)
            return
        for name, scores in _finite(saliency.items()):
            groups = scores if self.scope == "row" else scores.reshape(1, -1)
            yield name, top(groups, self.keep(groups.shape[1])).reshape(scores.shape)


@dataclass(frozen=True)
class NM:
    """Keeps ``n`` of every ``m`` consecutive inputs of a row. ``NM(1, 4)`` removes three quarters."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InputError(f"pattern {self} is impossible: N:M keeps N of every M inputs, so 1 <= N <= M (e.g. 2:4)")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def local(self) -> bool:
        return True

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if columns % self.m == 0 else f"{columns} inputs are not divisible by {self.m}"

    def __call__(self, saliency: Saliency) -> Iterator[tuple[str, Tensor]]:
        for name, scores in _finite(saliency.items()):
            if reason := self.misfit(*scores.shape):
                raise InputError(f"{name}: {reason}, as {self} needs; leave it out with --exclude")
            yield name, top(scores.reshape(-1, self.m), self.n).reshape(scores.shape)


def parse(spec: str | float | Pattern, scope: Scope | None = None, default: Scope = "row") -> Pattern:
    """A pattern from its spelling: a level (``0.6``) or N of M kept (``2:4``).

    scope: the budget group of a level, ``default`` unless given; an N:M pattern has its own and refuses one.
    Raises InputError for anything else.
    """
    if isinstance(spec, (Unstructured, NM)):
        return spec
    text = str(spec).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        if scope is not None:
            raise InputError(f"scope {scope!r} does not go with {text}: N:M is cut within groups of {match[2]} inputs")
        return NM(int(match[1]), int(match[2]))
    try:
        level = float(text)
    except ValueError:
        raise InputError(f"sparsity {text!r} is neither a level such as 0.6 nor a pattern such as 2:4") from None
    return Unstructured(level, scope or default)


def top(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` highest of each row of ``scores`` ``[groups, n]`` as a boolean mask; the lower index wins ties."""
    size = scores.shape[1]
    if keep >= size:
        return torch.ones_like(scores, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if size <= SHORT:
        return torch.cat([_ranks(piece) < keep for piece in torch.split(scores, PIECE)])  # pieces stay in the processor's cache
    threshold = scores.kthvalue(size - keep + 1, dim=1, keepdim=True).values
    mask = scores >= threshold
    # Only rows with more ties at the threshold than places left need the (slow) count from the left.
    crowded = (mask.sum(1) > keep).nonzero().squeeze(1)
    if len(crowded):
        rows, edge = scores[crowded], threshold[crowded]
        above, ties = rows > edge, rows == edge
        places = keep - above.sum(1, keepdim=True)
        mask[crowded] = above | (ties & (ties.cumsum(1) <= places))
    return mask


def _ranks(scores: Tensor) -> Tensor:
    """How many others of its row ``[groups, n]`` go before each score. All pairs: in short rows no sort is as fast."""
    columns = scores.T.contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for later in range(1, len(columns)):
        for earlier in range(later):
            first = columns[earlier] >= columns[later]
            ranks[later] += first
            ranks[earlier] += ~first
    return ranks.T


def _finite(items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, scores in items:
        if not bool(torch.isfinite(scores).all()):
            raise InputError(f"{name}: the scores contain NaN or infinity; recalibrate, and check the model's weights")
        yield name, scores


def _model_wide(saliency: Saliency, keep_of: Callable[[int], int]) -> Iterator[tuple[str, Tensor]]:
    """One budget over all matrices, one matrix in memory at a time (three passes over a file-backed saliency)."""
    total = sum(scores.numel() for _, scores in _finite(saliency.items()))
    keep = keep_of(total)
    if keep in (0, total):
        for name, scores in saliency.items():
            yield name, torch.full(scores.shape, keep > 0, dtype=torch.bool, device=scores.device)
        return
    threshold, ties_kept = _select(saliency, keep)
    for name, scores in saliency.items():
        keys = _ordered(scores)
        mask = keys > threshold
        ties = (keys == threshold).flatten()
        count = int(ties.sum())
        if count:
            places = min(count, ties_kept)
            ties_kept -= places
            mask |= (ties & (ties.cumsum(0) <= places)).reshape(mask.shape)
        yield name, mask


def _ordered(scores: Tensor) -> Tensor:
    """float32 -> int32 in the same order (IEEE floats sort as sign-magnitude integers); -0.0 counts as 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _select(saliency: Saliency, keep: int) -> tuple[int, int]:
    """The key of the ``keep``-th highest score of all matrices, and how many scores equal to it are to be kept.

    A radix selection: a histogram of the high 16 bits finds the bin, one of the low 16 bits inside it the exact value;
    nothing is sorted, copied or concatenated.
    """
    high = sum(torch.bincount((_ordered(s).flatten() >> 16) + 32768, minlength=65536).cpu() for s in saliency.values())
    bin_, left = _descend(torch.as_tensor(high), keep)
    low = torch.zeros(65536, dtype=torch.int64)
    for scores in saliency.values():
        keys = _ordered(scores).flatten()
        low += torch.bincount(keys[(keys >> 16) == bin_ - 32768] & 0xFFFF, minlength=65536).cpu()
    value, left = _descend(low, left)
    return ((bin_ - 32768) << 16) + value, left


def _descend(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The highest bin at which the count from the top reaches ``keep``, and how many are to be taken inside it."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, keep))
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, keep - above
