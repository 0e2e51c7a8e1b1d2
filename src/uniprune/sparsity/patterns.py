"""Sparsity patterns: which scores survive. They see scores, never a model.

A pattern is called with a saliency (matrix name -> scores ``[out, in]``, higher = keep) and yields one boolean mask per
matrix (True = keep). Counts are exact, ``keep = n - floor(sparsity * n)`` per budget group, and among equal scores the
lower index is kept, so that masks do not depend on the sorting algorithm.

It works in two steps. ``prepare`` looks at the scores of all matrices and decides what concerns several of them, such as the
threshold of a shared budget; it returns a function that then creates each matrix's mask, from that matrix's scores alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from uniprune.common.formatting import spell_fraction
from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.threshold import Bounds, Threshold, sampled_thresholds, thresholds
from uniprune.sparsity.top import top
from uniprune.sparsity.views import View

Saliency = Mapping[str, Tensor]
Masks = Mapping[str, Tensor]
Shape = tuple[int, int]
Sizes = Mapping[str, int]
Limits = Mapping[str, tuple[float, float]]
MaskFn = Callable[[str, Tensor], Tensor]
"""(name of a matrix, its finite scores ``[out, in]``) -> its mask."""
Search = Callable[[Saliency, int, Mapping[str, Bounds], Sizes], Mapping[str, Threshold]]
"""(scores, how many of them to keep, bounds by matrix, sizes by matrix) -> the threshold of each matrix."""


class Pattern(Protocol):
    """Creates masks from scores. ``sparsity`` is the fraction of weights removed."""

    @property
    def sparsity(self) -> float: ...

    @property
    def local(self) -> bool:
        """Whether the mask of each matrix depends on its own scores alone."""
        ...

    @property
    def sample_group(self) -> int:
        """How many consecutive inputs a sample keeps together for :meth:`prepare_from_sample`; 0: it is to be all scores."""
        ...

    def pattern_of(self, name: str) -> Pattern:
        """The pattern of one matrix: this pattern itself, unless it combines several."""
        ...

    def unsupported(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape cannot have the pattern, or None."""
        ...

    def prepare(self, saliency: Saliency) -> MaskFn:
        """What creates masks, after a look at all scores; they have the exact sparsity."""
        ...

    def prepare_from_sample(self, sample: Saliency) -> MaskFn:
        """As :meth:`prepare`, from a sample of each matrix's scores: about the same threshold, of which all ties are kept."""
        ...

    def __call__(self, saliency: Saliency) -> Iterator[tuple[str, Tensor]]:
        """The masks of all matrices, made one at a time."""
        ...


class BasePattern:
    """Defaults for a pattern whose matrices are independent; a subclass adds ``sparsity`` and ``prepare``."""

    @property
    def local(self) -> bool:
        return True

    @property
    def sample_group(self) -> int:
        return 0

    def pattern_of(self: Pattern, name: str) -> Pattern:
        return self

    def unsupported(self, rows: int, columns: int) -> str | None:
        return None

    def prepare_from_sample(self: Pattern, sample: Saliency) -> MaskFn:
        return self.prepare(sample)

    def __call__(self: Pattern, saliency: Saliency) -> Iterator[tuple[str, Tensor]]:
        create = self.prepare(saliency)
        for name, scores in saliency.items():
            yield name, create(name, finite(name, scores))


class Shared(Pattern, Protocol):
    """A pattern with a budget that matrices share, so that some can make up for what rules spare in others."""

    def group(self, name: str) -> str:
        """The name of the budget that a matrix belongs to."""
        ...

    def removable(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        """The fewest and the most weights that a matrix can lose, if the fraction lost is from ``floor`` to ``ceiling``."""
        ...

    def for_budget(self, saliency: Saliency, sizes: Sizes, removed: int, limits: Limits, search: Search = thresholds) -> MaskFn:
        """What creates the masks of one budget's matrices: it removes ``removed`` weights of them in all.

        sizes: weights by matrix, at least of these. limits: floor and ceiling of the fraction that a matrix loses, if limited.
        search: :func:`thresholds`, or :func:`sampled_thresholds` where the saliency is a sample.
        """
        ...


def grouped(names: Iterable[str], group: Callable[[str], str]) -> list[list[str]]:
    """Names by group, both in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group(name), []).append(name)
    return list(groups.values())


def sizes_of(saliency: Saliency) -> dict[str, int]:
    """How many weights each matrix has; where the saliency has no ``size``, this reads (or computes) all scores."""
    tell = getattr(saliency, "size", None)
    return {name: tell(name) if tell else saliency[name].numel() for name in saliency}


def removed_count(sparsity: float, size: int) -> int:
    """``floor(sparsity * size)``, exactly: 0.29 of 100 are 29, though 0.29 * 100 < 29 in floats; 1 - 0.8 is 0.2."""
    return math.floor(Fraction(f"{sparsity:.15g}") * size)


@dataclass(frozen=True)
class Unstructured(BasePattern):
    """Removes ``floor(sparsity * n)`` weights of each budget group, wherever they are.

    scope: the budget group. ``row``: each output row by itself (Wanda, arXiv 2306.11695); ``matrix``: each matrix;
    ``block``: the matrices of a decoder block; ``model``: all matrices. Scores that share a budget must be on one scale
    (``views.ScaledToMeanOne``).
    """

    sparsity: float
    scope: Scope = "row"
    sample_group = 1

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or not 0 <= self.sparsity <= 1 or math.isnan(self.sparsity):
            raise InputError(f"sparsity {self.sparsity} is not between 0 and 1; give the fraction to remove, e.g. 0.5")
        if self.scope not in get_args(Scope):
            raise InputError(f"scope {self.scope!r} is unknown; use one of {', '.join(get_args(Scope))}")

    def __str__(self) -> str:
        return f"{spell_fraction(self.sparsity)} by {self.scope}"

    @classmethod
    def read(cls, text: str, scope: Scope | None, default: Scope) -> Unstructured | None:
        try:
            sparsity = float(text)
        except ValueError:
            return None
        return cls(sparsity, scope or default)

    @property
    def spelling(self) -> tuple[str, Scope | None]:
        return str(self.sparsity), self.scope

    @property
    def local(self) -> bool:
        return self.scope in ("row", "matrix")

    def keep(self, size: int) -> int:
        """How many of ``size`` weights are kept."""
        return size - removed_count(self.sparsity, size)

    def group(self, name: str) -> str:
        """The budget that a matrix has its share of: its decoder block's, by the first number in its name, or the model's."""
        if self.scope == "block" and (number := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)):
            return number[1]
        return ""

    def prepare(self, saliency: Saliency) -> MaskFn:
        return self._prepare(saliency, thresholds)

    def prepare_from_sample(self, sample: Saliency) -> MaskFn:
        return self._prepare(sample, sampled_thresholds)

    def _prepare(self, saliency: Saliency, search: Search) -> MaskFn:
        if self.local:
            return self._create
        creators: dict[str, MaskFn] = {}
        for names in grouped(saliency, self.group):
            group = View(saliency, names=names)
            sizes = sizes_of(group)
            goes = removed_count(self.sparsity, sum(sizes.values()))
            creators |= dict.fromkeys(names, self.for_budget(group, sizes, goes, {}, search))
        return lambda name, scores: creators[name](name, scores)

    def removable(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        size = shape[0] * shape[1]
        return math.ceil(Fraction(str(floor)) * size), removed_count(ceiling, size)

    def for_budget(self, saliency: Saliency, sizes: Sizes, removed: int, limits: Limits, search: Search = thresholds) -> MaskFn:
        sizes, bounds = {name: sizes[name] for name in saliency}, {}
        for name, limit in limits.items():
            least, most = self.removable((1, sizes[name]), *limit)
            bounds[name] = sizes[name] - most, sizes[name] - least
        found = search(saliency, sum(sizes.values()) - removed, bounds, sizes)
        return lambda name, scores: found[name].mask(scores)

    def _create(self, name: str, scores: Tensor) -> Tensor:
        if self.scope == "row":
            return top(scores, self.keep(scores.shape[1]))
        return thresholds({name: scores}, self.keep(scores.numel()))[name].mask(scores)


@dataclass(frozen=True)
class NM(BasePattern):
    """Keeps ``n`` of every ``m`` consecutive inputs of a row. ``NM(1, 4)`` removes three quarters."""

    n: int
    m: int
    local = True

    def __post_init__(self) -> None:
        if not (isinstance(self.n, Integral) and isinstance(self.m, Integral) and 1 <= self.n <= self.m):
            raise InputError(f"pattern {self} is impossible: N:M keeps N of every M inputs, so 1 <= N <= M (e.g. 2:4)")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def read(cls, text: str, scope: Scope | None, default: Scope) -> NM | None:
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        if match and scope is not None:
            raise InputError(f"scope {scope!r} does not go with {text}: N:M is cut within groups of {match[2]} inputs")
        return cls(int(match[1]), int(match[2])) if match else None

    @property
    def spelling(self) -> tuple[str, Scope | None]:
        return str(self), None

    @property
    def sparsity(self) -> float:
        return (self.m - self.n) / self.m  # 1 - 4 / 5 is not 0.2

    @property
    def sample_group(self) -> int:
        return self.m

    def unsupported(self, rows: int, columns: int) -> str | None:
        return None if columns % self.m == 0 else f"{columns} inputs are not divisible by {self.m}"

    def prepare(self, saliency: Saliency) -> MaskFn:
        return self._create

    def _create(self, name: str, scores: Tensor) -> Tensor:
        if reason := self.unsupported(*scores.shape):
            raise InputError(f"{name}: {reason}, as {self} needs; leave it out with --exclude")
        return top(scores.reshape(-1, self.m), self.n).reshape(scores.shape)


def by_row(pattern: Pattern) -> bool:
    """Whether a pattern fixes how many weights each row keeps: N:M, or a sparsity by row."""
    return isinstance(pattern, NM) or (isinstance(pattern, Unstructured) and pattern.scope == "row")


@dataclass(frozen=True)
class Tiled(BasePattern):
    """Removes whole tiles of ``height`` rows and ``width`` inputs, those with the lowest sums of scores.

    For kernels that skip blocks of zeros (BSR). of: how many tiles go, out of which budget group; a row is one of tiles.
    """

    of: Unstructured
    height: int
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.of, Unstructured):
            raise InputError(f"of tiles a fraction goes, not {self.of}; give Tiled(Unstructured(0.8), 16, 16)")
        if not (isinstance(self.height, Integral) and isinstance(self.width, Integral)) or min(self.height, self.width) < 1:
            raise InputError(f"pattern {self} is impossible: tiles have 1 row and 1 input at least (e.g. 0.8@16x16)")

    def __str__(self) -> str:
        return f"{self.of} of {self.height}x{self.width} tiles"

    @classmethod
    def read(cls, text: str, scope: Scope | None, default: Scope) -> Tiled | None:
        match = re.fullmatch(r"([^@]+)@(\d{1,9})x(\d{1,9})", text)
        of = Unstructured.read(match[1], scope, default) if match else None
        return cls(of, int(match[2]), int(match[3])) if match and of else None

    @property
    def spelling(self) -> tuple[str, Scope | None]:
        return f"{self.sparsity}@{self.height}x{self.width}", self.of.scope

    @property
    def sparsity(self) -> float:
        return self.of.sparsity

    @property
    def scope(self) -> Scope:
        return self.of.scope

    @property
    def local(self) -> bool:
        return self.of.local

    @property
    def sample_group(self) -> int:
        return self.width if self.height == 1 else 0

    def unsupported(self, rows: int, columns: int) -> str | None:
        fits = rows % self.height == 0 and columns % self.width == 0
        return None if fits else f"{rows} x {columns} weights are not divisible into {self.height}x{self.width} tiles"

    def group(self, name: str) -> str:
        return self.of.group(name)

    def prepare(self, saliency: Saliency) -> MaskFn:
        return self._tile(self.of.prepare(View(saliency, self.sums)))

    def prepare_from_sample(self, sample: Saliency) -> MaskFn:
        return self._tile(self.of.prepare_from_sample(View(sample, self.sums)))

    def removable(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        least, most = self.of.removable((shape[0] // self.height, shape[1] // self.width), floor, ceiling)
        return least * self.height * self.width, most * self.height * self.width

    def for_budget(self, saliency: Saliency, sizes: Sizes, removed: int, limits: Limits, search: Search = thresholds) -> MaskFn:
        area = self.height * self.width
        tiles = {name: sizes[name] // area for name in saliency}
        return self._tile(self.of.for_budget(View(saliency, self.sums), tiles, removed // area, limits, search))

    def sums(self, name: str, scores: Tensor) -> Tensor:
        """The sums ``[out / height, in / width]`` of scores ``[out, in]``."""
        rows, columns = scores.shape
        if reason := self.unsupported(rows, columns):
            raise InputError(f"{name}: {reason}; leave it out with --exclude")
        tiles = scores.reshape(rows // self.height, self.height, columns // self.width, self.width)
        return tiles.sum((1, 3))

    def _tile(self, create: MaskFn) -> MaskFn:
        def tiles(name: str, scores: Tensor) -> Tensor:
            mask = create(name, self.sums(name, scores))
            return mask.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)

        return tiles


def lost(pattern: Pattern, shape: Iterable[int]) -> int:
    """How many weights a matrix of this shape loses under a pattern that it does not share with others."""
    rows, columns = shape
    if isinstance(pattern, NM):
        return rows * columns // pattern.m * (pattern.m - pattern.n)
    if isinstance(pattern, Tiled):
        tiles = rows // pattern.height, columns // pattern.width
        return lost(pattern.of, tiles) * pattern.height * pattern.width
    groups, size = (rows, columns) if getattr(pattern, "scope", None) == "row" else (1, rows * columns)
    return groups * removed_count(pattern.sparsity, size)


def finite(name: str, scores: Tensor) -> Tensor:
    """The scores themselves. Raises InputError if one is NaN or infinite."""
    check_extremes([name], [scores.aminmax()])
    return scores


def check_extremes(names: Iterable[str], extremes: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raises InputError if a matrix has scores that are NaN or infinite. extremes: its lowest and its highest score.

    Both are NaN if any score is. All are read from the GPU at once, because each read waits for it.
    """
    ends = [end for pair in extremes for end in pair]
    values = torch.stack(ends).tolist() if ends else []
    for name, low, high in zip(names, values[::2], values[1::2], strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{name}: the scores contain NaN or infinity; recalibrate, and check the model's weights")


def check_fit(shapes: Iterable[tuple[str, tuple[int, int]]], pattern: Any) -> None:
    """Raises InputError naming the matrices whose shape cannot have the pattern."""
    unsupported = [(name, reason) for name, shape in shapes if (reason := pattern.unsupported(*shape))]
    if unsupported:
        name, reason = unsupported[0]
        raise InputError(
            f"{len(unsupported)} matrices cannot be {pattern}, e.g. {name}: {reason}; calibrate without them (--exclude)"
        )
