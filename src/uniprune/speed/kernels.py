"""The matrix products that there are for pruned weights: the masks that each is for, how it stores and multiplies.

Each is called in the way that is fastest for it, which is not what ``nn.Linear`` does: see :meth:`CSR.multiply`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from uniprune.common import fused
from uniprune.errors import InputError
from uniprune.models.loading import dtype_name
from uniprune.runtime.linear import BitmaskLinear
from uniprune.runtime.packed import pack
from uniprune.sparsity.hardware import PROFILES
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern, Shape
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured

TWO_OF_FOUR = NM(2, 4)
ANY_MASK = "any mask"
SEMI_STRUCTURED_NEEDS = PROFILES["nvidia-semi-structured"]


@dataclass(frozen=True)
class Kernel:
    """A matrix product; this one is dense. name: what it is called by. kind: of the masks that it is for."""

    name: str = "dense"
    kind: str = "dense"

    def patterns(self, sparsities: Sequence[float]) -> list[Pattern]:
        """The patterns it takes, where it has a choice one for each sparsity (fraction removed)."""
        return [Unstructured(0.0, "matrix")]

    def unsupported(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot take a matrix there, as far as that is documented, or None."""
        return None

    def compress(self, weight: Tensor) -> Any:
        """A masked weight ``[out, in]`` as the kernel wants it; raises whatever the library does where that cannot be."""
        return weight.clone()

    def copy(self, weight: Any) -> Any:
        """What ``compress`` gave, once more."""
        return weight.clone()

    def multiply(self, weight: Any, tokens: Tensor) -> Tensor:
        """``tokens @ weight.T``: ``[batch, in]`` -> ``[batch, out]``."""
        return linear(tokens, weight)


@dataclass(frozen=True)
class Bitmask(Kernel):
    """This package's own, as ``uniprune.accelerate`` uses it: any mask; few tokens by the kernel, many by unpacked rows."""

    name: str = "uniprune.accelerate"
    kind: str = ANY_MASK

    def patterns(self, sparsities: Sequence[float]) -> list[Pattern]:
        return [Unstructured(sparsity, "matrix") for sparsity in sparsities]

    def unsupported(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type == "cpu":
            return None
        return None if fused.available() else f"on {device.type.upper()} it needs the triton package"

    def compress(self, weight: Tensor) -> BitmaskLinear:
        return BitmaskLinear(pack(weight.cpu())).to(weight.device)

    def copy(self, weight: BitmaskLinear) -> BitmaskLinear:
        return deepcopy(weight)

    def multiply(self, weight: BitmaskLinear, tokens: Tensor) -> Tensor:
        found: Tensor = weight(tokens)
        return found


@dataclass(frozen=True)
class CSR(Kernel):
    """Compressed sparse rows: any mask."""

    name: str = "CSR"
    kind: str = "unstructured"

    def patterns(self, sparsities: Sequence[float]) -> list[Pattern]:
        return [Unstructured(sparsity, "matrix") for sparsity in sparsities]

    def compress(self, weight: Tensor) -> Tensor:
        with _quietly():
            return _short_indices(weight.to_sparse_csr())

    def multiply(self, weight: Tensor, tokens: Tensor) -> Tensor:
        # ``linear`` gives the same, on a CPU in two to seven times the time.
        if len(tokens) == 1:
            return torch.mv(weight, tokens[0])[None]
        return (weight @ tokens.T).T


@dataclass(frozen=True)
class BSR(Kernel):
    """Block-sparse rows: tiles of ``height`` rows and ``width`` inputs, each kept or removed as a whole."""

    name: str = "BSR"
    kind: str = "16x16 tiles"
    height: int = 16
    width: int = 16

    def patterns(self, sparsities: Sequence[float]) -> list[Pattern]:
        return [Tiled(Unstructured(sparsity, "matrix"), self.height, self.width) for sparsity in sparsities]

    def compress(self, weight: Tensor) -> Tensor:
        with _quietly():
            return _short_indices(weight.to_sparse_bsr((self.height, self.width)))

    def multiply(self, weight: Tensor, tokens: Tensor) -> Tensor:
        return (weight @ tokens.T).T  # as for CSR


@dataclass(frozen=True)
class SemiStructured(Kernel):
    """The 2:4 product of sparse tensor cores, by cuSPARSELt or CUTLASS."""

    name: str = "semi-structured"
    kind: str = str(TWO_OF_FOUR)

    def patterns(self, sparsities: Sequence[float]) -> list[Pattern]:
        return [TWO_OF_FOUR]

    def unsupported(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"2:4 products need a CUDA GPU, and this is a {device.type.upper()}"
        needed, found = SEMI_STRUCTURED_NEEDS.capability, torch.cuda.get_device_capability(device)
        if needed and found < needed:
            return f"2:4 products need compute capability {needed[0]}.{needed[1]}, and this GPU has {found[0]}.{found[1]}"
        return SEMI_STRUCTURED_NEEDS.unsupported(TWO_OF_FOUR, shape, dtype_name(dtype))

    def compress(self, weight: Tensor) -> Tensor:
        with _quietly():
            return to_sparse_semi_structured(weight.contiguous())


DENSE, SEMI_STRUCTURED, BITMASK = Kernel(), SemiStructured(), Bitmask()
TILES = [shape for shape in PROFILES["block"].patterns if not isinstance(shape, NM)]
SPARSE: tuple[Kernel, ...] = (
    BITMASK,
    SEMI_STRUCTURED,
    CSR(),
    *(BSR(kind=f"{height}x{width} tiles", height=height, width=width) for height, width in TILES),
)


def check_product(dense: Tensor, sparse: Tensor) -> None:
    """Raises InputError if two products differ by more than rounding in either's dtype: a wrong kernel is not a fast one."""
    epsilon = max(torch.finfo(product.dtype).eps for product in (dense, sparse))
    largest = dense.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float((dense.float() - sparse.float()).abs().max() / largest)
    if not error <= epsilon**0.5:  # NaN is wrong, too
        raise InputError(f"the product is wrong, by {error:.1g} of the largest output")


def _short_indices(weight: Tensor) -> Tensor:
    """CSR or BSR with indices of 32 bits, as the vendors' libraries take them: else each product would convert them first."""
    rows, columns = weight.crow_indices().int(), weight.col_indices().int()
    return torch.sparse_compressed_tensor(rows, columns, weight.values(), weight.shape, layout=weight.layout)


@contextmanager
def _quietly() -> Iterator[None]:
    """PyTorch says once in a process that sparse tensors are in beta, and 2:4 ones a prototype; docs/speed.md says so, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
