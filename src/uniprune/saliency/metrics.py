"""Local saliency metrics: how much each weight matters, from its matrix and that matrix's inputs alone.

A metric is a frozen dataclass: its fields are its hyper-parameters, ``statistic`` is what it wants to know of the inputs.
Scores are float32 ``[out, in]``, finite and >= 0; higher = keep. A new metric is one class and one line in METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from uniprune.common import fields
from uniprune.errors import InputError
from uniprune.saliency import statistics
from uniprune.saliency.statistics import Norm, SquaredNorm, Statistic


class Metric(Protocol):
    """Scores a weight ``[out, in]``; a dataclass, whose fields are its hyper-parameters.

    statistic: the kind of statistic that its ``inputs`` are to be, whatever calibrates; None where the inputs do not matter,
    and are None.
    """

    statistic: ClassVar[type[Statistic] | None]

    def __call__(self, weight: Tensor, inputs: Any) -> Tensor: ...


@dataclass(frozen=True)
class Magnitude:
    """``|W|``: large weights matter."""

    statistic: ClassVar[type[Statistic] | None] = None

    def __call__(self, weight: Tensor, inputs: None = None) -> Tensor:
        return weight.abs().float()


@dataclass(frozen=True)
class Wanda:
    """``|W_ij| * rms(X_j)`` (arXiv 2306.11695). The RMS is the paper's norm up to one factor per matrix."""

    statistic: ClassVar[type[Statistic] | None] = SquaredNorm

    def __call__(self, weight: Tensor, inputs: SquaredNorm) -> Tensor:
        return weight.abs().float().mul_(inputs.rms)


@dataclass(frozen=True)
class RIA:
    """``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * rms(X_j) ** a`` (Zhang et al., ICLR 2024).

    a: exponent of the activations, >= 0; 0 leaves the relative importance of the weight alone.
    """

    a: float = 0.5
    statistic: ClassVar[type[Statistic] | None] = SquaredNorm

    def __post_init__(self) -> None:
        if not 0 <= self.a < math.inf:
            raise InputError(f"ria: the exponent a = {self.a} is negative, or no number")

    def __call__(self, weight: Tensor, inputs: SquaredNorm) -> Tensor:
        size = weight.float().abs()
        return _relative(size, size.sum(1), size.sum(0)) * inputs.rms**self.a


@dataclass(frozen=True)
class StochRIA:
    """RIA whose row and column sums run over a random subset of ``beta * min(out, in)`` entries (arXiv 2501.18980).

    a: as in RIA. beta: fraction in (0, 1]. seed: of the subset. Departure: one subset of columns serves all rows of a
    matrix, and one of rows all its columns, where the paper draws one for each; on a square matrix beta = 1 is RIA.
    """

    a: float = 0.5
    beta: float = 0.1
    seed: int = 0
    statistic: ClassVar[type[Statistic] | None] = SquaredNorm

    def __post_init__(self) -> None:
        if not 0 <= self.a < math.inf:
            raise InputError(f"stochria: the exponent a = {self.a} is negative, or no number")
        if not 0 < self.beta <= 1:
            raise InputError(f"stochria: beta = {self.beta} is not in (0, 1]")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"stochria: the seed {self.seed} is negative, or 2**63 or more")

    def __call__(self, weight: Tensor, inputs: SquaredNorm) -> Tensor:
        size = weight.float().abs()
        rows, columns = size.shape
        tau = max(1, int(self.beta * min(rows, columns)))
        generator = torch.Generator().manual_seed(self.seed)
        some_columns = torch.randperm(columns, generator=generator)[:tau].to(size.device)
        some_rows = torch.randperm(rows, generator=generator)[:tau].to(size.device)
        return _relative(size, size[:, some_columns].sum(1), size[some_rows].sum(0), least=1e-6) * inputs.rms**self.a


@dataclass(frozen=True)
class REAP:
    """Of whole experts: the router's weight times the norm of an expert's output, averaged over the tokens routed to it.

    (arXiv 2510.13999.) What it says of weights is what it says of their expert, so it is for ``experts`` alone. inputs: of the
    output times that weight.
    """

    statistic: ClassVar[type[Statistic] | None] = Norm

    def __call__(self, weight: Tensor, inputs: Norm) -> Tensor:
        return torch.full(weight.shape, float(inputs.mean), device=weight.device)


def _relative(size: Tensor, row_sums: Tensor, column_sums: Tensor, least: float = 0.0) -> Tensor:
    """Each entry relative to its row and its column. least: of the sums, relative to the largest entry: sums of a sample may
    be much smaller than an entry that is not in it."""
    floor = (size.max() * least).clamp_min(torch.finfo(torch.float32).tiny)
    return size / row_sums.maximum(floor)[:, None] + size / column_sums.maximum(floor)


METRICS: dict[str, type[Metric]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "stochria": StochRIA,
}


OF_EXPERTS: dict[str, type[Metric]] = {"reap": REAP}
"""Metrics of whole experts, which say nothing of one weight against another."""


def parse(spec: str, seed: int = 0) -> Metric:
    """A metric from its spelling: a name, or with hyper-parameters ``ria:a=0.5`` or ``stochria:a=0.5,beta=0.1``.

    seed: for metrics that have one and whose spelling does not set it.
    Raises InputError for an unknown name or hyper-parameter.
    """
    name, _, options = spec.partition(":")
    if name not in METRICS | OF_EXPERTS:
        known = f"use one of {', '.join(METRICS)}; or {', '.join(OF_EXPERTS)}, of experts"
        other = "; SparseGPT, which updates weights, is a method of uniprune compare" if name.lower() == "sparsegpt" else ""
        raise InputError(f"metric {name!r} is unknown; {known}{other}")
    kind = (METRICS | OF_EXPERTS)[name]
    values: dict[str, Any] = {"seed": seed} if "seed" in fields.types_of(kind) else {}
    try:
        values |= fields.parse_pairs(filter(None, options.split(",")), "ria:a=0.5")
    except InputError as error:
        raise InputError(f"metric {spec}: {error}") from None
    return fields.build(kind, values, f"metric {name}")


def spell(metric: Metric) -> str | None:
    """The spelling that :func:`parse` turns into this metric, hyper-parameters and all; None if there is none."""
    name = next((name for name, kind in (METRICS | OF_EXPERTS).items() if kind is type(metric)), None)
    if name is None:
        return None
    options = ",".join(f"{key}={value}" for key, value in fields.values_of(metric).items())
    spelled = f"{name}:{options}" if options else name
    try:
        return spelled if parse(spelled) == metric else None
    except InputError:  # a hyper-parameter that text cannot say
        return None


def record(metric: Metric) -> str | Mapping[str, Any]:
    """What JSON says of a metric: its spelling, else what it is (``fields.record``), which does not replay it."""
    return spell(metric) or fields.record(metric)


def check(metric: Any) -> None:
    """Raises InputError, with the reason, unless an object can be the metric of a run."""
    fields.check_object(metric, "metric", ("statistic", "__call__"))
    if metric.statistic is not None:
        statistics.check(metric.statistic)
