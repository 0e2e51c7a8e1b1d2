"""The loop around the controller: the pruned model's loss, the steps of all matrices, the windows that judge, the best state.

A descent can be interrupted: its state goes into a run folder (``runs``) and it continues from there, bit for bit. It can be
shared between processes (``ranks``): each takes its part of every step's windows, and all have the same state.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.controller.loss import Loss
from uniprune.controller.mirror_descent import Evener, MirrorDescent, State
from uniprune.controller.passes import Passes, Resident, Streamed
from uniprune.controller.states import Best, Cut, States, StoredStates
from uniprune.controller.straight_through import StraightThrough
from uniprune.errors import InputError
from uniprune.models.blocks import Replay, Residency, resident
from uniprune.models.blocks import batches as in_batches
from uniprune.models.matrices import Matrices, find_blocks
from uniprune.saliency import statistics
from uniprune.saliency.calibration import LocalSaliency
from uniprune.saliency.metrics import Metric
from uniprune.saliency.statistics import SquaredNorm, check_seen
from uniprune.sparsity.patterns import NM, Pattern, Unstructured
from uniprune.storage.runs import Pace, Run
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

logger = logging.getLogger(__name__)

START_TOKENS = 8192  # of calibration text, whose statistics make the start
SAMPLE, SAMPLED = 37, 1 << 22  # every 37th dual, or so many in all, tell what a common budget would be while descending
JUDGED = 1024  # tokens in one batch of held-out windows
GLANCE = 16  # one row of 16 tells how many masks a step flipped; as many at a time as tiles may need


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
    residency: Residency = resident,
    run: Run | None = None,
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The global saliency (duals) and a record of the descent.

    windows: token ids ``[windows, length]``; the last few judge the state and are never descended on, the first few also make
    the start. metric: the local saliency. targets: the patterns whose masks the loss is taken at, one per step, drawn by
    ``seed`` in shuffled rounds. steps: by default so many that each window is used once. residency: of a model whose blocks are
    in memory one at a time; its states are then kept on disk. run: where progress is kept, and taken up again; the saliency
    that is returned may lie there.
    The state with the lowest held-out KL is returned: it is never worse there than the start. A descent that diverges is set
    back to the best state and goes on at half the step size; one that stops improving is stopped.
    Raises InputError if there are too few windows.
    """
    settings = settings or MirrorDescent()
    if len(windows) < 2:
        raise InputError("the controller holds a calibration window out and needs another; give --windows 2 or more")
    if settings.temperature:
        if not all(isinstance(target, (Unstructured, NM)) and getattr(target, "scope", "") != "block" for target in targets):
            raise InputError(f"masks of {targets[0]} cannot be relaxed; leave temperature at 0")
        if residency is not resident and not all(target.local for target in targets):
            raise InputError("relaxed masks with one budget for the model need all of it in memory; leave temperature at 0")
    judges = max(1, min(max(settings.held_out, len(targets)), len(windows) // 8))
    held_out, windows = windows[-judges:], windows[:-judges]
    todo = in_batches(windows, settings.batch_tokens)
    steps = steps or len(todo)
    with ExitStack() as stack:
        kept = run or Run(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uniprune-"))))
        passes = _passes(model, matrices, residency, kept)
        stack.enter_context(passes.network)
        descent = Descent(passes, matrices, windows, metric, targets, settings, kept, durable=run is not None)
        best, order = descent.best, _drawn(targets, seed)
        history, stale, begin = [], 0, 0
        every = math.ceil(steps / settings.checks)
        if saved := descent.saved():
            history, stale, begin = saved["history"], saved["stale"], saved["step"]
            best.value = saved["best"]
        else:
            best.keep(descent.judge(targets, held_out), descent.states)
            history = [best.value]
        for _ in range(begin):
            next(order)
        for index in progress(range(begin, steps), "descending", steps - begin):
            target, batch = next(order), todo[index % len(todo)]
            kl, flips = descent.step(batch, target, 1 - index / steps)
            progress.note(f"{target}: KL {kl:.3f}, {flips:.2%} flipped", batch.numel())
            logger.info("step %d: %s KL %.4f", index, target, kl)
            if not (index + 1) % every or index + 1 == steps:
                history.append(descent.judge(targets, held_out))
                if history[-1] < best.value:
                    best.keep(history[-1], descent.states)
                    stale = 0
                elif not history[-1] < 1.5 * history[0]:  # also NaN
                    logger.warning("the controller diverged (held-out KL %.3f); back to the best, half the step", history[-1])
                    descent.back_off()
                else:
                    stale += 1
            after = steps if stale == 2 else index + 1
            facts = {"step": after, "history": history, "stale": stale, "best": best.value}
            descent.save(facts, last=after == steps)
            if stale == 2:
                break
        judged = {"steps": steps, "judged_every": every, "held_out_kl": history, "best_held_out_kl": best.value}
        return best if run else dict(best), judged | descent.record


class Descent:
    """The states of all matrices, and the steps that move them.

    best: of the states that were judged. record: tokens descended on, KL in nats per token and share of masks that each step
    flipped, how often it backed off.
    """

    def __init__(
        self,
        passes: Passes,
        matrices: Matrices,
        windows: Tensor,
        metric: Metric,
        targets: Sequence[Pattern],
        settings: MirrorDescent,
        run: Run,
        durable: bool = False,
    ) -> None:
        self._passes, self._matrices, self._settings = passes, matrices, settings
        self._streamed = isinstance(passes, Streamed)
        self._durable, self._pace, self._store = durable, Pace(), Store(run, "descent")
        head = passes.head(windows, None if settings.labels else settings.vocabulary)
        self._loss = Loss(head, settings.labels, settings.evenness, settings.hidden)
        inputs, self._gradients = _start(passes, windows[: max(1, START_TOKENS // windows.shape[1])], run, durable)
        self._local = LocalSaliency(matrices, metric, inputs)
        self.states: States | StoredStates = StoredStates(self._store) if self._streamed else States(self._store)
        self.best = Best(self._store, matrices, passes.device)
        self._every = max(SAMPLE, sum(matrix.size for matrix in matrices.values()) // SAMPLED)
        grains = {target.grain for target in targets if not target.local}
        self._samples: dict[int, dict[str, Tensor]] = {grain: {} for grain in grains if grain}
        self._scale, self._size = 1.0, 0.0
        self._flipped, self._seen = 0, 0
        self.record: dict[str, Any] = {"tokens": 0, "kl": [], "flips": [], "backed_off": 0}
        self.record |= self._local.starved
        saved = StoredStates(self._store) if self._store.facts else None
        for name in matrices:
            state = saved[name].to(passes.device) if saved else self.start(name)
            if saved is None or not self._streamed:  # else it is where it belongs
                self.states[name] = state
            self._sample(name, state)
        passes.network.sink = self._sink
        passes.network.weigh = Evener(inputs, self._gradients) if settings.even_tokens else None

    def start(self, name: str) -> State:
        """A matrix's state before the first step."""
        return self._settings.init(self._local[name], self._gradients[name])

    def step(self, batch: Tensor, target: Pattern, left: float) -> tuple[float, float]:
        """One step on windows ``[n, length]``; its KL in nats per token, and the share of masks that it flipped.

        left: the part of the descent that is left, in (0, 1], which the step size and the temperature follow.
        """
        self._size = self._scale * self._settings.step_size * left
        self._flipped = self._seen = 0
        self._aim(target, self._settings.temperature * left)
        mine = distributed.share(batch)
        student, teacher = self._passes.forward(mine, between=self._loss.between if self._settings.hidden else None)
        assert teacher is not None
        kl, gradient = self._loss.gradient(student, teacher, mine)
        self._passes.backward(gradient)
        kl, flips = distributed.total_of(kl) / batch.numel(), self._flipped / max(1, self._seen)
        self.record["tokens"] += batch.numel()
        self.record["kl"].append(kl)
        self.record["flips"].append(flips)
        return kl, flips

    def judge(self, targets: Sequence[Pattern], windows: Tensor) -> float:
        """Mean KL in nats per token of hard masks; the targets share the windows, so that many cost no more than one."""
        total = 0.0
        for index, target in enumerate(targets):
            self._aim(target)
            part = windows[index % len(windows) :: len(targets)]
            mine = part[distributed.rank() :: distributed.count()]
            kl = 0.0
            for batch in self._passes.portions(mine, JUDGED):
                kl += self._loss.kl(*self._passes.look(batch))
            total += distributed.total_of(kl) / part.numel()
        return total / len(targets)

    def back_off(self) -> None:
        """Goes on from the best duals at half the step size, without momentum."""
        for name, dual in self.best.items():
            nothing = torch.zeros_like(dual, dtype=torch.bfloat16)
            self._put(name, State(dual, nothing, nothing.clone(), self.states[name].unit, 0))
        self._scale /= 2
        self.record["backed_off"] += 1

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Keeps the progress: states on disk at every step, states in memory as often as it costs little time."""
        facts = {"scale": self._scale, "record": self.record, **facts}
        if isinstance(self.states, StoredStates):
            self._store.commit(facts)
        elif self._durable and (last or self._pace.due()):
            with self._pace.saving():
                stored = StoredStates(self._store)
                for name, state in self.states.items():
                    stored[name] = state
                self._store.commit(facts)

    def saved(self) -> dict[str, Any]:
        """The facts of an earlier run that stopped here, or nothing."""
        facts = dict(self._store.facts)
        if facts:
            self._scale, self.record = facts["scale"], facts["record"]
        return facts

    def _aim(self, target: Pattern, temperature: float = 0.0) -> None:
        """The masks of the passes to come."""
        shared: Mapping[str, Tensor] = {}
        if not target.local:
            shared = self._samples[target.grain] if target.grain else {name: self.states.dual(name) for name in self._matrices}
        hard = target.settle(shared, exact=False)
        if temperature:
            units = [self.states[name].unit for name in self._matrices]
            temperature *= sum(units) / len(units)
        self._cut = Cut(target, hard, self.states.dual, self._matrices, temperature, self._streamed)
        self._passes.network.masks = self._cut

    def _put(self, name: str, state: State) -> None:
        self.states[name] = state
        self._sample(name, state)

    def _sample(self, name: str, state: State) -> None:
        for grain, samples in self._samples.items():
            runs = state.dual.reshape(-1, grain) if state.dual.shape[1] % grain == 0 else state.dual
            samples[name] = runs[:: self._every].clone()

    def _sink(self, name: str, gradient: Tensor | None) -> None:
        weight = self._matrices[name].weight
        if distributed.count() > 1:  # all of them must take part, also those whose windows did not reach an expert
            gradient = distributed.total(
                torch.zeros(weight.shape, device=weight.device) if gradient is None else gradient.float()
            )
        if gradient is None:
            return
        gradient = gradient.float() * weight
        if self._settings.temperature:
            soft = self._cut[name]
            gradient *= soft * (1 - soft)
        state = self.states[name].to(weight.device)
        start = self.start(name).dual if self._settings.anchor else None
        moved = self._settings.step(state, gradient, self._size, start)
        rows = max(1, len(moved.dual) // GLANCE // GLANCE) * GLANCE
        before, after = (self._cut.hard(name, each.dual[:rows]) for each in (state, moved))
        self._flipped += int((before != after).sum())
        self._seen += before.numel()
        self._put(name, moved)


def sensitivities(passes: Passes, windows: Tensor) -> tuple[dict[str, SquaredNorm], dict[str, Tensor]]:
    """The inputs of each matrix in the dense model, and the RMS ``[out]`` of its next-token loss gradient at the outputs.

    windows: token ids ``[windows, length]``. The network of ``passes`` is left without masks.
    """
    network = passes.network
    inputs = {name: SquaredNorm(matrix.shape[1], passes.device) for name, matrix in network.matrices.items()}
    totals = {name: torch.zeros(matrix.shape[0], device=passes.device) for name, matrix in network.matrices.items()}

    def watch(name: str, x: Tensor, gradient: Tensor) -> None:
        inputs[name].update(x)
        totals[name] += gradient.float().square().sum(0)

    network.masks, network.watch = {}, watch
    head = passes.head(windows)
    for batch in passes.portions(windows[distributed.rank() :: distributed.count()], windows.shape[1]):
        hidden, _ = passes.forward(batch, teacher=False)
        passes.backward(head.next_token(hidden, batch))
    network.watch = None
    for name, norm in inputs.items():
        distributed.total(norm.total)
        norm.tokens = int(distributed.total_of(norm.tokens))
        distributed.total(totals[name])
    statistics.feed(network.matrices, inputs, totals)
    check_seen(inputs)
    return inputs, {name: (total / windows.numel()).sqrt() for name, total in totals.items()}


def any_sparsity() -> tuple[Pattern, ...]:
    """The targets that one artefact for all is descended on, in turn; 2:4 twice, for it learns least from the others."""
    return *(Unstructured(level, "model") for level in (0.5, 0.6, 0.7)), NM(2, 4), NM(4, 8), NM(2, 4)


def _start(passes: Passes, windows: Tensor, run: Run, durable: bool) -> tuple[dict[str, SquaredNorm], dict[str, Tensor]]:
    """:func:`sensitivities`, or what an earlier run found them to be."""
    store = Store(run, "start")
    if store.facts:
        inputs = {}
        for name, tokens in store.facts["tokens"].items():
            total = store.tensor("inputs", name).to(passes.device)
            inputs[name] = SquaredNorm(len(total), total.device)
            inputs[name].add(total, tokens)
        return inputs, {name: rms.to(passes.device) for name, rms in store["gradients"].items()}
    inputs, gradients = sensitivities(passes, windows)
    if durable:
        store["inputs"] = {name: norm.total for name, norm in inputs.items()}
        store["gradients"] = gradients
        store.commit({"tokens": {name: norm.tokens for name, norm in inputs.items()}})
    return inputs, gradients


def _passes(model: nn.Module, matrices: Matrices, residency: Residency, run: Run) -> Passes:
    network, (_, blocks) = StraightThrough(matrices), find_blocks(model)
    if residency is resident:
        return Resident(model, blocks, network)
    stash = run.folder / "stash"
    stash.mkdir(exist_ok=True)
    return Streamed(model, Replay(model, blocks, residency), network, Stash(stash))


def _drawn(targets: Sequence[Pattern], seed: int) -> Iterator[Pattern]:
    """The targets in shuffled rounds, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (targets[index] for index in torch.randperm(len(targets), generator=generator).tolist())
