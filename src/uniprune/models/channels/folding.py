"""Channel permutation: channels in another order, so that N:M keeps more, while the dense model computes the same.

The inputs of a matrix are the outputs of other matrices. Reorder the rows of those and the columns of this one alike, and the
model's function is the same; but N:M groups of this one hold other inputs. Rows are not grouped, so the masks of the others
lose nothing. Three kinds of channels can move: the hidden ones of an MLP (``hidden``), the values of each attention head
(``heads``), and the residual stream, in one order for the whole model (``stream``).

Which of them may move is found by shape and then proved by running parts of the model (``trial``). An order is searched for on
scores (``sparsity.channel_order``), and the weights are reordered (``folding``) before anything is pruned: so the inputs of a
group lie side by side, and no later step needs to know.

After the channel permutation of RIA (Zhang et al., ICLR 2024), which reorders each matrix's inputs while the model runs; here
all orders are folded into the weights. This module has what channels are, and how parameters are reordered with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from uniprune.errors import InputError
from uniprune.sparsity.channel_order import pieces


class Axis(NamedTuple):
    """An axis of a parameter that channels lie along, as stored, and how they lie there.

    Its entries, seen as ``[groups, repeats, channels of a group]``, go by group and channel alone: what they are repeats of
    moves alike. Two producers in one matrix, one above the other (Phi-3's gate_up_proj), are 2 repeats of one group; the inputs
    of a matrix behind grouped-query attention have a group for each head of values, and a repeat for each query that it serves.
    """

    parameter: str
    axis: int
    groups: int = 1
    repeats: int = 1


@dataclass(frozen=True)
class Channels:
    """Channels that may be put in another order within each of their groups, given that all parameters that have them go along.

    consumers: names of the matrices whose inputs they are: N:M groups those. size: how many channels. axes: of all parameters
    that have them. groups: within which they stay (heads of values), as long as each other. repeats: of the consumers' axes.
    """

    consumers: tuple[str, ...]
    size: int
    axes: tuple[Axis, ...]
    groups: int = 1
    repeats: int = 1

    def inside(self, prefix: str) -> Channels:
        """The same channels as seen from outside the module ``prefix``; the consumers' names are left."""
        return replace(self, axes=tuple(axis._replace(parameter=f"{prefix}.{axis.parameter}") for axis in self.axes))

    def rows(self, scores: Tensor) -> Tensor:
        """A consumer's scores ``[out, in]`` as ``[out * repeats, size]``: a column for each channel."""
        return scores.reshape(len(scores), self.groups, self.repeats, -1).transpose(1, 2).reshape(-1, self.size)

    def inputs(self, order: Tensor) -> Tensor:
        """The order ``[in]`` of the consumers' inputs for an order ``[size]`` of the channels."""
        return _entries(order, self.groups, self.repeats)


class Move(NamedTuple):
    """A parameter's new order: entry j along ``axis``, as stored, is the old entry ``order[j]``."""

    axis: int
    order: Tensor


def folding(channels: Channels, order: Tensor) -> list[tuple[str, Move]]:
    """How each parameter that has the channels is to be reordered; nothing but the names and axes is needed.

    order: int64 ``[size]``. Raises InputError unless it is a permutation that keeps every channel in its group.
    """
    first = torch.arange(channels.size).view(channels.groups, -1)
    if not torch.equal(order.cpu().view(channels.groups, -1).sort(1).values, first):
        within = f", each in its group of {first.shape[1]}" if channels.groups > 1 else ""
        raise InputError(
            f"{channels.consumers[0]}: its permutation is not one of {channels.size} inputs{within}; search for it on this "
            "matrix's scores"
        )
    return [(axis.parameter, Move(axis.axis, _entries(order, axis.groups, axis.repeats))) for axis in channels.axes]


def _entries(order: Tensor, groups: int, repeats: int) -> Tensor:
    """The order of an axis's entries for an order of channels."""
    size = len(order) // groups
    within = order.view(groups, 1, size) % size
    starts = torch.arange(groups * repeats, device=order.device).view(groups, repeats, 1) * size
    return (starts + within).flatten()


@torch.no_grad()
def reorder(values: Tensor | np.ndarray[Any, Any], axis: int, order: Tensor) -> None:
    """Reorders a weight or bias in place along one axis, a piece of the other axis at a time.

    An array is taken as bits, whatever float they are of: it may be mapped from a checkpoint's file.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values.view(f"i{values.itemsize}"))
    table = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
    order = order.to(table.device)
    for piece in pieces(table, 1 - axis):
        piece.copy_(piece.index_select(axis, order))


def fold(model: nn.Module, found: Iterable[tuple[Channels, Tensor]]) -> None:
    """Reorders the parameters of a model in memory, in place."""
    for channels, order in found:
        for name, move in folding(channels, order):
            reorder(model.get_parameter(name), *move)
