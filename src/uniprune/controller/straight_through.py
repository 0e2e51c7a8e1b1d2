"""The pruned model in the forward pass, a gradient for every weight in the backward pass.

The weights are never changed: each layer multiplies by ``weight * mask``, and in the backward pass the gradient with respect to
that product is computed, for pruned and kept weights alike (the straight-through estimator). Gradients are handed over block by
block, so that those of the whole model never exist at once. With the masks off, the same model is the dense one: a teacher that
takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.models.blocks import rerouted
from uniprune.models.experts import unfused
from uniprune.models.matrices import Matrices, Matrix

Sink = Callable[[str, "Tensor | None"], None]
Weigh = Callable[[str, Tensor, Tensor], Tensor]
Seen = Callable[[str, Tensor, Tensor], None]

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class StraightThrough:
    """Routes the matrices of a model through masks, inside ``with``; afterwards the model is as it was.

    Passes are those of the dense model, except inside :meth:`pruned` and :meth:`training`. Gradients of weights are computed
    inside :meth:`training` alone.

    masks: of the passes that are made now, by matrix name; a matrix without one is dense.
    """

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices
        self.masks: Mapping[str, Tensor] = {}
        self._sink: Sink | None = None
        self._seen: Seen | None = None  # what a backward pass through a matrix is told
        self._gradients: dict[str, Tensor] = {}
        self._dense = False
        self._routes = ExitStack()

    def __enter__(self) -> StraightThrough:
        routed = [(matrix, module) for matrix in self.matrices.values() for module in matrix.modules]
        self._routes.enter_context(
            rerouted((module for _, module in routed), lambda index, forward: self._route(*routed[index], forward))
        )
        self._routes.enter_context(unfused(matrix.module for matrix in self.matrices.values()))
        return self

    def __exit__(self, *error: object) -> None:
        self._routes.close()

    @contextmanager
    def pruned(self, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside ``with``, passes are those of the pruned model. masks: matrix name -> boolean mask ``[out, in]``."""
        self.masks = masks
        try:
            yield
        finally:
            self.masks = {}

    @contextmanager
    def training(self, masks: Mapping[str, Tensor], sink: Sink, weigh: Weigh | None = None) -> Iterator[None]:
        """As :meth:`pruned`; backward passes also compute gradients of weights, which :meth:`flush` hands to the sink.

        sink: is called with (name, dL/d(weight * mask)), summed over all passes since the last call; in the model's dtype, or
        float32 if it is a sum of several passes. None for a matrix that saw no token.
        weigh: (name, inputs ``[tokens, in]``, output gradients ``[tokens, out]``) -> the output gradients, each token's times
        the weight that it is to have; by default all weigh 1.
        """
        self._sink = sink
        with self.pruned(masks), self.watching(partial(self._add, weigh)):
            try:
                yield
            finally:
                self._sink = None  # which may hold the masks
                self._gradients.clear()

    @contextmanager
    def watching(self, seen: Seen) -> Iterator[None]:
        """Inside ``with``, a function sees what backward passes through matrices see: (name, inputs, output gradients)."""
        self._seen = seen
        try:
            yield
        finally:
            self._seen = None

    def flush(self, block: int) -> None:
        """Hands the gradients of one block's matrices to the sink, if there is one, in the order of the matrices."""
        if self._sink is None:
            return
        for name in [name for name, matrix in self.matrices.items() if matrix.block == block]:
            self._sink(name, self._gradients.pop(name, None))

    def backward(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Is told of a backward pass through a matrix: its inputs ``[tokens, in]`` and output gradients ``[tokens, out]``."""
        if self._seen is not None:
            self._seen(name, x, gradient)

    def _add(self, weigh: Weigh | None, name: str, x: Tensor, gradient: Tensor) -> None:
        """Adds a backward pass through a matrix to its gradient."""
        if weigh is not None:
            gradient = weigh(name, x, gradient)
        product = gradient.T @ x
        earlier = self._gradients.get(name)
        self._gradients[name] = product if earlier is None else earlier.float().add_(product)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside ``with``, the model is dense, and passes keep nothing for gradients."""
        self._dense = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._dense = False

    def _route(self, matrix: Matrix, module: nn.Module, original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        # Autograd builds a graph only behind something that requires a gradient, and no parameter does.
        grad_anchor = torch.zeros((), requires_grad=True)

        def forward(x: Tensor) -> Tensor:
            if self._dense:
                return original(x)
            y: Tensor = _MaskedLinear.apply(x, grad_anchor, matrix, self)  # type: ignore[no-untyped-call]
            bias = module.bias
            return y + bias if isinstance(bias, Tensor) else y

        return forward


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad_anchor: Tensor, matrix: Matrix, network: StraightThrough) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        # The mapping and not the mask: packed masks (``descent.masks``) are unpacked again in the backward pass.
        ctx.matrix, ctx.masks, ctx.network = matrix, network.masks, network
        return functional.linear(x, _masked(matrix, network.masks))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        name, network = ctx.matrix.name, ctx.network
        gradient_x = gradient @ _masked(ctx.matrix, ctx.masks) if ctx.needs_input_grad[0] else None
        network.backward(name, x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        return gradient_x, None, None, None


def _masked(matrix: Matrix, masks: Mapping[str, Tensor]) -> Tensor:
    weight = matrix.weight
    if matrix.name not in masks:  # ``get`` would take a KeyError in what makes a mask for a matrix without one
        return weight
    mask = masks[matrix.name]
    # As integers of the same size: on a CPU several times as fast as weight * mask, for the mask need not become a float.
    return (weight.view(INTEGERS[weight.element_size()]) * mask).view(weight.dtype)
