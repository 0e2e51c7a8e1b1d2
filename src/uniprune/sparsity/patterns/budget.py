"""Budgets: which matrices have one together, and how many of their weights are to go, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

from torch import Tensor


def grouped(names: Iterable[str], group: Callable[[str], str]) -> list[list[str]]:
    """Names by group, both in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group(name), []).append(name)
    return list(groups.values())


def sizes_of(saliency: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights each matrix has; where the saliency has no ``size``, this reads (or computes) all scores."""
    tell = getattr(saliency, "size", None)
    return {name: tell(name) if tell else saliency[name].numel() for name in saliency}


def removed_count(sparsity: float, size: int) -> int:
    """``floor(sparsity * size)``, exactly: 0.29 of 100 are 29, though 0.29 * 100 < 29 in floats; 1 - 0.8 is 0.2."""
    return math.floor(Fraction(f"{sparsity:.15g}") * size)
