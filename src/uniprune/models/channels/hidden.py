"""The hidden channels of an MLP: the outputs of its producers (gate, up), and the inputs of its consumer (down)."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from uniprune.models.channels.folding import Axis, Channels
from uniprune.models.channels.trial import Trial, alone
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
    uses = uses_of(model)
    trials: dict[str, Trial | None] = {}
    verdicts: dict[tuple[str, Channels], bool] = {}
    found = []
    for prefix, members in families.items():
        parent = model.get_submodule(prefix)
        candidates = list(candidates_of(members))
        allowed = []
        for channels in candidates:
            if any(uses[id(parent.get_parameter(axis.parameter))] > 1 for axis in channels.axes):
                continue
            structure = repr(parent)
            if structure not in trials:
                trials[structure] = alone(parent, members[0].shape[1])
            trial = trials[structure]
            if (structure, channels) not in verdicts:
                verdicts[structure, channels] = trial is not None and trial.harmless(channels)
            if verdicts[structure, channels]:
                (consumer,) = channels.consumers
                allowed.append(replace(channels.inside(prefix), consumers=(stored[f"{prefix}.{consumer}"],)))
        if candidates and len(allowed) != 1:
            logger.info("%s: its hidden channels stay in their order; no reordering was proved to be harmless", prefix)
        found += [channels for channels in allowed if len(allowed) == 1 and channels.consumers[0] in matrices]
    return found


def uses_of(model: nn.Module) -> Counter[int]:
    """How many places each parameter has in a model, by its ``id``."""
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


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
    found = [Axis(f"{leaf(matrix)}.weight", 1 if matrix.transposed else 0, groups, repeats)]
    if isinstance(matrix.module.bias, Tensor):
        found.append(Axis(f"{leaf(matrix)}.bias", 0, groups, repeats))
    return found


def inputs_of(matrix: Matrix, groups: int = 1, repeats: int = 1) -> Axis:
    """The axis of a layer's weight that its inputs lie along."""
    return Axis(f"{leaf(matrix)}.weight", 0 if matrix.transposed else 1, groups, repeats)
