"""The model's own forward pass with its blocks bypassed: each hands its input on, so that none of its weights is needed.

It tells how the model calls its blocks, and what the model does before the first one and after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from uniprune.models.blocks import last_hidden, rerouted, with_hidden
from uniprune.models.replay.calls import Call, Takes, split_arguments


class Interface(NamedTuple):
    """What blocks of a model have in common where one is joined to the next.

    output: what the first block put out for a few tokens; others are taken to put out as much. takes: of every block but the
    first, if it has the argument.
    """

    output: Any
    takes: Takes

    @property
    def gives(self) -> tuple[int, ...]:
        """The places of what blocks hand on beside hidden states."""
        return tuple(sorted(set(self.takes.values())))


class Bypass(NamedTuple):
    """What a pass with bypassed blocks gives: input and call of each block, and the final hidden states."""

    inputs: list[Tensor]
    calls: list[Call]
    final: Tensor


def bypass(model: nn.Module, blocks: nn.ModuleList, interface: Interface, ids: Tensor, last: Tensor | None = None) -> Bypass:
    """A pass over token ids ``[windows, length]``. last: the hidden states that the last block is to put out."""
    with bypassed(blocks, interface, last) as (inputs, calls):
        return Bypass(inputs, calls, last_hidden(model, ids))


@contextmanager
def bypassed(
    blocks: nn.ModuleList, interface: Interface, last: Tensor | None = None
) -> Iterator[tuple[list[Tensor], list[Call]]]:
    """Inside ``with``, blocks are bypassed; ``last`` as in :func:`bypass`. To the lists, each adds its input and its call."""
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def route(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = split_arguments(args, kwargs)
            takes = {argument: place for argument, place in interface.takes.items() if calls and argument in arguments}
            inputs.append(hidden)
            calls.append(Call(arguments, keyword=not args, takes=takes))
            return with_hidden(interface.output, hidden if last is None or index + 1 < len(blocks) else last)

        return hand_on

    with rerouted(blocks, route):
        yield inputs, calls
