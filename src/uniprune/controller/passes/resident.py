"""Passes of a model that is in memory as a whole.

They keep the activations of all blocks for the backward pass, or only the blocks' inputs and run each block again (activation
checkpointing): one more forward pass, and the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uniprune.controller.straight_through import StraightThrough
from uniprune.errors import InputError
from uniprune.models.blocks import (
    OVERFLOW,
    batches,
    device_of,
    forked,
    hidden_in,
    hidden_of,
    last_hidden,
    rerouted,
    warn_unless_causal,
)
from uniprune.models.output_head import Head
from uniprune.storage.stash import give_back_memory


class Resident:
    """Passes of a model that is in memory as a whole.

    recompute: whether each block's activations are computed again in the backward pass instead of being kept.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, network: StraightThrough, recompute: bool = False) -> None:
        self._model, self._blocks, self.network, self._recompute = model, blocks, network, recompute
        self._last: Tensor | None = None
        self._flushed: set[int] = set()

    @property
    def device(self) -> torch.device:
        return device_of(self._model)

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        target = self._dense(batch)
        return self.forward_student(batch), target

    def forward_student(self, batch: Tensor) -> Tensor:
        with ExitStack() as stack, torch.enable_grad():
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(self._flush(index), with_kwargs=True).remove)
            if self._recompute:
                stack.enter_context(rerouted(self._blocks, self._checkpointed))
            self._last = last_hidden(self._model, batch)
        return self._last.detach()

    def backward(self, gradient: Tensor) -> None:
        assert self._last is not None, "backward without forward"
        if not self._last.requires_grad:  # reversible layers (Reformer) differentiate in their own way
            raise InputError(f"no gradient comes through the blocks of {type(self._model).__name__}; use --controller none")
        self._flushed.clear()
        torch.autograd.backward([self._last], [gradient])
        self._last = None
        # Inputs without a gradient set off no flush: the first block's, and others' if no block before them has matrices.
        for index in range(len(self._blocks)):
            if index not in self._flushed:
                self.network.flush(index)

    @torch.no_grad()
    def infer(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.infer_student(batch), self._dense(batch)

    @torch.no_grad()
    def infer_student(self, batch: Tensor) -> Tensor:
        return last_hidden(self._model, batch)

    def in_batches(self, windows: Tensor, tokens: int) -> list[Tensor]:
        return batches(windows, tokens)

    def head(self, text: Tensor, vocabulary: int | None = None) -> Head:
        probe = text[:1, :8]
        hidden, states = self._dense_states(probe)
        warn_unless_causal(self._model, self._dense(forked(probe[0])))
        for index, state in enumerate((*states, hidden)):
            if not bool(torch.isfinite(state).all()):
                raise InputError(f"block {index} {OVERFLOW}")
        with self.network.dense():
            return Head(self._model, text, vocabulary).fit(
                self._model, lambda: self._model(input_ids=probe.to(hidden.device), use_cache=False), hidden
            )

    def _dense(self, batch: Tensor) -> Tensor:
        """The dense model's final hidden states."""
        with self.network.dense():
            return last_hidden(self._model, batch)

    def _dense_states(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The dense model's final hidden states, and those after each block but the last."""
        states: list[Tensor] = []

        def after(module: nn.Module, args: object, output: Any) -> None:
            states.append(hidden_of(output))

        with ExitStack() as stack:
            for block in self._blocks[:-1]:
                stack.callback(block.register_forward_hook(after).remove)
            return self._dense(batch), states

    def _checkpointed(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that keeps only its inputs for the backward pass. No RNG state is kept: nothing is random in
        evaluation mode."""

        def block(*args: Any, **kwargs: Any) -> Any:
            output = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            self._tidy()
            return output

        return block

    def _tidy(self) -> None:
        """Gives the memory of freed activations back to the system, before what is kept is allocated in its midst."""
        if self._recompute and self.device.type == "cpu":
            give_back_memory()

    def _flush(self, index: int) -> Any:
        """A hook that flushes a block's gradients as soon as the gradient of its input is there: then they are complete.

        Some models pass through a block several times (Dory, Inkling 2 with loops): its first input has its gradient last.
        """
        entered = False

        def flush(gradient: Tensor) -> None:
            self._flushed.add(index)
            self.network.flush(index)
            self._tidy()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal entered
            hidden = hidden_in(args, kwargs)
            if hidden.requires_grad and not entered:
                hidden.register_hook(flush)  # type: ignore[no-untyped-call]
            entered = True

        return before
