"""Several N:M patterns side by side, chosen by the loss that each would cost a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from uniprune.common.formatting import spell_fraction
from uniprune.errors import InputError
from uniprune.sparsity.patterns.budget import removed_count, sizes_of
from uniprune.sparsity.patterns.nm import DENSE, NM, spell
from uniprune.sparsity.patterns.protocol import BasePattern, Limits, MaskFn, Saliency, Search, Shape, Sizes
from uniprune.sparsity.patterns.spelling import parse
from uniprune.sparsity.threshold import Bounds, Threshold, thresholds


@dataclass(frozen=True)
class Mixed(BasePattern):
    """N:M patterns, one for each matrix, so that together they remove a fraction of all weights for the least loss.

    sparsity: of all matrices together; met to within one group. allow: the patterns to choose from; ``1:1`` is dense. A
    matrix's loss under a pattern is the sum of ``score ** power`` over what it would lose. On the lower convex hull of its
    (weights removed, loss) points, matrices take one step after the other towards sparser patterns, the cheapest per weight
    first, across the model (the Lagrangian relaxation of a knapsack); the last step is taken by some groups of a matrix only.
    """

    sparsity: float
    allow: tuple[NM, ...]
    power: float = 2.0
    local = False

    def __post_init__(self) -> None:
        ordered = sorted(self.allow, key=lambda nm: (nm.sparsity, nm.m))
        if len({nm.sparsity for nm in ordered}) < max(2, len(ordered)):
            raise InputError(f"{self}: --allow needs two patterns or more of different sparsity, e.g. 2:4,dense")
        object.__setattr__(self, "allow", tuple(ordered))
        if not ordered[0].sparsity <= self.sparsity <= ordered[-1].sparsity:
            low, high = ordered[0].sparsity, ordered[-1].sparsity
            raise InputError(f"sparsity {self.sparsity:g} is out of reach: {self} are between {low:g} and {high:g}")

    def __str__(self) -> str:
        return f"{spell_fraction(self.sparsity)} in {', '.join(map(spell, self.allow))}"

    @property
    def sample_group(self) -> int:
        return math.lcm(*(nm.m for nm in self.allow))

    def unsupported(self, rows: int, columns: int) -> str | None:
        reasons = [nm.unsupported(rows, columns) for nm in self.allow]
        return None if None in reasons else reasons[-1]

    def group(self, name: str) -> str:
        return ""

    def removable(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        options = self._options(shape, floor, ceiling)
        size = shape[0] * shape[1]
        return round(options[0].sparsity * size), round(options[-1].sparsity * size)

    def prepare(self, saliency: Saliency) -> MaskFn:
        sizes = sizes_of(saliency)
        return self.for_budget(saliency, sizes, removed_count(self.sparsity, sum(sizes.values())), {})

    def for_budget(self, saliency: Saliency, sizes: Sizes, removed: int, limits: Limits, search: Search = thresholds) -> MaskFn:
        chosen: dict[str, NM] = {}
        steps: list[tuple[float, int, str, NM, NM, int]] = []
        for order, (name, scores) in enumerate(saliency.items()):
            shape = (scores.shape[0], scores.shape[1])
            options = self._options(shape, *limits.get(name, (0.0, 1.0)), name)
            hull = _hull([(round(nm.sparsity * sizes[name]), self._loss(nm, name, scores), nm) for nm in options])
            chosen[name] = hull[0][2]
            removed -= hull[0][0]
            for (less, low, before), (more, high, after) in pairwise(hull):
                steps.append(((high - low) / (more - less), order, name, before, after, more - less))
        for _, _, name, before, after, goes in sorted(steps, key=lambda step: step[:2]):
            if goes > removed:
                partial = self._partial(name, saliency[name], before, after, removed)
                return lambda other, scores: partial(scores) if other == name else chosen[other].prepare({})(other, scores)
            chosen[name] = after
            removed -= goes
        return lambda name, scores: chosen[name].prepare({})(name, scores)

    def _options(self, shape: Shape, floor: float, ceiling: float, name: str = "a matrix") -> list[NM]:
        options = [nm for nm in self.allow if nm.unsupported(*shape) is None and floor <= nm.sparsity <= ceiling]
        if not options:
            raise InputError(
                f"{name} {shape}: none of {', '.join(map(spell, self.allow))} fits between {floor:g} and {ceiling:g}"
            )
        return options

    def _loss(self, pattern: NM, name: str, scores: Tensor) -> float:
        if pattern.n == pattern.m:
            return 0.0
        return float(self._lost(pattern, name, scores).sum(dtype=torch.float64))

    def _lost(self, pattern: NM, name: str, scores: Tensor) -> Tensor:
        """The loss of each weight that goes. Those of scores below 0, as a controller's duals may be, are no loss."""
        return scores.masked_fill(pattern.prepare({})(name, scores), 0).clamp_min(0) ** self.power

    def _partial(self, name: str, scores: Tensor, before: NM, after: NM, goes: int) -> Any:
        """What creates the mask of a matrix of which only the cheapest groups take the step from one pattern to the next."""
        size = math.lcm(before.m, after.m)
        each = round(size * (after.sparsity - before.sparsity))

        def costs(scores: Tensor) -> Tensor:
            dear, cheap = (self._lost(nm, name, scores) for nm in (after, before))
            return (cheap - dear).reshape(-1, size).sum(1, keepdim=True)

        edge: Threshold = thresholds({name: costs(scores)}, goes // each)[name]

        def create(scores: Tensor) -> Tensor:
            step = edge.mask(costs(scores))
            sparser, denser = (nm.prepare({})(name, scores).reshape(-1, size) for nm in (after, before))
            return torch.where(step, sparser, denser).reshape(scores.shape)

        return create


def choice(spec: str) -> NM:
    """One of the patterns that ``Mixed`` may choose from: ``2:4``, ``dense``. Raises InputError for another kind."""
    pattern = DENSE if spec == "dense" else parse(spec)
    if not isinstance(pattern, NM):
        raise InputError(f"--allow {spec}: only N:M patterns and dense can be chosen from, e.g. 2:4,dense")
    return pattern


def _hull(points: list[tuple[int, float, NM]]) -> list[tuple[int, float, NM]]:
    """The lower convex hull of (removed, loss) points, from left to right."""
    hull: list[tuple[int, float, NM]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple[int, float, NM], other: tuple[int, float, NM]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
