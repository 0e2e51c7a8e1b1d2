"""Statistics of the inputs of a linear layer: what is summed over tokens. They are collected in ``observation``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from uniprune.errors import InputError, first_line


class Statistic:
    """What a metric wants to know of a matrix's inputs: a sum over tokens ``[tokens, in]``, and how many tokens there were.

    Sums can be added in any order: so they do not depend on how tokens were split into batches and processes, and a run that
    was interrupted adds to what it had saved. A kind of statistic is a subclass with :meth:`sums`, and with ``power``,
    :meth:`become_even` and :meth:`nbytes` as well if its total is not one number for each input channel. What is no sum over
    tokens, a maximum say, cannot be one.

    total: the sum, a tensor of whatever shape ``sums`` gives it. tokens: how many were added.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = self.sums(torch.zeros(0, columns, device=device))
        self.tokens = 0

    @staticmethod
    def sums(x: Tensor) -> Tensor:
        """What the inputs ``[tokens, in]`` add to the total; of no tokens, a total of zeros."""
        raise NotImplementedError

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """Bytes that the total of a matrix with that many inputs takes, for the forecast of memory."""
        return 8 * columns

    def add(self, sums: Tensor, tokens: int) -> None:
        self.total += sums
        self.tokens += tokens

    def update(self, x: Tensor) -> None:
        self.add(self.sums(x), len(x))

    def merge(self, other: Statistic) -> None:
        """Adds the sums of other tokens, e.g. of another process."""
        self.add(other.total, other.tokens)

    @property
    def mean(self) -> Tensor:
        """The total per token."""
        return self.total / max(self.tokens, 1)

    @property
    def power(self) -> float:
        """The total as one number, its mean over channels: what puts experts that saw few tokens on their fellows' scale."""
        return float(self.total.mean())

    def become_even(self, power: float) -> None:
        """Becomes the statistic of one token, all of whose channels are alike, with this power."""
        self.total.fill_(power)
        self.tokens = 1


class SquaredNorm(Statistic):
    """Per input channel, the sum of squares over the tokens, in float64."""

    @staticmethod
    def sums(x: Tensor) -> Tensor:
        return x.to(torch.float64, copy=True).square_().sum(0)  # a float32 square overflows at 2e19, and is 0 below 3e-23

    @property
    def rms(self) -> Tensor:
        """Root mean square ``[in]`` of each input channel, float32."""
        return self.mean.sqrt().float()


class Gram(SquaredNorm):
    """Sum of outer products ``[in, in]`` over the tokens, float32, for refinement; its diagonal holds the squared norms."""

    @staticmethod
    def sums(x: Tensor) -> Tensor:
        return x.float().T @ x.float()

    @classmethod
    def nbytes(cls, columns: int) -> int:
        return 4 * columns**2

    @property
    def rms(self) -> Tensor:
        return self.mean.diagonal().sqrt()

    @property
    def power(self) -> float:
        return float(self.total.diagonal().mean())

    def become_even(self, power: float) -> None:
        self.total.zero_().diagonal().fill_(power)
        self.tokens = 1


class Norm(Statistic):
    """The sum of the tokens' Euclidean norms, one number in float64."""

    @staticmethod
    def sums(x: Tensor) -> Tensor:
        total: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).sum()
        return total


Kind = type[Statistic]
Statistics = Mapping[str, Statistic]
"""By matrix name."""


def additional(kind: Kind, wanted: Kind | None) -> Kind | None:
    """The statistic that must be collected in addition to one kind, for a metric that wants another; None if the one will do.

    A subclass will do: a Gram matrix is a squared norm, too.
    """
    return None if wanted is None or issubclass(kind, wanted) else wanted


def check(kind: Any) -> None:
    """Raises InputError, with the reason, unless a class is a statistic: it is tried on a few numbers."""
    if not (isinstance(kind, type) and issubclass(kind, Statistic)):
        raise InputError(f"statistic {kind!r} is no subclass of uniprune.saliency.statistics.Statistic")
    if reason := _flaw(kind):  # type: ignore[arg-type]
        raise InputError(f"statistic {kind.__name__}: {reason}")


@cache
def _flaw(kind: Kind) -> str | None:
    x = torch.linspace(-1, 2, 5 * 16).reshape(5, 16)
    try:
        whole, parts = kind(16, x.device), kind(16, x.device)
        whole.update(x)
        for part in (x[:2], x[2:]):
            parts.update(part)
        if whole.total.shape != parts.total.shape or not torch.allclose(whole.total, parts.total, rtol=1e-3, atol=1e-6):
            return "what two batches of tokens add is not what they add together; it must be a sum over tokens"
        whole.become_even(2.0)
        if whole.tokens != 1 or not math.isclose(whole.power, 2.0, rel_tol=1e-3):
            return f"after become_even(2.0) it must be that of one token with power 2.0; it has {whole.power:g}"
    except Exception as error:  # of somebody else's code: whatever it is, it is better now than after an hour
        return f"{type(error).__name__}: {first_line(error)}"
    return None
