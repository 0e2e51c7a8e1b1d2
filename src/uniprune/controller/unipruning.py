"""The published controller (UniPruning, arXiv 2510.03291), written from its objective: the ablation beside ``mirror_descent``.

    min over (W', Gamma) of  L(W') + rho/2 * |Gamma - S(W', X)|^2 + lambda * |Gamma|_1

W' is a working copy of the prunable weights, thrown away at the end; L the next-token cross-entropy; S a local metric of W' and
of the inputs X of its matrices. A step on one batch:

    W' <- Adam step on L, at the learning rate h_t; for an N:M target then W' <- prox of h_t * lambda2 * R_NM
    V <- V + alpha * rho * (S(W', X) - Gamma)
    Gamma <- kappa * soft_threshold(V, lambda)

Masks are cut from Gamma: float32, finite and >= 0, on the scale of the local metric, unlike the duals of ``mirror_descent``. So
cuts over the whole model need ``views.ScaledToMeanOne``, as with the metric itself.

Departures and choices, where the published values do nothing:

- alpha is 5,000, so that alpha * rho is 0.05: with alpha near 1, V moves by about 0.1 % in 128 steps. With kappa = 1, Gamma is
  then the moving average of S(W', X) over about 20 steps.
- V starts at S of the dense model, plus lambda: at rest, Gamma is the local saliency. From there V never falls under lambda
  while alpha * rho * kappa <= 1 (which is enforced), so lambda shifts V and does not change Gamma.
- W' moves on L alone. The coupling's own gradient, rho * (S - Gamma) * dS/dW', is left out.
- The prox is a proximal gradient step: its weight is lambda2 times the learning rate, in the plain metric, not in Adam's. At
  2:4 it takes h_t * lambda2 * (the sum of the products of the others by twos) off a weight. With the published lambda2 = 1e-3
  and weights of 0.05 that is under the last bit of a float32; at about 1 / (3 weight^2), about 130, it pulls as hard as Adam.
- The inputs X are those of the forward pass of the step, made by W' before the step: no second pass.

Memory: per prunable weight 16 bytes (copy, gradient, two moments) besides the model, 4 for V, and what autograd keeps of one
batch; in a half-precision model that includes W' in its dtype.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.controller.bounds import COUNT, FRACTION, NOT_NEGATIVE, check_bounds
from uniprune.controller.protocol import Controller, ControllerRecord, Cost
from uniprune.controller.prox import prox_nm, soft_threshold
from uniprune.controller.schedule import in_steps, shuffled_rounds, step_windows
from uniprune.controller.start import warn_without_gradient
from uniprune.errors import InputError, UniPruneError
from uniprune.models.blocks import device_of, rerouted, text_alone
from uniprune.models.experts import unfused
from uniprune.models.matrices import Matrices, Matrix
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import Metric
from uniprune.saliency.observation import observing
from uniprune.sparsity.patterns.checks import check_fit
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern

logger = logging.getLogger(__name__)

BOUNDS = {
    "learning_rate": NOT_NEGATIVE,
    "warmup": FRACTION,
    "lam": NOT_NEGATIVE,
    "nm_weight": NOT_NEGATIVE,
    "batch_tokens": COUNT,
}


@dataclass(frozen=True)
class UniPruning(Controller):
    """Settings of the published controller, its pure ``init`` / ``step`` on one matrix, and :meth:`calibrate`.

    learning_rate: of Adam at its peak, after a linear warm-up over the fraction ``warmup`` of the steps and before a linear
    decay to 0. rho: the coupling of Gamma to S. lam: lambda, the threshold, in units of the local metric. nm_weight: lambda2,
    for N:M targets; others have none. alpha: the step of V. kappa: the scale of Gamma. batch_tokens: tokens of a step.
    """

    cost: ClassVar[Cost] = Cost(flops_per_token=6, state_bytes=20)  # copy, gradient, two moments and V, float32

    learning_rate: float = 1e-4
    warmup: float = 0.1
    rho: float = 1e-5
    lam: float = 1e-3
    nm_weight: float = 1e-3
    alpha: float = 5e3
    kappa: float = 1.0
    batch_tokens: int = 512

    def __post_init__(self) -> None:
        check_bounds("unipruning", self, BOUNDS)
        if not (self.kappa > 0 and 0 < self.alpha * self.rho * self.kappa <= 1):
            rate = self.alpha * self.rho * self.kappa
            raise InputError(f"unipruning: alpha * rho * kappa = {rate:g} is not in (0, 1]; beyond 1 the saliency overshoots")

    def step_tokens(self, length: int) -> int:
        """Tokens of a step on windows of ``length``."""
        return step_windows(self.batch_tokens, length) * length

    def init(self, local: Tensor) -> Tensor:
        """The first V ``[out, in]``, float32. local: scores ``[out, in]`` >= 0, which are the first Gamma."""
        return local.float() / self.kappa + self.lam

    def step(self, dual: Tensor, saliency: Tensor) -> Tensor:
        """V after one step towards ``saliency`` ``[out, in]``, S(W', X)."""
        return dual + self.alpha * self.rho * (saliency.float() - self.gamma(dual))

    def gamma(self, dual: Tensor) -> Tensor:
        """The global saliency ``[out, in]``, >= 0."""
        return self.kappa * soft_threshold(dual, self.lam)

    def rate(self, index: int, steps: int) -> float:
        """The learning rate of step ``index`` of ``steps``; none is 0, so that no batch is wasted."""
        rising = (index + 1) / max(1.0, self.warmup * steps)
        falling = (steps - index) / max(1.0, (1 - self.warmup) * steps)
        return self.learning_rate * min(1.0, rising, falling)

    def calibrate(
        self,
        calibration: Calibration,
        metric: Metric,
        targets: Sequence[Pattern],
        steps: int | None = None,
        seed: int = 0,
    ) -> tuple[dict[str, Tensor], ControllerRecord]:
        """The global saliency Gamma and a record of the descent: steps, tokens, and each step's loss in nats per token.

        metric: the local metric S. targets: one per step, drawn by ``seed`` in shuffled rounds; they matter only where they are
        N:M, by their prox. steps: by default each window is used once.
        The model's weights are the same afterwards, bit for bit, also after an error.
        Raises InputError if a matrix cannot have a target, UniPruneError if the loss is no longer finite.
        """
        matrices = calibration.matrices
        for target in targets:
            check_fit(((name, matrix.shape) for name, matrix in matrices.items()), target)
        todo = in_steps(calibration.windows, self.batch_tokens)
        steps = steps or len(todo)
        order = shuffled_rounds(targets, seed)
        local = one_shot(calibration, metric)
        duals = {name: self.init(local[name]) for name in matrices}
        losses: list[float] = []
        tokens = 0
        with WorkingCopy(calibration.model, matrices) as copy:
            for index in calibration.progress(range(steps), "descending", steps):
                target, batch = next(order), todo[index % len(todo)]
                rate = self.rate(index, steps)
                with observing(matrices, metric.statistic) as statistics:
                    loss = copy.step(batch, rate)
                if not math.isfinite(loss):
                    raise UniPruneError(f"step {index}: the loss is {loss}; lower the learning rate {self.learning_rate:g}")
                copy.pull(target, rate * self.nm_weight)
                for name, weight in copy.weights.items():
                    statistic = statistics.get(name)
                    if statistic is None or statistic.tokens:  # an expert may see nothing of one batch: its V stays
                        duals[name] = self.step(duals[name], metric(weight.detach(), statistic))
                tokens += batch.numel()
                losses.append(loss)
                calibration.progress.note(f"{target}: loss {loss:.3f}", batch.numel())
                logger.info("step %d: %s loss %.4f", index, target, loss)
        warn_without_gradient(copy.without_gradient)
        record = ControllerRecord(
            objective="cross-entropy",
            steps=steps,
            tokens=tokens,
            loss=losses,
            without_gradient=list(copy.without_gradient),
            starved=local.starved,
        )
        return {name: self.gamma(dual) for name, dual in duals.items()}, record


class WorkingCopy:
    """Routes the matrices of a model through a float32 copy of their weights that learns, inside ``with``.

    weights: matrix name -> W' ``[out, in]``. without_gradient: matrices, experts' aside, that no gradient has reached so far.
    The model itself is never written to, and is as it was afterwards.
    """

    def __init__(self, model: nn.Module, matrices: Matrices) -> None:
        self._model = model
        self._matrices = matrices
        self.weights = {name: _copy(matrix) for name, matrix in matrices.items()}
        self.without_gradient = [name for name, matrix in matrices.items() if not matrix.group]
        self._adam = torch.optim.Adam(self.weights.values(), foreach=False)  # foreach would need another copy
        self._routes = ExitStack()

    def __enter__(self) -> WorkingCopy:
        routed = [(module, self.weights[name]) for name, matrix in self._matrices.items() for module in matrix.modules]
        self._routes.enter_context(rerouted((module for module, _ in routed), lambda index, forward: _route(*routed[index])))
        self._routes.enter_context(unfused(matrix.module for matrix in self._matrices.values()))
        return self

    def __exit__(self, *error: object) -> None:
        self._routes.close()

    def step(self, batch: Tensor, rate: float) -> float:
        """One Adam step on the next-token cross-entropy of windows ``[n, length]``; returns it in nats per token."""
        ids = batch.to(device_of(self._model))
        leaves = list(self.weights.values())
        with text_alone(self._model), torch.enable_grad():
            logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1]
            # The gradient is that of the sum, and divided in float32: float16 would lose small gradients.
            loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        tokens = ids[:, 1:].numel()
        by_name = dict(zip(self.weights, gradients, strict=True))
        self.without_gradient = [
            name for name in self.without_gradient if (gradient := by_name[name]) is None or not bool(gradient.any())
        ]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = None if gradient is None else gradient.div_(tokens)
        del gradients, by_name
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        return float(loss.detach()) / tokens

    @torch.no_grad()
    def pull(self, target: Pattern, weight: float) -> None:
        """W' <- prox of ``weight`` times the N:M regulariser, for matrices that are to be N:M."""
        for name, leaf in self.weights.items() if weight else ():
            part = target.pattern_of(name)
            if isinstance(part, NM) and part.n < part.m:
                leaf.copy_(prox_nm(leaf, weight, part.n, part.m))


def _copy(matrix: Matrix) -> Tensor:
    copied = matrix.weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copied.requires_grad_()


def _route(module: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = module.bias
        return functional.linear(x, weight.to(x.dtype), bias if isinstance(bias, Tensor) else None)

    return forward
