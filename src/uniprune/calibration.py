"""Calibration text -> saliency, by a local metric: in one pass over the dense model, or block after block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uniprune import masks as masking
from uniprune import refine as refining
from uniprune.errors import InputError, UniPruneError
from uniprune.executor import Blocks, batches, forward
from uniprune.matrices import Matrices, find_blocks
from uniprune.metrics import Gram, Metric, SquaredNorm
from uniprune.patterns import Pattern
from uniprune.progress import Progress, silent


class LocalSaliency(Mapping[str, Tensor]):
    """Scores computed when they are asked for: all of them together would take as much memory as the model."""

    def __init__(self, matrices: Matrices, metric: Metric, statistics: Mapping[str, SquaredNorm]) -> None:
        self._matrices, self._metric, self._statistics = matrices, metric, statistics

    def __getitem__(self, name: str) -> Tensor:
        return self._metric(self._matrices[name].weight, self._statistics.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


@contextmanager
def observing(matrices: Matrices, kind: type[SquaredNorm] | None) -> Iterator[dict[str, SquaredNorm]]:
    """Inside the ``with`` block, every forward pass feeds each matrix's inputs to its statistic."""
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
            statistics[name] = kind(matrix.shape[1], matrix.parameter.device)
            handles.append(matrix.module.register_forward_pre_hook(feed(statistics[name])))
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def one_shot(
    model: nn.Module, matrices: Matrices, windows: Tensor, metric: Metric, progress: Progress = silent
) -> LocalSaliency:
    """The saliency of every matrix from one forward pass over the dense model.

    windows: token ids ``[windows, length]``.
    Raises UniPruneError if a matrix saw no token (an expert that was never routed to).
    """
    with observing(matrices, metric.statistic) as statistics:
        todo = batches(windows) if metric.statistic else []
        for batch in progress(todo, "calibrating", len(todo)):
            forward(model, batch)
    check_seen(statistics)
    return LocalSaliency(matrices, metric, statistics)


def sequential(
    model: nn.Module,
    matrices: Matrices,
    windows: Tensor,
    metric: Metric,
    pattern: Pattern,
    progress: Progress = silent,
    refine: bool = False,
) -> dict[str, Tensor]:
    """Masks cut block after block, each block scored on what the pruned blocks before it put out (as Wanda's code does).

    refine: lower each matrix's reconstruction error on those inputs before its block runs on (see uniprune.refine); that
    takes a Gram matrix per matrix of one block, in float32.
    The model's weights are the same afterwards, bit for bit.
    Raises InputError if the pattern needs all scores at once (scope ``model``), or with ``refine`` has no budget by row.
    """
    if not pattern.local:
        raise InputError(f"--sequential cuts block after block, but {pattern} needs all scores; use --scope row or matrix")
    if refine:
        refining.check(pattern)
    kind = Gram if refine else metric.statistic
    _, modules = find_blocks(model)
    runner = Blocks(model, modules, windows)
    masks: dict[str, Tensor] = {}
    for index in progress(runner, "pruning block by block", len(modules)):
        here = {name: matrix for name, matrix in matrices.items() if matrix.block == index}
        if kind:
            with observing(here, kind) as statistics:
                runner.run(index)
            check_seen(statistics)
        else:
            statistics = {}
        cut = dict(pattern(LocalSaliency(here, metric, statistics)))
        if refine:
            cut = {name: refining.refine(here[name].weight, m, statistics[name].mean, pattern) for name, m in cut.items()}
        with masking.applied(here, cut):
            runner.run(index, advance=True)
        masks |= cut
    return masks


def check_seen(statistics: Mapping[str, SquaredNorm]) -> None:
    """Raises UniPruneError if a matrix saw no token, or if its sums overflowed."""
    blind = [name for name, statistic in statistics.items() if statistic.tokens == 0]
    if blind:
        raise UniPruneError(
            f"{len(blind)} matrices saw no calibration token, e.g. {blind[0]}; use more text, or leave them out"
        )
    for name, statistic in statistics.items():
        if not bool(torch.isfinite(statistic.total).all()):
            raise UniPruneError(f"{name}: its inputs overflowed; calibrate in another dtype (--dtype bfloat16 or float32)")
