"""What a descent starts from: input statistics and output gradients of one pass of the dense model, forwards and backwards.

``fisher`` is the controller that uses these alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.controller.passes.protocol import Passes
from uniprune.controller.schedule import in_steps
from uniprune.errors import InputError
from uniprune.saliency.observation import check_called, check_seen, fill_starved_experts, observing, sum_over_processes
from uniprune.saliency.statistics import Kind, SquaredNorm, Statistic, Statistics, additional
from uniprune.storage.runs import OLDER, Run
from uniprune.storage.tensor_store import Store

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=Statistic)
FLOOR = 1e-6  # least gradient RMS of an output, of the largest in its matrix: at 0 all scores of its row would be equal


class Start(NamedTuple):
    """What a descent starts from, by matrix name.

    norms: squared norms of the inputs in the dense model. gradients: RMS over the tokens ``[out]`` of the gradient of the
    next-token loss at the outputs. statistics: of the inputs, of the kind that the metric wants; ``norms`` itself if that kind
    is squared norms. without_gradient: matrices that saw tokens, but got no gradient; their ``gradients`` are the median of the
    other matrices', or 1 where no matrix has one.
    """

    norms: dict[str, SquaredNorm]
    gradients: dict[str, Tensor]
    statistics: Statistics
    without_gradient: list[str]


def sensitivities(
    passes: Passes,
    windows: Tensor,
    wanted: Kind | None,
    run: Run | None = None,
    batch_tokens: int | None = None,
    progress: Progress = silent,
) -> Start:
    """Measures the start of a descent, or restores it from a run that is resumed.

    windows: token ids ``[windows, length]``. wanted: the statistic of the local metric. run: where it is saved. batch_tokens:
    tokens that go through the model at once; by default one window, or all if blocks are read one at a time.
    """
    other = additional(SquaredNorm, wanted)
    store = Store(run, "start", shared=True) if run else None
    if store is not None and store.facts:
        return _restored(store, passes, other)
    start = _measured(passes, windows, other, batch_tokens, progress)
    if store is not None:
        if not distributed.rank():  # all processes have the same sums
            store["inputs"] = {name: norm.total for name, norm in start.norms.items()}
            store["gradients"] = start.gradients
            if other:
                store["statistics"] = {name: statistic.total for name, statistic in start.statistics.items()}
        store.commit(
            {"tokens": {name: norm.tokens for name, norm in start.norms.items()}, "without_gradient": start.without_gradient}
        )
    return start


def _measured(passes: Passes, windows: Tensor, other: Kind | None, batch_tokens: int | None, progress: Progress) -> Start:
    """other: the kind of statistic to collect besides squared norms, if any."""
    network = passes.network
    columns = {name: matrix.shape[1] for name, matrix in network.matrices.items()}
    norms = {name: SquaredNorm(count, passes.device) for name, count in columns.items()}
    others = {name: other(count, passes.device) for name, count in columns.items()} if other else {}
    totals = {name: torch.zeros(matrix.shape[0], device=passes.device) for name, matrix in network.matrices.items()}

    def seen(name: str, x: Tensor, gradient: Tensor) -> None:
        norms[name].update(x)
        totals[name] += gradient.float().square().sum(0)
        if others:
            others[name].update(x)

    head = passes.head(windows)
    portions = [
        portion
        for batch in in_steps(windows, batch_tokens or windows.numel())
        for portion in passes.in_batches(batch[distributed.rank() :: distributed.count()], batch_tokens or windows.shape[1])
    ]
    with network.watching(seen):
        for number, batch in enumerate(progress(portions, "measuring output gradients", len(portions))):
            passes.backward(head.next_token(passes.forward_student(batch), batch))
            if number == 0:
                _check_called(passes, batch[:1], norms)
    for total in totals.values():
        distributed.total(total)
    sum_over_processes(norms)
    sum_over_processes(others)
    unreached = [name for name, norm in norms.items() if not norm.tokens and not network.matrices[name].group]
    for statistics in filter(None, (norms, others)) if unreached else ():
        _observe_forward(passes, portions, {name: statistics[name] for name in unreached})  # type: ignore[index]
    fill_starved_experts(network.matrices, norms, totals)
    fill_starved_experts(network.matrices, others)
    check_seen(norms)
    check_seen(others)
    gradients = {name: (total / windows.numel()).sqrt() for name, total in totals.items()}
    without_gradient = [name for name, gradient in gradients.items() if not bool(gradient.any())]
    _fill_with_median(gradients, without_gradient)
    for gradient in gradients.values():
        gradient.clamp_min_(FLOOR * gradient.max())
    return Start(norms, gradients, others or norms, without_gradient)


def _check_called(passes: Passes, batch: Tensor, norms: Mapping[str, SquaredNorm]) -> None:
    """Raises as ``observation.check_called``. norms: after a pass backwards over the batch, which does not come everywhere."""
    matrices = {name: matrix for name, matrix in passes.network.matrices.items() if not (norms[name].tokens or matrix.group)}
    if matrices:
        with observing(matrices, SquaredNorm, passes.device) as observed:
            passes.infer(batch)
        check_called(matrices, observed)


def _observe_forward(passes: Passes, portions: list[Tensor], statistics: dict[str, Statistic]) -> None:
    """Adds the inputs of matrices that no gradient reaches, from forward passes: the backward pass never comes to them."""
    kind = type(next(iter(statistics.values())))
    matrices = {name: passes.network.matrices[name] for name in statistics}
    with observing(matrices, kind, passes.device) as observed:
        for batch in portions:
            passes.infer(batch)
    sum_over_processes(observed)
    for name, statistic in observed.items():
        statistics[name].merge(statistic)


def _fill_with_median(gradients: dict[str, Tensor], names: Collection[str]) -> None:
    """Gives matrices without a gradient the median of the others: at 0, a shared budget would remove their weights first.

    Where no matrix has one, all have the same: their scores are then the local metric's.
    """
    others = [float(gradient.mean()) for name, gradient in gradients.items() if name not in names]
    for name in names:
        gradients[name].fill_(median(others) if others else 1.0)


def warn_without_gradient(names: Collection[str]) -> None:
    """Warns of matrices that no gradient has reached, so that their scores are the local metric's alone."""
    if names:
        logger.warning(
            "no gradient reached %d matrices, e.g. %s: they choose, or what they compute is not used; their masks are the "
            "local metric's alone, unless they are left dense (--exclude)",
            len(names),
            next(iter(names)),
        )


def _restored(store: Store, passes: Passes, other: Kind | None) -> Start:
    """What an earlier run saved; other: as for :func:`_measured`. Raises InputError for one of another version."""
    if "without_gradient" not in store.facts:
        raise InputError(OLDER)

    def statistics(kind: type[S], key: str) -> dict[str, S]:
        restored = {name: kind(matrix.shape[1], passes.device) for name, matrix in passes.network.matrices.items()}
        for name, total in store[key].items():
            restored[name].add(total.to(passes.device), store.facts["tokens"][name])
        return restored

    norms = statistics(SquaredNorm, "inputs")
    gradients = {name: rms.to(passes.device) for name, rms in store["gradients"].items()}
    return Start(norms, gradients, statistics(other, "statistics") if other else norms, list(store.facts["without_gradient"]))
