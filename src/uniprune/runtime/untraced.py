"""What a compiled graph cannot hold, since it takes the addresses of tensors.

Imported where a model is compiled and not before: it imports the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uniprune.errors import InputError


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer's product, between the graphs of a compiled model. Raises InputError in torch.jit.trace and torch.export."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
        raise InputError(
            "an accelerated model cannot be traced or exported; take the pruned checkpoint, loaded by transformers"
        )
    return product(x)
