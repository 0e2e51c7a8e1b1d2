"""Rules for some of the matrices; where these share a budget, what a rule spares the others make up for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns.budget import grouped, removed_count, sizes_of
from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE
from uniprune.sparsity.patterns.protocol import BasePattern, Limits, MaskFn, Pattern, Saliency, Search, Shape, Shared, Sizes
from uniprune.sparsity.patterns.spelling import parse
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.threshold import sampled_thresholds, thresholds
from uniprune.sparsity.views import View


@dataclass(frozen=True)
class Rule:
    """What holds for the matrices in whose names a regular expression is found.

    what: ``dense``, a pattern (``2:4``), a fraction (``0.3``), or a range (``0.3..0.7``): floor and ceiling of the fraction
    that a budget shared with other matrices may remove. Raises InputError for anything else.
    """

    match: str
    what: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise InputError(f"rule {self}: {self.match!r} is not a regular expression: {error}") from None
        if limits := self.limits:
            if not 0 <= limits[0] <= limits[1] <= 1:
                raise InputError(f"rule {self}: a range is floor..ceiling, between 0 and 1, e.g. 0.3..0.7")
        else:
            self.pattern("matrix")

    @classmethod
    def parse(cls, text: str) -> Rule:
        """A rule from its spelling, ``REGEX=WHAT``."""
        match, equals, what = text.rpartition("=")
        if not equals or not match:
            raise InputError(f"rule {text!r} is not REGEX=WHAT, e.g. 'down_proj=dense', 'mlp=2:4' or 'layers.0.=0.2..0.4'")
        return cls(match, what.strip())

    def __str__(self) -> str:
        return f"{self.match}={self.what}"

    @property
    def limits(self) -> tuple[float, float] | None:
        """Floor and ceiling, if the rule is a range."""
        number = r"\s*(\d*\.?\d+)\s*"
        found = re.fullmatch(rf"{number}\.\.{number}", self.what)
        return (float(found[1]), float(found[2])) if found else None

    def pattern(self, scope: Scope) -> Pattern:
        """What the rule fixes; scope: of a sparsity."""
        return DENSE if self.what == "dense" else parse(self.what, default=scope)


@dataclass(frozen=True)
class Ruled(BasePattern):
    """A pattern, but for the matrices that rules say something else of; the first rule that matches counts.

    Where matrices share a budget, it is that of all of them together: what a rule spares, the others make up for.
    """

    base: Pattern
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        ranges = [rule for rule in self.rules if rule.limits]
        if ranges and self.base.local:
            raise InputError(
                f"rule {ranges[0]}: a range needs a budget shared by matrices, and {self.base} has none; see --scope"
            )

    def __str__(self) -> str:
        return "; ".join((str(self.base), *map(str, self.rules)))

    @property
    def sparsity(self) -> float:
        return self.base.sparsity

    @property
    def local(self) -> bool:
        return self.base.local

    @property
    def by_row(self) -> bool:
        return self.base.by_row

    @property
    def sample_group(self) -> int:
        return self.base.sample_group

    @property
    def shared(self) -> Shared:
        """The base, of which it is known that it is not local."""
        return cast(Shared, self.base)

    def rule(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if re.search(rule.match, name)), None)

    def pattern_of(self, name: str) -> Pattern:
        rule = self.rule(name)
        if rule is None or rule.limits:
            return self.base.pattern_of(name)
        rows = isinstance(self.base, (Unstructured, Tiled)) and self.base.scope == "row"
        return rule.pattern("row" if rows else "matrix")

    def unsupported(self, rows: int, columns: int) -> str | None:
        return None  # that of the parts counts

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raises InputError for rules that no matrix is left for, and for budgets that they make impossible."""
        used = {self.rule(name) for name in shapes}
        for rule in self.rules:
            if rule not in used:
                matched = next((name for name in shapes if re.search(rule.match, name)), None)
                if matched is None:
                    raise InputError(f"rule {rule} matches none of the {len(shapes)} matrices, e.g. {next(iter(shapes))}")
                raise InputError(f"rule {rule} has no effect: {self.rule(matched)} before it takes all that it matches")
        if self.local:
            return
        _, limits = self._split(shapes)
        for name, (floor, ceiling) in limits.items():
            if self.base.unsupported(*shapes[name]):
                continue  # what becomes of it is for others to say
            _, most = self.shared.removable(shapes[name], floor, ceiling)
            if most <= floor * math.prod(shapes[name]) - 1:
                raise InputError(
                    f"rule {self.rule(name)}: {name} {list(shapes[name])} loses whole tiles, and no number of them is from "
                    f"{floor:g} to {ceiling:g} of it; widen the range, or take smaller tiles"
                )
        for names in grouped(shapes, self.shared.group):
            least, most, total = self._bounds({name: shapes[name] for name in names})
            if not least <= removed_count(self.sparsity, total) <= most:
                why, what = ("rules", "the rules") if self.rules else ("shapes", "what is allowed")
                raise InputError(
                    f"sparsity {self.sparsity:g} is out of reach: with these {why} it is between {least / total:.4f} and "
                    f"{most / total:.4f}; change it, or {what}"
                )

    def reach(self, shapes: Mapping[str, Shape]) -> tuple[float, float]:
        """As :func:`reach`."""
        low, high = (0.0, 1.0)
        if isinstance(self.base, Mixed):
            low, high = self.base.allow[0].sparsity, self.base.allow[-1].sparsity
        for names in [] if self.local else grouped(shapes, self.shared.group):
            least, most, total = self._bounds({name: shapes[name] for name in names})
            low, high = max(low, least / total), min(high, most / total)
        return low, high

    def prepare(self, saliency: Saliency) -> MaskFn:
        return self._prepare(saliency, thresholds)

    def prepare_from_sample(self, sample: Saliency) -> MaskFn:
        return self._prepare(sample, sampled_thresholds)

    def _prepare(self, saliency: Saliency, search: Search) -> MaskFn:
        if self.local:
            return lambda name, scores: self.pattern_of(name).prepare({})(name, scores)
        creators: dict[str, MaskFn] = {}
        for names in grouped(saliency, self.shared.group):
            fixed, limits = self._split(names)
            creators |= {name: part.prepare({}) for name, part in fixed.items()}
            free = View(saliency, names=(name for name in names if name not in fixed))
            if free:
                sizes = sizes_of(View(saliency, names=names))
                shapes = {} if search is sampled_thresholds else {name: saliency[name].shape for name in fixed}
                goes = self._goes(sizes, fixed, shapes)
                creators |= dict.fromkeys(free, self.shared.for_budget(free, sizes, goes, limits, search))
        return lambda name, scores: creators[name](name, scores)

    def _split(self, names: Iterable[str]) -> tuple[dict[str, Pattern], Limits]:
        """Of some matrices those whose pattern is fixed, and the ranges of others."""
        rules = {name: rule for name in names if (rule := self.rule(name))}
        fixed = {name: self.pattern_of(name) for name, rule in rules.items() if not rule.limits}
        return fixed, {name: rule.limits for name, rule in rules.items() if rule.limits}

    def _bounds(self, shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
        """The fewest and the most weights that matrices of one budget can lose together, and how many they have."""
        fixed, limits = self._split(shapes)
        bounds = [self.shared.removable(shapes[name], *limits.get(name, (0.0, 1.0))) for name in shapes if name not in fixed]
        gone = sum(part.removes(*shapes[name]) for name, part in fixed.items())
        least, most = (gone + sum(bound[side] for bound in bounds) for side in (0, 1))
        return least, most, sum(map(math.prod, shapes.values()))

    def _goes(self, sizes: Sizes, fixed: Mapping[str, Pattern], shapes: Mapping[str, Iterable[int]]) -> int:
        """How many weights of the others are to go, so that the budget of all is met; shapes: of those that are not samples."""
        gone = 0
        for name, part in fixed.items():
            gone += part.removes(*shapes[name]) if name in shapes else round(sizes[name] * part.sparsity)
        goes = removed_count(self.sparsity, sum(sizes.values())) - gone
        return max(0, goes)  # of a sample, rounding may leave less than nothing


def reach(pattern: Pattern, shapes: Mapping[str, Shape]) -> tuple[float, float]:
    """The lowest and the highest sparsity that a pattern could have instead of its own, for its rules and for the shapes."""
    if isinstance(pattern, Mixed):
        return Ruled(pattern, ()).reach(shapes)
    return pattern.reach(shapes) if isinstance(pattern, Ruled) else (0.0, 1.0)
