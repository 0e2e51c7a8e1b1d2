"""Runs a model over token windows: whole, or block after block.

Block after block, a block is called with the very arguments that the model itself passes to it: they are captured from
a real forward pass and replayed, never rebuilt by hand, so that nothing here knows what an attention mask looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from uniprune.errors import UniPruneError

BATCH_TOKENS = 2048


def batches(windows: Tensor, tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Windows ``[n, length]`` in batches of about ``tokens`` tokens, at least one window each."""
    per_batch = max(1, tokens // windows.shape[1])
    return [windows[start : start + per_batch] for start in range(0, len(windows), per_batch)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def forward(model: nn.Module, batch: Tensor) -> None:
    """One pass through the decoder blocks; the output head is left out, since nobody looks at the logits."""
    backbone = getattr(model, "base_model", model)
    backbone(input_ids=batch.to(device_of(model)), use_cache=False)


@dataclass(frozen=True)
class Call:
    """The arguments of one block's forward, without the hidden states that flow from block to block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.keyword:
            output = block(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return _hidden(output)


class Blocks:
    """The decoder blocks of a model over a set of windows, to be run one after the other.

    hidden: the inputs of the next block, one tensor ``[windows, length, width]`` per batch.
    Raises UniPruneError if blocks take arguments that depend on the tokens: they could not be replayed.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, blocks: nn.ModuleList, windows: Tensor) -> None:
        self.blocks = blocks
        self._batches = batches(windows)
        self._calls: dict[torch.Size, list[Call]] = {}
        for batch in self._batches:
            if batch.shape not in self._calls:
                self._calls[batch.shape], _, _ = _trace(model, blocks, batch)
        self._verify(model, self._batches[-1])
        self.hidden = [_first_input(model, blocks, batch) for batch in self._batches]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.blocks)))

    @torch.no_grad()
    def run(self, index: int, advance: bool = False) -> None:
        """Runs one block on the current hidden states; with ``advance`` its outputs take their place."""
        block = self.blocks[index]
        for number, batch in enumerate(self._batches):
            output = self._calls[batch.shape][index](block, self.hidden[number])
            if advance:
                self.hidden[number] = output

    def _verify(self, model: nn.Module, batch: Tensor) -> None:
        """Replays other tokens of the same shape, which must give what the model itself gives."""
        other = batch.flip(-1)
        _, hidden, expected = _trace(model, self.blocks, other)
        for call, block in zip(self._calls[batch.shape], self.blocks, strict=True):
            hidden = call(block, hidden)
        if not torch.allclose(hidden, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            kind = type(self.blocks[0]).__name__
            raise UniPruneError(f"{kind} takes arguments that depend on the tokens; --sequential cannot replay it")


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs, keyword=False)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], Call((), rest, keyword=True)


def _trace(model: nn.Module, blocks: nn.ModuleList, batch: Tensor) -> tuple[list[Call], Tensor, Tensor]:
    """One real forward pass: every block's call, the first block's input and the last block's output."""
    calls: list[Call] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split(args, kwargs)
        inputs.append(hidden)
        calls.append(call)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(_hidden(output))))
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls, inputs[0], outputs[0]


class _Reached(Exception):
    """The first block was reached; the rest of the forward pass is not needed."""


def _first_input(model: nn.Module, blocks: nn.ModuleList, batch: Tensor) -> Tensor:
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        found.append(_split(args, kwargs)[0])
        raise _Reached

    handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        forward(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]
