"""The global controller: mirror descent on the saliency, with the loss of the whole pruned model in the loop.

The state is one float32 dual ``V`` per matrix, a power of the saliency: masks are cut from it by any pattern. It starts at the
local saliency, put on one scale for the whole model by the gradients at the matrices' outputs,

    V_ij = (local score_ij * rms of dL/dy_i) ** power

and each step moves it against the straight-through gradient of the pruned model's loss with respect to the mask,

    V <- V - eta * unit * m / r,   g = W * dL/d(W * mask)

where eta is the step size, m and r are running mean and RMS of g (Adam's, kept in 8 bits each), and unit is the matrix's mean
dual at the start. The power is the mirror map: near 0 (a logarithm) all weights would move by the same factor, at 1 by the same
amount. The loss is that of ``loss.Loss``, by default the divergence from the dense model's predictions. The weights are never
changed.

The idea is UniPruning's (arXiv 2510.03291; ``unipruning`` is the variant as it was published). Departure: there the gradient
comes from a copy of the weights that is trained meanwhile; here it comes from the pruned model itself, and there is no copy.

On few tokens, the noise of the gradients is what limits the descent. Three things reduce it. Rows and columns move only as far
as their gradients agree from step to step (:func:`confidence`). And so that a few tokens with large gradients do not drown the
others, each token's divergence is weighted down in the loss (its ``evenness``), and tokens are weighted in each matrix's
gradient by the sizes of their input and output gradient there (``descent.token_weighting``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from uniprune.common.fused import fused
from uniprune.controller.descent import loop
from uniprune.controller.descent.token_weighting import TINY
from uniprune.controller.protocol import ControllerRecord, Cost
from uniprune.controller.schedule import step_windows
from uniprune.errors import InputError
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Metric
from uniprune.sparsity.patterns import Pattern
from uniprune.storage.runs import OLDER
from uniprune.storage.stash import moved

LEAST, MOST = 0.02, 5.0  # in confidence(): least signal share of a row or column, greatest factor of a weight
BAND, WIDE_BAND = 1 << 17, 1 << 24  # weights updated at a time: on a CPU as many as its cache holds, on a GPU to bound memory
LEVELS = 127  # largest int8
MANTISSA, SMALLEST = 20, (127 - 31) << 3  # float32 to UE5M3: bits of the mantissa to drop; what 2**-31 then is, to subtract


class State(NamedTuple):
    """The state of one matrix ``[out, in]``: its dual, and mean and RMS of its gradients. 6 bytes per weight in all.

    dual: float32. ratio: mean / RMS, which the decays bound (:attr:`Step.level`), int8. rms: in units of ``top``, in UE5M3
    (uint8: 5 bits of exponent, 3 of mantissa). top: the largest gradient so far, float32 ``[]``. unit: the mean dual at the
    start. steps: taken so far.
    ratio and rms are rounded stochastically (:func:`dither`): rounded to nearest, changes of a running mean that are less than
    half a unit would all be lost. Both use the same dither, so that the mean's error is 1e-4 of the RMS.
    """

    dual: Tensor
    ratio: Tensor
    rms: Tensor
    top: Tensor
    unit: float
    steps: int

    def to(self, device: torch.device) -> State:
        dual, ratio, rms, top = (moved(tensor, device) for tensor in self[:4])
        return State(dual, ratio, rms, top, self.unit, self.steps)

    def rest(self) -> dict[str, Tensor]:
        """All tensors but the dual, to be saved."""
        facts = torch.tensor([self.unit, self.steps], dtype=torch.float64)
        return {"ratio": self.ratio, "rms": self.rms, "top": self.top, "facts": facts}


@dataclass(frozen=True)
class MirrorDescent:
    """Settings of the controller, its pure ``init`` / ``step`` on one matrix, and :meth:`calibrate`, which descends on all.

    step_size: of the dual, in units of the matrix's mean dual; falls linearly to 0. mean_decay, rms_decay: of the running mean
    and RMS of the gradients (Adam's beta1 and beta2), in [0, 1). power: the dual is the saliency to this power, > 0. labels,
    evenness: of the loss, see ``loss.Loss``. vocabulary: the loss compares the predictions of so many tokens only, the text's
    most frequent ones (with labels, of all). even_tokens: whether each matrix's gradient weights outlier tokens down. focus:
    whether rows and columns move only as far as their gradients agree from step to step (:func:`confidence`). batch_tokens:
    tokens of a step. held_out: windows that the state is checked on and never descends on, at least one for each target and at
    most an eighth of all. checks: the most checks, evenly spaced, besides the one of the start.

    A variant is a subclass with an ``init`` or ``step`` of its own; the loop (``descent``) uses of a state only what is in
    ``states.State``.
    """

    cost: ClassVar[Cost] = Cost(
        flops_per_token=8,  # student forwards and backwards, teacher forwards
        state_bytes=6,  # a float32 dual and two moments of 8 bits
        disk_bytes=2 * 6 + 4,  # two versions of the states, and the best duals, which share files with them
        best_bytes=4,
        read_bytes=6,  # each state once
        written_bytes=6,
        shared_budget_read_bytes=4,  # each dual again: masks can only be created when the duals of all matrices have moved
        mask_bytes=1,
    )
    in_memory: ClassVar[bool] = False
    one_process: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    step_size: float = 0.0045
    mean_decay: float = 0.9
    rms_decay: float = 0.95
    power: float = 0.5
    labels: float = 0.0
    evenness: float = 0.5
    vocabulary: int = 8192
    even_tokens: bool = True
    focus: bool = True
    batch_tokens: int = 1024
    held_out: int = 4
    checks: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            fits, allowed = value < math.inf, "a number >= 0"
            if name == "labels":
                fits, allowed = value <= 1, "in [0, 1]"
            elif name.endswith("_decay"):
                fits, allowed = value < 1, "in [0, 1)"
            if not (value >= 0 and fits):
                raise InputError(f"controller: {name} = {value} is not {allowed}")
        if self.mean_decay and self.mean_decay**2 >= self.rms_decay:  # nothing bounds the mean in units of the RMS
            raise InputError(
                f"controller: rms_decay = {self.rms_decay} is not above mean_decay ** 2 = {self.mean_decay**2:.4g}"
            )
        if self.power == 0 or min(self.batch_tokens, self.held_out, self.checks, self.vocabulary) < 1:
            raise InputError("controller: power, batch_tokens, held_out, checks and vocabulary must be above 0")

    def step_tokens(self, length: int) -> int:
        """Tokens of a step on windows of ``length``."""
        return step_windows(self.batch_tokens, length) * length

    def calibrate(
        self,
        calibration: Calibration,
        metric: Metric,
        targets: Sequence[Pattern],
        steps: int | None = None,
        seed: int = 0,
    ) -> tuple[Mapping[str, Tensor], ControllerRecord]:
        """The best duals of a descent, see ``loop.descend``."""
        return loop.descend(self, calibration, metric, targets, steps, seed)

    def init(self, local: Tensor, output_gradient: Tensor) -> State:
        """The first state. local: scores ``[out, in]``, >= 0. output_gradient: RMS ``[out]`` of dL/dy over the tokens."""
        dual = (local.float() * output_gradient.float()[:, None]).clamp_min(TINY) ** self.power
        return self._at_rest(dual, float(dual.mean()))

    def restart(self, state: State, dual: Tensor) -> State:
        """A state with this dual and no memory of earlier gradients."""
        return self._at_rest(dual, state.unit)

    def restore(self, dual: Tensor, rest: Mapping[str, Tensor]) -> State:
        """A state that was saved as its dual and :meth:`State.rest`."""
        if "ratio" not in rest:
            raise InputError(OLDER)
        unit, steps = rest["facts"].tolist()
        return State(dual, rest["ratio"], rest["rms"], rest["top"], unit, int(steps))

    def step(self, state: State, gradient: Tensor, size: float) -> State:
        """One step against ``gradient`` ``[out, in]``, float32."""
        steps = state.steps + 1
        dual, ratio, rms, top = updated(
            gradient,
            *state[:4],
            step=Step(
                decays=(self.mean_decay, self.rms_decay),
                rescale=math.sqrt(1 - self.rms_decay**steps) / (1 - self.mean_decay**steps),
                noise=noise_of(self.mean_decay, steps) if self.focus and steps > 2 else None,
                unit=state.unit,
                size=size,
                turn=steps,
            ),
        )
        return State(dual, ratio, rms, top, state.unit, steps)

    def _at_rest(self, dual: Tensor, unit: float) -> State:
        """A state that has seen no gradient."""
        ratio, rms = (torch.zeros_like(dual, dtype=dtype) for dtype in (torch.int8, torch.uint8))
        return State(dual, ratio, rms, torch.zeros((), device=dual.device), unit, 0)


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


@fused(kernels=3, triton="uniprune.common.triton_kernels:updated", representative=_exercises_all, specialised_on=_compiled_for)
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
    move = mean.div_(root.clamp_min_(1e-30))
    ratio = (move / step.level).add_(places, alpha=2.0**-MANTISSA).floor_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return move.mul_(step.rescale), ratio, rms


def dither(like: Tensor, offset: int) -> Tensor:
    """Integers in [0, 2**20) for stochastic rounding, int32, in the shape of ``like``: multiples of the golden ratio, which are
    evenly distributed, and do not depend on the execution. offset: index of the first weight, plus :attr:`Step.offset`."""
    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    places.add_(_int32(offset)).mul_(_int32(0x9E3779B1))
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
