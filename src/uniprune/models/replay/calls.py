"""What goes from block to block, and how a block is called with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from uniprune.models.blocks import hidden_in, hidden_of, others_of
from uniprune.storage.stash import Stash

Arguments = dict[str | int, Any]
"""By name, or by their place behind the hidden states."""
Takes = Mapping[str | int, int]
"""Of a block's arguments, those that the block before put out beside hidden states, and at which place."""


class Flow(NamedTuple):
    """What goes from block to block: hidden states, and what else a block hands on to the next one, by its place in what the
    block puts out (the keys that sparse attention chose in GLM-5 and Hy 4, the states of ZAYA's routers).

    hidden: ``[windows, length, width]``, as a rule: XLNet has the axis of tokens first, Gemma 3n one of several streams.
    """

    hidden: Tensor
    handed: Mapping[int, Tensor | None] = {}

    @classmethod
    def out_of(cls, output: Any, places: Iterable[int]) -> Flow:
        """Of what a block put out, the hidden states and what is at some places beside them."""
        return cls(hidden_of(output), {place: output[place] for place in places})

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


@dataclass(frozen=True)
class Call:
    """How the model calls a block: called with the block's forward and a flow, it gives what the block puts out.

    arguments: those of the forward beside the hidden states. keyword: whether these have a name, too. takes: of the arguments,
    those whose values are the flow's.
    """

    arguments: Arguments
    keyword: bool
    takes: Takes

    def __call__(self, block: Callable[..., Any], flow: Flow) -> Any:
        given = self.arguments | {argument: flow.handed[place] for argument, place in self.takes.items()}
        args = [value for argument, value in given.items() if isinstance(argument, int)]
        kwargs = {argument: value for argument, value in given.items() if isinstance(argument, str)}
        return block(*args, hidden_states=flow.hidden, **kwargs) if self.keyword else block(flow.hidden, *args, **kwargs)


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """The hidden states that a block is called with, and its other arguments."""
    given: list[tuple[str | int, Any]] = [*enumerate(args[1:]), *kwargs.items()]
    return hidden_in(args, kwargs), {name: value for name, value in given if name != "hidden_states"}


def handed_on(output: Any, arguments: Arguments) -> Takes:
    """The arguments of a block that are the very tensors which the block before put out beside hidden states."""
    return {
        argument: place
        for place, tensor in enumerate(others_of(output), 1)
        for argument, value in arguments.items()
        if isinstance(value, Tensor) and value is tensor
    }
