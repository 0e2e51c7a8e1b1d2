"""The global controller: mirror descent on the saliency, with the loss of the whole pruned model in the loop.

The state is one float32 dual ``V`` per matrix, a power of the saliency: masks are cut from it by any pattern. It starts at the
local saliency, put on one scale for the whole model by the gradients at the matrices' outputs,

    V_ij = (local score_ij * rms of dL/dy_i) ** power

and each step moves it against the straight-through gradient of the pruned model's loss with respect to the mask,

    V <- V - eta * unit * (m / r + rho * (V - V_start) / unit),   g = W * dL/d(W * mask)

where m and r are running mean and RMS of g (Adam's, kept in 8 bits each), unit is the matrix's mean dual and rho the anchor to
the local saliency. The power is the mirror map: at 0 (a logarithm) every weight would move by an equal factor, at 1 by an equal
amount. The loss is that of ``loss.Loss``: by default the divergence from the dense model's predictions. The weights stay as
they are. Idea: UniPruning, arXiv 2510.03291; departures: the gradient comes from the pruned model itself instead of from a
drifting copy of the weights, so there is no such copy (that variant is ``published``).

What limits a descent on few tokens is the noise of the gradients, so three things make it smaller. Rows and columns move by
how far their gradients agree from step to step (:func:`confidence`). And a few loud tokens would drown the rest, so tokens are
evened out twice: in the loss (its ``evenness``), and in each matrix's gradient, by the sizes of the input and the output
gradient that a token has there (``straight_through.Evener``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from uniprune.common.fused import fused
from uniprune.controller import descent
from uniprune.controller.protocol import ControllerRecord, Cost
from uniprune.controller.start import step_windows
from uniprune.errors import InputError
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Metric
from uniprune.sparsity.patterns import Pattern
from uniprune.storage.stash import moved

TINY = 1e-20
LEAST, MOST = 0.02, 5.0  # signal share of a row or column, and factor of a weight, in confidence()
BAND, WIDE_BAND = 1 << 17, 1 << 24  # weights moved at a time: on a CPU what its cache holds, elsewhere for memory's sake
LEVELS = 127  # of a ratio in int8
MANTISSA, SMALLEST = 20, (127 - 31) << 3  # of float32 what UE5M3 lacks: low bits of the mantissa, and of the exponents


class State(NamedTuple):
    """One matrix: the dual (float32), mean and RMS of its gradients. 6 bytes per weight in all.

    ratio: the mean over the RMS, which the decays bound, int8. rms: in UE5M3 (uint8: 5 bits of exponent, 3 of mantissa), in
    units of ``top``, the largest gradient so far, float32 ``[]``. Both are rounded stochastically (:func:`dither`): a running
    mean is lost where each of its changes is less than half a unit. By the same dither, so the mean's error is 1e-4 of the RMS.
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
        """All but the dual, for the disk."""
        facts = torch.tensor([self.unit, self.steps], dtype=torch.float64)
        return {"ratio": self.ratio, "rms": self.rms, "top": self.top, "facts": facts}


@dataclass(frozen=True)
class MirrorDescent:
    """Settings of the controller, its pure ``init`` / ``step`` on one matrix, and :meth:`calibrate`, which descends on all.

    step_size: of the dual, in units of the matrix's mean dual, falling linearly to 0. mean_decay, rms_decay: of the running
    mean and RMS of the gradients, in [0, 1). power: of the saliency that the dual is, > 0. anchor: pull towards the start, per
    unit of step size. temperature: of relaxed masks (``prox.relaxed``), in units of the mean dual, falling linearly to 0; 0 has
    hard masks throughout. labels, evenness, hidden, vocabulary: of the loss, see ``loss.Loss``. even_tokens: whether each
    matrix's gradient down-weights outlier tokens. focus: whether rows and columns move by how far their gradients agree from
    step to step (:func:`confidence`). batch_tokens: per step. held_out: windows that judge and are never descended on, one for
    each target at least and an eighth at most. checks: how often they do, at most.

    A variant is a subclass with an ``init`` or ``step`` of its own; the loop (``descent``) knows of a state what
    ``states.State`` says.
    """

    # Of memory, float32 dual, two moments of 8 bits; on disk, the last two versions of the states and the best duals. A step
    # reads all to move it, and the dual to create a mask that could not be created before all duals had moved.
    cost: ClassVar[Cost] = Cost(flops=8, memory=6, disk=2 * 6 + 4, read=6, written=6, shared=4, masks=1)
    in_memory: ClassVar[bool] = False
    one_process: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    step_size: float = 0.0045
    mean_decay: float = 0.9
    rms_decay: float = 0.95
    power: float = 0.5
    anchor: float = 0.0
    temperature: float = 0.0
    labels: float = 0.0
    evenness: float = 0.5
    hidden: float = 0.0
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
        """The duals after a descent, see ``descent.descend``."""
        return descent.descend(self, calibration, metric, targets, steps, seed)

    def init(self, local: Tensor, output_gradient: Tensor) -> State:
        """local: scores ``[out, in]`` >= 0. output_gradient: RMS of dL/dy ``[out]`` at the matrix's outputs."""
        dual = (local.float() * output_gradient.float()[:, None]).clamp_min(TINY) ** self.power
        return self._still(dual, float(dual.mean()))

    def restart(self, state: State, dual: Tensor) -> State:
        """A state at another dual, without momentum."""
        return self._still(dual, state.unit)

    def restore(self, dual: Tensor, rest: Mapping[str, Tensor]) -> State:
        """A state that was saved as its dual and :meth:`State.rest`."""
        if "ratio" not in rest:
            raise InputError("the interrupted run is of an earlier version of uniprune; --overwrite restarts it")
        unit, steps = rest["facts"].tolist()
        return State(dual, rest["ratio"], rest["rms"], rest["top"], unit, int(steps))

    def step(self, state: State, gradient: Tensor, size: float, start: Tensor | None = None) -> State:
        """One step against ``gradient`` ``[out, in]``, float32; ``start``: the dual that the anchor pulls to."""
        steps = state.steps + 1
        dual, ratio, rms, top = updated(
            gradient,
            *state[:4],
            start,
            step=Step(
                decays=(self.mean_decay, self.rms_decay),
                rescale=math.sqrt(1 - self.rms_decay**steps) / (1 - self.mean_decay**steps),
                noise=noise_of(self.mean_decay, steps) if self.focus and steps > 2 else None,
                unit=state.unit,
                size=size,
                anchor=self.anchor,
                turn=steps,
            ),
        )
        return State(dual, ratio, rms, top, state.unit, steps)

    def _still(self, dual: Tensor, unit: float) -> State:
        ratio, rms = (torch.zeros_like(dual, dtype=dtype) for dtype in (torch.int8, torch.uint8))
        return State(dual, ratio, rms, torch.zeros((), device=dual.device), unit, 0)


class Step(NamedTuple):
    """What a step is the same for in all of a matrix.

    decays: of mean and RMS. rescale: what their quotient is times, for they begin at 0. noise: of :func:`confidence`; None
    trusts all alike. unit, size, anchor: of the step. turn: its number, for :func:`dither`.
    """

    decays: tuple[float, float]
    rescale: float
    noise: float | None
    unit: float
    size: float
    anchor: float
    turn: int

    @property
    def least(self) -> float:
        """The least signal of a row or column, as a mean square."""
        return LEAST * (1 - (self.noise or 0))

    @property
    def most(self) -> float:
        return MOST

    @property
    def level(self) -> float:
        """The unit of ratios in int8: no running mean is larger, in units of the RMS, than Cauchy and Schwarz have it."""
        decay, rms_decay = self.decays
        faster = decay**2 / rms_decay if decay else 0.0
        return (1 - decay) / math.sqrt((1 - rms_decay) * (1 - faster)) / LEVELS

    @property
    def offset(self) -> int:
        """What sets the dither of this step apart, as int32."""
        return _int32(self.turn * 0x6487ED51)


def _weighs(*_: Any, step: Step) -> bool:
    """Whether a step uses all that a state has, and weighs rows and columns if any does; the first two do not."""
    return step.turn > 2


@fused(kernels=3, triton="uniprune.common.triton_kernels:updated", telling=_weighs)
def updated(
    gradient: Tensor, dual: Tensor, ratio: Tensor, rms: Tensor, before: Tensor, start: Tensor | None, *, step: Step
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dual, ratio and RMS ``[out, in]``, and the largest gradient ``[]``, after a step.

    before: the largest gradient before it. start: what the anchor pulls to.
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
        if start is not None:
            move += step.anchor * (dual[band] - start[band])
        torch.sub(dual[band], move, alpha=step.size, out=move)
    return moves, ratios, roots, top


def _averaged(
    gradient: Tensor, ratio: Tensor, rms: Tensor, before: Tensor, top: Tensor, places: Tensor, step: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """The direction, which is the running mean over RMS, rescaled; both as they are kept, rounded by ``places``."""
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
    """Integers in [0, 2**20), int32, of the shape of ``like``: multiples of the golden ratio, which fall evenly, and are the
    same in all executions. offset: of the first weight, and of the step."""
    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    places.add_(_int32(offset)).mul_(_int32(0x9E3779B1))
    return places.bitwise_right_shift_(32 - MANTISSA).bitwise_and_((1 << MANTISSA) - 1)


def to_ue5m3(values: Tensor, places: Tensor) -> Tensor:
    """Float32 in [0, 1] as uint8 with 5 bits of exponent and 3 of mantissa, from 2**-31 up; places: of :func:`dither`."""
    bits = values.view(torch.int32) + places
    return bits.bitwise_right_shift_(MANTISSA).sub_(SMALLEST).clamp_(0, 255).to(torch.uint8)


def from_ue5m3(codes: Tensor) -> Tensor:
    """The float32 that :func:`to_ue5m3` rounded to."""
    return codes.int().add_(SMALLEST).bitwise_left_shift_(MANTISSA).view(torch.float32)


def _int32(number: int) -> int:
    """The last 32 bits, signed, as integers overflow in C."""
    return (number + 2**31) % 2**32 - 2**31


def noise_of(decay: float, steps: int) -> float:
    """The mean square of a running mean over RMS of pure noise after ``steps``: the sum of the mean's squared weights."""
    return (1 - decay) / (1 + decay) * (1 + decay**steps) / (1 - decay**steps)


def confidence(rows: Tensor, columns: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Factors of rows and of columns with mean 1 that trust them as far as their gradients agree from step to step.

    rows, columns: mean squares of the direction (running mean over RMS of the gradients) in each row and column. noise: what
    :func:`noise_of` says they would be without a signal. What a row or a column has beyond that is signal. Its share, by row
    times by column, is the factor of a weight (Wiener's, with the signal of a row and of a column estimated from all of it).
    """
    shares = ((energy - noise).clamp_min_(LEAST * (1 - noise)) for energy in (rows, columns))
    by_row, by_column = (share / share.mean() for share in shares)
    return by_row, by_column
