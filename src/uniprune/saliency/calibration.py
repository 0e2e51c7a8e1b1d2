"""Calibration text -> saliency, by a local metric: in one pass over the dense model, in memory or block after block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.models.blocks import Residency, batches, device_of, last_hidden, resident
from uniprune.models.matrices import Matrices, find_blocks
from uniprune.models.replay.replay import Replay
from uniprune.models.replay.sweep import BlockSweep
from uniprune.saliency.metrics import Metric
from uniprune.saliency.observation import check_called, observing, starved, sum_and_check
from uniprune.saliency.record import Starved
from uniprune.saliency.statistics import Kind, Statistics
from uniprune.sparsity.views import Scores
from uniprune.storage.runs import Run
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

Finish = Callable[[Matrices, Statistics], None]
"""Finishes the statistics of some matrices, in place, when all tokens have been seen."""
SWEEP, OUTPUTS = "sweep", "outputs"  # stages of a run that go block by block: over inputs of matrices, outputs of experts


@dataclass(frozen=True)
class Calibration:
    """What a calibration works on, and how it is executed.

    matrices: those of ``model`` to score. windows: token ids ``[windows, length]``. residency: brings a block's weights into
    memory, where they are there one block at a time. run: where progress is saved and resumed; what is returned may lie there.
    recompute: whether the backward pass of a model in memory computes each block's activations again instead of keeping them
    (activation checkpointing). offload: whether the controller's states lie in host memory, beside a GPU's.
    """

    model: nn.Module
    matrices: Matrices
    windows: Tensor
    residency: Residency = resident
    run: Run | None = None
    progress: Progress = silent
    recompute: bool = False
    offload: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return device_of(self.model)

    @property
    def streamed(self) -> bool:
        """Whether the model's blocks are in memory one at a time."""
        return self.residency is not resident


class LocalSaliency(Scores):
    """Scores computed when they are asked for: all of them together would take as much memory as the model."""

    def __init__(self, matrices: Matrices, metric: Metric, statistics: Statistics) -> None:
        self._matrices, self._metric, self._statistics = matrices, metric, statistics

    def __getitem__(self, name: str) -> Tensor:
        scores = self._metric(self._matrices[name].weight, self._statistics.get(name) if self._metric.statistic else None)
        return scores.float()  # a metric of the user's may compute in float64, as statistics are

    def size(self, name: str) -> int:
        return self._matrices[name].size

    @property
    def starved(self) -> Starved | None:
        """For the report: the experts that saw too few tokens and are scored by magnitude, if any."""
        return starved(self._matrices, self._statistics)

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def one_shot(calibration: Calibration, metric: Metric) -> LocalSaliency:
    """The saliency of every matrix from one forward pass over the dense model.

    Raises as :func:`observed`.
    """
    return LocalSaliency(calibration.matrices, metric, observed(calibration, metric.statistic))


@torch.no_grad()
def observed(
    calibration: Calibration,
    kind: Kind | None,
    finish: Finish = sum_and_check,
    stage: str = SWEEP,
    all_called: bool = True,
) -> Statistics:
    """The statistics of every matrix's inputs, from one forward pass over the dense model; for ``kind`` None there is no pass.

    finish: is called with the finished statistics; by default they are summed over processes, experts that saw few tokens are
    filled in, and all are checked. stage: the name in the run that progress is kept under. all_called: whether the first batch
    has to reach every matrix that is no expert's.
    A model whose blocks are in memory one at a time keeps hidden states and statistics in the run: when it is resumed, finished
    blocks are not run again. The pass of a model in memory is short, and starts again.
    Raises InputError if a matrix saw no token and no expert of its group did, or if inputs overflowed.
    """
    matrices = calibration.matrices
    if kind is None:
        return {}
    if calibration.streamed:
        return _by_block(calibration, kind, finish, stage)
    todo = batches(distributed.share(calibration.windows))
    with observing(matrices, kind, calibration.device) as statistics:
        for number, batch in enumerate(calibration.progress(todo, "calibrating", len(todo))):
            last_hidden(calibration.model, batch)
            if number == 0 and all_called:
                check_called(matrices, statistics)
    finish(matrices, statistics)
    return statistics


def _by_block(calibration: Calibration, kind: Kind, finish: Finish, stage: str) -> Statistics:
    matrices, device = calibration.matrices, calibration.device
    store, sweep = open_sweep(calibration, stage)
    with observing(matrices, kind, device) as statistics:
        for name, saved in store.items() if store is not None else ():
            statistics[name].add(saved["total"].to(device), int(saved["tokens"]))
        for index in calibration.progress(sweep, "calibrating block by block", len(sweep)):
            sweep.run(index, advance=True)
            here = {name: statistics[name] for name, matrix in matrices.items() if matrix.block == index}
            finish(matrices, here)
            if store is not None:
                for name, statistic in here.items():
                    store[name] = {"total": statistic.total, "tokens": torch.tensor(statistic.tokens)}
                sweep.sync()
                store.commit({"done": index + 1})
    return statistics


def open_sweep(calibration: Calibration, stage: str = SWEEP) -> tuple[Store | None, BlockSweep]:
    """The store of a stage, with what an earlier run has saved (None without a run), and the blocks still to be run."""
    model, windows = calibration.model, calibration.windows
    replay = Replay.probed(model, find_blocks(model)[1], windows, calibration.residency)
    mine = distributed.share(windows)
    if calibration.run is None:
        return None, BlockSweep(replay, mine)
    store, stash = Store(calibration.run, stage), Stash(calibration.run.aside(f"{stage}-stash"), calibration.run.durable)
    return store, BlockSweep(replay, mine, stash, done=store.facts.get("done", 0))
