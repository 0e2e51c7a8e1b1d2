"""The global controller: mirror descent on the saliency, with the loss of the whole pruned model in the loop.

The state is one float32 dual ``V`` per matrix, a power of the saliency: masks are cut from it by any pattern. It starts at the
local saliency, put on one scale for the whole model by the gradients at the matrices' outputs,

    V_ij = (local score_ij * rms of dL/dy_i) ** power

and each step moves it against the straight-through gradient of the pruned model's loss with respect to the mask,

    V <- V - eta * unit * (m / r + rho * (V - V_start) / unit),   g = W * dL/d(W * mask)

where m and r are running mean and RMS of g (Adam's, kept in bfloat16), unit is the matrix's mean dual and rho the anchor to the
local saliency. The power is the mirror map: at 0 (a logarithm) every weight would move by an equal factor, at 1 by an equal
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
from typing import ClassVar, NamedTuple

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


class State(NamedTuple):
    """One matrix: the dual (float32), mean and RMS of its gradients (bfloat16). 8 bytes per weight in all."""

    dual: Tensor
    mean: Tensor
    rms: Tensor
    unit: float
    steps: int

    def to(self, device: torch.device) -> State:
        dual, mean, rms = (moved(tensor, device) for tensor in self[:3])
        return State(dual, mean, rms, self.unit, self.steps)

    def rest(self) -> dict[str, Tensor]:
        """All but the dual, for the disk."""
        return {"mean": self.mean, "rms": self.rms, "facts": torch.tensor([self.unit, self.steps], dtype=torch.float64)}


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

    # Of memory, float32 dual, two bfloat16 moments; on disk, the last two versions of the states and the best duals. A step
    # reads all to move it, and the dual to create a mask that could not be created before all duals had moved.
    cost: ClassVar[Cost] = Cost(flops=8, memory=8, disk=2 * 8 + 4, read=8, written=8, shared=4, masks=1)
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
        unit, steps = rest["facts"].tolist()
        return State(dual, rest["mean"], rest["rms"], unit, int(steps))

    def step(self, state: State, gradient: Tensor, size: float, start: Tensor | None = None) -> State:
        """One step against ``gradient`` ``[out, in]``, float32; ``start``: the dual that the anchor pulls to."""
        steps = state.steps + 1
        dual, mean, rms = updated(
            gradient,
            *state[:3],
            start,
            step=Step(
                decays=(self.mean_decay, self.rms_decay),
                rescale=math.sqrt(1 - self.rms_decay**steps) / (1 - self.mean_decay**steps),
                noise=noise_of(self.mean_decay, steps) if self.focus and steps > 2 else None,
                unit=state.unit,
                size=size,
                anchor=self.anchor,
            ),
        )
        return State(dual, mean, rms, state.unit, steps)

    def _still(self, dual: Tensor, unit: float) -> State:
        nothing = torch.zeros_like(dual, dtype=torch.bfloat16)
        return State(dual, nothing, nothing.clone(), unit, 0)


class Step(NamedTuple):
    """What a step is the same for in all of a matrix.

    decays: of mean and RMS. rescale: what their quotient is times, for they begin at 0. noise: of :func:`confidence`; None
    trusts all alike. unit, size, anchor: of the step.
    """

    decays: tuple[float, float]
    rescale: float
    noise: float | None
    unit: float
    size: float
    anchor: float

    @property
    def least(self) -> float:
        """The least signal of a row or column, as a mean square."""
        return LEAST * (1 - (self.noise or 0))

    @property
    def most(self) -> float:
        return MOST


@fused(kernels=3, triton="uniprune.common.triton_kernels:updated")
def updated(
    gradient: Tensor, dual: Tensor, mean: Tensor, rms: Tensor, start: Tensor | None, *, step: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """Dual, mean and RMS after a step, all ``[out, in]``; ``start``: what the anchor pulls to."""
    # In place: on a CPU, new memory for each intermediate result takes longer than the arithmetic.
    decay, rms_decay = step.decays
    mean = mean.float().mul_(decay).add_(gradient, alpha=1 - decay)
    rms = rms.float().square_().mul_(rms_decay).addcmul_(gradient, gradient, value=1 - rms_decay).sqrt_()
    kept = mean.bfloat16(), rms.bfloat16()
    move = mean.div_(rms.clamp_min_(1e-30)).mul_(step.rescale)
    if step.noise is not None:
        move *= confidence(move, step.noise)
    move *= step.unit
    if start is not None:
        move += step.anchor * (dual - start)
    return dual - move.mul_(step.size), *kept


def noise_of(decay: float, steps: int) -> float:
    """The mean square of a running mean over RMS of pure noise after ``steps``: the sum of the mean's squared weights."""
    return (1 - decay) / (1 + decay) * (1 + decay**steps) / (1 - decay**steps)


def confidence(move: Tensor, noise: float) -> Tensor:
    """Factors ``[out, in]`` with mean 1 that trust rows and columns as far as their gradients agree from step to step.

    move: running mean over RMS of the gradients; noise: what :func:`noise_of` says its mean square would be without a signal.
    What a row or a column has beyond that is signal. Its share, by row times by column, is the factor of a weight (Wiener's,
    with the signal of a row and of a column estimated from all of it), at most MOST.
    """
    energy = move.square()
    shares = ((energy.mean(axis) - noise).clamp_min_(LEAST * (1 - noise)) for axis in (0, 1))
    columns, rows = (share.div_(share.mean()) for share in shares)
    return torch.outer(rows, columns).clamp_max_(MOST)
