"""Runs a model block after block.

A block is called with the very arguments that the model itself passes to it: they are captured while the model's own forward
pass runs over hollow blocks, and replayed, never rebuilt by hand, so that nothing here knows what an attention mask looks like.
Hollow blocks hand their input on: no weight of a block is needed to learn its arguments, or to have what the model does before
the first block and after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uniprune.errors import InputError, UniPruneError, first_line
from uniprune.models.blocks import (
    OVERFLOW,
    Residency,
    batches,
    device_of,
    forked,
    hidden_in,
    hidden_of,
    last_hidden,
    rerouted,
    resident,
    warn_unless_causal,
    with_hidden,
)
from uniprune.storage.stash import Stash

PROBE_TOKENS = 16


class Flow(NamedTuple):
    """What goes from block to block: hidden states, and what else a block hands on to the next one, by its place in what the
    block puts out (the keys that sparse attention chose in GLM-5 and Hy 4, the states of ZAYA's routers).

    hidden: ``[windows, length, width]``, as a rule: XLNet has the axis of tokens first, Gemma 3n one of several streams.
    """

    hidden: Tensor
    handed: Mapping[int, Tensor | None] = {}

    def each(self, change: Callable[[Tensor], Tensor]) -> Flow:
        """The same with each tensor changed."""
        return Flow(change(self.hidden), {place: None if t is None else change(t) for place, t in self.handed.items()})

    def put(self, stash: Stash, name: str) -> Flow:
        """The same, kept in a stash."""
        handed: dict[int, Tensor | None] = {}
        for place, tensor in self.handed.items():
            slot = _place_of(name, place)
            if tensor is None:
                stash.forget(slot)
            handed[place] = None if tensor is None else stash.put(slot, tensor)
        return Flow(stash.put(name, self.hidden), handed)

    @classmethod
    def take(cls, stash: Stash, name: str, places: Iterable[int]) -> Flow:
        """What an earlier process put, with what was handed on at some places."""
        slots = {place: _place_of(name, place) for place in places}
        return cls(stash.take(name), {place: stash.take(slot) if slot in stash else None for place, slot in slots.items()})


def _place_of(name: str, place: int) -> str:
    return f"{name}-{place}"


Arguments = dict[str | int, Any]
"""By name, or by their place behind the hidden states."""


@dataclass(frozen=True)
class Call:
    """How a block is called.

    arguments: those of its forward beside the hidden states. keyword: whether these have a name, too. takes: of the arguments,
    those that the block before put out, and at which place. gives: the places of what this block hands on; None for all.
    """

    arguments: Arguments
    keyword: bool
    takes: Mapping[str | int, int]
    gives: tuple[int, ...] | None

    def __call__(self, block: Callable[..., Any], flow: Flow) -> Flow:
        given = self.arguments | {argument: flow.handed[place] for argument, place in self.takes.items()}
        args = [value for argument, value in given.items() if isinstance(argument, int)]
        kwargs = {argument: value for argument, value in given.items() if isinstance(argument, str)}
        output = block(*args, hidden_states=flow.hidden, **kwargs) if self.keyword else block(flow.hidden, *args, **kwargs)
        places = range(1, _places(output)) if self.gives is None else self.gives
        return Flow(hidden_of(output), {place: output[place] for place in places})


class Replay:
    """The decoder blocks of a model, called one by one with the arguments that the model itself passes to them.

    residency: what has a block's weights in memory; whoever runs a block does so inside it.
    Raises UniPruneError, at the first windows, if the blocks do not give what the model itself gives: if their arguments
    depend on what other blocks did.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, residency: Residency = resident) -> None:
        self.blocks, self.residency = blocks, residency
        self._model = model
        self._calls: dict[torch.Size, list[Call]] = {}  # by the shape of the windows
        self._latest: tuple[Tensor, list[Call]] | None = None  # where they depend on the tokens: the last windows, and theirs
        self._output: Any = None  # what the first block's forward returned for a few tokens
        self._takes: dict[str | int, int] = {}  # of each block but the first; known once the model has run as a whole
        self._gives: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return device_of(self._model)

    def enter(self, batch: Tensor) -> Flow:
        """The first block's input for token ids ``[windows, length]``."""
        if self._output is None:
            self._output = self._first_output(batch)
            self._verify(forked(batch[0, :PROBE_TOKENS]))
        if batch.shape not in self._calls and self._latest is None:
            self._learn(batch)
        with torch.no_grad():
            inputs, calls, _ = self._through(batch)
        if self._latest is not None:
            self._latest = batch, calls
        return Flow(inputs[0])

    def run(self, index: int, flow: Flow, ids: Tensor) -> Flow:
        """A block's output for an input as :meth:`enter` gives it. ids: the windows, which entered before."""
        return self.call(index, ids)(self.blocks[index], flow)

    def call(self, index: int, ids: Tensor) -> Call:
        """How the model calls a block for windows, which entered before."""
        return self._calls_of(ids)[index]

    @torch.no_grad()
    def _calls_of(self, ids: Tensor) -> list[Call]:
        """How the blocks are called for windows: as for others of their shape, unless it depends on the tokens.

        Some models give their blocks the tokens (DeepSeek-V4, whose first routers go by them) or embeddings of their own
        (Gemma 4). Such calls are as large as hidden states, so only the last are kept; a pass over hollow blocks brings others.
        """
        if self._latest is None:
            return self._calls[ids.shape]
        if not torch.equal(self._latest[0], ids):
            self._latest = ids, self._through(ids)[1]
        return self._latest[1]

    @property
    def gives(self) -> tuple[int, ...]:
        """The places of what blocks hand on beside hidden states; a window must have entered."""
        assert self._gives is not None, "no window has entered"
        return self._gives

    def leave(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of the last block's output: the final hidden states ``[windows, length, width]``."""
        return self._through(ids, hidden)[2]

    def around(self, module: nn.Module, batch: Tensor, last: Tensor | None = None) -> Any:
        """What ``module``, the model or its backbone, returns when its blocks are hollow. last: what the last one puts out."""
        assert self._output is not None, "no window has entered"
        with rerouted(self.blocks, self._hollow_route([], [], last)):
            return module(input_ids=batch.to(device_of(self._model)), use_cache=False)

    def _through(self, batch: Tensor, last: Tensor | None = None) -> tuple[list[Tensor], list[Call], Tensor]:
        """The model's own pass over hollow blocks: their inputs and calls, and the final hidden states.

        last: what the last block is to put out.
        """
        inputs: list[Tensor] = []
        calls: list[Call] = []
        with rerouted(self.blocks, self._hollow_route(inputs, calls, last)):
            return inputs, calls, last_hidden(self._model, batch)

    def _hollow_route(self, inputs: list[Tensor], calls: list[Call], last: Tensor | None) -> Callable[..., Any]:
        """For :func:`rerouted`: hollow blocks, of which the last puts out ``last``."""
        return lambda index, _: self._hollow(inputs, calls, last if index + 1 == len(self.blocks) else None)

    def _hollow(self, inputs: list[Tensor], calls: list[Call], output: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = _split(args, kwargs)
            takes = {argument: place for argument, place in self._takes.items() if calls and argument in arguments}
            calls.append(Call(arguments, keyword=not args, takes=takes, gives=self._gives))
            inputs.append(hidden)
            return with_hidden(self._output, hidden if output is None else output)

        return forward

    @torch.no_grad()
    def _first_output(self, batch: Tensor) -> Any:
        """What the first block returns, learnt from a run of it."""
        found: list[Any] = []

        def route(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def stop(*args: Any, **kwargs: Any) -> Any:
                with self.residency(0):
                    found.append(forward(*args, **kwargs))
                raise _Reached

            return stop

        try:
            with rerouted(self.blocks, route):
                last_hidden(self._model, batch[:1, :PROBE_TOKENS])
        except _Reached:
            pass
        (output,) = found
        others = output[1:] if _places(output) else ()
        if any(isinstance(other, Tensor) and other.shape == output[0].shape for other in others):  # Reformer
            kind = type(self.blocks[0]).__name__
            raise UniPruneError(f"blocks of {kind} hand on two streams of hidden states; they cannot be run one by one")
        return output

    @torch.no_grad()
    def _learn(self, batch: Tensor) -> None:
        """How the blocks are called for windows of a shape, and whether that depends on the tokens."""
        _, calls, _ = self._through(batch)
        _, others, _ = self._through(batch.flip(-1))
        pairs = zip(calls, others, strict=True)
        if all(_same(call.arguments, other.arguments) for call, other in pairs):
            self._calls[batch.shape] = calls
        else:
            self._latest = batch, calls

    @torch.no_grad()
    def _verify(self, probe: Tensor) -> None:
        """A few tokens through the model itself, each block loaded once, and beside it through the blocks alone.

        Alone, each is called with arguments that no other block was run with: some hand on keys and values in an object that
        all are given (Gemma 3n and 4). With several batches those would be of the last one. What a block puts out and the next
        one is given, the very tensor, is part of the flow.
        """
        inputs, calls, _ = self._through(probe)
        if len(calls) != len(self.blocks):
            raise _entangled(self.blocks, f" (a pass calls the {len(self.blocks)} of them {len(calls)} times)")
        alone, before = [Flow(inputs[0])], None

        def route(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def both(*args: Any, **kwargs: Any) -> Any:
                nonlocal before
                self._takes |= _handed_on(before, _split(args, kwargs)[1])
                with self.residency(index):
                    before = forward(*args, **kwargs)
                    if not bool(torch.isfinite(hidden_of(before)).all()):
                        raise InputError(f"block {index} {OVERFLOW}")
                    call = self._through(probe)[1][index]
                    try:
                        alone.append(call(forward, alone.pop()))
                    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                        raise _entangled(self.blocks, f" ({first_line(error)})") from error
                return before

            return both

        with rerouted(self.blocks, route):
            expected = last_hidden(self._model, probe)
        if not bool(expected.isfinite().all()):
            raise InputError(f"{type(self._model).__name__} {OVERFLOW}")
        warn_unless_causal(self._model, expected)
        found = self.leave(alone.pop().hidden, probe)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise _entangled(self.blocks)
        self._gives = tuple(sorted(set(self._takes.values())))


def _entangled(blocks: nn.ModuleList, why: str = "") -> UniPruneError:
    return UniPruneError(
        f"blocks of {type(blocks[0]).__name__} depend on each other beyond their inputs{why}; they cannot be run one by one: "
        "give memory for the whole model (--max-memory), and leave out --sequential and --refine"
    )


class Blocks:
    """The decoder blocks of a model over a set of windows, to be run one after the other.

    flows: the inputs of the next block, one for each batch, kept in ``stash``. done: blocks that have been run over the same
    windows before; their outputs are still in the stash.
    """

    def __init__(self, replay: Replay, windows: Tensor, stash: Stash | None = None, done: int = 0) -> None:
        self._replay, self._stash, self._done = replay, stash or Stash(), done
        self._batches = batches(windows)
        self.flows = []
        for number, batch in enumerate(self._batches):
            entered, slot = replay.enter(batch), _slot(number, done)
            self.flows.append(Flow.take(self._stash, slot, replay.gives) if done else entered.put(self._stash, slot))

    def over(self, windows: Tensor, stash: Stash) -> Blocks:
        """The same blocks over other windows, as far as these are; run them in turn."""
        return Blocks(self._replay, windows, stash, self._done)

    def __len__(self) -> int:
        return len(self._replay)

    def __iter__(self) -> Iterator[int]:
        """The indices of the blocks to be run; each block's weights are in memory until the next one is asked for."""
        for index in range(self._done, len(self._replay)):
            with self._replay.residency(index):
                yield index

    @torch.no_grad()
    def run(self, index: int, advance: bool = False) -> None:
        """Runs one block on the current hidden states; with ``advance`` its outputs take their place."""
        for number, flow in enumerate(self.flows):
            output = self._replay.run(index, flow.each(lambda t: t.to(self._replay.device)), self._batches[number])
            if advance:
                self.flows[number] = output.put(self._stash, _slot(number, index + 1))

    def sync(self) -> None:
        """Returns when the inputs of the next block are on the disk, if that is where they are kept."""
        self._stash.sync()


def _slot(batch: int, block: int) -> str:
    """Inputs of one block never overwrite those of the block before: until it is known to be done, they may be needed again."""
    return f"hidden-{batch}-{block % 2}"


class _Reached(Exception):
    """The first block was run; the rest of the forward pass is not needed."""


def _places(output: Any) -> int:
    """How many things a block puts out in a sequence; 0 for hidden states alone."""
    return len(output) if isinstance(output, (tuple, list)) else 0


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """A block's hidden states, and its other arguments."""
    given: list[tuple[str | int, Any]] = [*enumerate(args[1:]), *kwargs.items()]
    return hidden_in(args, kwargs), {name: value for name, value in given if name != "hidden_states"}


def _handed_on(before: Any, arguments: Arguments) -> dict[str | int, int]:
    """The arguments of a block that are tensors which the block before put out beside hidden states, and their places there."""
    return {
        argument: place
        for place in range(1, _places(before))
        for argument, value in arguments.items()
        if isinstance(value, Tensor) and value is before[place]
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors and what holds them included; objects of other kinds count as equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)
