"""Channel permutation: hidden channels in another order, so that N:M keeps more, while the dense model computes the same.

The hidden channels of an MLP are the outputs of its producers (gate, up) and the inputs of its consumer (down). Reorder the
producers' rows and the consumer's columns alike, and the module's function is the same; but N:M groups of the consumer hold
other inputs. Rows are not grouped, so the producers' own masks lose nothing.

Which modules allow that is found by shape and then proved by running them (:func:`find_channels`). An order is searched for
on scores (:func:`search`), and the weights are reordered (:func:`folding`, :func:`reorder`, :func:`fold`) before anything is
pruned: so the inputs of a group lie side by side, and no later step needs to know.

After the channel permutation of RIA (Zhang et al., ICLR 2024): allocation, then linear sum assignment; see :func:`search`.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from uniprune.errors import InputError
from uniprune.models.matrices import Matrices, Matrix, find_matrices
from uniprune.sparsity.channel_order import _pieces

logger = logging.getLogger(__name__)
TOKENS = 4  # that a module is run on to prove what it allows
ROUNDING = 1e-4  # relative: outputs closer than this are the same,
CHANGE = 1e-2  # and those further apart are not


# ------------------------------------------------------------------------------------------------------------- channels


@dataclass(frozen=True)
class Channels:
    """Hidden channels that may be put in any order, given that all parameters that have them go along.

    consumer, producers: names of matrices. size: how many channels. parts: 2 where a producer is two matrices in one,
    one above the other (Phi-3's gate_up_proj, ``out == 2 * size``), else 1. axes: (name of a parameter, the axis of it,
    as stored, that the channels lie along), for every parameter that has them; the consumer's weight is the last.
    """

    consumer: str
    producers: tuple[str, ...]
    size: int
    parts: int
    axes: tuple[tuple[str, int], ...]

    def inside(self, prefix: str) -> Channels:
        """The same channels as seen from outside the module ``prefix``."""
        return replace(
            self,
            consumer=f"{prefix}.{self.consumer}",
            producers=tuple(f"{prefix}.{name}" for name in self.producers),
            axes=tuple((f"{prefix}.{name}", axis) for name, axis in self.axes),
        )

    def named(self, names: Mapping[str, str]) -> Channels:
        """The same channels, their matrices by other names."""
        return replace(self, consumer=names[self.consumer], producers=tuple(names[name] for name in self.producers))


def find_channels(model: nn.Module, matrices: Matrices) -> list[Channels]:
    """The hidden channels that may be reordered, for consumers among ``matrices``, in their order.

    A module qualifies whose own matrices are, by shape, one consumer ``[width, H]`` and producers ``[H, width]`` or
    ``[2 H, width]``, with H other than the width, and whose outputs are proved not to depend on the channels' order. The
    proof runs a copy of the module with random weights on the CPU, one for each structure that occurs; it takes 4 bytes per
    weight of that module. The model may be on the meta device. Producers that are not among ``matrices`` (``--exclude``)
    are reordered all the same. Weights that several modules share stay as they are. What is proved is proved of the module
    as its own forward runs it: a model that reads the channels past it would not be seen.
    """
    families: dict[str, list[Matrix]] = defaultdict(list)
    ours = {id(module): name for name, module in model.named_modules()}
    stored: dict[str, str] = {}  # name of a module -> that of its matrix, which is the checkpoint's
    for matrix in find_matrices(model).values():
        if name := ours.get(id(matrix.module)):  # fused experts' matrices are no modules of the model; they stay as they are
            stored[name] = matrix.name
            families[name.rpartition(".")[0]].append(replace(matrix, name=name))
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    verdicts: dict[tuple[str, Channels], bool] = {}
    found = []
    for prefix, members in families.items():
        parent = model.get_submodule(prefix)
        candidates = list(_candidates(members))
        allowed = []
        for channels in candidates:
            if any(uses[id(parent.get_parameter(name))] > 1 for name, _ in channels.axes):
                continue
            structure = repr(parent), channels
            if structure not in verdicts:
                verdicts[structure] = _proved(parent, channels)
            if verdicts[structure]:
                allowed.append(channels.inside(prefix).named(stored))
        if candidates and len(allowed) != 1:
            logger.info("%s: its hidden channels stay in their order; no reordering was proved to be harmless", prefix)
        found += [channels for channels in allowed if len(allowed) == 1 and channels.consumer in matrices]
    return found


def _candidates(members: Sequence[Matrix]) -> Iterator[Channels]:
    """Every reading of a module's own matrices as producers and one consumer, by shape; names as seen from the module."""
    for consumer in members:
        width, size = consumer.shape
        producers = [matrix for matrix in members if matrix is not consumer]
        parts = next((p for p in (1, 2) if all(matrix.shape == (p * size, width) for matrix in producers)), None)
        if producers and parts and width != size:
            axes = []
            for matrix in producers:
                name = _leaf(matrix)
                axes.append((f"{name}.weight", 1 if matrix.transposed else 0))
                if isinstance(matrix.module.bias, Tensor):
                    axes.append((f"{name}.bias", 0))
            axes.append((f"{_leaf(consumer)}.weight", 0 if consumer.transposed else 1))
            yield Channels(_leaf(consumer), tuple(map(_leaf, producers)), size, parts, tuple(axes))


def _leaf(matrix: Matrix) -> str:
    return matrix.name.rpartition(".")[2]


@torch.no_grad()
def _proved(parent: nn.Module, channels: Channels) -> bool:
    """Whether a module's outputs stay the same when its channels are reordered, and do not when only the producers are.

    Every parameter is random, norms and biases too: weights of a norm across the channels, all 1 before training, would
    not tell the channels apart.
    """
    generator = torch.Generator().manual_seed(0)
    randoms = {id(p): _random(p, generator) for p in parent.parameters()}
    name, axis = channels.axes[-1]
    width = parent.get_parameter(name).shape[1 - axis]
    try:
        replica = copy.deepcopy(parent, randoms).eval().cpu()  # what the memo has is not copied
        wanted = inspect.signature(replica.forward).parameters.values()
        count = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in wanted)
        inputs = torch.randn(count, 1, TOKENS, width, generator=generator)
        moves = list(folding(channels, torch.randperm(channels.size, generator=generator)).items())
        outputs = [_outputs(replica, inputs)]
        for some in (moves[:-1], moves[-1:]):
            for name, (axis, order) in some:
                reorder(replica.get_parameter(name), axis, order)
            outputs.append(_outputs(replica, inputs))
    except Exception as error:  # a module that cannot be run on its own, whatever it raises, is one that nothing is proved of
        logger.debug("%s could not be run: %s", type(parent).__name__, error)
        return False
    before, halfway, after = outputs
    return _distance(before, after) < ROUNDING and _distance(before, halfway) > CHANGE


def _random(parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    scale = min(parameter.shape) ** -0.5 if parameter.dim() > 1 else 1.0
    return nn.Parameter(torch.empty(parameter.shape).normal_(0, scale, generator=generator), requires_grad=False)


def _outputs(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    output = module(*inputs)
    return [tensor for tensor in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(tensor, Tensor)]


def _distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference of any output, relative to the largest value of it."""
    return max((float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)


# -------------------------------------------------------------------------------------------------------------- folding


class Move(NamedTuple):
    """A parameter's new order: entry j along ``axis``, as stored, is the old entry ``order[j]``."""

    axis: int
    order: Tensor


def folding(channels: Channels, permutation: Tensor) -> dict[str, Move]:
    """How each parameter that has the channels is to be reordered, by its name; nothing but the names and axes is needed.

    permutation: int64 ``[size]``, of the consumer's inputs. Raises InputError if it is not one.
    """
    _check(channels.consumer, permutation, channels.size)
    stacked = torch.cat([permutation + part * channels.size for part in range(channels.parts)])
    *produced, (consumed, axis) = channels.axes
    return {name: Move(axis, stacked) for name, axis in produced} | {consumed: Move(axis, permutation)}


@torch.no_grad()
def reorder(values: Tensor | np.ndarray[Any, Any], axis: int, order: Tensor) -> None:
    """Reorders a weight or bias in place along one axis, a piece of the other axis at a time.

    An array is taken as bits, whatever float they are of: it may be mapped from a checkpoint's file.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values.view(f"i{values.itemsize}"))
    table = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
    order = order.to(table.device)
    for piece in _pieces(table, 1 - axis):
        piece.copy_(piece.index_select(axis, order))


def fold(model: nn.Module, found: Iterable[Channels], permutations: Mapping[str, Tensor]) -> None:
    """Reorders the parameters of a model in memory, in place, for every consumer that has a permutation."""
    for channels in found:
        if channels.consumer in permutations:
            for name, (axis, order) in folding(channels, permutations[channels.consumer]).items():
                reorder(model.get_parameter(name), axis, order)


def _check(name: str, permutation: Tensor, size: int) -> None:
    if not torch.equal(permutation.sort().values.cpu(), torch.arange(size)):
        raise InputError(f"{name}: its permutation is not one of {size} inputs; search for it on this matrix's scores")
