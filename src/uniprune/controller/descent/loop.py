"""The loop of mirror descent: steps on the pruned model's loss, checks on held-out windows, the best state so far.

A descent that is interrupted continues from its run folder (``storage.runs``), on a CPU bit for bit (on CUDA the backward
passes of attention sum in an order that changes, so a few mask bits at the edge may differ). Several processes can share one
(``common.distributed``): each takes its part of every step's windows, and owns the states of some of the matrices. The loop is
the same for a model in memory and one that is read block by block: ``passes`` and ``states`` have an implementation for each.
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
from uniprune.controller.descent.loss import Loss
from uniprune.controller.descent.states import Best, InMemory, MaskFactory, OnDisk, Rule, State, States
from uniprune.controller.passes import Passes, open_passes
from uniprune.controller.protocol import ControllerRecord
from uniprune.controller.start import in_steps, sensitivities, warn_without_gradient
from uniprune.controller.straight_through import Evener
from uniprune.errors import InputError
from uniprune.saliency.calibration import Calibration, LocalSaliency
from uniprune.saliency.metrics import Metric
from uniprune.saliency.observation import starved
from uniprune.sparsity.patterns import NM, Pattern, Unstructured, check_extremes
from uniprune.storage import runs
from uniprune.storage.runs import Pace, Run
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

if TYPE_CHECKING:
    from uniprune.controller.mirror_descent import MirrorDescent

logger = logging.getLogger(__name__)

START_TOKENS = 8192  # of the calibration text, from whose statistics the first duals are made
HELD_OUT_TOKENS = 1024  # in one batch of held-out windows
SAMPLE = 5  # flips are counted in every fifth matrix


def descend(
    settings: MirrorDescent,
    calibration: Calibration,
    metric: Metric,
    targets: Sequence[Pattern],
    steps: int | None = None,
    seed: int = 0,
) -> tuple[Mapping[str, Tensor], ControllerRecord]:
    """The global saliency (duals) and a record of the descent.

    calibration: its last windows are held out: the state is checked on them, and never descends on them. The first ones also
    make the start. metric: the local saliency. targets: the patterns of the masks that the loss is taken at, one per step, in
    rounds shuffled by ``seed``. steps: by default each window is used once.
    Returned is the state with the lowest held-out KL, the start included. A descent that diverges goes on from the best state
    at half the step size; one that has not improved in two checks is stopped.
    Raises InputError if there are too few windows.
    """
    if settings.temperature:
        _check_relaxed(targets, calibration)
    windows, held_out = _split(calibration.windows, max(settings.held_out, len(targets)))
    todo = in_steps(windows, settings.batch_tokens)
    steps = steps or len(todo)
    every = math.ceil(steps / settings.checks)
    with ExitStack() as stack:
        run = calibration.run or stack.enter_context(runs.temporary())
        store = Store(run, "descent", shared=True)
        if store.facts.get("step") == steps:  # of a run that was interrupted after the descent
            return Best(store, calibration.matrices, calibration.device, ()), _record(steps, every, store.facts)
        passes = open_passes(calibration, run)
        stack.enter_context(passes.network)
        descent = Descent(settings, passes, replace(calibration, windows=windows), metric, targets, run, store)
        descent.repeats = steps > len(todo)
        first = descent.resume()
        if not first:
            descent.check(targets, held_out)
        order = _shuffled_rounds(targets, seed)
        for _ in range(first):
            next(order)
        target = next(order)
        for index in calibration.progress(range(first, steps), "descending", steps - first):
            batch, following = todo[index % len(todo)], next(order)
            kl, flips = descent.step(batch, target, 1 - index / steps, following if index + 1 < steps else None)
            calibration.progress.note(f"{target}: KL {kl:.3f}, {flips:.2%} flipped", batch.numel())
            logger.info("step %d: %s KL %.4f", index, target, kl)
            target = following
            if not (index + 1) % every or index + 1 == steps:
                descent.check(targets, held_out)
            descent.save(steps if descent.stalled else index + 1, steps)
            if descent.stalled:
                break
        record = _record(steps, every, descent.facts)
        if calibration.run:
            return descent.best, record
        descent.states.clear()  # makes room for the copy of the best duals
        return dict(descent.best), record


class Descent:
    """The states of all matrices, the steps that move them, and the checks on held-out windows.

    calibration: its windows are those to descend on. run: where states lie that are not in memory; the calibration's own, or a
    temporary one. store: of the run, where states are saved.

    best: the duals with the lowest held-out KL so far. history: the held-out KL of each check, in nats per token. record: for
    the report: tokens descended on; of each step the KL in nats per token and the share of masks that it flipped; how often it
    backed off; matrices that no gradient has reached. repeats: whether the same windows will come again.
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
        # Each process owns some matrices: it has their states. Gradients are reduced to the owner, masks are broadcast by it.
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
        self._stash, self._teacher_states = Stash(run.aside()), dict[str, Tensor]()
        self.best = Best(store, self._matrices, passes.device, self._own)
        self._mask_factory = MaskFactory(self.states, self._matrices, self._owners, targets, passes.device)
        self._scale, self._size, self.repeats = 1.0, 0.0, False
        self._flips, self._seen, self._reached = list[Tensor](), 0, set[str]()
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}  # least and greatest of each dual that is still to be checked
        self.history: list[float] = []
        self._stale = 0  # checks since the best state that found neither improvement nor divergence
        self.record: dict[str, Any] = {"tokens": 0, "loss": [], "flips": [], "backed_off": 0}
        self.record |= starved(self._matrices, found.norms) | {"without_gradient": found.without_gradient}
        for name in self._own:
            if self._saved:
                self._mask_factory.update(name, self.states.dual(name).to(passes.device))
            else:
                self._set_state(name, self.start(name))
        self._check_finite()
        passes.network.sink = self._apply_gradient
        passes.network.weigh = Evener(found.norms, self._gradients) if settings.even_tokens else None

    def start(self, name: str) -> State:
        """A matrix's state before the first step."""
        return self._rule.init(self._local[name], self._gradients[name])

    def step(self, batch: Tensor, target: Pattern, left: float, following: Pattern | None = None) -> tuple[float, float]:
        """One step on windows ``[n, length]``; returns its KL in nats per token, and the share of mask bits that it flipped.

        left: the fraction of the descent that is left, in (0, 1]; step size and temperature are proportional to it. following:
        the target of the next step, if that is known.
        """
        self._size = self._scale * self._settings.step_size * left
        self._flips, self._seen = [], 0
        temperature = self._settings.temperature * left
        self._masks = self._passes.network.masks = self._mask_factory.masks(target, temperature)
        self._mask_factory.prepare_next(None if temperature else following)
        mine = distributed.share(batch)
        student, teacher = self._forward(mine)
        kl, gradient = self._loss.gradient(student, teacher, mine)
        self._passes.backward(gradient)
        self._check_finite()
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
        """Final hidden states of student and teacher."""
        if self._settings.hidden:
            return self._passes.forward(batch, self._loss.hidden_gradient)
        return self._with_cached_teacher(batch, self._passes.forward, self._passes.forward_student, self.repeats)

    def _with_cached_teacher(
        self, batch: Tensor, both: Callable[[Tensor], tuple[Tensor, Tensor]], alone: Callable[[Tensor], Tensor], again: bool
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states of student and teacher; the teacher's are cached if the windows will come ``again``.

        both: the pass of both models. alone: that of the student, for windows whose teacher is in the cache.
        """
        key = f"final-{hashlib.sha256(batch.cpu().numpy().tobytes()).hexdigest()[:16]}"  # the same in a resumed run
        if key in self._teacher_states:
            return alone(batch), self._teacher_states[key].to(self._passes.device)
        student, teacher = both(batch)
        if again:
            self._teacher_states[key] = self._stash.put(key, teacher)
        return student, teacher

    def held_out_kl(self, targets: Sequence[Pattern], windows: Tensor) -> float:
        """Mean KL of hard masks in nats per token. The windows are dealt out to the targets: many cost no more than one."""
        total = 0.0
        for index, target in enumerate(targets):
            self._passes.network.masks = self._mask_factory.masks(target)
            part = windows[index % len(windows) :: len(targets)]
            mine = part[distributed.rank() :: distributed.count()]
            kl = 0.0
            for batch in self._passes.in_batches(mine, HELD_OUT_TOKENS):
                kl += self._loss.kl(
                    *self._with_cached_teacher(batch, self._passes.infer, self._passes.infer_student, again=True), batch
                )
            total += distributed.total_of(kl) / part.numel()
        return total / len(targets)

    def check(self, targets: Sequence[Pattern], windows: Tensor) -> None:
        """Measures the held-out KL: keeps the state if it is the best, and sets it back if the descent has diverged."""
        value, start = self.held_out_kl(targets, windows), not self.history
        self.history.append(value)
        if start or value < self.best.value:
            self.best.keep(value, self.states)
            self._stale = 0
        elif not value <= 1.5 * self.history[0]:  # also NaN
            logger.warning("the controller diverged (held-out KL %.3f); back to the best, half the step", value)
            self.back_off()
        else:
            self._stale += 1

    @property
    def stalled(self) -> bool:
        """Whether two checks since the last improvement found neither another one nor a divergence."""
        return self._stale == 2

    def back_off(self) -> None:
        """Goes on from the best duals at half the step size, without momentum."""
        for name in self._own:
            self._set_state(name, self._rule.restart(self.states[name], self.best[name]))
        self._check_finite()
        self._scale /= 2
        self.record["backed_off"] += 1

    @property
    def facts(self) -> dict[str, Any]:
        """What is saved beside the states, as JSON data; with the number of steps done it is all that :meth:`resume` needs."""
        state = {"history": self.history, "stale": self._stale, "best": self.best.value}
        return {"scale": self._scale, "record": self.record, **state}

    def save(self, done: int, steps: int) -> None:
        """Saves the progress, as often as the states allow; ``done`` of so many ``steps`` need not be taken any more."""
        self.states.save({**self.facts, "step": done}, last=done == steps)

    def resume(self) -> int:
        """Takes up what an earlier run has saved; returns how many steps that had done, 0 if there was none."""
        saved = self._saved
        if not saved:
            return 0
        self._scale, self.record, self.history, self._stale = (saved[key] for key in ("scale", "record", "history", "stale"))
        self.best.value = saved["best"]
        return int(saved["step"])

    def _set_state(self, name: str, state: State) -> None:
        self.states[name] = state
        self._extremes[name] = state.dual.aminmax()
        self._mask_factory.update(name, state.dual)

    def _check_finite(self) -> None:
        """Raises InputError for duals that are no longer finite. All at once: each look at a value waits for the GPU."""
        check_extremes(self._extremes, self._extremes.values())
        self._extremes.clear()

    def _apply_gradient(self, name: str, gradient: Tensor | None) -> None:
        """The network's sink: moves the state of a matrix by the gradient of this step. None: no token reached the matrix."""
        weight, owner = self._matrices[name].weight, self._owners[name]
        if distributed.count() > 1:  # a collective operation: also for those whose windows did not reach an expert
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
            self._count_flips(name, state.dual, moved.dual)
        self._set_state(name, moved)

    def _count_flips(self, name: str, before: Tensor, after: Tensor) -> None:
        """Counts the mask bits that differ between a matrix's duals before a step and after it."""
        masks = self._masks.hard(name, before) if self._settings.temperature else self._masks[name]
        self._flips.append((masks != self._masks.hard(name, after)).sum())
        self._seen += masks.numel()


def _record(steps: int, every: int, facts: Mapping[str, Any]) -> ControllerRecord:
    """The record of a descent that is over. facts: as :attr:`Descent.facts`."""
    warn_without_gradient(facts["record"]["without_gradient"])
    return ControllerRecord(
        objective="KL",
        steps=steps,
        judged_every=every,
        held_out_loss=facts["history"],
        best_held_out_loss=facts["best"],
        **facts["record"],
    )


def _split(windows: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """The windows to descend on, and as many as ``held_out``, from the end, to check with: an eighth at most, one at least.

    Raises InputError if a process would be left without a window.
    """
    count = max(1, min(held_out, len(windows) // 8, len(windows) - distributed.count()))
    distributed.check_windows(len(windows), count)
    return windows[:-count], windows[-count:]


def _check_relaxed(targets: Sequence[Pattern], calibration: Calibration) -> None:
    """Raises InputError if masks cannot be relaxed, as a temperature above 0 asks for."""
    if distributed.count() > 1:
        raise InputError("relaxed masks are no bits that processes could exchange; start one, or leave temperature at 0")
    if not all(isinstance(target, (Unstructured, NM)) and getattr(target, "scope", "") != "block" for target in targets):
        raise InputError(f"masks of {targets[0]} cannot be relaxed; leave temperature at 0")
    if calibration.streamed and not all(target.local for target in targets):
        raise InputError("relaxed masks with one budget for the model need all of it in memory; leave temperature at 0")


def _states(rule: Rule, store: Store, calibration: Calibration, run: Run, names: Sequence[str]) -> States:
    """The states on disk if the model is read block by block, else in memory: on its device, or in host memory (offload)."""
    if calibration.streamed:
        return OnDisk(store, rule, run.aside())
    home = torch.device("cpu") if calibration.offload else calibration.device
    packed = calibration.recompute or distributed.count() > 1
    return InMemory(store, rule, Pace() if calibration.run else None, home, packed, names)


def _shuffled_rounds(targets: Sequence[Pattern], seed: int) -> Iterator[Pattern]:
    """The targets without end: all of them in random order, then all in another order, and so on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (targets[index] for index in torch.randperm(len(targets), generator=generator).tolist())
