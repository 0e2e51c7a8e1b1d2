"""Fused experts run one by one, for as long as somebody watches or reroutes their matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.errors import UniPruneError
from uniprune.experts import Fused, Slice


@contextmanager
def taken_apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside ``with``, the experts that any of these modules is a slice of run through all their slices, one by one.

    Raises UniPruneError, at the first tokens, if that is not what their module computes.
    """
    slices = {id(module.fused): module.fused for module in modules if isinstance(module, Slice)}
    fused = [one for one in slices.values() if "forward" not in vars(one.module)]  # else it is apart already
    try:
        for one in fused:
            one.module.forward = _checked(one)
        yield
    finally:
        for one in fused:
            del one.module.forward  # the class's own forward shows again


def _checked(fused: Fused) -> Callable[..., Tensor]:
    checked = False

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal checked
        if not checked:
            checked = True
            _check(fused, *args, **kwargs)
        return fused.forward(*args, **kwargs)

    return forward


@torch.no_grad()
def _check(fused: Fused, *args: Any, **kwargs: Any) -> None:
    expected = type(fused.module).forward(fused.module, *args, **kwargs)
    found = fused.run(Slice.forward, *args, **kwargs)
    if not torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        kind = type(fused.module).__name__
        raise UniPruneError(f"{fused.name}: {kind} computes something else than its experts one by one; they cannot be pruned")
