"""The hidden channels of an MLP: the outputs of its producers (gate, up), and the inputs of its consumer (down)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from uniprune.checkpoints.layout import names_of
from uniprune.models.channels.folding import Axis, Channels
from uniprune.models.channels.trial import harmless_alone
from uniprune.models.linear import input_axis
from uniprune.models.matrices import Matrices, Matrix, find_matrices

logger = logging.getLogger(__name__)


def find_hidden(model: nn.Module, matrices: Matrices) -> list[Channels]:
    """The hidden channels that may be reordered, for consumers among ``matrices``, in their order.

    A module qualifies whose own matrices are, by shape, one consumer ``[width, H]`` and producers ``[H, width]`` or
    ``[2 H, width]``, with H other than the width, and whose outputs are proved not to depend on the channels' order. The
    proof runs a copy of the module, one for each structure that occurs. The model may be on the meta device. Producers that are
    not among ``matrices`` (``--exclude``) are reordered all the same. Weights that several modules share stay as they are. What
    is proved is proved of the module as its own forward runs it: a model that reads the channels past it would not be seen.
    """
    families: dict[str, list[Matrix]] = defaultdict(list)
    ours = {id(module): name for name, module in model.named_modules()}
    stored: dict[str, str] = {}  # name of a module -> that of its matrix, which is the checkpoint's
    for matrix in find_matrices(model).values():
        if name := ours.get(id(matrix.module)):  # fused experts' matrices are no modules of the model; they stay as they are
            stored[name] = matrix.name
            families[name.rpartition(".")[0]].append(replace(matrix, name=name))
    names = names_of(model)
    verdicts: dict[tuple[str, Channels], bool] = {}
    found = []
    for prefix, members in families.items():
        parent = model.get_submodule(prefix)
        candidates = list(candidates_of(members))
        allowed = []
        for channels in candidates:
            if any(len(names[id(parent.get_parameter(axis.parameter))]) > 1 for axis in channels.axes):
                continue
            structure = repr(parent), channels
            if structure not in verdicts:
                verdicts[structure] = harmless_alone(parent, channels)
            if verdicts[structure]:
                (consumer,) = channels.consumers
                allowed.append(replace(channels.inside(prefix), consumers=(stored[f"{prefix}.{consumer}"],)))
        if candidates and len(allowed) != 1:
            logger.info("%s: its hidden channels stay in their order; no reordering was proved to be harmless", prefix)
        found += [channels for channels in allowed if len(allowed) == 1 and channels.consumers[0] in matrices]
    return found


def candidates_of(members: Sequence[Matrix]) -> Iterator[Channels]:
    """Every reading of a module's own matrices as producers and one consumer, by shape; names as seen from the module."""
    for consumer in members:
        width, size = consumer.shape
        producers = [matrix for matrix in members if matrix is not consumer]
        parts = next((p for p in (1, 2) if all(matrix.shape == (p * size, width) for matrix in producers)), None)
        if producers and parts and width != size:
            axes = [axis for matrix in producers for axis in outputs_of(matrix, repeats=parts)]
            yield Channels((leaf(consumer),), size, (*axes, inputs_of(consumer)))


def leaf(matrix: Matrix) -> str:
    """A matrix's name as seen from the module that has it."""
    return matrix.name.rpartition(".")[2]


def outputs_of(matrix: Matrix, groups: int = 1, repeats: int = 1) -> list[Axis]:
    """The axes of a layer's parameters, as seen from the module that has it, that its outputs lie along."""
    found = [Axis(f"{leaf(matrix)}.weight", 1 - input_axis(matrix.module), groups, repeats)]
    if isinstance(matrix.module.bias, Tensor):
        found.append(Axis(f"{leaf(matrix)}.bias", 0, groups, repeats))
    return found


def inputs_of(matrix: Matrix, groups: int = 1, repeats: int = 1) -> Axis:
    """The axis of a layer's weight that its inputs lie along."""
    return Axis(f"{leaf(matrix)}.weight", input_axis(matrix.module), groups, repeats)
