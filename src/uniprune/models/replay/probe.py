"""A few tokens through a model, and beside it through its blocks alone: whether these give the same, and what they hand on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.errors import InputError, UniPruneError, first_line
from uniprune.models.blocks import (
    OVERFLOW,
    Residency,
    forked,
    hidden_of,
    last_hidden,
    others_of,
    rerouted,
    warn_unless_causal,
)
from uniprune.models.replay.bypass import Interface, bypass
from uniprune.models.replay.calls import Flow, handed_on, split_arguments

PROBE_TOKENS = 16


@torch.no_grad()
def probe(model: nn.Module, blocks: nn.ModuleList, residency: Residency, ids: Tensor) -> Interface:
    """How a model joins its blocks. ids: token ids ``[windows, length]``, of which a few are used. Each block is loaded once.

    Raises UniPruneError if the blocks, one by one, do not give what the model itself gives: if their arguments depend on what
    other blocks did. Raises InputError if what they put out is not finite.
    """
    probing = _Probe(model, blocks, residency, forked(ids[0, :PROBE_TOKENS]))
    with rerouted(blocks, lambda index, forward: partial(probing.run, index, forward)):
        expected = last_hidden(model, probing.ids)
    if not bool(expected.isfinite().all()):
        raise InputError(f"{type(model).__name__} {OVERFLOW}")
    warn_unless_causal(model, expected)
    probing.compare(expected)
    return probing.interface


class _Probe:
    """The model's own pass over token ids, as far as it has come, and beside it a pass of the blocks alone.

    interface: as far as it is known by then.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, residency: Residency, ids: Tensor) -> None:
        self._model, self._blocks, self._residency, self.ids = model, blocks, residency, ids
        self.interface = Interface(None, {})
        self._output: Any = None  # of the last block that was run, called by the model
        self._alone: Any = None  # of the same block alone

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward: runs it, and once more alone while its weights are in memory."""
        _, arguments = split_arguments(args, kwargs)
        takes = {**self.interface.takes, **handed_on(self._output, arguments)}
        with self._residency(index):
            self._output = forward(*args, **kwargs)
            self._check_output(index)
            self.interface = Interface(self.interface.output if index else self._output, takes)
            self._alone = self._run_alone(index, forward)
        return self._output

    def _check_output(self, index: int) -> None:
        hidden, others = hidden_of(self._output), others_of(self._output)
        if not index and any(isinstance(other, Tensor) and other.shape == hidden.shape for other in others):  # Reformer
            kind = type(self._blocks[0]).__name__
            raise UniPruneError(f"blocks of {kind} hand on two streams of hidden states; they cannot be run one by one")
        if not bool(torch.isfinite(hidden).all()):
            raise InputError(f"block {index} {OVERFLOW}")

    def _run_alone(self, index: int, forward: Callable[..., Any]) -> Any:
        """A block's output for what the one before put out alone, with the arguments that it will be called with.

        These are of another pass over bypassed blocks for each block. Some models give all blocks one object, in which a block
        leaves keys and values for those after it (Gemma 3n and 4). The objects of a new pass have none, so a block that needs
        them fails here. It has to: batch after batch through each block, they would be those of the last batch.
        """
        found = bypass(self._model, self._blocks, self.interface, self.ids)
        if len(found.calls) != len(self._blocks):
            raise self._entangled(f" (a pass calls the {len(self._blocks)} of them {len(found.calls)} times)")
        try:
            flow = Flow.out_of(self._alone, self.interface.gives) if index else Flow(found.inputs[0])
            return found.calls[index](forward, flow)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise self._entangled(f" ({first_line(error)})") from error

    def compare(self, expected: Tensor) -> None:
        """Raises UniPruneError unless what the blocks put out alone leads to the model's final hidden states."""
        found = bypass(self._model, self._blocks, self.interface, self.ids, last=hidden_of(self._alone)).final
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise self._entangled()

    def _entangled(self, why: str = "") -> UniPruneError:
        return UniPruneError(
            f"blocks of {type(self._blocks[0]).__name__} depend on each other beyond their inputs{why}; they cannot be run one "
            "by one: give memory for the whole model (--max-memory), and leave out --sequential and --refine"
        )
