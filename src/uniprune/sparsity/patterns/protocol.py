"""Sparsity patterns: which scores survive. They see scores, never a model.

A pattern is called with a saliency (matrix name -> scores ``[out, in]``, higher = keep) and yields one boolean mask per
matrix (True = keep). Counts are exact, ``keep = n - floor(sparsity * n)`` per budget group, and among equal scores the
lower index is kept, so that masks do not depend on the sorting algorithm.

It works in two steps. ``prepare`` looks at the scores of all matrices and decides what concerns several of them, such as the
threshold of a shared budget; it returns a function that then creates each matrix's mask, from that matrix's scores alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from uniprune.sparsity.patterns.budget import removed_count
from uniprune.sparsity.patterns.checks import finite
from uniprune.sparsity.threshold import Bounds, Threshold, thresholds

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
    def by_row(self) -> bool:
        """Whether it fixes how many weights each row keeps and not which, but for the groups of N:M.

        Rules for some of the matrices aside: ask the pattern of one.
        """
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

    def removes(self, rows: int, columns: int) -> int:
        """How many weights a matrix of this shape, which can have the pattern, loses if it shares no budget with others."""
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
    def by_row(self) -> bool:
        return False

    @property
    def sample_group(self) -> int:
        return 0

    def pattern_of(self: Pattern, name: str) -> Pattern:
        return self

    def unsupported(self, rows: int, columns: int) -> str | None:
        return None

    def removes(self: Pattern, rows: int, columns: int) -> int:
        return removed_count(self.sparsity, rows * columns)

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
