"""The highest scores of each row, exact to the last tie."""

from __future__ import annotations

import torch
from torch import Tensor

from uniprune.common.fused import fused

SHORT = 16  # longest row that is ranked pair by pair
PIECE = 1 << 18  # such rows at a time


def top(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` highest of each row of ``scores`` ``[groups, n]`` as a boolean mask; the lower index wins ties."""
    size = scores.shape[1]
    if keep >= size:
        return torch.ones_like(scores, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if size <= SHORT:
        return _among_few(scores, keep=keep)  # type: ignore[no-any-return]
    threshold = scores.kthvalue(size - keep + 1, dim=1, keepdim=True).values
    if scores.device.type != "cpu":  # where to look for crowded rows is to wait for the device
        return _first(scores, threshold, keep)
    mask = scores >= threshold
    # Only rows with more ties at the threshold than places left need the (slow) count from the left.
    crowded = (mask.sum(1) > keep).nonzero().squeeze(1)
    if len(crowded):
        mask[crowded] = _first(scores[crowded], threshold[crowded], keep)
    return mask


def _first(scores: Tensor, threshold: Tensor, keep: int) -> Tensor:
    """Scores above the threshold of their row, and the first of those equal to it."""
    above, ties = scores > threshold, scores == threshold
    places = keep - above.sum(1, keepdim=True)
    return above | (ties & (ties.cumsum(1, dtype=torch.int32) <= places))


@fused(kernels=1, triton="uniprune.common.triton_kernels:among_few", specialised_on=lambda scores, *, keep: scores.shape[1])
def _among_few(scores: Tensor, *, keep: int) -> Tensor:
    """:func:`top` of short rows. On a CPU in pieces, which stay in the processor's cache."""
    if scores.device.type != "cpu" or len(scores) <= PIECE:
        return _ranks(scores) < keep
    return torch.cat([_ranks(piece) < keep for piece in torch.split(scores, PIECE)])


def _ranks(scores: Tensor) -> Tensor:
    """How many others of its row ``[groups, n]`` go before each score. All pairs: in short rows no sort is as fast."""
    columns = torch.stack(scores.unbind(1))  # scores.T.contiguous(), twice as fast
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for later in range(1, len(columns)):
        for earlier in range(later):
            first = columns[earlier] >= columns[later]
            ranks[later].add_(first)
            ranks[earlier].add_(~first)
    return ranks.T
