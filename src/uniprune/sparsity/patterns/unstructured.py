"""A fraction of the weights, wherever they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import get_args

from torch import Tensor

from uniprune.common.formatting import spell_fraction
from uniprune.common.matrix_names import block_of
from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns.budget import grouped, removed_count, sizes_of
from uniprune.sparsity.patterns.protocol import BasePattern, Limits, MaskFn, Saliency, Search, Shape, Sizes
from uniprune.sparsity.threshold import Bounds, sampled_thresholds, thresholds
from uniprune.sparsity.top import top
from uniprune.sparsity.views import View


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

    @property
    def by_row(self) -> bool:
        return self.scope == "row"

    def removes(self, rows: int, columns: int) -> int:
        groups, size = (rows, columns) if self.by_row else (1, rows * columns)
        return groups * removed_count(self.sparsity, size)

    def keep(self, size: int) -> int:
        """How many of ``size`` weights are kept."""
        return size - removed_count(self.sparsity, size)

    def group(self, name: str) -> str:
        """The budget that a matrix has its share of: its decoder block's, by the first number in its name, or the model's."""
        return block_of(name) if self.scope == "block" else ""

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
        most = removed_count(ceiling, size)
        return min(math.ceil(Fraction(str(floor)) * size), most), most  # 0.3..0.3 of 25: 7

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
