"""Statistics of the inputs of each linear layer, how they are collected, and what stands in for those of starved experts."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.common import distributed
from uniprune.errors import InputError, first_line
from uniprune.models.experts import taken_apart
from uniprune.models.matrices import Matrices


class Statistic:
    """What a metric wants to know of a matrix's inputs: a sum over tokens ``[tokens, in]``, and how many tokens there were.

    Sums can be added in any order: so they do not depend on how tokens were split into batches and processes, and a run that
    was interrupted adds to what it had saved. A kind of statistic is a subclass with :meth:`sums`, and with ``power``,
    :meth:`even` and :meth:`nbytes` as well if its total is not one number for each input channel. What is no sum over tokens,
    a maximum say, cannot be one.

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

    def even(self, power: float) -> None:
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

    def even(self, power: float) -> None:
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


def beside(kind: Kind, wanted: Kind | None) -> Kind | None:
    """What has to be collected beside statistics of one kind for a metric that wants another; None if those will do.

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
        whole.even(2.0)
        if whole.tokens != 1 or not math.isclose(whole.power, 2.0, rel_tol=1e-3):
            return f"after even(2.0) it must be that of one token with power 2.0; it has {whole.power:g}"
    except Exception as error:  # of somebody else's code: whatever it is, it is better now than after an hour
        return f"{type(error).__name__}: {first_line(error)}"
    return None


logger = logging.getLogger(__name__)

FEW = 32  # tokens: with fewer, the RMS of a channel is off by more than an eighth


def feed(matrices: Matrices, statistics: Statistics, gradients: Mapping[str, Tensor] | None = None) -> None:
    """Where an expert's matrix saw under FEW tokens, its inputs become even, and as large as its fellows' are per token.

    So an activation-aware score becomes the magnitude, on the scale of the other experts' scores. gradients: sums over the
    tokens of squared output gradients ``[out]``; they become even, too, and as large as the fellows' are on average. Where all
    experts of a group saw too little, they are all treated so; where none saw any token, nothing is changed.
    """
    for names in _groups(matrices, statistics).values():
        few = [name for name in names if statistics[name].tokens < FEW]
        enough = [name for name in names if statistics[name].tokens >= FEW] or [n for n in few if statistics[n].tokens]
        if not few or not enough:
            continue
        power = sum(statistics[name].power for name in enough) / sum(statistics[name].tokens for name in enough)
        gradient = sum(float(gradients[name].mean()) for name in enough) / len(enough) if gradients is not None else 0.0
        for name in few:
            statistics[name].even(power)
            if gradients is not None:
                gradients[name].fill_(gradient)


def starved(matrices: Matrices, statistics: Statistics) -> dict[str, Any]:
    """For the report, which experts' matrices :func:`feed` gave a stand-in, with a warning; empty if there are none."""
    groups = _groups(matrices, statistics)
    names = [name for group in groups.values() for name in group if statistics[name].tokens < FEW]
    if not names:
        return {}
    count = sum(map(len, groups.values()))
    logger.warning(
        "%d of %d experts' matrices saw under %d calibration tokens, e.g. %s; they are scored by magnitude: use more text",
        *(len(names), count, FEW, names[0]),
    )
    return {"starved": {"matrices": names, "of": count, "tokens_under": FEW}}


def _groups(matrices: Matrices, statistics: Statistics) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in statistics:
        if group := matrices[name].group:
            groups[group].append(name)
    return groups


@contextmanager
def observing(matrices: Matrices, kind: Kind | None, device: torch.device | None = None) -> Iterator[dict[str, Statistic]]:
    """Inside the ``with`` block, every forward pass feeds each matrix's inputs to its statistic.

    device: where the sums lie; by default each matrix's own, which must then be in memory.
    """
    statistics: dict[str, Statistic] = {}
    handles = []
    latest: list[Any] = [None, None]  # q, k, v and gate, up are called on one tensor, whose sums are computed once

    def adding(statistic: Statistic) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0] is not latest[0]:
                latest[:] = args[0], statistic.sums(args[0].detach().reshape(-1, args[0].shape[-1]))
            statistic.add(latest[1], args[0].shape[:-1].numel())

        return hook

    try:
        for name, matrix in matrices.items() if kind else ():
            assert kind is not None
            statistics[name] = kind(matrix.shape[1], device or matrix.device)
            handles += [module.register_forward_pre_hook(adding(statistics[name])) for module in matrix.modules]
        with taken_apart(matrix.module for matrix in matrices.values()):
            yield statistics
    finally:
        for handle in handles:
            handle.remove()


def pool(matrices: Matrices, statistics: Statistics) -> None:
    """Sums statistics over all processes, sees to starved experts, and checks them as :func:`check_seen` does."""
    add_up(statistics)
    feed(matrices, statistics)
    check_seen(statistics)


def add_up(statistics: Statistics) -> None:
    """Sums statistics over all processes."""
    for statistic in statistics.values():
        distributed.total(statistic.total)
        statistic.tokens = round(distributed.total_of(statistic.tokens))


def check_seen(statistics: Statistics) -> None:
    """Raises InputError if a matrix saw no token, or if its sums overflowed."""
    blind = [name for name, statistic in statistics.items() if statistic.tokens == 0]
    if blind:
        raise InputError(
            f"{len(blind)} matrices saw no calibration token, e.g. {blind[0]}: their layers are passed by, or they are experts "
            "that nothing was sent to; leave them out (--exclude), or use more text"
        )
    for name, statistic in statistics.items():
        if not bool(torch.isfinite(statistic.total).all()):
            raise InputError(f"{name}: its inputs overflowed; calibrate in another dtype (--dtype bfloat16 or float32)")
