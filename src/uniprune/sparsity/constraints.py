"""One budget under constraints: rules for some of the matrices, and several N:M patterns side by side.

Both are patterns themselves, made of patterns: whatever creates masks takes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast, get_args

import torch
from torch import Tensor

from uniprune.common.formatting import spell_fraction
from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns import (
    NM,
    BasePattern,
    Limits,
    MaskFn,
    Pattern,
    Saliency,
    Search,
    Shape,
    Shared,
    Sizes,
    grouped,
    lost,
    removed_count,
    sizes_of,
)
from uniprune.sparsity.spelling import PATTERNS, parse
from uniprune.sparsity.threshold import Bounds, Threshold, sampled_thresholds, thresholds
from uniprune.sparsity.views import View

DENSE = NM(1, 1)


def spell(pattern: Pattern) -> str:
    """A pattern as people name it."""
    return "dense" if pattern == DENSE else str(pattern)


def spelled(text: str) -> Pattern | None:
    """The pattern whose spelling a text is, rules and all; None for other text, and for sparsities that may have been rounded.

    Raises InputError for a pattern that is impossible, or that is to be spelled in another way.
    """
    base, *rules = text.split("; ")
    fraction = r"(?P<fraction>[\d.e+-]+)"
    forms = (
        r"\d+:\d+",
        fraction + r" by (?P<scope>\w+)(?: of (?P<tile>\d+x\d+) tiles)?",
        fraction + r" in (?P<allow>[\w:, ]+)",
    )
    found = next((match.groupdict() for form in forms if (match := re.fullmatch(form, base))), None)
    if (
        found is None
        or found.get("scope") not in (None, *get_args(Scope))
        or len((found.get("fraction") or "").lstrip("0.")) >= 6
    ):
        return None
    if allow := found.get("allow"):
        pattern: Pattern = Mixed(float(found["fraction"]), tuple(map(choice, allow.split(", "))))
    else:
        tile = f"@{found['tile']}" if found.get("tile") else ""
        pattern = parse((found.get("fraction") or base) + tile, found.get("scope"))  # type: ignore[arg-type]
    if rules:
        pattern = Ruled(pattern, tuple(map(Rule.parse, rules)))
    if str(pattern) != text:
        raise InputError(f"the pattern {text!r} is to be spelled {str(pattern)!r}")
    return pattern


def settings(pattern: Pattern) -> dict[str, Any] | None:
    """The settings of a recipe that ask for a pattern: its sparsity and scope, its choices, its rules; None if none do."""
    if isinstance(pattern, Ruled):
        base = settings(pattern.base)
        return base and base | {"rules": tuple(map(str, pattern.rules))}
    if isinstance(pattern, Mixed):
        found = {"sparsity": str(pattern.sparsity), "allow": tuple(map(spell, pattern.allow))}
        return found if pattern == Mixed(pattern.sparsity, pattern.allow) else None
    if isinstance(pattern, PATTERNS):
        text, scope = pattern.spelling
        return {"sparsity": text, "scope": scope} if parse(text, scope) == pattern else None
    return None


def choice(spec: str) -> NM:
    """One of the patterns that ``Mixed`` may choose from: ``2:4``, ``dense``. Raises InputError for another kind."""
    pattern = DENSE if spec == "dense" else parse(spec)
    if not isinstance(pattern, NM):
        raise InputError(f"--allow {spec}: only N:M patterns and dense can be chosen from, e.g. 2:4,dense")
    return pattern


def reach(pattern: Pattern, shapes: Mapping[str, Shape]) -> tuple[float, float]:
    """The lowest and the highest sparsity that a pattern could have instead of its own, for its rules and for the shapes."""
    if isinstance(pattern, Mixed):
        return Ruled(pattern, ()).reach(shapes)
    return pattern.reach(shapes) if isinstance(pattern, Ruled) else (0.0, 1.0)


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
        return rule.pattern("row" if getattr(self.base, "scope", None) == "row" else "matrix")

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
        gone = sum(lost(part, shapes[name]) for name, part in fixed.items())
        least, most = (gone + sum(bound[side] for bound in bounds) for side in (0, 1))
        return least, most, sum(map(math.prod, shapes.values()))

    def _goes(self, sizes: Sizes, fixed: Mapping[str, Pattern], shapes: Mapping[str, Iterable[int]]) -> int:
        """How many weights of the others are to go, so that the budget of all is met; shapes: of those that are not samples."""
        gone = sum(
            lost(part, shapes[name]) if name in shapes else round(sizes[name] * part.sparsity) for name, part in fixed.items()
        )
        goes = removed_count(self.sparsity, sum(sizes.values())) - gone
        return max(0, goes)  # of a sample, rounding may leave less than nothing


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
