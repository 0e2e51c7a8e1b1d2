"""The kernel's product on a GPU, in Triton: a program a row, the values gathered by the running count of its bits.

Written after the published descriptions of decoding with bitmasks (see packed.py), and tested on a CPU by Triton's interpreter.
It has not run on a GPU, so nothing is claimed of its speed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from uniprune.runtime.packed import Packed


def multiply(tokens: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``tokens @ weight.T + bias``, as :meth:`Handle.multiply` has it: ``[batch, in]`` -> ``[batch, out]``, batch 1 to 8."""
    rows, columns = packed.shape
    batch = len(tokens)
    room = 1 << (batch - 1).bit_length()  # Triton's blocks are powers of two
    tokens = pad(tokens, (0, 0, 0, room - batch)).contiguous()
    output = tokens.new_empty(room, rows)
    _kernel()[(rows,)](packed.values, packed.bits, packed.offsets_on(tokens.device), bias, tokens, output, columns, BATCH=room)
    return output[:batch]


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    # Annotated with nothing but constexpr: Triton evaluates annotations as if they were its own code.
    @triton.jit  # type: ignore[untyped-decorator]
    def product(values, bits, offsets, bias, tokens, output, columns, BATCH: tl.constexpr):  # type: ignore[no-untyped-def]
        BLOCK: tl.constexpr = 256  # columns at a time
        row = tl.program_id(0).to(tl.int64)
        place = tl.load(offsets + row)
        number = tl.arange(0, BATCH)
        sums = tl.zeros([BATCH, BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            byte = tl.load(bits + row * ((columns + 7) // 8) + column // 8, mask=inside, other=0).to(tl.int32)
            kept = (byte >> (column % 8)) & 1
            count = tl.cumsum(kept, 0)
            weight = tl.load(values + place + count - 1, mask=kept != 0, other=0.0).to(tl.float32)
            there = number[:, None] * columns + column[None, :]
            token = tl.load(tokens + there, mask=inside[None, :], other=0.0).to(tl.float32)
            sums += weight[None, :] * token
            place += tl.sum(kept, 0)
        found = tl.sum(sums, 1)
        if bias is not None:
            found += tl.load(bias + row).to(tl.float32)
        tl.store(output + number * tl.num_programs(0) + row, found.to(output.dtype.element_ty))

    return product
