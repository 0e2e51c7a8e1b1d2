"""The loop around mirror descent: the pruned model's loss, the steps of all matrices, the windows that judge, the best state.

A descent can be interrupted: its state goes into a run folder (``storage.runs``) and it continues from there, on a CPU bit for
bit (on CUDA the backward passes of attention sum in an order that changes: a few mask bits at the edge may differ). It can be
shared between processes (``common.distributed``): each takes its part of every step's windows, all have the same state. What
differs between a model in memory and one that is read block by block is settled where the passes and the states are made.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.controller.loss import Loss
from uniprune.controller.passes import Passes, opened
from uniprune.controller.protocol import ControllerRecord
from uniprune.controller.start import in_steps, sensitivities, warn_of_stillness
from uniprune.controller.states import Best, Cuts, InMemory, OnDisk, Rule, State, States
from uniprune.controller.straight_through import Evener
from uniprune.errors import InputError
from uniprune.saliency.calibration import Calibration, LocalSaliency
from uniprune.saliency.metrics import Metric
from uniprune.saliency.statistics import starved
from uniprune.sparsity.patterns import NM, Pattern, Unstructured, check_extremes
from uniprune.storage import runs
from uniprune.storage.runs import Pace, Run
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

if TYPE_CHECKING:
    from uniprune.controller.mirror_descent import MirrorDescent

logger = logging.getLogger(__name__)

START_TOKENS = 8192  # of calibration text, whose statistics make the start
JUDGED = 1024  # tokens in one batch of held-out windows
SAMPLE = 5  # one matrix of 5 tells how many masks a step flipped


def descend(
    settings: MirrorDescent,
    calibration: Calibration,
    metric: Metric,
    targets: Sequence[Pattern],
    steps: int | None = None,
    seed: int = 0,
) -> tuple[Mapping[str, Tensor], ControllerRecord]:
    """The global saliency (duals) and a record of the descent.

    calibration: the last few windows judge the state and are never descended on, the first few also make the start. metric:
    the local saliency. targets: the patterns whose masks the loss is taken at, one per step, drawn by ``seed`` in shuffled
    rounds. steps: by default each window is used once.
    The state with the lowest held-out KL is returned: it is never worse there than the start. A descent that diverges is set
    back to the best state and goes on at half the step size; one that stops improving is stopped.
    Raises InputError if there are too few windows.
    """
    windows = calibration.windows
    if settings.temperature:
        _check_relaxed(targets, calibration)
    judges = max(1, min(max(settings.held_out, len(targets)), len(windows) // 8, len(windows) - distributed.count()))
    distributed.check_windows(len(windows), judges)
    held_out, windows = windows[-judges:], windows[:-judges]
    todo = in_steps(windows, settings.batch_tokens)
    steps = steps or len(todo)
    with ExitStack() as stack:
        run = calibration.run or stack.enter_context(runs.temporary())
        store, every = Store(run, "descent", shared=True), math.ceil(steps / settings.checks)
        if store.facts.get("step") == steps:  # an earlier run came to the end, and then was interrupted
            return Best(store, calibration.matrices, calibration.device, ()), _record(steps, every, store.facts)
        passes = opened(calibration, run)
        stack.enter_context(passes.network)
        descent = Descent(settings, passes, replace(calibration, windows=windows), metric, targets, run, store)
        best, order, descent.repeats = descent.best, _drawn(targets, seed), steps > len(todo)
        history, stale, begin = [], 0, 0
        if saved := descent.saved():
            history, stale, begin = saved["history"], saved["stale"], saved["step"]
            best.value = saved["best"]
        else:
            best.keep(descent.judge(targets, held_out), descent.states)
            history = [best.value]
        for _ in range(begin):
            next(order)
        target = next(order)
        for index in calibration.progress(range(begin, steps), "descending", steps - begin):
            batch, following = todo[index % len(todo)], next(order)
            kl, flips = descent.step(batch, target, 1 - index / steps, following if index + 1 < steps else None)
            calibration.progress.note(f"{target}: KL {kl:.3f}, {flips:.2%} flipped", batch.numel())
            logger.info("step %d: %s KL %.4f", index, target, kl)
            target = following
            if not (index + 1) % every or index + 1 == steps:
                history.append(descent.judge(targets, held_out))
                if history[-1] < best.value:
                    best.keep(history[-1], descent.states)
                    stale = 0
                elif not history[-1] <= 1.5 * history[0]:  # also NaN
                    logger.warning("the controller diverged (held-out KL %.3f); back to the best, half the step", history[-1])
                    descent.back_off()
                else:
                    stale += 1
            after = steps if stale == 2 else index + 1
            facts = {"step": after, "history": history, "stale": stale, "best": best.value}
            descent.save(facts, last=after == steps)
            if stale == 2:
                break
        record = _record(steps, every, {"history": history, "best": best.value, "record": descent.record})
        if calibration.run:
            return best, record
        descent.states.clear()  # their place is the duals'
        return dict(best), record


class Descent:
    """The states of all matrices, and the steps that move them.

    calibration: of it, the windows to descend on. run: where states lie that are not in memory; the calibration's own, else a
    temporary one. store: of the run, where they are saved. best: of the states that were judged. record: tokens descended on,
    KL in nats per token and share of masks that each step flipped, how often it backed off, matrices that no gradient has
    reached. repeats: whether windows will come again.
    """

    def __init__(
        self,
        settings: MirrorDescent,
        passes: Passes,
        calibration: Calibration,
        metric: Metric,
        targets: Sequence[Pattern],
        run: Run,
        store: Store,
    ) -> None:
        self._settings, self._passes, self._matrices = settings, passes, calibration.matrices
        self._rule: Rule = settings
        windows = calibration.windows
        # Of several processes each keeps, moves and cuts the duals of some matrices; gradients go there, masks come from there.
        self._owners = distributed.owners({name: matrix.size for name, matrix in self._matrices.items()})
        self._own = [name for name, owner in self._owners.items() if owner == distributed.rank()]
        self._sampled = set(list(self._matrices)[::SAMPLE])
        head = passes.head(windows, None if settings.labels else settings.vocabulary)
        self._loss = Loss(head, settings.labels, settings.evenness, settings.hidden)
        few = windows[: max(1, START_TOKENS // windows.shape[1])]
        found = sensitivities(passes, few, metric.statistic, calibration.run)
        self._local, self._gradients = LocalSaliency(self._matrices, metric, found.statistics), found.gradients
        self._saved = dict(store.facts)
        self.states = _states(settings, store, calibration, run, self._own)
        self._aside, self._finals = Stash(run.aside()), dict[str, Tensor]()
        self.best = Best(store, self._matrices, passes.device, self._own)
        self._cuts = Cuts(self.states, self._matrices, self._owners, targets, passes.device)
        self._scale, self._size, self.repeats = 1.0, 0.0, False
        self._flips, self._seen, self._reached = list[Tensor](), 0, set[str]()
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}  # of duals that are not known to be finite yet
        self.record: dict[str, Any] = {"tokens": 0, "loss": [], "flips": [], "backed_off": 0}
        self.record |= starved(self._matrices, found.norms) | {"without_gradient": found.still}
        for name in self._own:
            if self._saved:
                self._cuts.follow(name, self.states.dual(name).to(passes.device))
            else:
                self._put(name, self.start(name))
        self._check()
        passes.network.sink = self._sink
        passes.network.weigh = Evener(found.norms, self._gradients) if settings.even_tokens else None

    def start(self, name: str) -> State:
        """A matrix's state before the first step."""
        return self._rule.init(self._local[name], self._gradients[name])

    def step(self, batch: Tensor, target: Pattern, left: float, following: Pattern | None = None) -> tuple[float, float]:
        """One step on windows ``[n, length]``; its KL in nats per token, and the share of masks that it flipped.

        left: the part of the descent that is left, in (0, 1], which the step size and the temperature follow. following: the
        target of the next step, if that is known.
        """
        self._size = self._scale * self._settings.step_size * left
        self._flips, self._seen = [], 0
        temperature = self._settings.temperature * left
        self._masks = self._passes.network.masks = self._cuts.masks(target, temperature)
        self._cuts.ahead(None if temperature else following)
        mine = distributed.share(batch)
        student, teacher = self._forward(mine)
        kl, gradient = self._loss.gradient(student, teacher, mine)
        self._passes.backward(gradient)
        self._check()
        if self.record["without_gradient"]:
            reached = set[str]().union(*distributed.all_gather(self._reached))
            self.record["without_gradient"] = [name for name in self.record["without_gradient"] if name not in reached]
        flipped = distributed.total_of(int(torch.stack(self._flips).sum()) if self._flips else 0)
        kl, flips = distributed.total_of(kl) / batch.numel(), flipped / max(1, distributed.total_of(self._seen))
        self.record["tokens"] += batch.numel()
        self.record["loss"].append(kl)
        self.record["flips"].append(flips)
        return kl, flips

    def _forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states of the pruned and of the dense model."""
        if self._settings.hidden:
            return self._passes.forward(batch, self._loss.between)
        return self._beside(batch, self._passes.forward, self._passes.forward_alone, self.repeats)

    def _beside(
        self, batch: Tensor, both: Callable[[Tensor], tuple[Tensor, Tensor]], alone: Callable[[Tensor], Tensor], again: bool
    ) -> tuple[Tensor, Tensor]:
        """What a pass of both models gives; if the windows come ``again``, the dense model's hidden states are kept."""
        key = f"final-{hashlib.sha256(batch.cpu().numpy().tobytes()).hexdigest()[:16]}"  # the same in a run that goes on
        if key in self._finals:
            return alone(batch), self._finals[key].to(self._passes.device)
        student, teacher = both(batch)
        if again:
            self._finals[key] = self._aside.put(key, teacher)
        return student, teacher

    def judge(self, targets: Sequence[Pattern], windows: Tensor) -> float:
        """Mean KL in nats per token of hard masks; the targets share the windows, so that many cost no more than one."""
        total = 0.0
        for index, target in enumerate(targets):
            self._passes.network.masks = self._cuts.masks(target)
            part = windows[index % len(windows) :: len(targets)]
            mine = part[distributed.rank() :: distributed.count()]
            kl = 0.0
            for batch in self._passes.portions(mine, JUDGED):
                kl += self._loss.kl(*self._beside(batch, self._passes.look, self._passes.look_alone, again=True), batch)
            total += distributed.total_of(kl) / part.numel()
        return total / len(targets)

    def back_off(self) -> None:
        """Goes on from the best duals at half the step size, without momentum."""
        for name in self._own:
            self._put(name, self._rule.restart(self.states[name], self.best[name]))
        self._check()
        self._scale /= 2
        self.record["backed_off"] += 1

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Keeps the progress, as often as the states allow."""
        self.states.save({"scale": self._scale, "record": self.record, **facts}, last)

    def saved(self) -> dict[str, Any]:
        """The facts of an earlier run that stopped here, or nothing."""
        if self._saved:
            self._scale, self.record = self._saved["scale"], self._saved["record"]
        return self._saved

    def _put(self, name: str, state: State) -> None:
        self.states[name] = state
        self._extremes[name] = state.dual.aminmax()
        self._cuts.follow(name, state.dual)

    def _check(self) -> None:
        """Raises InputError for duals that are no longer finite."""
        check_extremes(self._extremes, self._extremes.values())
        self._extremes.clear()

    def _sink(self, name: str, gradient: Tensor | None) -> None:
        weight, owner = self._matrices[name].weight, self._owners[name]
        if distributed.count() > 1:  # all of them must take part, also those whose windows did not reach an expert
            gradient = distributed.reduce_to(
                owner, torch.zeros(weight.shape, device=weight.device) if gradient is None else gradient.float().contiguous()
            )
        if gradient is None or owner != distributed.rank():
            return
        if name in self.record["without_gradient"] and bool(gradient.any()):
            self._reached.add(name)
        # Mixed types are one kernel less on a GPU, and slow on a CPU.
        gradient = gradient.float() * (weight.float() if weight.device.type == "cpu" else weight)
        if self._settings.temperature:
            soft = self._masks[name]
            gradient *= soft * (1 - soft)
        state = self.states[name].to(weight.device)
        start = self.start(name).dual if self._settings.anchor else None
        moved = self._rule.step(state, gradient, self._size, start)
        if name in self._sampled:
            self._count(name, state.dual, moved.dual)
        self._put(name, moved)

    def _count(self, name: str, before: Tensor, after: Tensor) -> None:
        """Notes how many masks differ between a matrix's duals before a step and after it."""
        masks = self._masks.hard(name, before) if self._settings.temperature else self._masks[name]
        self._flips.append((masks != self._masks.hard(name, after)).sum())
        self._seen += masks.numel()


def _record(steps: int, every: int, facts: Mapping[str, Any]) -> ControllerRecord:
    """Of a descent that is over; facts: as they were saved last."""
    warn_of_stillness(facts["record"]["without_gradient"])
    return ControllerRecord(
        objective="KL",
        steps=steps,
        judged_every=every,
        held_out_loss=facts["history"],
        best_held_out_loss=facts["best"],
        **facts["record"],
    )


def any_sparsity() -> tuple[Pattern, ...]:
    """The targets that one artefact for all is descended on, in turn; 2:4 twice, for it learns least from the others."""
    return *(Unstructured(sparsity, "model") for sparsity in (0.5, 0.6, 0.7)), NM(2, 4), NM(4, 8), NM(2, 4)


def _check_relaxed(targets: Sequence[Pattern], calibration: Calibration) -> None:
    """Raises InputError if masks cannot be relaxed, as a temperature above 0 asks for."""
    if distributed.count() > 1:
        raise InputError("relaxed masks are no bits that processes could exchange; start one, or leave temperature at 0")
    if not all(isinstance(target, (Unstructured, NM)) and getattr(target, "scope", "") != "block" for target in targets):
        raise InputError(f"masks of {targets[0]} cannot be relaxed; leave temperature at 0")
    if calibration.streamed and not all(target.local for target in targets):
        raise InputError("relaxed masks with one budget for the model need all of it in memory; leave temperature at 0")


def _states(rule: Rule, store: Store, calibration: Calibration, run: Run, names: Sequence[str]) -> States:
    """Where states lie: of a model that is read block by block on disk, else on its device or in host memory."""
    if calibration.streamed:
        return OnDisk(store, rule, run.aside())
    home = torch.device("cpu") if calibration.offload else calibration.device
    packed = calibration.recompute or distributed.count() > 1
    return InMemory(store, rule, Pace() if calibration.run else None, home, packed, names)


def _drawn(targets: Sequence[Pattern], seed: int) -> Iterator[Pattern]:
    """The targets in shuffled rounds, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (targets[index] for index in torch.randperm(len(targets), generator=generator).tolist())
