"""Better masks for one matrix without gradients: descent on its reconstruction error over masks alone, no weight changes.

    E(mask) = tr(L A L^T),   L = W - W * mask (what is lost),   A = X^T X / tokens [in, in]

is the mean squared change of the matrix's outputs. It is separable over rows, so all rows descend side by side. Pure
functions of float32 tensors on one device: a mask ``[out, in]`` in (True = keep), one of the same pattern out.

``--refine`` descends on E with a Gram matrix whose off-diagonal elements are halved (:func:`damped`): the plain E lets the
changes of lost weights cancel each other for most tokens, at the cost of a few that matter to all others.

Sources: the reconstruction error as in SparseGPT (arXiv 2301.00774), exchanges of two weights of a row as in SparseSwaps
(arXiv 2512.10922). Departure: the damping.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from uniprune.errors import InputError
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern

CHOICES = 128  # masks of a group that are all tried; 4:8 has 70, 8:16 would have 12870
PANEL = 128  # columns whose products are kept current while their groups change; a fresh product then ends rounding drift
CHUNK = 256  # rows at a time in row swaps: bounds their memory to CHUNK * (in + CANDIDATES ** 2) numbers, a few times
CANDIDATES = 32  # weights of each side that row swaps pair with each other
SWEEPS = 4  # turns of every group
SWAPS, ROUNDS = 16, 20  # swaps of a row between two fresh products, and how many such rounds
DAMPING = 0.5  # of off-diagonal elements: at 0 E is the plain error, at 1 its minimum is Wanda's mask
TOLERANCE = 1e-6  # of a weight's own error: what a change must gain beyond rounding, so that ties keep the present mask


def check(pattern: Pattern) -> None:
    """Raises InputError unless the pattern, rules aside, fixes what each row keeps: N:M, or a sparsity by row."""
    if not pattern.by_row:
        raise InputError(f"--refine exchanges weights within a row, but {pattern} has no budget by row; use --scope row or N:M")


def errors(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The reconstruction error ``[out]`` of each row; E is their sum. gram: ``[in, in]``, float32."""
    lost = weight.float() * ~mask
    return ((lost @ gram) * lost).sum(1)


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """A Gram matrix ``[in, in]`` with its off-diagonal elements times ``1 - damping``.

    Off-diagonal elements tell how inputs go together on average over the tokens. Masks that rely on it fully change the outputs
    of most tokens less, but those of rare ones more: of the first token of a text, say, to which all later ones attend, and
    whose hidden state is unlike all others'. With the diagonal alone, weights are lost independently of each other.
    """
    result = gram * (1 - damping)
    result.diagonal().copy_(gram.diagonal())
    return result


def refine(weight: Tensor, mask: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """A mask of the same pattern whose error is nowhere higher: :func:`descend_groups` or :func:`swap_rows`, then a check.

    Rows whose error, computed again, did not fall keep the mask they had, so that rounding cannot do harm.
    Raises InputError for patterns without a budget by row.
    """
    check(pattern)
    weight = weight.float()
    better = descend_groups(weight, mask, gram, pattern) if isinstance(pattern, NM) else swap_rows(weight, mask, gram)
    fell = errors(weight, better, gram) < errors(weight, mask, gram)
    return torch.where(fell[:, None], better, mask)


def descend_groups(weight: Tensor, mask: Tensor, gram: Tensor, pattern: NM, sweeps: int = SWEEPS) -> Tensor:
    """Coordinate descent over groups of M inputs: each in turn takes the best of all its masks, given the other groups.

    weight: float32. sweeps: how often every group has its turn. Where more than 128 masks keep N of M (8:16), a group makes
    its best exchanges of a kept and a pruned weight instead: then exact for each exchange, but not over all masks.
    """
    n, m = pattern.n, pattern.m
    if n == m:
        return mask
    exact = math.comb(m, n) <= CHOICES
    choices = _Choices.of(m, m - n, gram.device) if exact else None
    mask = mask.clone()
    panel = max(m, PANEL // m * m)
    for _ in range(sweeps):
        before = mask.clone()
        for start in range(0, weight.shape[1], panel):
            inside = slice(start, start + panel)
            product = (weight * ~mask) @ gram[:, inside]
            for first in range(0, product.shape[1], m):
                here, group = slice(first, first + m), slice(start + first, start + first + m)
                w, kept, block = weight[:, group], mask[:, group], gram[group, group]
                if choices is None:
                    new = _exchange(w, kept, product[:, here], block, m, m)
                else:
                    new = _best_choice(w, kept, product[:, here], block, choices)
                product += (w * (kept.float() - new.float())) @ gram[group, inside]
                mask[:, group] = new
        if torch.equal(mask, before):
            break
    return mask


def swap_rows(
    weight: Tensor, mask: Tensor, gram: Tensor, rounds: int = ROUNDS, swaps: int = SWAPS, candidates: int = CANDIDATES
) -> Tensor:
    """Exchanges kept for pruned weights within each row, the best pair first, until no pair lowers the row's error.

    weight: float32; every row of the mask keeps equally many. The change of a pair is exact, cross term and all, but only the
    ``candidates`` weights of each side that are best by themselves are paired: in longer rows the best pair can be missed.
    At most ``rounds * swaps`` exchanges; the candidates are chosen again after every ``swaps``.
    """
    mask = mask.clone()
    active = torch.arange(len(mask), device=mask.device)
    for _ in range(rounds):
        moved = []
        for rows in torch.split(active, CHUNK):
            w, kept = weight[rows], mask[rows]
            new = _exchange(w, kept, (w * ~kept) @ gram, gram, candidates, swaps)
            mask[rows] = new
            moved.append(rows[(new != kept).any(1)])
        active = torch.cat(moved)
        if not len(active):
            break
    return mask


class _Choices(NamedTuple):
    """All ways to drop some of M weights, and what of them is the same for every group.

    drops: zeros and ones ``[choices, m]``. first, second: of each pair of weights, and of each weight with itself; own: the
    places of the latter. twice: ``[pairs]``, 2 for pairs. both: whether a choice drops a pair, ``[choices, pairs]``.
    """

    drops: Tensor
    first: Tensor
    second: Tensor
    own: Tensor
    twice: Tensor
    both: Tensor

    @classmethod
    def of(cls, m: int, dropped: int, device: torch.device) -> _Choices:
        indices = torch.tensor(list(combinations(range(m), dropped)))
        drops = torch.zeros(len(indices), m).scatter_(1, indices, 1)
        first, second = torch.triu_indices(m, m)
        own, twice = (first == second).nonzero()[:, 0], torch.where(first == second, 1.0, 2.0)
        found = (drops, first, second, own, twice, drops[:, first] * drops[:, second])
        return cls(*(tensor.to(device) for tensor in found))


def _best_choice(weight: Tensor, mask: Tensor, product: Tensor, gram: Tensor, choices: _Choices) -> Tensor:
    """The best mask ``[rows, m]`` of one group, the others given.

    product: ``L A`` ``[rows, m]`` with the present mask; gram: the group's own ``[m, m]``.
    """
    drops, first, second, own, twice, both = choices
    outside = product - (weight * ~mask) @ gram
    terms = weight[:, first] * weight[:, second] * (gram[first, second] * twice)  # [rows, pairs]
    margin = TOLERANCE * terms[:, own].sum(1, keepdim=True)
    terms[:, own] += 2 * weight * outside
    change = terms @ both.T  # [rows, choices]: E without the constant of the other groups
    present = ((~mask).to(drops) @ drops.T).argmax(1, keepdim=True)
    change.scatter_add_(1, present, -margin.clamp_min(torch.finfo(torch.float32).tiny))
    return drops[change.argmin(1)] == 0


def _exchange(weight: Tensor, mask: Tensor, product: Tensor, gram: Tensor, candidates: int, swaps: int) -> Tensor:
    """Up to ``swaps`` disjoint exchanges in each row, the best first, each exact given those before it; the new mask.

    product: ``L A`` ``[rows, n]`` with the present mask; gram: ``[n, n]``. With f = w to prune a kept weight and -w to restore
    a pruned one, a flip of i alone changes E by ``cost_i = f_i^2 A_ii + 2 f_i (L A)_i``, of i and j by
    ``cost_i + cost_j + 2 f_i f_j A_ij``; and the flip of i adds ``2 f_i f_j A_ij`` to every other cost_j.
    """
    keep = int(mask[0].sum())
    sides = min(candidates, keep), min(candidates, mask.shape[1] - keep)
    flip = torch.where(mask, weight, -weight)
    cost = flip.square() * gram.diagonal() * (1 + TOLERANCE) + 2 * flip * product
    columns = [
        cost.masked_fill(other, math.inf).topk(side, largest=False).indices
        for side, other in zip(sides, (~mask, mask), strict=True)
    ]
    chosen = torch.cat(columns, 1)
    flip, cost = flip.gather(1, chosen), cost.gather(1, chosen)
    split = sides[0]
    cross = 2 * flip[:, :split, None] * flip[:, None, split:] * gram[columns[0][:, :, None], columns[1][:, None]]
    flipped = torch.zeros_like(chosen, dtype=torch.bool)
    for _ in range(min(swaps, *sides)):
        change, pair = (cost[:, :split, None] + cost[:, None, split:] + cross).flatten(1).min(1)
        good = (change < 0)[:, None]
        if not bool(good.any()):
            break
        for side in (pair // sides[1], split + pair % sides[1]):
            at = side[:, None]
            row = gram[chosen.gather(1, at), chosen]
            cost += 2 * flip * flip.gather(1, at) * row * good
            flipped.scatter_(1, at, good)
        cost.masked_fill_(flipped, math.inf)
    return mask ^ torch.zeros_like(mask).scatter_(1, chosen, flipped)
