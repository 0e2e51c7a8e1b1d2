"""The order of input channels in which an N:M pattern keeps the most: a search on scores alone, as in the paper of RIA."""

from __future__ import annotations

import torch
from torch import Tensor

from uniprune.errors import InputError
from uniprune.sparsity.patterns.nm import NM

PIECE = 1 << 24  # elements handled at a time where a matrix may be mapped from a file, or large
SWEEPS = 4
BATCH = 512  # groups that exchange channels with each other at a time: time and memory grow with it


def kept(scores: Tensor, n: int, m: int, permutation: Tensor | None = None) -> float:
    """The sum of the scores ``[out, in]`` that N:M keeps when the columns are in another order (float64 sum)."""
    total = 0.0
    for rows in pieces(scores, 0):
        ordered = rows if permutation is None else rows[:, permutation]
        total += float(ordered.reshape(-1, m).topk(n).values.sum(dtype=torch.float64))
    return total


def search(scores: Tensor, n: int, m: int, sweeps: int = SWEEPS, batch: int = BATCH, seed: int = 0) -> Tensor:
    """An order of the columns, int64 ``[in]`` on the CPU, in which N:M keeps much of the scores ``[out, in]``.

    Column j of the reordered matrix is column ``permutation[j]`` of the original. Where nothing better than the
    identity is found, that is returned. Same scores and seed: same order.

    First the columns are dealt out to the groups by their sums, so that large ones do not meet. Then, again and again, each
    group gives up one channel, and all those are handed out again, in the best way. Let ``t_rg`` be the N-th largest of the
    scores that row r has left in group g: channel i adds ``max(s_ri - t_rg, 0)`` there, which is ``|s_ri - t_rg| / 2`` and
    terms of i alone and g alone, that every assignment has. So the best assignment is the one with the highest sum of L1
    distances (Zhang et al., ICLR 2024, solve it alike). Departures from RIA: which channel leaves is drawn at random, and is
    another one in every sweep, and at most ``batch`` groups exchange channels at a time. The time goes as
    ``sweeps * batch * in * out``.

    Raises InputError if the columns cannot be grouped, or if a score is NaN or infinite.
    """
    columns = scores.shape[1]
    if reason := NM(n, m).unsupported(*scores.shape):
        raise InputError(f"no channel permutation for {n}:{m}: {reason}")
    if not bool(torch.isfinite(scores).all()):
        raise InputError(
            "no channel permutation: the scores contain NaN or infinity; recalibrate, and check the model's weights"
        )
    identity = torch.arange(columns)
    if n == m or columns == m:
        return identity
    generator = torch.Generator().manual_seed(seed)
    groups = max((identity, _dealt(scores, m)), key=lambda order: kept(scores, n, m, order)).reshape(-1, m)
    for _ in range(sweeps):
        groups = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(1))
        for place in range(m):
            for some in torch.split(torch.randperm(len(groups), generator=generator), batch):
                groups[some, place] = _exchanged(scores, groups[some], place, n)
    groups = groups.sort(1).values  # inside a group the lower index goes first, as it wins ties
    found = groups[groups[:, 0].argsort()].flatten()
    return found if kept(scores, n, m, found) > kept(scores, n, m) else identity


def search_within(scores: Tensor, groups: int, n: int, m: int, seed: int = 0) -> Tensor:
    """As :func:`search`, with each of so many equal parts of the columns in an order of its own. Raises as it does."""
    parts = scores.chunk(groups, 1)
    starts = range(0, scores.shape[1], parts[0].shape[1])
    return torch.cat([start + search(part, n, m, seed=seed) for start, part in zip(starts, parts, strict=True)])


def _dealt(scores: Tensor, m: int) -> Tensor:
    """The columns by falling sum, dealt to the groups back and forth: each group gets one of every m-th of them."""
    deals = scores.sum(0, dtype=torch.float64).cpu().argsort(descending=True, stable=True).reshape(m, -1)
    deals[1::2] = deals[1::2].flip(1)
    return deals.T.flatten()


def _exchanged(scores: Tensor, groups: Tensor, place: int, n: int) -> Tensor:
    """The channels ``[groups]`` at one place of each group ``[groups, m]``, handed out again if that keeps more."""
    leaving = groups[:, place]
    staying = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    value = torch.zeros(len(groups), len(groups), device=scores.device)  # [channel, group]
    for rows in pieces(scores, 0):
        thresholds = rows[:, staying].topk(n).values[..., -1]
        value += torch.cdist(rows[:, leaving].T.float().contiguous(), thresholds.T.float().contiguous(), p=1)
    value = value.double().cpu()
    entering = _assignment(value)
    better = value[entering, torch.arange(len(groups))].sum() > value.diagonal().sum()
    return leaving[entering] if better else leaving


def _assignment(value: Tensor) -> Tensor:
    """For each column of ``value`` ``[n, n]`` one row, so that the sum of the chosen entries is the highest there is."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(value.T.numpy(), maximize=True)[1])


def pieces(table: Tensor, axis: int) -> tuple[Tensor, ...]:
    """A matrix in views of at most PIECE elements, cut along one axis."""
    return torch.split(table, max(1, PIECE // max(1, table.shape[1 - axis])), dim=axis)
