"""Calibration text -> saliency, by a local metric: in one pass over the dense model, or block after block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.models.blocks import Blocks, Replay, Residency, batches, device_of, last_hidden, resident
from uniprune.models.matrices import Matrices, find_blocks
from uniprune.saliency import statistics as statistics_module
from uniprune.saliency.metrics import Metric
from uniprune.saliency.statistics import SquaredNorm, observing, pool
from uniprune.storage.runs import Run
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

SWEEP = "sweep"  # the stage of a run that goes from block to block


class LocalSaliency(Mapping[str, Tensor]):
    """Scores computed when they are asked for: all of them together would take as much memory as the model."""

    def __init__(self, matrices: Matrices, metric: Metric, statistics: Mapping[str, SquaredNorm]) -> None:
        self._matrices, self._metric, self._statistics = matrices, metric, statistics

    def __getitem__(self, name: str) -> Tensor:
        return self._metric(self._matrices[name].weight, self._statistics.get(name))

    @property
    def starved(self) -> dict[str, Any]:
        """For the report, the experts that are scored by magnitude."""
        return statistics_module.starved(self._matrices, self._statistics)

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


@torch.no_grad()
def one_shot(
    model: nn.Module,
    matrices: Matrices,
    windows: Tensor,
    metric: Metric,
    progress: Progress = silent,
    residency: Residency = resident,
    run: Run | None = None,
) -> LocalSaliency:
    """The saliency of every matrix from one forward pass over the dense model.

    windows: token ids ``[windows, length]``. residency: of a model whose blocks are in memory one at a time. run: where hidden
    states lie between such blocks, and which blocks are done; a pass of a model in memory is short, and begins anew.
    Raises UniPruneError if a matrix saw no token and has no fellows that did (see uniprune.saliency.starvation).
    """
    if metric.statistic is None:
        return LocalSaliency(matrices, metric, {})
    mine = distributed.share(windows)
    if residency is resident:
        todo = batches(mine)
        with observing(matrices, metric.statistic, device_of(model)) as statistics:
            for batch in progress(todo, "calibrating", len(todo)):
                last_hidden(model, batch)
        pool(matrices, statistics)
        return LocalSaliency(matrices, metric, statistics)
    store = Store(run, SWEEP) if run else None
    runner = _blocks(model, mine, residency, run, store)
    with observing(matrices, metric.statistic, device_of(model)) as statistics:
        for name, found in store.items() if store else ():
            statistics[name].add(found["total"].to(device_of(model)), int(found["tokens"]))
        for index in progress(runner, "calibrating block by block", len(runner)):
            runner.run(index, advance=True)
            here = {name: statistics[name] for name, matrix in matrices.items() if matrix.block == index}
            pool(matrices, here)
            if store is not None:
                for name, statistic in here.items():
                    store[name] = {"total": statistic.total, "tokens": torch.tensor(statistic.tokens)}
                store.commit({"done": index + 1})
    return LocalSaliency(matrices, metric, statistics)


def _blocks(model: nn.Module, windows: Tensor, residency: Residency, run: Run | None, store: Store | None) -> Blocks:
    """The blocks that are still to be run over the windows."""
    replay = Replay(model, find_blocks(model)[1], residency)
    if run is None or store is None:
        return Blocks(replay, windows)
    stash = run.folder / "stash"
    stash.mkdir(exist_ok=True)
    return Blocks(replay, windows, Stash(stash), done=store.facts.get("done", 0))
