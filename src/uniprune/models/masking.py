"""Masks as plain tensors outside the model (True = keep), and the only place where a weight is set to zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from uniprune.models.matrices import Matrices


def apply(matrices: Matrices, masks: Iterable[tuple[str, Tensor]]) -> None:
    """Zeroes the pruned weights of a model in memory; kept weights keep their bits."""
    for name, mask in masks:
        matrices[name].weight.masked_fill_(~mask.to(matrices[name].device), 0)


@contextmanager
def applied(matrices: Matrices, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with the masks applied, for the length of a ``with`` block; its weights come back bit for bit."""
    with preserved(matrices, masks):
        apply(matrices, masks.items())
        yield


@contextmanager
def preserved(matrices: Matrices, names: Iterable[str]) -> Iterator[None]:
    """Inside ``with``, the weights of these matrices may be changed; afterwards they are as they were, bit for bit."""
    saved = {name: matrices[name].parameter.detach().clone() for name in names}
    try:
        yield
    finally:
        for name, weight in saved.items():
            matrices[name].parameter.detach().copy_(weight)


def zeros(matrices: Matrices) -> dict[str, float]:
    """Fraction of exact zeros in each matrix as it is now: what a model's sparsity really is, whatever its name says."""
    return {name: float((matrix.parameter == 0).float().mean()) for name, matrix in matrices.items()}
