"""A step of mirror descent on one matrix: Adam's direction from moments of 8 bits, scaled by how far gradients agree.

In plain PyTorch here, for GPUs in Triton in ``kernels``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uniprune.common.fused import fused
from uniprune.controller.descent.token_weighting import TINY

LEAST, MOST = 0.02, 5.0  # in confidence(): least signal share of a row or column, greatest factor of a weight
BAND, WIDE_BAND = 1 << 17, 1 << 24  # weights updated at a time: on a CPU as many as its cache holds, on a GPU to bound memory
LEVELS = 127  # largest int8
LEAST_RMS = 1e-30  # that a mean is divided by
MANTISSA, SMALLEST = 20, (127 - 31) << 3  # float32 to UE5M3: bits of the mantissa to drop; what 2**-31 then is, to subtract
GOLDEN = 0x9E3779B1 - 2**32  # the golden ratio in 32 bits, as a signed integer


class Step(NamedTuple):
    """The numbers of a step, which are the same for all weights of a matrix.

    decays: of mean and RMS. rescale: Adam's bias correction of mean / RMS. noise: for :func:`confidence`; None: all rows and
    columns move alike. unit: the mean dual at the start. size: the step size, in units of it. turn: the number of the step, for
    :func:`dither`.
    """

    decays: tuple[float, float]
    rescale: float
    noise: float | None
    unit: float
    size: float
    turn: int

    @property
    def least(self) -> float:
        """The least signal that a row or column is taken to have, as a mean square."""
        return least_signal(self.noise or 0)

    @property
    def most(self) -> float:
        return MOST

    @property
    def level(self) -> float:
        """What one unit of an int8 ratio stands for: 1/127 of the largest possible |mean| / RMS (by Cauchy and Schwarz)."""
        decay, rms_decay = self.decays
        faster = decay**2 / rms_decay if decay else 0.0
        return (1 - decay) / math.sqrt((1 - rms_decay) * (1 - faster)) / LEVELS

    @property
    def offset(self) -> int:
        """An int32 that gives each step a dither of its own."""
        return _int32(self.turn * 0x6487ED51)


def _exercises_all(*_: Any, step: Step) -> bool:
    """Whether a step goes through all that the kernels compute, so that they can be checked by it: the first two do not."""
    return step.turn > 2


def _compiled_for(*_: Any, step: Step) -> bool:
    """What the kernels are compiled for: whether rows and columns are weighted."""
    return step.noise is not None


@fused(
    kernels=3, triton="uniprune.controller.descent.kernels:updated", representative=_exercises_all, specialised_on=_compiled_for
)
def updated(
    gradient: Tensor, dual: Tensor, ratio: Tensor, rms: Tensor, before: Tensor, *, step: Step
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dual, ratio and RMS ``[out, in]``, and the largest gradient ``[]``, after a step.

    gradient: float32. before: the largest gradient before the step.
    """
    rows, columns = dual.shape
    top = torch.maximum(before, gradient.abs().amax())
    moves, ratios, roots = torch.empty_like(dual), torch.empty_like(ratio), torch.empty_like(rms)
    by_row, by_column = torch.empty(rows, device=dual.device), torch.zeros(columns, device=dual.device)
    size = max(1, (BAND if dual.device.type == "cpu" else WIDE_BAND) // columns)
    bands = [slice(first, first + size) for first in range(0, rows, size)]
    for band in bands:
        places = dither(dual[band], band.start * columns + step.offset)
        moves[band], ratios[band], roots[band] = _averaged(gradient[band], ratio[band], rms[band], before, top, places, step)
        if step.noise is not None:
            energy = moves[band].square()
            by_row[band] = energy.mean(1)
            by_column += energy.sum(0)
    if step.noise is not None:
        trust = confidence(by_row, by_column / rows, step.noise)
    for band in bands:
        move = moves[band]
        if step.noise is not None:
            move *= torch.outer(trust[0][band], trust[1]).clamp_max_(MOST)
        move *= step.unit
        torch.sub(dual[band], move, alpha=step.size, out=move)
    return moves, ratios, roots, top


def _averaged(
    gradient: Tensor, ratio: Tensor, rms: Tensor, before: Tensor, top: Tensor, places: Tensor, step: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """The direction, which is mean / RMS with bias correction; and the new ratio and RMS as they are stored.

    before, top: the largest gradient before and after this step. places: of :func:`dither`.
    """
    # In place: on a CPU, new memory for each intermediate result takes longer than the arithmetic.
    decay, rms_decay = step.decays
    root = from_ue5m3(rms) * before
    mean = (root * ratio).mul_(decay * step.level).add_(gradient, alpha=1 - decay)
    root = root.square_().mul_(rms_decay).addcmul_(gradient, gradient, value=1 - rms_decay).sqrt_()
    rms = to_ue5m3(root / top.clamp_min(TINY), places)
    move = mean.div_(root.clamp_min_(LEAST_RMS))
    ratio = (move / step.level).add_(places, alpha=2.0**-MANTISSA).floor_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return move.mul_(step.rescale), ratio, rms


def dither(like: Tensor, offset: int) -> Tensor:
    """Integers in [0, 2**20) for stochastic rounding, int32, in the shape of ``like``: multiples of the golden ratio, which are
    evenly distributed, and do not depend on the execution. offset: index of the first weight, plus :attr:`Step.offset`."""
    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    places.add_(_int32(offset)).mul_(GOLDEN)
    return places.bitwise_right_shift_(32 - MANTISSA).bitwise_and_((1 << MANTISSA) - 1)


def to_ue5m3(values: Tensor, places: Tensor) -> Tensor:
    """Float32 in [0, 1] as uint8 with 5 bits of exponent and 3 of mantissa, from 2**-31 up. places: of :func:`dither`."""
    bits = values.view(torch.int32) + places
    return bits.bitwise_right_shift_(MANTISSA).sub_(SMALLEST).clamp_(0, 255).to(torch.uint8)


def from_ue5m3(codes: Tensor) -> Tensor:
    """The float32 that :func:`to_ue5m3` rounded to."""
    return codes.int().add_(SMALLEST).bitwise_left_shift_(MANTISSA).view(torch.float32)


def _int32(number: int) -> int:
    """The last 32 bits as a signed integer: overflow as in C."""
    return (number + 2**31) % 2**32 - 2**31


def noise_of(decay: float, steps: int) -> float:
    """The mean square that mean / RMS has after ``steps`` of pure noise: the sum of the squared weights of the running mean."""
    return (1 - decay) / (1 + decay) * (1 + decay**steps) / (1 - decay**steps)


def least_signal(noise: float) -> float:
    """The least signal that a row or column is taken to have, above 0 where all may be noise (without a running mean)."""
    return max(LEAST * (1 - noise), TINY)


def confidence(rows: Tensor, columns: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Factors of rows and of columns, each with mean 1: how far the gradients in them agree from step to step.

    rows, columns: mean squares of the direction (mean / RMS) in each row and each column. noise: what they would be if the
    gradients were pure noise (:func:`noise_of`). The excess is signal. A weight's factor is that of its row times that of its
    column, as in a Wiener filter whose signal is estimated from whole rows and columns.
    """
    shares = ((energy - noise).clamp_min_(least_signal(noise)) for energy in (rows, columns))
    by_row, by_column = (share / share.mean() for share in shares)
    return by_row, by_column
