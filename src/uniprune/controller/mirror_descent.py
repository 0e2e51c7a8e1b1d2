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
as their gradients agree from step to step (``update.confidence``). And so that a few tokens with large gradients do not drown
the others, each token's divergence is weighted down in the loss (its ``evenness``), and tokens are weighted in each matrix's
gradient by the sizes of their input and output gradient there (``token_weighting``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from uniprune.controller.bounds import COUNT, DECAY, FRACTION, NOT_NEGATIVE, POSITIVE, check_bounds
from uniprune.controller.descent import loop
from uniprune.controller.descent.token_weighting import TINY
from uniprune.controller.descent.update import Step, noise_of, updated
from uniprune.controller.protocol import Controller, ControllerRecord, Cost
from uniprune.controller.schedule import step_windows
from uniprune.errors import InputError
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Metric
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.storage.runs import OLDER
from uniprune.storage.stash import moved

BOUNDS = {
    "step_size": NOT_NEGATIVE,
    "mean_decay": DECAY,
    "rms_decay": DECAY,
    "power": POSITIVE,
    "labels": FRACTION,
    "evenness": NOT_NEGATIVE,
    "vocabulary": COUNT,
    "batch_tokens": COUNT,
    "held_out": COUNT,
    "checks": COUNT,
}


class State(NamedTuple):
    """The state of one matrix ``[out, in]``: its dual, and mean and RMS of its gradients. 6 bytes per weight in all.

    dual: float32. ratio: mean / RMS, which the decays bound (``update.Step.level``), int8. rms: in units of ``top``, in UE5M3
    (uint8: 5 bits of exponent, 3 of mantissa). top: the largest gradient so far, float32 ``[]``. unit: the mean dual at the
    start. steps: taken so far.
    ratio and rms are rounded stochastically (``update.dither``): rounded to nearest, changes of a running mean that are less
    than half a unit would all be lost. Both use the same dither, so that the mean's error is 1e-4 of the RMS.
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
class MirrorDescent(Controller):
    """Settings of the controller, its pure ``init`` / ``step`` on one matrix, and :meth:`calibrate`, which descends on all.

    step_size: of the dual, in units of the matrix's mean dual; falls linearly to 0. mean_decay, rms_decay: of the running mean
    and RMS of the gradients (Adam's beta1 and beta2), in [0, 1). power: the dual is the saliency to this power, > 0. labels,
    evenness: of the loss, see ``loss.Loss``. vocabulary: the loss compares the predictions of so many tokens only, the text's
    most frequent ones (with labels, of all). even_tokens: whether each matrix's gradient weights outlier tokens down. focus:
    whether rows and columns move only as far as their gradients agree from step to step (``update.confidence``). batch_tokens:
    tokens of a step. held_out: windows that the state is checked on and never descends on, at least one for each target and at
    most an eighth of all. checks: the most checks, evenly spaced, besides the one of the start.

    A variant is a subclass with an ``init`` or ``step`` of its own; the loop (``descent``) uses of a state only what is in
    ``states.UpdateState``.
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
    images: ClassVar[bool] = True
    holds_out: ClassVar[bool] = True

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
        check_bounds("feedback", self, BOUNDS)
        if self.mean_decay and self.mean_decay**2 >= self.rms_decay:  # nothing bounds the mean in units of the RMS
            raise InputError(f"feedback: rms_decay = {self.rms_decay} is not above mean_decay ** 2 = {self.mean_decay**2:.4g}")

    def step_tokens(self, length: int) -> int:
        """Tokens of a step on windows of ``length``."""
        return step_windows(self.batch_tokens, length) * length

    def logits(self, vocabulary: int) -> int:
        """The most frequent tokens of the text, but all where labels count."""
        return vocabulary if self.labels else min(vocabulary, self.vocabulary)

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
