"""The highest scores of each row, exact to the last tie."""

from __future__ import annotations

import torch
from torch import Tensor

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
        return torch.cat([_ranks(piece) < keep for piece in torch.split(scores, PIECE)])  # pieces stay in the processor's cache
    threshold = scores.kthvalue(size - keep + 1, dim=1, keepdim=True).values
    mask = scores >= threshold
    # Only rows with more ties at the threshold than places left need the (slow) count from the left.
    crowded = (mask.sum(1) > keep).nonzero().squeeze(1)
    if len(crowded):
        rows, edge = scores[crowded], threshold[crowded]
        above, ties = rows > edge, rows == edge
        places = keep - above.sum(1, keepdim=True)
        mask[crowded] = above | (ties & (ties.cumsum(1) <= places))
    return mask


def _ranks(scores: Tensor) -> Tensor:
    """How many others of its row ``[groups, n]`` go before each score. All pairs: in short rows no sort is as fast."""
    columns = scores.T.contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for later in range(1, len(columns)):
        for earlier in range(later):
            first = columns[earlier] >= columns[later]
            ranks[later] += first
            ranks[earlier] += ~first
    return ranks.T
