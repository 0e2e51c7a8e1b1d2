"""A loaded 2:4-pruned model on sparse tensor cores: its matrices swapped for PyTorch's semi-structured tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.sparse import SparseSemiStructuredTensor

from uniprune.errors import InputError, first_line
from uniprune.models.experts import Slice
from uniprune.models.matrices import Matrix, find_matrices
from uniprune.speed.kernels import SEMI_STRUCTURED, check_product

TRIAL = 32  # tokens of the trial product: padded by no backend


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """Swaps the 2:4 matrices of a model on CUDA, in place, for tensors that sparse tensor cores multiply by.

    For inference only: afterwards the model can neither be saved nor moved. Returns the matrices that stay dense, by name, and
    why: not 2:4, of a shape that the kernels do not take, stored transposed (Conv1D). They compute as before.
    Raises InputError, and leaves the model as it is, if no matrix can be swapped (as on a CPU, or in float32), or if a trial
    product fails or is wrong. Whether this is faster, ``uniprune bench`` measures.
    """
    matrices = find_matrices(model)
    left = {name: reason for name, matrix in matrices.items() if (reason := _unsupported(matrix))}
    ready = [matrix for name, matrix in matrices.items() if name not in left]
    if not ready:
        name, reason = next(iter(left.items()))
        raise InputError(f"none of {len(left)} matrices can be semi-structured, e.g. {name}: {reason}")
    _try(ready[0].parameter)
    for matrix in ready:
        matrix.module.weight = nn.Parameter(SEMI_STRUCTURED.compress(matrix.parameter.detach()), requires_grad=False)
    return left


def _unsupported(matrix: Matrix) -> str | None:
    """Why a matrix cannot be swapped, or None; the weights are looked at last."""
    weight = matrix.parameter
    if isinstance(matrix.module, Slice):
        return "it is one of fused experts"
    if isinstance(weight, SparseSemiStructuredTensor):
        return "it is semi-structured already"
    if reason := SEMI_STRUCTURED.unsupported(matrix.shape, weight.dtype, weight.device):
        return reason
    if matrix.transposed:
        return "it is stored transposed"
    return None if is_two_of_four(weight) else "its weights are not 2:4; prune with --sparsity 2:4"


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 consecutive inputs of ``weight`` ``[out, in]`` are not zero; ``in`` divides by 4."""
    return bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())


def _try(weight: Tensor) -> None:
    """One product: a PyTorch without the kernel for this GPU raises one thing or another."""
    tokens = torch.randn(TRIAL, weight.shape[1], device=weight.device).to(weight.dtype)
    try:
        check_product(linear(tokens, weight), linear(tokens, SEMI_STRUCTURED.compress(weight.detach())))
    except Exception as error:
        raise InputError(f"2:4 products do not work on this GPU: {first_line(error)}") from error
