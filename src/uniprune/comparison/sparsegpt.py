"""SparseGPT (arXiv 2301.00774): masks and an update of the weights that stay, decoder block after decoder block.

Only ``compare`` uses it, for a row of its table: it changes weights in memory, which this package's own methods never do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from uniprune.common.progress import Progress, silent
from uniprune.errors import InputError, UniPruneError
from uniprune.models.matrices import Matrices, find_blocks
from uniprune.models.replay.replay import Replay
from uniprune.models.replay.sweep import BlockSweep
from uniprune.saliency.observation import observing
from uniprune.saliency.statistics import Gram
from uniprune.sparsity.patterns.checks import check_fit
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.top import top

Choose = Callable[[int, Tensor], Tensor]  # (first column, OBS scores ``[out, width]`` from there on) -> mask


@torch.no_grad()
def sparsegpt(
    model: nn.Module,
    matrices: Matrices,
    windows: Tensor,
    pattern: Pattern,
    damp: float = 0.01,
    block_size: int = 128,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Masks by SparseGPT (arXiv 2301.00774), whose weight update is written into ``model``.

    The model is changed for good: pruned weights become zero, kept ones make up for them, and each decoder block is fitted to
    what the pruned blocks before it put out. After an error, the matrices done so far stay changed.

    windows: token ids ``[windows, length]``. damp: added to the diagonal of the Hessian X^T X, as a fraction of its mean.
    block_size: columns between updates of the rest of the matrix, rounded down to whole groups where the pattern is N:M; an
    unstructured mask is chosen, and its budget spent, on so many columns at a time. The counts of these add up to the
    pattern's own. A column whose inputs are all zero (dead) has its weights set to zero first, so that they go first.
    Raises InputError as :func:`check` does, UniPruneError if a Hessian is not positive definite or a matrix saw no token.
    """
    check(pattern, matrices)
    sweep = BlockSweep(Replay.probed(model, find_blocks(model)[1], windows), windows)
    masks: dict[str, Tensor] = {}
    for index in progress(sweep, "SparseGPT, block by block", len(sweep)):
        here = {name: matrix for name, matrix in matrices.items() if matrix.block == index}
        with observing(here, Gram) as found:
            sweep.run(index)
        for name, matrix in here.items():
            weight = matrix.weight.to(torch.float32, copy=True)
            weight[:, found[name].total.diagonal() == 0] = 0
            factor = inverse_factor(name, found[name].total, damp).float()
            masks[name] = eliminate(weight, factor, *chooser(pattern.pattern_of(name), block_size))
            matrix.weight.copy_(weight)
        sweep.run(index, advance=True)
    return masks


def check(pattern: Pattern, matrices: Matrices) -> None:
    """Raises InputError unless SparseGPT can cut the pattern: N:M or a fraction, of each row or matrix by itself."""
    if not pattern.local:
        raise InputError(f"SparseGPT cuts block after block, but {pattern} needs all scores; use scope row or matrix")
    check_fit(((name, matrix.shape) for name, matrix in matrices.items()), pattern)
    for name in matrices:
        if not isinstance(part := pattern.pattern_of(name), NM | Unstructured):
            raise InputError(f"SparseGPT cuts N:M patterns and fractions, not {part}; leave it out")
    if any(matrix.spans for matrix in matrices.values()):
        raise InputError("SparseGPT cuts block after block, but blocks of this model share weights; leave it out")


def inverse_factor(name: str, hessian: Tensor, damp: float) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1, float64; ``name`` is for the errors.

    Row j of U is row j of the inverse of H[j:, j:], over its root U_jj: all that pruning column j needs to know when the
    columns before it are settled. It comes from one Cholesky from the last column up, H = R R^T, as U = R^-1.
    """
    hessian = hessian.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise UniPruneError(f"{name} saw no calibration token; use more text, or leave it out")
    diagonal += damp * diagonal.mean()
    diagonal[dead] = 1
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        raise UniPruneError(f"{name}: its Hessian is not positive definite at damp = {damp}; use a larger one, or more text")
    return factor


def chooser(pattern: Pattern, block_size: int) -> tuple[Choose, int, int]:
    """How :func:`eliminate` chooses a mask: the choice, for how many columns at a time, and the block size that suits it."""
    if isinstance(pattern, NM):
        kept, width = pattern.n, pattern.m
        return lambda start, scores: top(scores, kept), width, max(width, block_size - block_size % width)
    assert isinstance(pattern, Unstructured)

    def choose(start: int, scores: Tensor) -> Tensor:
        groups = scores if pattern.scope == "row" else scores.reshape(1, -1)
        per_column = groups.shape[1] // scores.shape[1]
        # Counted from the first column on: what one block's floor leaves over, a later block removes.
        before, after = start * per_column, start * per_column + groups.shape[1]
        return top(groups, pattern.keep(after) - pattern.keep(before)).reshape(scores.shape)

    return choose, block_size, block_size


def eliminate(weight: Tensor, factor: Tensor, choose: Choose, width: int, block_size: int) -> Tensor:
    """Prunes ``weight`` ``[out, in]`` in place, column after column from the left, and returns the mask.

    Each pruned weight is made up for, as well as least squares can, by the weights right of it in its row. ``factor``: of
    :func:`inverse_factor`. ``choose``: called every ``width`` columns, with the OBS scores W_ij^2 / [(H[j:, j:])^-1]_jj of the
    weights as they are by then. ``block_size``, a multiple of ``width``: how often the columns beyond are updated; it changes
    the speed, but not the result for a given mask.
    """
    mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    for start in range(0, weight.shape[1], block_size):
        here = slice(start, start + block_size)
        corner = factor[here, here]
        block = weight[:, here].T.contiguous()  # [columns, out], so that a column is contiguous
        dropped = torch.empty_like(block, dtype=torch.bool)
        errors = torch.empty_like(block)
        for column in range(len(block)):
            if column % width == 0:
                ahead = slice(column, column + width)
                scores = (block[ahead] / corner.diagonal()[ahead, None]).square()
                dropped[ahead] = ~choose(start + column, scores.T).T
            errors[column] = block[column] * dropped[column] / corner[column, column]
            block[column + 1 :].addr_(corner[column, column + 1 :], errors[column], alpha=-1)
        mask[:, here] = ~dropped.T
        weight[:, here] = block.masked_fill_(dropped, 0).T
        weight[:, start + block_size :] -= errors.T @ factor[here, start + block_size :]
    return mask
