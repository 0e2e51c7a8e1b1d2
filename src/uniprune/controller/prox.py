"""Proximal maps and projections of the controllers, each beside the objective that it optimises.

They see tensors, never a model, and return float32. The objectives are functions too: each map can be held against its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from uniprune.errors import InputError
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern, Saliency
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.top import top

TOLERANCE = 3e-6  # of a budget; what float32 sums can hold
ROOT_STEPS = 64  # safeguarded Newton; 4 to 12 are the rule
SWEEPS = 100  # of coordinate descent; 2 to 10 are the rule
SETTLED = 1e-7  # relative change per sweep at which coordinate descent stops
SHRUNK = (0.8, 0.6, 0.4)  # starts of coordinate descent: multiples of z, and of its n + 1 largest
CHUNK = 1 << 18  # groups solved at a time, which bounds the memory beside the result
FAR = 1e30  # stands for infinity, which would make NaN of differences


def soft_threshold(v: Tensor, lam: float) -> Tensor:
    """``argmin_x 1/2 |x - v|^2 + lam * |x|_1``: every entry moves towards 0 by ``lam`` >= 0 and stops there."""
    _check_weight(lam)
    v = v.float()
    return v.sign() * (v.abs() - lam).clamp_min(0)


def l1_objective(x: Tensor, v: Tensor, lam: float) -> Tensor:
    """What :func:`soft_threshold` minimises: ``1/2 |x - v|^2 + lam * |x|_1``, a scalar."""
    return 0.5 * (x - v).square().sum() + lam * x.abs().sum()


def relaxed_top(scores: Tensor, keep: int, temperature: float) -> Tensor:
    """The relaxed mask ``[groups, n]`` in [0, 1] of scores ``[groups, n]``, with ``keep`` in each row: an entropic projection.

    ``argmax_m <scores, m> + temperature * H(m)`` over ``0 <= m <= 1`` with row sums ``keep``, H the sum of binary entropies.
    The solution is ``sigmoid((scores - tau) / temperature)``, with tau per row so that the budget is met, to 1e-5 of it. Equal
    scores get equal values. temperature: in units of the scores, > 0; towards 0 the mask becomes that of ``sparsity.top``.
    """
    _check_temperature(temperature)
    return _relax(scores.float(), top(scores, keep), keep, temperature)


def budget_objective(mask: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """What :func:`relaxed_top` maximises: ``<scores, mask> + temperature * H(mask)``, per row."""
    entropy: Tensor = torch.special.entr(mask) + torch.special.entr(1 - mask)
    return (scores * mask + temperature * entropy).sum(-1)


def relaxed(pattern: Pattern, saliency: Saliency, temperature: float) -> Iterator[tuple[str, Tensor]]:
    """Relaxed masks ``[out, in]`` of a saliency, as ``pattern(saliency)`` yields the hard ones; see :func:`relaxed_top`.

    The budget groups are the pattern's own. One budget for the whole model has one tau: the saliency is then read once per
    step of the root search, about ten times, one matrix at a time.
    Raises InputError as the pattern does.
    """
    _check_temperature(temperature)
    if not pattern.local:
        assert isinstance(pattern, Unstructured)
        yield from _relaxed_model(pattern, saliency, temperature)
        return
    for name, mask in pattern(saliency):
        groups, keep = budget_groups(pattern, saliency[name])
        yield name, _relax(groups.float(), mask.reshape(groups.shape), keep, temperature).reshape(mask.shape)


def budget_groups(pattern: Pattern, scores: Tensor) -> tuple[Tensor, int]:
    """One matrix's scores ``[out, in]`` as ``[groups, n]``, one budget group a row, and how many of each are kept.

    2:4 of ``[8, 16]`` -> ``[32, 4]``, 2; by row -> ``[8, 16]``; by matrix -> ``[1, 128]``.
    """
    if isinstance(pattern, NM):
        return scores.reshape(-1, pattern.m), pattern.n
    assert isinstance(pattern, Unstructured)
    groups = scores if pattern.scope == "row" else scores.reshape(1, -1)
    return groups, pattern.keep(groups.shape[1])


def _relax(scores: Tensor, mask: Tensor, keep: int, temperature: float) -> Tensor:
    """mask: the hard one; the lowest kept and the highest removed score bracket tau."""
    size = scores.shape[1]
    if not 0 < keep < size:
        return mask.float()
    pivot = scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    below = scores.masked_fill(mask, -torch.inf).amax(1, keepdim=True)
    scaled = _scaled(scores, pivot, temperature)

    def moments(shift: Tensor) -> tuple[Tensor, Tensor]:
        soft = (scaled - shift).sigmoid()
        return soft.sum(1, keepdim=True), (soft * (1 - soft)).sum(1, keepdim=True)

    return (scaled - _root(moments, _scaled(below, pivot, temperature), keep, size)).sigmoid()


def _relaxed_model(pattern: Unstructured, saliency: Saliency, temperature: float) -> Iterator[tuple[str, Tensor]]:
    size = sum(scores.numel() for scores in saliency.values())
    keep = pattern.keep(size)
    pivot, below = torch.full((), torch.inf), torch.full((), -torch.inf)
    for name, mask in pattern(saliency):
        scores = saliency[name].float()
        pivot = torch.minimum(pivot, scores.masked_fill(~mask, torch.inf).amin().cpu())
        below = torch.maximum(below, scores.masked_fill(mask, -torch.inf).amax().cpu())
    if not 0 < keep < size:
        for name, scores in saliency.items():
            yield name, torch.full(scores.shape, float(keep > 0), device=scores.device)
        return

    def soft(name: str, shift: Tensor) -> Tensor:
        scores = saliency[name].float()
        return (_scaled(scores, pivot.to(scores.device), temperature) - shift.to(scores.device)).sigmoid()

    def moments(shift: Tensor) -> tuple[Tensor, Tensor]:
        masks = (soft(name, shift) for name in saliency)
        sums = [torch.stack((mask.sum(), (mask * (1 - mask)).sum())).cpu() for mask in masks]
        total, slope = torch.stack(sums).sum(0)
        return total, slope

    shift = _root(moments, _scaled(below, pivot, temperature), keep, size)
    for name in saliency:
        yield name, soft(name, shift)


def _scaled(scores: Tensor, pivot: Tensor, temperature: float) -> Tensor:
    """Scores in units of the temperature from the pivot: differences of close floats are exact, so ties cost no precision."""
    return ((scores - pivot) / temperature).clamp(-FAR, FAR)


def _root(moments: Callable[[Tensor], tuple[Tensor, Tensor]], below: Tensor, keep: int, size: int) -> Tensor:
    """The shift at which the sum of ``sigmoid(scaled - shift)`` is ``keep``, per group, by Newton inside a bracket.

    moments: shift -> the sum, and the sum of m * (1 - m), its slope but for the sign. below: the highest removed score, on
    the scale where the lowest kept one is 0: so ``keep + 1`` scores are >= below, and ``size - keep + 1`` are <= 0.
    """
    low, high = below - math.log(keep), torch.full_like(below, math.log(size - keep))
    shift = (low + high) / 2
    for _ in range(ROOT_STEPS):
        total, slope = moments(shift)
        if bool(((total - keep).abs() <= TOLERANCE * keep).all()):
            break
        low = torch.where(total > keep, shift, low)
        high = torch.where(total < keep, shift, high)
        newton = shift + (total - keep) / slope.clamp_min(torch.finfo(torch.float32).tiny)
        shift = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    return shift


def nm_regulariser(w: Tensor, n: int, m: int) -> Tensor:
    """How far weights ``[out, in]`` are from N:M: a scalar, 0 exactly where ``n`` or fewer of every ``m`` are not 0.

    Per group, the sum over all sets of ``n + 1`` weights of the product of their magnitudes (the elementary symmetric
    polynomial): for 2:4, ``|abc| + |abd| + |acd| + |bcd|`` (Kuebler et al., arXiv 2501.18015; other N:M are our extension).
    Raises InputError if the columns are not divisible by ``m``.
    """
    return _symmetric(_nm_groups(w, n, m).abs().unbind(1), n + 1).sum()


def nm_objective(w: Tensor, z: Tensor, lam: float, n: int, m: int) -> Tensor:
    """What :func:`prox_nm` minimises: ``1/2 |w - z|^2 + lam * nm_regulariser(w)``, a scalar."""
    return 0.5 * (w - z).square().sum() + lam * nm_regulariser(w, n, m)


def prox_nm(z: Tensor, lam: float, n: int, m: int) -> Tensor:
    """``argmin_w 1/2 |w - z|^2 + lam * nm_regulariser(w, n, m)`` of ``z`` ``[out, in]``, group by group.

    lam: >= 0, in units of ``|z| ** (1 - n)``. At 0 the identity, from some size on the ``n`` largest magnitudes as they are and
    zeros. The problem is not convex. In one coordinate it is, with the solution ``max(0, |z_i| - lam * e_n(others))``:
    coordinate descent from z, its n and n + 1 largest, and shrunk copies (without them it overshoots into a corner where
    magnitudes are close); the lowest objective wins. 40 random starts found nothing lower by 1e-5 for m <= 4, and in 4 of 4,000
    groups at 4:8. Groups in which the objective is convex between 0 and z need one start only: there descent finds the
    minimum. (The solver is ours, not the paper's.)
    Raises InputError if the columns are not divisible by ``m``.
    """
    _check_weight(lam)
    groups = _nm_groups(z, n, m).float()
    if n == m:
        return z.float().clone()
    solved = torch.empty_like(groups)
    for start in range(0, len(groups), CHUNK):
        chunk = groups[start : start + CHUNK]
        size, order = chunk.abs().sort(dim=1, descending=True, stable=True)
        # The Hessian is 1 on the diagonal and lam * e_(n-1)(the others) off it, in a row at most lam * (m - n) * e_(n-1)(all
        # but the least) together. Below 1 the objective is convex between 0 and z, where the descent stays.
        bent = lam * (m - n) * _symmetric(size[:, :-1].unbind(1), n - 1) >= 1
        lowest = torch.empty_like(size)
        lowest[~bent] = _lowest(size[~bent], lam, n, [(m, 1.0)])
        lowest[bent] = _lowest(size[bent], lam, n, [(m, 1.0), (n, 1.0), (n + 1, 1.0), *product((m, n + 1), SHRUNK)])
        solved[start : start + CHUNK] = torch.zeros_like(lowest).scatter_(1, order, lowest) * chunk.sign()
    return solved.reshape(z.shape)


def _lowest(size: Tensor, lam: float, n: int, starts: Sequence[tuple[int, float]]) -> Tensor:
    """The best that coordinate descent finds for magnitudes ``[groups, m]``, falling; a start is its first ones, scaled."""
    if not len(size):
        return size
    w = torch.stack([functional.pad(size[:, :kept] * scale, (0, size.shape[1] - kept)) for kept, scale in starts])
    # Columns of all starts of all groups. Sweeps run from the smallest magnitude up: among equals the lower index survives.
    columns, targets = list(w.flatten(0, 1).unbind(1)), size.repeat(len(starts), 1).unbind(1)
    settled = SETTLED * float(size.max())
    for _ in range(SWEEPS):
        before = list(columns)
        for place in reversed(range(len(columns))):
            others = _symmetric(columns[:place] + columns[place + 1 :], n)
            columns[place] = (targets[place] - lam * others).clamp_min(0)
        if max(float((new - old).abs().max()) for new, old in zip(columns, before, strict=True)) <= settled:
            break
    w = torch.stack(columns, 1).reshape(w.shape)
    value = 0.5 * (w - size).square().sum(-1) + lam * _symmetric(w.unbind(-1), n + 1)
    return w[value.argmin(0), torch.arange(len(size), device=size.device)]


def _symmetric(columns: Sequence[Tensor], order: int) -> Tensor:
    """The elementary symmetric polynomial of that order, entry by entry: the sum over all sets of columns of their product."""
    sums = [torch.ones_like(columns[0])] + [torch.zeros_like(columns[0]) for _ in range(order)]
    for seen, column in enumerate(columns, 1):
        for k in range(min(order, seen), 0, -1):
            sums[k] = sums[k] + column * sums[k - 1]
    return sums[order]


def _nm_groups(w: Tensor, n: int, m: int) -> Tensor:
    if reason := NM(n, m).unsupported(*w.shape):
        raise InputError(f"weights {tuple(w.shape)}: {reason}, as {n}:{m} needs")
    return w.reshape(-1, m)


def _check_weight(lam: float) -> None:
    if not (lam >= 0 and math.isfinite(lam)):
        raise InputError(f"the weight {lam} of a regulariser is not a finite number >= 0")


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature {temperature} is not a finite number > 0; for a hard mask use the pattern itself")
