"""One pass of the dense model, forwards and backwards: what a descent starts from, and the controller that stops there."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.controller.passes import Passes, open_passes
from uniprune.controller.protocol import ControllerRecord, Cost
from uniprune.errors import InputError
from uniprune.models.matrices import Matrices
from uniprune.saliency.calibration import Calibration, LocalSaliency
from uniprune.saliency.metrics import Metric
from uniprune.saliency.statistics import (
    Kind,
    SquaredNorm,
    Statistic,
    Statistics,
    add_up,
    beside,
    check_seen,
    feed,
    observing,
    starved,
)
from uniprune.sparsity.patterns import Pattern, by_row
from uniprune.storage import runs
from uniprune.storage.runs import Run
from uniprune.storage.tensor_store import Store

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=Statistic)
FAINT = 1e-6  # of the largest in its matrix: what an output that no gradient reached is worth, so that its row keeps its order


class Start(NamedTuple):
    """What a descent starts from, by matrix name.

    norms: of the inputs in the dense model. gradients: RMS ``[out]`` of the next-token loss's gradient at the outputs.
    statistics: of the inputs, of the kind that the metric wants; they are the norms if those will do. still: matrices that
    saw tokens and got no gradient; in ``gradients`` they have the others' median.
    """

    norms: dict[str, SquaredNorm]
    gradients: dict[str, Tensor]
    statistics: Statistics
    still: list[str]


@dataclass(frozen=True)
class Fisher:
    """The local score times the RMS of the loss's gradient at a weight's output, and no descent.

    Where the local score is Wanda's, its square is the weight's square times the diagonal of the Fisher information, inputs and
    output gradients taken to be independent (as in K-FAC, arXiv 1503.05671). Within a row nothing changes: N:M and budgets by
    row are the metric's own. A budget for a matrix or the model gives each row what its output is worth to the loss, the idea
    of F-Wanda (arXiv 2608.00481).

    batch_tokens: that go through the model at once; what is found is the same. More take more memory, but of a model that is
    read block by block fewer readings.
    """

    cost: ClassVar[Cost] = Cost(flops=4)
    in_memory: ClassVar[bool] = False
    one_process: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    batch_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise InputError("fisher: batch_tokens must be above 0")

    def step_tokens(self, length: int) -> int:
        """Tokens of a step on windows of ``length``: of one batch."""
        return step_windows(self.batch_tokens, length) * length

    def calibrate(
        self,
        calibration: Calibration,
        metric: Metric,
        targets: Sequence[Pattern],
        steps: int | None = None,
        seed: int = 0,
    ) -> tuple[Mapping[str, Tensor], ControllerRecord]:
        """The scores, made when they are asked for, and the record; steps: batches, at most."""
        if targets and all(by_row(target.part(name)) for target in targets for name in calibration.matrices):
            logger.warning(
                "--controller fisher changes nothing at %s, which is decided within rows: none is faster", targets[0]
            )
        batches = in_steps(calibration.windows, self.batch_tokens)[:steps]
        windows = torch.cat(batches)
        with ExitStack() as stack:
            passes = open_passes(calibration, calibration.run or stack.enter_context(runs.temporary()))
            stack.enter_context(passes.network)
            found = sensitivities(passes, windows, metric.statistic, calibration.run, self.batch_tokens, calibration.progress)
        warn_of_stillness(found.still)
        facts = starved(calibration.matrices, found.norms) | {"without_gradient": found.still}
        record = ControllerRecord(objective="cross-entropy", steps=len(batches), tokens=windows.numel(), **facts)
        return _Weighted(calibration.matrices, metric, found.statistics, found.gradients), record


class _Weighted(LocalSaliency):
    """Local scores, each row times a factor ``[out]``."""

    def __init__(self, matrices: Matrices, metric: Metric, statistics: Statistics, factors: Mapping[str, Tensor]) -> None:
        super().__init__(matrices, metric, statistics)
        self._factors = factors

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).float() * self._factors[name].float()[:, None]


def step_windows(tokens: int, length: int) -> int:
    """Windows of ``length`` in a step of so many tokens: as many as fit, and one for every process at least."""
    return max(distributed.count(), tokens // length)


def in_steps(windows: Tensor, tokens: int) -> list[Tensor]:
    """The windows ``[n, length]`` of each step, as many as :func:`step_windows` says; the last may have fewer."""
    processes = distributed.count()
    todo = list(torch.split(windows, step_windows(tokens, windows.shape[1])))
    if len(todo[-1]) < processes:
        todo[-2:] = [torch.cat(todo[-2:])]
    return todo


def sensitivities(
    passes: Passes,
    windows: Tensor,
    wanted: Kind | None,
    run: Run | None = None,
    batch_tokens: int | None = None,
    progress: Progress = silent,
) -> Start:
    """The start of a descent, or what an earlier run found it to be.

    windows: token ids ``[windows, length]``. wanted: the statistic of the local metric. batch_tokens: that go through the model
    at once; by default a window, or, where blocks are read one at a time, all. The network of ``passes`` is left
    without masks.
    """
    other = beside(SquaredNorm, wanted)
    store = Store(run, "start", shared=True) if run else None
    if store is not None and store.facts:
        return _restored(store, passes, other)
    start = _measured(passes, windows, other, batch_tokens, progress)
    if store is not None:
        if not distributed.rank():  # all have found the same
            store["inputs"] = {name: norm.total for name, norm in start.norms.items()}
            store["gradients"] = start.gradients
            if other:
                store["statistics"] = {name: one.total for name, one in start.statistics.items()}
        store.commit({"tokens": {name: norm.tokens for name, norm in start.norms.items()}, "still": start.still})
    return start


def _measured(passes: Passes, windows: Tensor, other: Kind | None, batch_tokens: int | None, progress: Progress) -> Start:
    network = passes.network
    columns = {name: matrix.shape[1] for name, matrix in network.matrices.items()}
    norms = {name: SquaredNorm(count, passes.device) for name, count in columns.items()}
    own = {name: other(count, passes.device) for name, count in columns.items()} if other else {}
    totals = {name: torch.zeros(matrix.shape[0], device=passes.device) for name, matrix in network.matrices.items()}

    def watch(name: str, x: Tensor, gradient: Tensor) -> None:
        norms[name].update(x)
        totals[name] += gradient.float().square().sum(0)
        if own:
            own[name].update(x)

    network.masks, network.watch = {}, watch
    head = passes.head(windows)
    portions = [
        portion
        for batch in in_steps(windows, batch_tokens or windows.numel())
        for portion in passes.in_batches(batch[distributed.rank() :: distributed.count()], batch_tokens or windows.shape[1])
    ]
    for batch in progress(portions, "finding what each output is worth", len(portions)):
        passes.backward(head.next_token(passes.forward_student(batch), batch))
    network.watch = None
    for total in totals.values():
        distributed.total(total)
    add_up(norms)
    add_up(own)
    unreached = [name for name, norm in norms.items() if not norm.tokens and not network.matrices[name].group]
    for statistics in filter(None, (norms, own)) if unreached else ():
        _observe(passes, portions, {name: statistics[name] for name in unreached})  # type: ignore[index]
    feed(network.matrices, norms, totals)
    feed(network.matrices, own)
    check_seen(norms)
    check_seen(own)
    gradients = {name: (total / windows.numel()).sqrt() for name, total in totals.items()}
    still = [name for name, gradient in gradients.items() if not bool(gradient.any())]
    _stand_in(gradients, still)
    for gradient in gradients.values():
        gradient.clamp_min_(FAINT * gradient.max())
    return Start(norms, gradients, own or norms, still)


def _observe(passes: Passes, portions: list[Tensor], statistics: dict[str, Statistic]) -> None:
    """Statistics of matrices that no gradient reaches, from passes forwards: backwards they see nothing."""
    kind = type(next(iter(statistics.values())))
    matrices = {name: passes.network.matrices[name] for name in statistics}
    with observing(matrices, kind, passes.device) as found:
        for batch in portions:
            passes.infer(batch)
    add_up(found)
    for name, statistic in found.items():
        statistics[name].merge(statistic)


def _stand_in(gradients: dict[str, Tensor], still: Collection[str]) -> None:
    """Without a gradient all of a matrix would be cut first, by any budget that it has in common with others."""
    others = [float(gradient.mean()) for name, gradient in gradients.items() if name not in still]
    for name in still if others else ():
        gradients[name].fill_(median(others))


def warn_of_stillness(names: Collection[str]) -> None:
    """Says which matrices no step of a descent could move."""
    if names:
        logger.warning(
            "no gradient reached %d matrices, e.g. %s: they choose, or what they compute is not used; their masks are the "
            "local metric's alone, unless they are left dense (--exclude)",
            *(len(names), next(iter(names))),
        )


def _restored(store: Store, passes: Passes, other: Kind | None) -> Start:
    def statistics(kind: type[S], key: str) -> dict[str, S]:
        found = {name: kind(matrix.shape[1], passes.device) for name, matrix in passes.network.matrices.items()}
        for name, total in store[key].items():
            found[name].add(total.to(passes.device), store.facts["tokens"][name])
        return found

    norms = statistics(SquaredNorm, "inputs")
    gradients = {name: rms.to(passes.device) for name, rms in store["gradients"].items()}
    return Start(norms, gradients, statistics(other, "statistics") if other else norms, list(store.facts["still"]))
