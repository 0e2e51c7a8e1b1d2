"""Sparsity patterns: which scores survive. They see scores, never a model.

A pattern is called with a saliency (matrix name -> scores ``[out, in]``, higher = keep) and yields one boolean mask per
matrix (True = keep). Counts are exact, ``keep = n - floor(sparsity * n)`` per budget group, and among equal scores the
lower index is kept, so that masks do not depend on the sorting algorithm.

It works in two steps: ``settle`` looks at all scores and decides what concerns several matrices, the threshold of a common
budget, say; the cutter that it returns cuts each matrix by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.threshold import Bounds, Threshold, thresholds
from uniprune.sparsity.views import View

Saliency = Mapping[str, Tensor]
Masks = Mapping[str, Tensor]
Shape = tuple[int, int]
Sizes = Mapping[str, int]
Spans = Mapping[str, tuple[float, float]]
Cutter = Callable[[str, Tensor], Tensor]
"""Given a matrix's name and its scores ``[out, in]``, or some of its rows, its mask."""

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

    @property
    def grain(self) -> int:
        """A sample of scores that tells what all would tell must be of runs of so many inputs; 0: no sample does."""
        ...

    def part(self, name: str) -> Pattern:
        """What a matrix gets: the pattern itself, unless it is different ones for different matrices."""
        ...

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape cannot have the pattern, or None."""
        ...

    def settle(self, saliency: Saliency, exact: bool = True) -> Cutter:
        """Decides what concerns several matrices. A sample of the scores settles nearly the same, ``exact`` or not at ties."""
        ...

    def __call__(self, saliency: Saliency) -> Iterator[tuple[str, Tensor]]:
        """The masks of all matrices; one at a time is in memory."""
        ...


class Cutting:
    """What is the same for most patterns."""

    def part(self: Pattern, name: str) -> Pattern:
        return self

    def __call__(self: Pattern, saliency: Saliency) -> Iterator[tuple[str, Tensor]]:
        cut = self.settle(saliency)
        for name, scores in saliency.items():
            yield name, cut(name, scores)


class Shared(Pattern, Protocol):
    """A pattern whose budget is shared by matrices, so that it can make up for what others get by a rule."""

    def group(self, name: str) -> str:
        """Which budget a matrix has its share of."""
        ...

    def span(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        """The fewest and the most weights that a matrix can lose, if it is to lose a fraction between two."""
        ...

    def share(self, saliency: Saliency, sizes: Sizes, removed: int, spans: Spans, exact: bool = True) -> Cutter:
        """Settles one budget of ``removed`` weights.

        sizes: weights by matrix, of these at least. spans: floor and ceiling of what a matrix may lose, where it has them.
        """
        ...


def grouped(names: Iterable[str], group: Callable[[str], str]) -> list[list[str]]:
    """Names by group, both in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group(name), []).append(name)
    return list(groups.values())


def sizes_of(saliency: Saliency) -> dict[str, int]:
    """How many weights each matrix has. It may cost a look at all scores: once is enough."""
    return {name: scores.numel() for name, scores in saliency.items()}


def removed(sparsity: float, size: int) -> int:
    """How many of ``size`` weights go. Exact: 0.29 of 100 are 29, though 0.29 * 100 < 29 in floats."""
    return math.floor(Fraction(str(sparsity)) * size)


@dataclass(frozen=True)
class Unstructured(Cutting):
    """Removes ``floor(sparsity * n)`` weights of each budget group, wherever they are.

    scope: the budget group. ``row``: each output row by itself (Wanda, arXiv 2306.11695); ``matrix``: each matrix;
    ``block``: the matrices of a decoder block; ``model``: all matrices. Scores that share a budget must be on one scale
    (``metrics.Comparable``).
    """

    sparsity: float
    scope: Scope = "row"
    grain = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1 or math.isnan(self.sparsity):
            raise InputError(f"sparsity {self.sparsity} is not between 0 and 1; give the fraction to remove, e.g. 0.5")
        if self.scope not in get_args(Scope):
            raise InputError(f"scope {self.scope!r} is unknown; use one of {', '.join(get_args(Scope))}")

    def __str__(self) -> str:
        return f"{self.sparsity:g} by {self.scope}"

    @property
    def local(self) -> bool:
        return self.scope in ("row", "matrix")

    def misfit(self, rows: int, columns: int) -> str | None:
        return None

    def keep(self, size: int) -> int:
        """How many of ``size`` weights survive."""
        return size - removed(self.sparsity, size)

    def group(self, name: str) -> str:
        """The budget that a matrix has its share of: its decoder block's, by the first number in its name, or the model's."""
        if self.scope == "block" and (number := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)):
            return number[1]
        return ""

    def settle(self, saliency: Saliency, exact: bool = True) -> Cutter:
        if self.local:
            return self._cut
        cutters: dict[str, Cutter] = {}
        for names in grouped(saliency, self.group):
            part = View(saliency, names=names)
            sizes = sizes_of(part)
            goes = removed(self.sparsity, sum(sizes.values()))
            cutters |= dict.fromkeys(names, self.share(part, sizes, goes, {}, exact))
        return lambda name, scores: cutters[name](name, scores)

    def span(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        size = shape[0] * shape[1]
        return math.ceil(Fraction(str(floor)) * size), removed(ceiling, size)

    def share(self, saliency: Saliency, sizes: Sizes, removed: int, spans: Spans, exact: bool = True) -> Cutter:
        sizes, bounds = {name: sizes[name] for name in saliency}, {}
        for name, span in spans.items():
            least, most = self.span((1, sizes[name]), *span)
            bounds[name] = sizes[name] - most, sizes[name] - least
        found = thresholds(saliency, sum(sizes.values()) - removed, bounds, sizes)
        if not exact:
            found = {name: Threshold(one.key) if 0 < one.ties < math.inf else one for name, one in found.items()}
        return lambda name, scores: found[name].cut(scores)

    def _cut(self, name: str, scores: Tensor) -> Tensor:
        groups = finite(name, scores) if self.scope == "row" else finite(name, scores).reshape(1, -1)
        return top(groups, self.keep(groups.shape[1])).reshape(scores.shape)


@dataclass(frozen=True)
class NM(Cutting):
    """Keeps ``n`` of every ``m`` consecutive inputs of a row. ``NM(1, 4)`` removes three quarters."""

    n: int
    m: int
    local = True

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InputError(f"pattern {self} is impossible: N:M keeps N of every M inputs, so 1 <= N <= M (e.g. 2:4)")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def grain(self) -> int:
        return self.m

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if columns % self.m == 0 else f"{columns} inputs are not divisible by {self.m}"

    def settle(self, saliency: Saliency, exact: bool = True) -> Cutter:
        return self._cut

    def _cut(self, name: str, scores: Tensor) -> Tensor:
        if reason := self.misfit(*scores.shape):
            raise InputError(f"{name}: {reason}, as {self} needs; leave it out with --exclude")
        return top(finite(name, scores).reshape(-1, self.m), self.n).reshape(scores.shape)


@dataclass(frozen=True)
class Tiled(Cutting):
    """Removes whole tiles of ``height`` rows and ``width`` inputs, those with the lowest sums of scores.

    For kernels that skip blocks of zeros (BSR). of: how many tiles go, out of which budget group; a row is one of tiles.
    """

    of: Unstructured
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise InputError(f"pattern {self} is impossible: tiles have 1 row and 1 input at least (e.g. 0.8@16x16)")

    def __str__(self) -> str:
        return f"{self.of} of {self.height}x{self.width} tiles"

    @property
    def sparsity(self) -> float:
        return self.of.sparsity

    @property
    def local(self) -> bool:
        return self.of.local

    @property
    def grain(self) -> int:
        return self.width if self.height == 1 else 0

    def misfit(self, rows: int, columns: int) -> str | None:
        fits = rows % self.height == 0 and columns % self.width == 0
        return None if fits else f"{rows} x {columns} weights are not divisible into {self.height}x{self.width} tiles"

    def group(self, name: str) -> str:
        return self.of.group(name)

    def settle(self, saliency: Saliency, exact: bool = True) -> Cutter:
        return self._tile(self.of.settle(View(saliency, self.sums), exact))

    def span(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        least, most = self.of.span((shape[0] // self.height, shape[1] // self.width), floor, ceiling)
        return least * self.height * self.width, most * self.height * self.width

    def share(self, saliency: Saliency, sizes: Sizes, removed: int, spans: Spans, exact: bool = True) -> Cutter:
        area = self.height * self.width
        tiles = {name: sizes[name] // area for name in saliency}
        return self._tile(self.of.share(View(saliency, self.sums), tiles, removed // area, spans, exact))

    def sums(self, name: str, scores: Tensor) -> Tensor:
        """The sums ``[out / height, in / width]`` of scores ``[out, in]``."""
        rows, columns = scores.shape
        if reason := self.misfit(rows, columns):
            raise InputError(f"{name}: {reason}; leave it out with --exclude")
        tiles = scores.reshape(rows // self.height, self.height, columns // self.width, self.width)
        return tiles.sum((1, 3))

    def _tile(self, cut: Cutter) -> Cutter:
        def tiles(name: str, scores: Tensor) -> Tensor:
            mask = cut(name, self.sums(name, scores))
            return mask.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)

        return tiles


def parse(spec: str | float | Pattern, scope: Scope | None = None, default: Scope = "row") -> Pattern:
    """A pattern from its spelling: a level (``0.6``), N of M kept (``2:4``) or a level of tiles (``0.8@16x16``).

    scope: the budget group of a level, ``default`` unless given; an N:M pattern has its own and refuses one.
    Raises InputError for anything else.
    """
    if not isinstance(spec, (str, float, int)):
        return spec
    text = str(spec).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        if scope is not None:
            raise InputError(f"scope {scope!r} does not go with {text}: N:M is cut within groups of {match[2]} inputs")
        return NM(int(match[1]), int(match[2]))
    match = re.fullmatch(r"([^@]+)(?:@(\d+)x(\d+))?", text)
    try:
        level = float(match[1] if match else "")
    except ValueError:
        raise InputError(f"sparsity {text!r} is neither a level such as 0.6 nor a pattern such as 2:4 or 0.8@16x16") from None
    of = Unstructured(level, scope or default)
    return Tiled(of, int(match[2]), int(match[3])) if match and match[2] else of


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


def finite(name: str, scores: Tensor) -> Tensor:
    """The scores, unless they are none."""
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"{name}: the scores contain NaN or infinity; recalibrate, and check the model's weights")
    return scores


def check_fit(shapes: Iterable[tuple[str, tuple[int, int]]], pattern: Any) -> None:
    """Raises InputError naming the matrices whose shape cannot have the pattern."""
    misfits = [(name, reason) for name, shape in shapes if (reason := pattern.misfit(*shape))]
    if misfits:
        name, reason = misfits[0]
        raise InputError(f"{len(misfits)} matrices cannot be {pattern}, e.g. {name}: {reason}; leave them out with --exclude")
