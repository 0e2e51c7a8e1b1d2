"""Whether a difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence


def standard_error(values: Sequence[float]) -> float | None:
    """Of a mean, by the sample's own deviation; of an accuracy, sqrt(p (1 - p) / (n - 1)). None for a single value."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def ratio_error(totals: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Of sum(totals) / sum(sizes), by how the parts differ; None for a single one.

    The ratio estimator (Cochran, Sampling Techniques, chapter 6): a large part tells more than a small one. Where all are of
    one size this is the standard error of the mean.
    """
    whole, count = sum(sizes), sum(size > 0 for size in sizes)
    if count < 2:
        return None
    ratio = math.fsum(totals) / whole
    squares = math.fsum((total - ratio * size) ** 2 for total, size in zip(totals, sizes, strict=True))
    return math.sqrt(squares * count / (count - 1)) / whole


def paired_error(gained: int, lost: int, questions: int) -> float | None:
    """Standard error of the difference (gained - lost) / questions of two accuracies on the same questions; None for one.

    The sample's own deviation of what each question adds, +1, -1 or 0: what both models have right cancels.
    """
    if questions < 2:
        return None
    squares = gained + lost - (gained - lost) ** 2 / questions
    return math.sqrt(squares / (questions - 1) / questions)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test (McNemar 1947): questions that only one of two models has right, each a fair coin.

    gained, lost: how many only the one, and only the other has right. What both have right, or neither, says nothing.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
