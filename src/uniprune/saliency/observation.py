"""Statistics of matrices' inputs, collected while a model runs, and what stands in for those of experts that saw few tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.common import distributed
from uniprune.errors import InputError
from uniprune.models.experts import unfused
from uniprune.models.matrices import Matrices
from uniprune.saliency.record import Starved
from uniprune.saliency.statistics import Kind, Statistic, Statistics

FEW = 32  # tokens: with fewer, the RMS of a channel is off by more than an eighth


@contextmanager
def observing(matrices: Matrices, kind: Kind | None, device: torch.device | None = None) -> Iterator[dict[str, Statistic]]:
    """Inside the ``with`` block, every forward pass adds each matrix's inputs to its statistic.

    device: where the sums lie; by default each matrix's own, which must then be in memory.
    """
    statistics: dict[str, Statistic] = {}
    handles = []
    latest: list[Any] = [None, None, None]  # q, k, v and gate, up are called on one tensor, whose sums are computed once

    def adding(statistic: Statistic) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            version = None if args[0].is_inference() else args[0]._version  # grows when a tensor is changed in place
            if args[0] is not latest[0] or version is None or version != latest[1]:
                latest[:] = args[0], version, statistic.sums(args[0].detach().reshape(-1, args[0].shape[-1]))
            statistic.add(latest[2], args[0].shape[:-1].numel())

        return hook

    try:
        for name, matrix in matrices.items() if kind else ():
            assert kind is not None
            statistics[name] = kind(matrix.shape[1], device or matrix.device)
            handles += [module.register_forward_pre_hook(adding(statistics[name])) for module in matrix.modules]
        with unfused(matrix.module for matrix in matrices.values()):
            yield statistics
    finally:
        for handle in handles:
            handle.remove()


def sum_and_check(matrices: Matrices, statistics: Statistics) -> None:
    """Sums statistics over all processes, fills in those of starved experts, and checks all as :func:`check_seen` does."""
    sum_over_processes(statistics)
    fill_starved_experts(matrices, statistics)
    check_seen(statistics)


def sum_over_processes(statistics: Statistics) -> None:
    """Gives each process the sums of all."""
    for statistic in statistics.values():
        distributed.total(statistic.total)
        statistic.tokens = round(distributed.total_of(statistic.tokens))


def check_called(matrices: Matrices, statistics: Statistics) -> None:
    """Raises InputError if a matrix that is no expert's saw no token: what one batch did not reach, no other will."""
    passed_by = [name for name, statistic in statistics.items() if statistic.tokens == 0 and not matrices[name].group]
    if passed_by:
        raise InputError(
            f"{len(passed_by)} matrices saw no calibration token, e.g. {passed_by[0]}: the model does not call their layers; "
            f"leave them out (--exclude), e.g. --exclude {'.'.join(passed_by[0].split('.')[-2:])}"
        )


def check_seen(statistics: Statistics) -> None:
    """Raises InputError if a matrix saw no token, or if its sums overflowed."""
    unseen = [name for name, statistic in statistics.items() if statistic.tokens == 0]
    if unseen:
        raise InputError(
            f"{len(unseen)} matrices saw no calibration token, e.g. {unseen[0]}: their layers are skipped, or they are "
            "experts that no token was routed to; leave them out (--exclude), or use more text"
        )
    for name, statistic in statistics.items():
        if not bool(torch.isfinite(statistic.total).all()):
            raise InputError(f"{name}: its inputs overflowed; calibrate in another dtype (--dtype bfloat16 or float32)")


def fill_starved_experts(matrices: Matrices, statistics: Statistics, gradients: Mapping[str, Tensor] | None = None) -> None:
    """Where an expert's matrix saw under FEW tokens, its inputs become even, and as large as its fellows' are per token.

    So an activation-aware score becomes the magnitude, on the scale of the other experts' scores. gradients: sums over the
    tokens of squared output gradients ``[out]``; they become even, too, and as large as the fellows' are on average. Where all
    experts of a group saw too little, they are all treated so; where none saw any token, nothing is changed.
    """
    for names in _groups(matrices, statistics).values():
        few = [name for name in names if statistics[name].tokens < FEW]
        enough = [name for name in names if statistics[name].tokens >= FEW]
        fellows = enough or [name for name in few if statistics[name].tokens]
        if not few or not fellows:
            continue
        power = sum(statistics[name].power for name in fellows) / sum(statistics[name].tokens for name in fellows)
        gradient = sum(float(gradients[name].mean()) for name in fellows) / len(fellows) if gradients is not None else 0.0
        for name in few:
            statistics[name].become_even(power)
            if gradients is not None:
                gradients[name].fill_(gradient)


def starved(matrices: Matrices, statistics: Statistics) -> Starved | None:
    """For the report: the matrices whose inputs :func:`fill_starved_experts` replaced; None if none are."""
    groups = _groups(matrices, statistics)
    names = [name for group in groups.values() for name in group if statistics[name].tokens < FEW]
    return Starved(matrices=names, of=sum(map(len, groups.values())), tokens_under=FEW) if names else None


def _groups(matrices: Matrices, statistics: Statistics) -> dict[str, list[str]]:
    """The names of the matrices at the same place of each expert, by their group."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in statistics:
        if group := matrices[name].group:
            groups[group].append(name)
    return groups
