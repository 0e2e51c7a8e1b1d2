"""The highest scores of short rows, on a GPU in one kernel (Triton); what ``sparsity.top`` has in plain PyTorch.

Only ``fused`` imports this module, where Triton is. Tested on a CPU by Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # rows that a program ranks


def among_few(scores: Tensor, *, keep: int) -> Tensor:
    """The ``keep`` highest of each short row of ``scores`` ``[groups, n]`` as a boolean mask; the lower index wins ties."""
    if scores.dtype == torch.float64:
        raise TypeError("its scores are float32 at most")
    groups, size = scores.shape
    mask = torch.empty(groups, size, dtype=torch.uint8, device=scores.device)
    room = 1 << (size - 1).bit_length()  # Triton's blocks are powers of two
    ranked[(-(-groups // BLOCK),)](scores.contiguous(), mask, groups, keep, SIZE=size, ROOM=room, BLOCK=BLOCK)
    return mask.view(torch.bool)


# Annotated with nothing but constexpr: Triton evaluates annotations as if they were its own code.
@triton.jit  # type: ignore[untyped-decorator]
def ranked(scores, mask, groups, keep, SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, ROOM)
    inside = (row[:, None] < groups) & (place[None, :] < SIZE)
    there = row[:, None] * SIZE + place[None, :]
    score = tl.load(scores + there, mask=inside, other=-float("inf")).to(tl.float32)
    own, other = score[:, :, None], score[:, None, :]
    earlier = place[None, None, :] < place[None, :, None]
    ahead = (other > own) | ((other == own) & earlier)
    rank = tl.sum(ahead.to(tl.int32), 2)
    tl.store(mask + there, (rank < keep).to(tl.uint8), mask=inside)
