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
drifting copy of the weights, so there is no such copy (that variant is ``paper``).

What limits a descent on few tokens is the noise of the gradients, so three things make it smaller. Rows and columns move by
how far their gradients agree from step to step (:func:`confidence`). And a few loud tokens would drown the rest, so tokens are
evened out twice: in the loss (its ``evenness``), and in each matrix's gradient, by the sizes of the input and the output
gradient that a token has there (:class:`Evener`).
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.artefacts import ScoresFile, write_scores
from uniprune.calibration import LocalSaliency, check_seen, observing
from uniprune.errors import InputError
from uniprune.executor import batches, device_of
from uniprune.loss import Loss
from uniprune.matrices import Matrices
from uniprune.metrics import Metric, SquaredNorm
from uniprune.patterns import NM, Pattern, Unstructured, top
from uniprune.progress import Progress, silent
from uniprune.prox import relaxed
from uniprune.straight_through import StraightThrough

logger = logging.getLogger(__name__)

TINY = 1e-20
LEAST, MOST = 0.02, 5.0  # signal share of a row or column, and factor of a weight, in confidence()
START_WINDOWS = 16  # calibration windows whose statistics make the start
SAMPLE = 37  # every 37th dual estimates the model-wide threshold while descending; the final masks are cut exactly


class State(NamedTuple):
    """One matrix: the dual (float32), mean and RMS of its gradients (bfloat16). 8 bytes per weight in all."""

    dual: Tensor
    mean: Tensor
    rms: Tensor
    unit: float
    steps: int


@dataclass(frozen=True)
class MirrorDescent:
    """Settings of the controller, and its pure ``init`` / ``step`` on one matrix.

    step_size: of the dual, in units of the matrix's mean dual, falling linearly to 0. mean_decay, rms_decay: of the running
    mean and RMS of the gradients, in (0, 1). power: of the saliency that the dual is, > 0. anchor: pull towards the start, per
    unit of step size. temperature: of relaxed masks (``prox.relaxed``), in units of the mean dual, falling linearly to 0; 0
    has hard masks throughout. labels, evenness, hidden, vocabulary: of the loss, see ``loss.Loss``. even_tokens: whether each
    matrix's gradient evens its tokens out. focus: whether rows and columns move by how far their gradients agree from step to
    step (:func:`confidence`). batch_tokens: per step. held_out: so many windows, one for each target at least and
    an eighth at most, judge and are never descended on. checks: how often they do.
    """

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
        below_one = ("mean_decay", "rms_decay", "labels")
        for name, value in asdict(self).items():
            if not (0 <= value < math.inf) or (name in below_one and value > 1):
                raise InputError(f"controller: {name} = {value} is not {'in [0, 1]' if name in below_one else 'a number >= 0'}")
        if self.power == 0 or min(self.batch_tokens, self.held_out, self.checks, self.vocabulary) < 1:
            raise InputError("controller: power, batch_tokens, held_out, checks and vocabulary must be above 0")

    def step_tokens(self, length: int) -> int:
        """Tokens of a step on windows of ``length``."""
        return self.batch_tokens

    def init(self, local: Tensor, output_gradient: Tensor) -> State:
        """local: scores ``[out, in]`` >= 0. output_gradient: RMS of dL/dy ``[out]`` at the matrix's outputs."""
        dual = (local.float() * output_gradient.float()[:, None]).clamp_min(TINY) ** self.power
        nothing = torch.zeros_like(dual, dtype=torch.bfloat16)
        return State(dual, nothing, nothing.clone(), float(dual.mean()), 0)

    def step(self, state: State, gradient: Tensor, size: float, start: Tensor | None = None) -> State:
        """One step against ``gradient`` ``[out, in]``, float32; ``start``: the dual that the anchor pulls to."""
        steps = state.steps + 1
        mean = torch.lerp(gradient, state.mean.float(), self.mean_decay)
        rms = torch.lerp(gradient.square(), state.rms.float().square(), self.rms_decay).sqrt_()
        move = mean / rms.clamp_min(1e-30)
        move *= math.sqrt(1 - self.rms_decay**steps) / (1 - self.mean_decay**steps)
        if self.focus and steps > 2:
            move *= confidence(move, self.mean_decay, steps)
        move *= state.unit
        if start is not None:
            move += self.anchor * (state.dual - start)
        return State(state.dual - size * move, mean.bfloat16(), rms.bfloat16(), state.unit, steps)


def confidence(move: Tensor, decay: float, steps: int) -> Tensor:
    """Factors ``[out, in]`` with mean 1 that trust rows and columns as far as their gradients agree from step to step.

    move: running mean over RMS of the gradients after ``steps`` steps, ``decay`` that of the mean. In pure noise its square is
    the sum of the mean's squared weights; what a row or a column has beyond that is signal. Its share, by row times by column,
    is the factor of a weight (Wiener's, with the signal of a row and of a column estimated from all of it), at most MOST.
    """
    noise = (1 - decay) / (1 + decay) * (1 + decay**steps) / (1 - decay**steps)
    energy = move.square()
    shares = [(energy.mean(axis, keepdim=True) - noise).clamp_min(LEAST * (1 - noise)) for axis in (0, 1)]
    factor = shares[0] * shares[1]
    return (factor / factor.mean()).clamp_max_(MOST)


class Evener:
    """Weighs the tokens of each matrix's gradient: ``|x| ** -1 * |dL/dy| ** -1/2``, scaled to mean 1.

    Sizes are RMS over channels, each channel in units of its own RMS in the dense model. The exponents were chosen by how well
    the gradient of few tokens then tells that of many (docs/results.md).
    """

    def __init__(self, inputs: Mapping[str, SquaredNorm], gradients: Mapping[str, Tensor]) -> None:
        self._inputs = {name: norm.rms.clamp_min(1e-9).reciprocal() for name, norm in inputs.items()}
        self._gradients = {name: rms.clamp_min(TINY).reciprocal() for name, rms in gradients.items()}

    def __call__(self, name: str, x: Tensor, gradient: Tensor) -> Tensor:
        """Weights ``[tokens]`` for inputs ``[tokens, in]`` and output gradients ``[tokens, out]``."""
        heard = (x * self._inputs[name]).square().mean(1).clamp_min(TINY)
        said = (gradient * self._gradients[name]).square().mean(1).clamp_min(TINY)
        weights = heard**-0.5 * said**-0.25
        return (weights / weights.mean()).to(gradient.dtype)


def any_sparsity() -> tuple[Pattern, ...]:
    """The targets that one artefact for all is descended on, in turn."""
    return *(Unstructured(level, "model") for level in (0.5, 0.6, 0.7)), NM(2, 4), NM(4, 8)


def descend(
    model: nn.Module,
    matrices: Matrices,
    windows: Tensor,
    metric: Metric,
    targets: Sequence[Pattern],
    steps: int | None = None,
    settings: MirrorDescent | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global saliency (duals) and a record of the descent.

    windows: token ids ``[windows, length]``; the last few judge the state and are never descended on, the first few also make
    the start. metric: the local saliency. targets: the patterns whose masks the loss is taken at, one per step, drawn by
    ``seed`` in shuffled rounds. steps: by default so many that each window is used once.
    The state with the lowest held-out KL is returned: it is never worse there than the start. A descent that diverges is set
    back to the best state and goes on at half the step size; one that stops improving is stopped.
    """
    settings = settings or MirrorDescent()
    if len(windows) < 2:
        raise InputError("the controller holds a calibration window out and needs another; give --windows 2 or more")
    judges = max(1, min(max(settings.held_out, len(targets)), len(windows) // 8))
    held_out, windows = windows[-judges:], windows[:-judges]
    todo = batches(windows, settings.batch_tokens)
    steps = steps or len(todo)
    order = _drawn(targets, seed)
    with Descent(model, matrices, windows, metric, settings) as descent, Best(matrices) as best:
        best.keep(descent.judge(targets, held_out), descent.states)
        history, stale = [best.value], 0
        for index in progress(range(steps), "descending", steps):
            target = next(order)
            kl, flips = descent.step(todo[index % len(todo)], target, 1 - index / steps)
            progress.note(f"{target}: KL {kl:.3f}, {flips:.2%} flipped")
            logger.info("step %d: %s KL %.4f", index, target, kl)
            if (index + 1) % max(1, steps // settings.checks) and index + 1 < steps:
                continue
            history.append(descent.judge(targets, held_out))
            if history[-1] < best.value:
                best.keep(history[-1], descent.states)
                stale = 0
            elif not history[-1] < 1.5 * history[0]:  # also NaN
                logger.warning("the controller diverged (held-out KL %.3f); back to the best state, half the step", history[-1])
                descent.back_off(best.items())
            else:
                stale += 1
                if stale == 2:
                    break
        judged = {"steps": steps, "held_out_kl": history, "best_held_out_kl": best.value}
        return dict(best.items()), judged | descent.record


class Descent:
    """The states of all matrices, and the model under their masks; inside ``with`` it is routed through them.

    record: tokens descended on, KL in nats per token and share of flipped masks of each step, how often it backed off.
    """

    def __init__(self, model: nn.Module, matrices: Matrices, windows: Tensor, metric: Metric, settings: MirrorDescent) -> None:
        self._matrices, self._settings = matrices, settings
        inputs, gradients = sensitivities(model, matrices, windows[:START_WINDOWS])
        local = LocalSaliency(matrices, metric, inputs)
        self.states = {name: settings.init(local[name], gradients[name]) for name in matrices}
        self._starts = {name: state.dual.bfloat16() for name, state in self.states.items()} if settings.anchor else {}
        self._unit = sum(state.unit for state in self.states.values()) / len(matrices)
        self._scale, self._size = 1.0, 0.0
        self._hard: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}  # of relaxed masks
        evener = Evener(inputs, gradients) if settings.even_tokens else None
        self._network = StraightThrough(matrices, self._sink, evener)
        loss = settings.vocabulary, settings.labels, settings.evenness, settings.hidden
        self._loss = Loss(model, self._network, windows, *loss)
        self.record: dict[str, Any] = {"tokens": 0, "kl": [], "flips": [], "backed_off": 0}

    def __enter__(self) -> Descent:
        self._network.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._network.__exit__(*error)

    def step(self, batch: Tensor, target: Pattern, left: float) -> tuple[float, float]:
        """One step on windows ``[n, length]``; its KL in nats per token, and the share of masks that had flipped before it.

        left: the part of the descent that is left, in (0, 1], which the step size and the temperature follow.
        """
        self._size = self._scale * self._settings.step_size * left
        duals = self._duals()
        before, self._hard = self._hard, cut(target, duals)
        self._network.masks = self._hard
        if self._settings.temperature:
            self._network.masks = dict(relaxed(target, duals, self._settings.temperature * left * self._unit))
            self._slopes = {name: mask * (1 - mask) for name, mask in self._network.masks.items()}
        kl, flips = self._loss.backward(batch), _flips(before, self._hard)
        self.record["tokens"] += batch.numel()
        self.record["kl"].append(kl)
        self.record["flips"].append(flips)
        return kl, flips

    def judge(self, targets: Sequence[Pattern], windows: Tensor) -> float:
        """Mean KL in nats per token of hard masks; the targets share the windows, so that many cost no more than one."""
        total = 0.0
        for index, target in enumerate(targets):
            self._network.masks = cut(target, self._duals())
            total += self._loss.held_out(windows[index % len(windows) :: len(targets)])
        return total / len(targets)

    def back_off(self, duals: Iterable[tuple[str, Tensor]]) -> None:
        """Goes on from other duals at half the step size, without momentum."""
        for name, dual in duals:
            nothing = torch.zeros_like(dual, dtype=torch.bfloat16)
            self.states[name] = State(dual, nothing, nothing.clone(), self.states[name].unit, 0)
        self._scale /= 2
        self.record["backed_off"] += 1

    def _duals(self) -> dict[str, Tensor]:
        return {name: state.dual for name, state in self.states.items()}

    def _sink(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.float() * self._matrices[name].weight
        if self._slopes:
            gradient *= self._slopes[name]
        start = self._starts[name].float() if self._starts else None
        self.states[name] = self._settings.step(self.states[name], gradient, self._size, start)


def _drawn(targets: Sequence[Pattern], seed: int) -> Iterator[Pattern]:
    """The targets in shuffled rounds, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (targets[index] for index in torch.randperm(len(targets), generator=generator).tolist())


def cut(target: Pattern, duals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks for one step; a model-wide threshold is estimated from a sample, which costs next to nothing."""
    if target.local:
        return dict(target(duals))
    assert isinstance(target, Unstructured)
    sample = torch.cat([dual.flatten()[::SAMPLE] for dual in duals.values()])
    kept = top(sample[None], target.keep(len(sample)))[0]
    threshold = sample[kept].min() if bool(kept.any()) else torch.inf
    return {name: dual >= threshold for name, dual in duals.items()}


def _flips(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    if not before:
        return 0.0
    changed = sum(int((before[name] != mask).sum()) for name, mask in after.items())
    return changed / sum(mask.numel() for mask in after.values())


class Best:
    """The best state so far, in a temporary file inside ``with``: in memory it would cost as much again."""

    def __init__(self, matrices: Matrices) -> None:
        self._shapes = {name: matrix.shape for name, matrix in matrices.items()}
        self._device = {name: matrix.parameter.device for name, matrix in matrices.items()}
        self._folder = tempfile.TemporaryDirectory(prefix="uniprune-")
        self._path = Path(self._folder.name) / "best.safetensors"
        self.value = math.inf

    def __enter__(self) -> Best:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def keep(self, value: float, states: Mapping[str, State]) -> None:
        write_scores(self._path, {name: states[name].dual for name in self._shapes}, self._shapes, {})
        self.value = value

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name, dual in ScoresFile(self._path).items():
            yield name, dual.to(self._device[name])


def sensitivities(model: nn.Module, matrices: Matrices, windows: Tensor) -> tuple[dict[str, SquaredNorm], dict[str, Tensor]]:
    """The inputs of each matrix in the dense model, and the RMS ``[out]`` of its next-token loss gradient at the outputs."""
    totals = {name: torch.zeros(matrix.shape[0], device=matrix.parameter.device) for name, matrix in matrices.items()}

    def watch(name: str) -> Any:
        def add(gradient: Tensor) -> None:
            totals[name] += gradient.float().square().flatten(0, -2).sum(0)

        return lambda module, args, output: output.register_hook(add) and None

    handles = [matrix.module.register_forward_hook(watch(name)) for name, matrix in matrices.items()]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        with torch.enable_grad(), observing(matrices, SquaredNorm) as inputs:
            for window in windows:
                ids = window[None].to(device_of(model))
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    check_seen(inputs)
    return inputs, {name: (total / windows.numel()).sqrt() for name, total in totals.items()}
