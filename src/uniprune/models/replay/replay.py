"""Runs a model block after block.

A block is called with the very arguments that the model itself passes to it: they are captured while the model's own forward
pass runs with its blocks bypassed, and replayed, never rebuilt by hand, so that nothing here knows what an attention mask looks
like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.models.blocks import Residency, device_of, resident
from uniprune.models.replay.bypass import Bypass, Interface, bypass, bypassed
from uniprune.models.replay.calls import Call, Flow
from uniprune.models.replay.probe import probe


class Replay:
    """The decoder blocks of a model, called one by one with the arguments that the model itself passes to them.

    residency: what has a block's weights in memory; whoever runs a block does so inside it. interface: as :func:`probe` found
    it. ids, everywhere: token ids ``[windows, length]``.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, interface: Interface, residency: Residency = resident) -> None:
        self._model, self.blocks, self.interface, self.residency = model, blocks, interface, residency
        self._calls = CallCache(lambda ids: self._bypass(ids).calls)

    @classmethod
    def probed(cls, model: nn.Module, blocks: nn.ModuleList, ids: Tensor, residency: Residency = resident) -> Replay:
        """Of a model that a few of the tokens are run through first. Raises UniPruneError and InputError as :func:`probe`."""
        return cls(model, blocks, probe(model, blocks, residency, ids), residency)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return device_of(self._model)

    @torch.no_grad()
    def enter(self, ids: Tensor) -> Flow:
        """The first block's input."""
        found = self._bypass(ids)
        self._calls.add(ids, found.calls)
        return Flow(found.inputs[0])

    def run(self, index: int, flow: Flow, ids: Tensor) -> Flow:
        """A block's output for an input as :meth:`enter` gives it for the same tokens."""
        return Flow.out_of(self.call(index, ids)(self.blocks[index], flow), self.interface.gives)

    @torch.no_grad()
    def call(self, index: int, ids: Tensor) -> Call:
        """How the model calls a block."""
        return self._calls[ids][index]

    def leave(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of the last block's output: the final hidden states ``[windows, length, width]``."""
        return self._bypass(ids, hidden).final

    def around(self, ids: Tensor, last: Tensor | None = None) -> Any:
        """What the model, with its output head, puts out if its blocks are bypassed. last: what the last one puts out."""
        with bypassed(self.blocks, self.interface, last):
            return self._model(input_ids=ids.to(self.device), use_cache=False)

    def _bypass(self, ids: Tensor, last: Tensor | None = None) -> Bypass:
        return bypass(self._model, self.blocks, self.interface, ids, last)


class CallCache:
    """How the model calls its blocks for token ids: as for others of their shape, unless that depends on the tokens.

    Some models give their blocks the tokens (DeepSeek-V4, whose first routers go by them) or embeddings of their own (Gemma 4).
    Such calls are as large as hidden states, so only the last ones are kept.

    find: the calls for token ids, from a pass over them. by_tokens: whether calls are known to depend on the tokens.
    """

    def __init__(self, find: Callable[[Tensor], list[Call]]) -> None:
        self._find = find
        self._by_shape: dict[torch.Size, list[Call]] = {}
        self._latest: tuple[Tensor, list[Call]] | None = None
        self.by_tokens = False

    def __getitem__(self, ids: Tensor) -> list[Call]:
        found = self._kept(ids)
        if found is None:
            self.add(ids, found := self._find(ids))
        return found

    def add(self, ids: Tensor, calls: list[Call]) -> None:
        """Keeps the calls for token ids. For the first ones of a shape it also asks for those of other tokens, to compare."""
        if not self.by_tokens and ids.shape not in self._by_shape:
            others = self._find(ids.flip(-1))
            pairs = zip(calls, others, strict=True)
            self.by_tokens = not all(_same(call.arguments, other.arguments) for call, other in pairs)
            self._by_shape = {} if self.by_tokens else self._by_shape | {ids.shape: calls}
        if self.by_tokens:
            self._latest = ids, calls

    def _kept(self, ids: Tensor) -> list[Call] | None:
        if not self.by_tokens:
            return self._by_shape.get(ids.shape)
        return self._latest[1] if self._latest is not None and torch.equal(self._latest[0], ids) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors and what holds them included; objects of other kinds count as equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)
