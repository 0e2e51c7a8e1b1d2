"""A linear layer whose matrix is packed: the kernel for few tokens, the dense product of unpacked rows for many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from uniprune.common.fused import fused
from uniprune.errors import InputError
from uniprune.models.linear import Probe
from uniprune.models.loading import dtype_name
from uniprune.models.matrices import Matrix
from uniprune.runtime.native import LARGEST_BATCH, TYPES, WORD, Handle, dense_handle
from uniprune.runtime.packed import Packed

WORTH = 0.25  # from this fraction of zeros on, a matrix is smaller packed, and no slower
LARGE = 1 << 20  # weights of a dense matrix that are worth the kernel
BY_KERNEL = (torch.float32, torch.bfloat16)  # types in which the kernel multiplies dense matrices no slower than PyTorch does
UNPACKED = 8 << 20  # bytes of rows that are unpacked together: few enough to be in a cache when they are multiplied

_is_linear = Probe()


class BitmaskLinear(nn.Module):
    """``nn.Linear``, or transformers' Conv1D (``transposed``), for inference; its state dict is that of these, zeros and all.

    Few tokens are multiplied by a kernel, on a GPU by Triton's; many, or where a gradient is asked for, by the unpacked matrix.
    In memory it has the values, the bits and the bias; ``weight`` is unpacked whenever it is asked for.
    """

    accelerated = True  # models.matrices looks for it
    values: Tensor
    bits: Tensor

    def __init__(self, packed: Packed, bias: Tensor | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.transposed = transposed
        self.register_buffer("values", packed.values, persistent=False)
        self.register_buffer("bits", packed.bits, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._packed: Packed | None = packed
        self._handle: Handle | None = None

    def forward(self, x: Tensor) -> Tensor:
        return untraced(self._product, x)

    def _product(self, x: Tensor) -> Tensor:
        if few(x, self.in_features, self.values):
            if x.is_cpu:
                if self._handle is None:
                    self._handle = self.packed.handle(self.bias)
                return self._handle.multiply(x)
            product: Tensor = few_tokens(x.reshape(-1, self.in_features), self.packed, self.bias)
            return product.reshape(*x.shape[:-1], -1)
        odd = x.shape[-1:] != (self.in_features,)  # let PyTorch say so
        if odd or not x.is_cpu or x.dtype is not self.values.dtype or (x.requires_grad and torch.is_grad_enabled()):
            return linear(x, self.packed.dense(), self.bias)
        return self._many(x)

    def _many(self, x: Tensor) -> Tensor:
        """The product with more tokens than the kernel is for: dense, with some rows at a time."""
        tokens, y = x.reshape(-1, self.in_features), x.new_empty((*x.shape[:-1], self.out_features))
        step = min(self.out_features, max(1, UNPACKED // (self.in_features * x.itemsize)))
        room = x.new_empty(step, self.in_features)
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            rows, part = self.packed.rows(first, last, room[: last - first]).T, y.view(-1, self.out_features)[:, first:last]
            if self.bias is None:
                torch.mm(tokens, rows, out=part)
            else:
                torch.addmm(self.bias[first:last], tokens, rows, out=part)
        return y

    @property
    def packed(self) -> Packed:
        if self._packed is None:
            if self.values.dtype not in TYPES:
                types, found = ", ".join(map(dtype_name, TYPES)), dtype_name(self.values.dtype)
                raise InputError(
                    f"accelerated models compute in {types}, not in {found}; convert this one: model.to(torch.float32)"
                )
            self._packed = Packed(self.values, self.bits, (self.out_features, self.in_features))
        return self._packed

    @property
    def weight(self) -> Tensor:
        """The dense matrix, unpacked: ``[out, in]``, of Conv1D ``[in, out]``."""
        dense = self.packed.dense()
        return dense.T.contiguous() if self.transposed else dense

    def _apply(self, fn: Any, recurse: bool = True) -> BitmaskLinear:
        self._packed = self._handle = None  # they have the addresses of tensors that will be others
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None, "_handle": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class KernelLinear(nn.Linear):
    """``nn.Linear`` without a bias, its weight as it is, that multiplies few tokens by the kernel.

    For what is not pruned, the output head above all: PyTorch's product of one token in bfloat16 takes twice as long.
    """

    accelerated = True
    _handle: Handle | None = None

    @staticmethod
    def convert(model: nn.Module) -> None:
        """Turns each ``nn.Linear`` in a model that is worth it into one of these."""
        for module in model.modules():
            if type(module) is not nn.Linear or module.bias is not None or module.in_features % WORD:
                continue
            if module.weight.numel() >= LARGE and module.weight.dtype in BY_KERNEL:
                module.__class__ = KernelLinear

    def forward(self, x: Tensor) -> Tensor:
        return untraced(self._product, x)

    def _product(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not x.is_cpu or weight.dtype not in BY_KERNEL or not weight.is_contiguous() or not few(x, self.in_features, weight):
            return super().forward(x)
        if self._handle is None or self._handle.values != weight.data_ptr() or self._handle.type != TYPES[weight.dtype]:
            self._handle = dense_handle(weight)
        return self._handle.multiply(x)

    def _apply(self, fn: Any, recurse: bool = True) -> KernelLinear:
        self._handle = None  # it would keep a weight in memory that is replaced
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}


def untraced(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer's product, also in a model that is compiled. Raises InputError where it is traced or exported."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        from uniprune.runtime.untraced import run

        found: Tensor = run(product, x)
        return found
    return product(x)


def _compiled_for(tokens: Tensor, packed: Packed, bias: Tensor | None) -> tuple[int, bool]:
    """What the kernel is compiled for: tokens rounded up to a power of two, and whether there is a bias."""
    return (len(tokens) - 1).bit_length(), bias is None


@fused(kernels=1, triton="uniprune.runtime.gpu:multiply", specialised_on=_compiled_for)
def few_tokens(tokens: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The product with so few tokens ``[batch, in]`` that a GPU's kernel is for them."""
    return linear(tokens, packed.dense(), bias)


def few(x: Tensor, columns: int, weight: Tensor) -> bool:
    """Whether tokens are so few, and of such a kind, that the kernel is to multiply them."""
    if x.dtype is not weight.dtype or x.device != weight.device or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return 0 < x.numel() <= LARGEST_BATCH * columns and x.shape[-1:] == (columns,)


def unsupported(matrix: Matrix, dtype: torch.dtype | None) -> str | None:
    """Why a matrix cannot be packed, whatever its weights, or None. dtype: of them; None if PyTorch does not have it."""
    if odd := next(
        (type(module) for module in matrix.modules if next(module.children(), None) or not _is_linear(module)), None
    ):
        return f"it is in a {odd.__name__}, which is more than an nn.Linear"
    return None if dtype in TYPES else f"its weights are of another type than {', '.join(map(dtype_name, TYPES))}"


def too_dense(kept: int, size: int) -> str | None:
    """Why it is not worth it to pack a matrix of which so many weights are not zero, or None."""
    zeros = 1 - kept / size
    return None if zeros >= WORTH else f"{zeros:.0%} of its weights are zero, and packing pays from {WORTH:.0%} on"


def nothing_to_pack(left: Mapping[str, str]) -> InputError:
    """The error for a model of which no matrix is packed. left: why not, by name."""
    name, reason = next(iter(left.items()))
    return InputError(f"none of {len(left)} matrices can be packed, e.g. {name}: {reason}; give a pruned model, on the CPU")
