"""The global controller: mirror descent on the saliency, with the loss of the whole pruned model in the loop.

The state is one float32 dual ``V`` per matrix, on the scale of log-saliency: masks are cut from it by any pattern. It starts at
the local saliency, put on one scale for the whole model by the gradients at the matrices' outputs:

    V_ij = log(local score_ij) + log(rms of dL/dy_i)

and each step moves it against the straight-through gradient of the pruned model's loss with respect to the mask,

    V <- V - eta * m / (r + eps) - eta * rho * (V - V_start),   g = W * dL/d(W * mask)

where m and r are running mean and RMS of g (Adam's, kept in bfloat16) and rho is the anchor to the local saliency. The loss
is the Kullback-Leibler divergence from the dense model's predictions, plus the distance of the hidden states after every
block. The weights stay as they are. Idea: UniPruning, arXiv 2510.03291; departures: the gradient comes from the pruned model
itself instead of from a drifting copy of the weights, so there is no such copy, and V moves on a log scale.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.artefacts import ScoresFile, write_scores
from uniprune.errors import InputError, UniPruneError
from uniprune.executor import batches, device_of
from uniprune.matrices import Matrices, find_blocks
from uniprune.patterns import Pattern, Unstructured, top
from uniprune.progress import Progress, silent
from uniprune.straight_through import StraightThrough

logger = logging.getLogger(__name__)

TINY = 1e-20
START_WINDOWS = 16  # calibration windows whose statistics make the start
SAMPLE = 37  # every 37th dual estimates the model-wide threshold while descending; the final masks are cut exactly


class State(NamedTuple):
    """One matrix: the dual (float32), mean and RMS of its gradients (bfloat16). 8 bytes per weight in all."""

    dual: Tensor
    mean: Tensor
    rms: Tensor
    steps: int


@dataclass(frozen=True)
class MirrorDescent:
    """Settings of the controller, and its pure ``init`` / ``step`` on one matrix.

    step_size: of the dual (nats of log-saliency), falling linearly to 0. mean_decay, rms_decay: of the running mean and RMS
    of the gradients, in (0, 1). anchor: pull towards the start, per unit of step size. hidden: weight of the hidden
    states' distance beside the KL divergence. vocabulary: the KL runs over this many tokens, the commonest of the calibration
    text, which saves time. batch_tokens: per step. held_out: so many windows, but at most
    an eighth, judge and are never descended on. checks: how often they do.
    """

    step_size: float = 0.01
    mean_decay: float = 0.9
    rms_decay: float = 0.95
    anchor: float = 0.0
    hidden: float = 4.0
    vocabulary: int = 8192
    batch_tokens: int = 1024
    held_out: int = 4
    checks: int = 4

    def init(self, local: Tensor, output_gradient: Tensor) -> State:
        """local: scores ``[out, in]`` >= 0. output_gradient: RMS of dL/dy ``[out]`` at the matrix's outputs."""
        dual = local.float().clamp_min(TINY).log() + output_gradient.float().clamp_min(TINY).log()[:, None]
        nothing = torch.zeros_like(dual, dtype=torch.bfloat16)
        return State(dual, nothing, nothing.clone(), 0)

    def step(self, state: State, gradient: Tensor, size: float, start: Tensor | None = None) -> State:
        """One step against ``gradient`` ``[out, in]``, float32; ``start``: the dual that the anchor pulls to."""
        steps = state.steps + 1
        mean = torch.lerp(gradient, state.mean.float(), self.mean_decay)
        rms = torch.lerp(gradient.square(), state.rms.float().square(), self.rms_decay).sqrt()
        move = mean / (1 - self.mean_decay**steps)
        move /= (rms / math.sqrt(1 - self.rms_decay**steps)).clamp_min(1e-30)
        if start is not None:
            move += self.anchor * (state.dual - start)
        return State(state.dual - size * move, mean.bfloat16(), rms.bfloat16(), steps)


def any_sparsity() -> tuple[Pattern, ...]:
    """The targets that one artefact for all is descended on, in turn."""
    from uniprune.patterns import NM

    return *(Unstructured(level, "model") for level in (0.5, 0.6, 0.7)), NM(2, 4), NM(4, 8)


def descend(
    model: nn.Module,
    matrices: Matrices,
    windows: Tensor,
    local: Mapping[str, Tensor],
    targets: Sequence[Pattern],
    steps: int | None = None,
    settings: MirrorDescent | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global saliency (duals) and a record of the descent.

    windows: token ids ``[windows, length]``; the last few judge the state and are never descended on. local: the local
    saliency. targets: the patterns whose masks the loss is taken at, one per step, drawn by ``seed`` in shuffled rounds.
    steps: by default so many that each window is used once.
    The state with the lowest held-out KL is returned: it is never worse there than the start. A descent that diverges is set
    back to the best state and goes on at half the step size; one that stops improving is stopped.
    """
    settings = settings or MirrorDescent()
    if len(windows) < 2:
        raise InputError("the controller holds a calibration window out and needs another; give --windows 2 or more")
    judges = max(1, min(settings.held_out, len(windows) // 8))
    held_out, windows = windows[-judges:], windows[:-judges]
    todo = batches(windows, settings.batch_tokens)
    steps = steps or len(todo)
    generator = torch.Generator().manual_seed(seed)
    gradients = output_gradients(model, matrices, windows[:START_WINDOWS])
    states = {name: settings.init(local[name], gradients[name]) for name in matrices}
    starts = {name: state.dual.bfloat16() for name, state in states.items()} if settings.anchor else {}
    size = 0.0

    def sink(name: str, gradient: Tensor) -> None:
        gradient = gradient.float() * matrices[name].weight
        start = starts[name].float() if starts else None
        states[name] = settings.step(states[name], gradient, size, start)

    with StraightThrough(matrices, sink) as network, tempfile.TemporaryDirectory(prefix="uniprune-") as scratch:
        loss = Loss(model, network, windows, settings)
        best = Best(Path(scratch) / "best.safetensors", matrices)

        def judge() -> float:
            total = 0.0
            for target in targets:
                network.masks = cut(target, {name: state.dual for name, state in states.items()})
                total += loss.held_out(held_out)
            return total / len(targets)

        best.keep(judge(), states)
        record: dict[str, Any] = {"steps": steps, "tokens": 0, "held_out_kl": [best.value], "backed_off": 0}
        scale, stale = 1.0, 0
        order: list[int] = []
        for index in progress(range(steps), "descending", steps):
            if not order:
                order = torch.randperm(len(targets), generator=generator).tolist()
            target = targets[order.pop()]
            size = scale * settings.step_size * (1 - index / steps)
            previous, network.masks = network.masks, cut(target, {name: state.dual for name, state in states.items()})
            batch = todo[index % len(todo)]
            kl = loss.backward(batch)
            record["tokens"] += batch.numel()
            progress.note(f"{target}: KL {kl:.3f}, {_flips(previous, network.masks):.2%} flipped")
            logger.info("step %d: %s KL %.4f", index, target, kl)
            if (index + 1) % max(1, steps // settings.checks) and index + 1 < steps:
                continue
            value = judge()
            record["held_out_kl"].append(value)
            if value < best.value:
                best.keep(value, states)
                stale = 0
            elif not value < 1.5 * record["held_out_kl"][0]:  # also NaN
                logger.warning("the controller diverged (held-out KL %.3f); back to the best state, half the step size", value)
                states = {name: settings.init(local[name], gradients[name])._replace(dual=dual) for name, dual in best.items()}
                scale /= 2
                record["backed_off"] += 1
            else:
                stale += 1
                if stale == 2:
                    break
        record["best_held_out_kl"] = best.value
        return dict(best.items()), record


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
    """The best state so far, on disk: in memory it would cost as much again."""

    def __init__(self, path: Path, matrices: Matrices) -> None:
        self._path, self._shapes = path, {name: matrix.shape for name, matrix in matrices.items()}
        self._device = {name: matrix.parameter.device for name, matrix in matrices.items()}
        self.value = math.inf

    def keep(self, value: float, states: Mapping[str, State]) -> None:
        duals = {name: states[name].dual for name in self._shapes}
        write_scores(self._path, duals, self._shapes, {})
        self.value = value

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, dual.to(self._device[name])) for name, dual in ScoresFile(self._path).items()]


class Loss:
    """KL of the pruned model from the dense one, and the distance of their hidden states, over token windows."""

    def __init__(self, model: nn.Module, network: StraightThrough, windows: Tensor, settings: MirrorDescent) -> None:
        self._model, self._network, self._settings = model, network, settings
        self._blocks = find_blocks(model)[1]
        head = model.get_output_embeddings()  # type: ignore[operator]
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        counts = torch.bincount(windows.flatten(), minlength=head.weight.shape[0])
        common = counts.topk(min(settings.vocabulary, len(counts))).indices.sort().values.to(head.weight.device)
        self._head = head.weight.detach()[common]
        self._bias = head.bias.detach()[common] if getattr(head, "bias", None) is not None else None
        self._scale = self._logit_scale(windows[:1, :8], head, common)

    def _logit_scale(self, probe: Tensor, head: Any, common: Tensor) -> float:
        """The factor that some families put on their logits; an error if ours cannot be made the model's own."""
        with self._network.dense():
            logits = self._model(input_ids=probe.to(device_of(self._model)), use_cache=False).logits[..., common].float()
            hidden, _ = self._run(probe)
            self._scale = 1.0
            ours = self._logits(hidden)
            scale = float((logits * ours).sum() / ours.square().sum())
        if not torch.allclose(logits, ours * scale, rtol=0.05, atol=0.02 * float(logits.abs().max())):
            kind = type(self._model).__name__
            raise UniPruneError(f"the controller cannot compute the logits of {kind} block by block; use --controller none")
        return scale

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = functional.linear(hidden, self._head, self._bias).float() * self._scale
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def _run(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states ``[windows, length, width]`` and those after each block."""
        states: list[Tensor] = []

        def after(module: nn.Module, args: object, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(after) for block in self._blocks[:-1]]
        try:
            backbone = getattr(self._model, "base_model", self._model)
            output = backbone(input_ids=batch.to(device_of(self._model)), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return output.last_hidden_state, states

    def backward(self, batch: Tensor) -> float:
        """Runs the pruned model forwards and backwards; the gradients go to the network's sink. Returns the KL in nats."""
        with self._network.dense():
            teacher, teacher_states = self._run(batch)
        student, states = self._run(batch)
        kl, gradient = self._kl(student.detach(), teacher)
        distance = torch.zeros((), device=student.device)
        if self._settings.hidden:
            for ours, theirs in zip(states, teacher_states, strict=True):
                distance = distance + (_unit(ours) - _unit(theirs)).square().mean() / len(states)
        # Sums over the tokens, not means: the step does not see the scale, and float16 would lose small gradients.
        if distance.requires_grad:
            weight = torch.full_like(distance, self._settings.hidden * batch.numel())
            torch.autograd.backward([student, distance], [gradient, weight])
        else:
            torch.autograd.backward([student], [gradient])
        return kl

    @torch.no_grad()
    def held_out(self, windows: Tensor) -> float:
        """Mean KL in nats per token over windows, without gradients."""
        total = 0.0
        for batch in batches(windows, self._settings.batch_tokens):
            with self._network.dense():
                teacher, _ = self._run(batch)
            student, _ = self._run(batch)
            total += self._kl(student, teacher, differentiate=False)[0] * batch.numel()
        return total / windows.numel()

    def _kl(self, student: Tensor, teacher: Tensor, differentiate: bool = True) -> tuple[float, Tensor]:
        """Mean KL(dense || pruned) per token, and the gradient of its sum, a window at a time: logits are large."""
        total, gradients = 0.0, []
        for ours, theirs in zip(student, teacher, strict=True):
            with torch.no_grad():
                target = functional.log_softmax(self._logits(theirs), -1)
            with torch.set_grad_enabled(differentiate):
                ours = ours.detach().requires_grad_(differentiate)
                predicted = functional.log_softmax(self._logits(ours), -1)
                kl = functional.kl_div(predicted, target, log_target=True, reduction="sum")
            if differentiate:
                gradients.append(torch.autograd.grad(kl, ours)[0])
            total += float(kl.detach())
        tokens = student.shape[0] * student.shape[1]
        return total / tokens, torch.stack(gradients) if gradients else student


def _unit(hidden: Tensor) -> Tensor:
    """Hidden states with RMS 1, float32: what the next block's norm makes of them."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)


def output_gradients(model: nn.Module, matrices: Matrices, windows: Tensor) -> dict[str, Tensor]:
    """RMS of the dense model's next-token loss gradient at each matrix's outputs, float32 ``[out]``."""
    totals = {name: torch.zeros(matrix.shape[0], device=matrix.parameter.device) for name, matrix in matrices.items()}

    def watch(name: str) -> Any:
        def add(gradient: Tensor) -> None:
            totals[name] += gradient.float().square().flatten(0, -2).sum(0)

        return lambda module, args, output: output.register_hook(add) and None

    handles = [matrix.module.register_forward_hook(watch(name)) for name, matrix in matrices.items()]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        with torch.enable_grad():
            for window in windows:
                ids = window[None].to(device_of(model))
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    tokens = windows.numel()
    return {name: (total / tokens).sqrt() for name, total in totals.items()}
