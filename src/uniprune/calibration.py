"""Calibration text -> saliency, by a local metric: in one pass over the dense model, or block after block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uniprune import masks as masking
from uniprune import ranks, starvation
from uniprune import refine as refining
from uniprune.errors import InputError, UniPruneError
from uniprune.executor import Blocks, Replay, Residency, Stash, batches, device_of, last_hidden, resident
from uniprune.matrices import Matrices, find_blocks
from uniprune.metrics import Gram, Metric, SquaredNorm
from uniprune.patterns import Pattern
from uniprune.progress import Progress, silent
from uniprune.routing import taken_apart
from uniprune.runs import Run
from uniprune.store import Store

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
        return starvation.starved(self._matrices, self._statistics)

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


@contextmanager
def observing(
    matrices: Matrices, kind: type[SquaredNorm] | None, device: torch.device | None = None
) -> Iterator[dict[str, SquaredNorm]]:
    """Inside the ``with`` block, every forward pass feeds each matrix's inputs to its statistic.

    device: where the sums lie; by default each matrix's own, which must then be in memory.
    """
    statistics: dict[str, SquaredNorm] = {}
    handles = []
    latest: list[Any] = [None, None]  # q, k, v and gate, up are called on one tensor, whose sums are computed once

    def feed(statistic: SquaredNorm) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0] is not latest[0]:
                latest[:] = args[0], statistic.sums(args[0].detach().reshape(-1, args[0].shape[-1]))
            statistic.add(latest[1], args[0].shape[:-1].numel())

        return hook

    try:
        for name, matrix in matrices.items() if kind else ():
            assert kind is not None
            statistics[name] = kind(matrix.shape[1], device or matrix.device)
            handles += [module.register_forward_pre_hook(feed(statistics[name])) for module in matrix.modules]
        with taken_apart(matrix.module for matrix in matrices.values()):
            yield statistics
    finally:
        for handle in handles:
            handle.remove()


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
    Raises UniPruneError if a matrix saw no token and has no fellows that did (see uniprune.starvation).
    """
    if metric.statistic is None:
        return LocalSaliency(matrices, metric, {})
    mine = ranks.share(windows)
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


def sequential(
    model: nn.Module,
    matrices: Matrices,
    windows: Tensor,
    metric: Metric,
    pattern: Pattern,
    progress: Progress = silent,
    refine: bool = False,
    residency: Residency = resident,
    run: Run | None = None,
) -> Mapping[str, Tensor]:
    """Masks cut block after block, each block scored on what the pruned blocks before it put out (as Wanda's code does).

    refine: lower each matrix's reconstruction error on those inputs before its block runs on (see uniprune.refine); that
    takes a Gram matrix per matrix of one block, in float32. residency: of a model whose blocks are in memory one at a
    time. run: where the masks of finished blocks are kept, and the states between them; the masks returned may lie there.
    The model's weights are the same afterwards, bit for bit.
    Raises InputError if the pattern needs all scores at once (scope ``model``), or with ``refine`` has no budget by row.
    """
    if any(matrix.spans for matrix in matrices.values()):
        raise InputError("--sequential cuts block after block, but blocks of this model share weights; leave it out")
    if not pattern.local:
        raise InputError(f"--sequential cuts block after block, but {pattern} needs all scores; use --scope row or matrix")
    if refine:
        refining.check(pattern)
    kind = Gram if refine else metric.statistic
    store = Store(run, SWEEP) if run else None
    runner = _blocks(model, ranks.share(windows), residency, run, store)
    masks: dict[str, Tensor] = {}
    for index in progress(runner, "pruning block by block", len(runner)):
        here = {name: matrix for name, matrix in matrices.items() if matrix.block == index}
        if kind:
            with observing(here, kind, device_of(model)) as statistics:
                runner.run(index)
            pool(here, statistics)
            starvation.starved(here, statistics)
        else:
            statistics = {}
        cut = dict(pattern(LocalSaliency(here, metric, statistics)))
        if refine:
            cut = {name: refining.refine(here[name].weight, m, statistics[name].mean, pattern) for name, m in cut.items()}
        with masking.applied(here, cut):
            runner.run(index, advance=True)
        if store is None:
            masks |= cut
        else:
            for name, mask in cut.items():
                store[name] = {"mask": masking.pack(mask)}
            store.commit({"done": index + 1})
    return masks if store is None else StoredMasks(store, matrices)


class StoredMasks(Mapping[str, Tensor]):
    """The masks of a sweep on disk, unpacked one matrix at a time."""

    def __init__(self, store: Store, matrices: Matrices) -> None:
        self._store, self._matrices = store, matrices

    def __getitem__(self, name: str) -> Tensor:
        return masking.unpack(self._store.tensor(name, "mask"), self._matrices[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def pool(matrices: Matrices, statistics: Mapping[str, SquaredNorm]) -> None:
    """Sums statistics over all processes, sees to starved experts, and checks them as :func:`check_seen` does."""
    for statistic in statistics.values():
        ranks.total(statistic.total)
        statistic.tokens = round(ranks.total_of(statistic.tokens))
    starvation.feed(matrices, statistics)
    check_seen(statistics)


def _blocks(model: nn.Module, windows: Tensor, residency: Residency, run: Run | None, store: Store | None) -> Blocks:
    """The blocks that are still to be run over the windows."""
    replay = Replay(model, find_blocks(model)[1], residency)
    if run is None or store is None:
        return Blocks(replay, windows)
    stash = run.folder / "stash"
    stash.mkdir(exist_ok=True)
    return Blocks(replay, windows, Stash(stash), done=store.facts.get("done", 0))


def check_seen(statistics: Mapping[str, SquaredNorm]) -> None:
    """Raises UniPruneError if a matrix saw no token, or if its sums overflowed."""
    blind = [name for name, statistic in statistics.items() if statistic.tokens == 0]
    if blind:
        raise UniPruneError(
            f"{len(blind)} matrices saw no calibration token, e.g. {blind[0]}: their layers are passed by, or they are experts "
            "that nothing was sent to; leave them out (--exclude), or use more text"
        )
    for name, statistic in statistics.items():
        if not bool(torch.isfinite(statistic.total).all()):
            raise InputError(f"{name}: its inputs overflowed; calibrate in another dtype (--dtype bfloat16 or float32)")
