"""The loop of mirror descent: steps on the pruned model's loss, checks on held-out windows, the best state so far.

A descent that is interrupted continues from its run folder (``storage.runs``), on a CPU bit for bit (on CUDA the backward
passes of attention sum in an order that changes, so a few mask bits at the edge may differ). Several processes can share one
(``common.distributed``): each takes its part of every step's windows, and owns the states of some of the matrices. The loop is
the same for a model in memory and one that is read block by block: ``passes`` and ``states`` have an implementation for each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.common.progress import Progress
from uniprune.controller.descent.history import DescentHistory
from uniprune.controller.descent.loss import Loss
from uniprune.controller.descent.masks import Masks
from uniprune.controller.descent.position import Position
from uniprune.controller.descent.states import Best, UpdateRule
from uniprune.controller.descent.teacher import TeacherCache
from uniprune.controller.descent.token_weighting import TokenWeighting
from uniprune.controller.passes.opening import open_passes
from uniprune.controller.passes.protocol import Passes
from uniprune.controller.protocol import ControllerRecord
from uniprune.controller.schedule import in_steps, shuffled_rounds
from uniprune.controller.start import sensitivities
from uniprune.controller.straight_through import Weigh
from uniprune.saliency.calibration import Calibration, LocalSaliency
from uniprune.saliency.metrics import Metric
from uniprune.saliency.observation import starved
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.storage import runs
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

if TYPE_CHECKING:
    from uniprune.controller.mirror_descent import MirrorDescent

logger = logging.getLogger(__name__)

START_TOKENS = 8192  # of the calibration text, from whose statistics the first duals are made
HELD_OUT_TOKENS = 1024  # in one batch of held-out windows
COUNT_EVERY = 5  # flips are counted in every so many matrices


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
    windows, held_out = _split(calibration.windows, max(settings.held_out, len(targets)))
    todo = in_steps(windows, settings.batch_tokens)
    plan = Plan(todo, held_out, targets, steps or len(todo), settings.checks, seed)
    with ExitStack() as stack:
        run = calibration.run or stack.enter_context(runs.temporary())
        store = Store(run, "descent", shared=True)
        saved = DescentHistory.of(store.facts)
        if saved.done == plan.steps:  # of a run that was interrupted after the descent
            best = Best(store, calibration.matrices, calibration.device, ())
            return best, saved.record(plan.steps, plan.every)
        passes = open_passes(calibration, run)
        stack.enter_context(passes.network)
        position = Position(settings, calibration, targets, run, store)
        teacher = TeacherCache(passes, Stash(run.aside()), repeats=plan.steps > len(todo))
        descent = opened(settings, passes, replace(calibration, windows=windows), metric, position, teacher)
        follow(plan, descent, calibration.progress)
        record = position.history.record(plan.steps, plan.every)
        if calibration.run:
            return position.best, record
        position.states.clear()  # makes room for the copy of the best duals
        return dict(position.best), record


class Plan(NamedTuple):
    """What a descent is to do.

    todo: windows ``[n, length]`` by step, and again from the first. held_out: windows to check with. targets: one per step, in
    shuffled rounds. steps: how many at most. checks: at most, besides that of the start.
    """

    todo: Sequence[Tensor]
    held_out: Tensor
    targets: Sequence[Pattern]
    steps: int
    checks: int
    seed: int

    @property
    def every(self) -> int:
        """The steps between two checks."""
        return math.ceil(self.steps / self.checks)


def opened(
    settings: MirrorDescent,
    passes: Passes,
    calibration: Calibration,
    metric: Metric,
    position: Position,
    teacher: TeacherCache,
) -> Descent:
    """A descent before its first step, or where an earlier process left it: measures the start, unless the run has it.

    calibration: its windows are those to descend on. position: empty, or that of a descent that is resumed. teacher: of the
    same ``passes``.
    """
    matrices, windows = calibration.matrices, calibration.windows
    head = passes.head(windows, None if settings.labels else settings.vocabulary)
    few = windows[: max(1, START_TOKENS // windows.shape[1])]
    start = sensitivities(passes, few, metric.statistic, calibration.run)
    if not position.resumed:
        position.history.without_gradient = start.without_gradient
        position.history.starved = starved(matrices, start.norms)
        local = LocalSaliency(matrices, metric, start.statistics)
        for name in position.own:
            position.set(name, settings.init(local[name], start.gradients[name]))
    position.check_finite()
    weigh = TokenWeighting(start.norms, start.gradients) if settings.even_tokens else None
    return Descent(settings, passes, Loss(head, settings.labels, settings.evenness), position, teacher, weigh)


def follow(plan: Plan, descent: Descent, progress: Progress) -> None:
    """Takes the steps of a plan that are left, with its checks, until they are done or the checks find no improvement."""
    position, history = descent.position, descent.history
    first = history.done
    if not position.resumed:
        descent.check(plan.targets, plan.held_out)
    order = islice(shuffled_rounds(plan.targets, plan.seed), first, None)
    target = next(order)
    for index in progress(range(first, plan.steps), "descending", plan.steps - first):
        batch, following = plan.todo[index % len(plan.todo)], next(order)
        last = index + 1 == plan.steps
        kl, flips = descent.step(batch, target, 1 - index / plan.steps, None if last else following)
        progress.note(f"{target}: KL {kl:.3f}, {flips:.2%} flipped", batch.numel())
        logger.info("step %d: %s KL %.4f", index, target, kl)
        target = following
        if last or not (index + 1) % plan.every:
            descent.check(plan.targets, plan.held_out)
        history.done = plan.steps if history.stalled else index + 1
        position.save(last=history.done == plan.steps)
        if history.stalled:
            break


class Descent:
    """The steps that move a position, and its checks on held-out windows.

    rule: moves the state of one matrix. teacher: of the same ``passes``. weigh: the weights of tokens in each matrix's
    gradient; None: all weigh 1.
    """

    def __init__(
        self,
        rule: UpdateRule,
        passes: Passes,
        loss: Loss,
        position: Position,
        teacher: TeacherCache,
        weigh: Weigh | None = None,
    ) -> None:
        self.position = position
        self.history = position.history
        self._rule = rule
        self._passes = passes
        self._loss = loss
        self._teacher = teacher
        self._weigh = weigh
        self._matrices = passes.network.matrices
        self._sampled = set(list(self._matrices)[::COUNT_EVERY])
        self._reached = set[str]()  # matrices that a gradient has reached only in a step

    def step(self, batch: Tensor, target: Pattern, left: float, following: Pattern | None = None) -> tuple[float, float]:
        """One step on windows ``[n, length]``; returns its KL in nats per token, and the share of mask bits that it flipped.

        left: the fraction of the descent that is left, in (0, 1]; the step size is proportional to it. following: the target of
        the next step, if that is known.
        """
        masks = self.position.mask_factory.start(target, following)
        flips = FlipCount(masks, self._sampled)
        size = self.history.scale * self._rule.step_size * left
        mine = distributed.share(batch)
        with self._passes.network.training(masks, partial(self._apply_gradient, size, flips), self._weigh):
            student, teacher = self._teacher.forward(mine)
            kl, gradient = self._loss.gradient(student, teacher, mine)
            self._passes.backward(gradient)
        self.position.check_finite()
        if self.history.without_gradient:
            reached = set[str]().union(*distributed.all_gather(self._reached))
            self.history.without_gradient = [name for name in self.history.without_gradient if name not in reached]
        share = flips.share()
        kl = distributed.total_of(kl) / self._loss.count(batch)
        self.history.tokens += batch.numel()
        self.history.loss.append(kl)
        self.history.flips.append(share)
        return kl, share

    def held_out_kl(self, targets: Sequence[Pattern], windows: Tensor) -> float:
        """Mean KL in nats per token. The windows are dealt out to the targets: many cost no more than one."""
        total = 0.0
        for index, target in enumerate(targets):
            part = windows[index % len(windows) :: len(targets)]
            mine = part[distributed.rank() :: distributed.count()]
            kl = 0.0
            with self._passes.network.pruned(self.position.mask_factory.create(target)):
                for batch in self._passes.in_batches(mine, HELD_OUT_TOKENS):
                    student, teacher = self._teacher.infer(batch)
                    kl += self._loss.kl(student, teacher, batch)
            total += distributed.total_of(kl) / self._loss.count(part)
        return total / len(targets)

    def check(self, targets: Sequence[Pattern], windows: Tensor) -> None:
        """Measures the held-out KL: keeps the duals if they are the best, goes back to the best if the descent has diverged."""
        kl = self.held_out_kl(targets, windows)
        verdict = self.history.judge(kl)
        if verdict == "better":
            self.position.keep_best()
        elif verdict == "diverged":
            logger.warning("the controller diverged (held-out KL %.3f); back to the best, half the step", kl)
            self.position.back_to_best()

    def _apply_gradient(self, size: float, flips: FlipCount, name: str, gradient: Tensor | None) -> None:
        """The network's sink: moves the state of a matrix by its gradient. None: no token reached the matrix.

        size, flips: of this step.
        """
        weight = self._matrices[name].weight
        owner = self.position.owners[name]
        if distributed.count() > 1:  # a collective operation: also for those whose windows did not reach an expert
            gradient = distributed.reduce_to(
                owner, torch.zeros(weight.shape, device=weight.device) if gradient is None else gradient.float().contiguous()
            )
        if gradient is None or owner != distributed.rank():
            return
        if name in self.history.without_gradient and bool(gradient.any()):
            self._reached.add(name)
        # Mixed types are one kernel less on a GPU, and slow on a CPU.
        gradient = gradient.float() * (weight.float() if weight.device.type == "cpu" else weight)
        state = self.position.states[name].to(weight.device)
        moved = self._rule.step(state, gradient, size)
        flips.add(name, moved.dual)
        self.position.set(name, moved)


class FlipCount:
    """Counts the mask bits that a step flips, in some of the matrices. masks: of the step."""

    def __init__(self, masks: Masks, sampled: Collection[str]) -> None:
        self._masks = masks
        self._sampled = sampled
        self._flipped: list[Tensor] = []  # of each matrix, on its device: a look at a value waits for the GPU
        self._seen = 0

    def add(self, name: str, moved: Tensor) -> None:
        """Counts the bits that differ between a matrix's mask and that of its dual after the step, cut at the same threshold:
        the next one, of a budget that matrices share, is known only when all have moved."""
        if name not in self._sampled:
            return
        mask = self._masks[name]
        self._flipped.append((mask != self._masks.cut(name, moved)).sum())
        self._seen += mask.numel()

    def share(self) -> float:
        """Of the bits that were looked at, by all processes together."""
        flipped = distributed.total_of(int(torch.stack(self._flipped).sum()) if self._flipped else 0)
        return flipped / max(1, distributed.total_of(self._seen))


def _split(windows: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """The windows to descend on, and as many as ``held_out``, from the end, to check with: an eighth at most, one at least.

    Raises InputError if a process would be left without a window.
    """
    count = max(1, min(held_out, len(windows) // 8, len(windows) - distributed.count()))
    distributed.check_windows(len(windows), count)
    return windows[:-count], windows[-count:]
