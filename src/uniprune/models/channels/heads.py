"""The values of each attention head: the outputs of v_proj, and the inputs of o_proj.

Attention sums values over tokens, channel by channel. So the channels of a head of values may go in any order, if the inputs of
the output matrix go along, in every head of queries that this head of values serves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from uniprune.checkpoints.configuration import setting
from uniprune.checkpoints.layout import names_of
from uniprune.models.channels.folding import Channels
from uniprune.models.channels.hidden import inputs_of, outputs_of
from uniprune.models.channels.trial import trials
from uniprune.models.matrices import Matrix, find_blocks, find_matrices
from uniprune.models.replay.replay import Replay


def find_heads(model: nn.Module, consumers: Collection[str], replay: Replay, ids: Tensor) -> list[Channels]:
    """The values that may be reordered within their heads, for matrices among ``consumers``, by name.

    A pair of matrices in one module qualifies if, by shape, the outputs of one and the inputs of the other are heads, as many
    as the configuration says, and if that is proved on a copy of a decoder block, one for each structure that occurs. Values
    that one matrix puts out with queries and keys (GPT-2, Phi-3) stay as they are, as do weights that several modules share.
    ids: token ids ``[1, tokens]`` for the proof; the model's blocks may be in memory one at a time.
    """
    count = setting(model.config, "num_attention_heads")
    if not isinstance(count, int) or count < 1:
        return []
    prefix, _ = find_blocks(model)
    ours = {id(module): name for name, module in model.named_modules()}
    every = {ours[id(one.module)]: one for one in find_matrices(model).values() if id(one.module) in ours}
    names = names_of(model)
    found = []
    for trial, indices in trials(replay, ids):
        allowed = {}
        for index in indices:
            block = f"{prefix}.{index}"
            inside = {name.removeprefix(f"{block}."): one for name, one in every.items() if name.startswith(f"{block}.")}
            for channels in _candidates(inside, count):
                stored = inside[channels.consumers[0]].name
                moving = [model.get_parameter(axis.parameter) for axis in channels.inside(block).axes]
                if stored not in consumers or any(len(names[id(parameter)]) > 1 for parameter in moving):
                    continue
                if channels not in allowed:
                    allowed[channels] = trial.harmless(channels)
                if allowed[channels]:
                    found.append(replace(channels.inside(block), consumers=(stored,)))
    return found


def _candidates(members: Mapping[str, Matrix], count: int) -> Iterator[Channels]:
    """Pairs of matrices of one module that may be those of values and outputs; names as seen from the block."""
    modules: dict[str, list[Matrix]] = defaultdict(list)
    for name, matrix in members.items():
        modules[name.rpartition(".")[0]].append(replace(matrix, name=name))
    for prefix, matrices in modules.items():
        for consumer in matrices:
            size, rest = divmod(consumer.shape[1], count)
            for producer in () if rest else matrices:
                groups, odd = divmod(producer.shape[0], size)
                if producer is consumer or odd or not groups or count % groups:
                    continue
                axes = (*outputs_of(producer, groups), inputs_of(consumer, groups, count // groups))
                channels = Channels((consumer.name,), producer.shape[0], axes, groups, count // groups)
                yield channels.inside(prefix) if prefix else channels
