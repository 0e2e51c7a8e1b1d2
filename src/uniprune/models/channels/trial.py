"""A copy of a module with random weights, on which it is proved what a new order of its channels changes.

Every parameter is random, norms and biases too: weights of a norm across the channels, all 1 before training, would not tell
the channels apart.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.models.blocks import hidden_of
from uniprune.models.channels.folding import Channels, folding, reorder
from uniprune.models.replay.calls import Flow
from uniprune.models.replay.replay import Replay

logger = logging.getLogger(__name__)
TOKENS = 16  # that a module is run on
ROUNDING = 1e-4  # relative: outputs closer than this are the same,
CHANGE = 1e-2  # and those further apart are not


class Trial:
    """A copy of a module in float32 on the CPU; it takes 4 bytes per weight.

    module: the copy. run: its outputs for fixed inputs. generator: what else is to be drawn.
    """

    def __init__(self, module: nn.Module, run: Callable[[], list[Tensor]], generator: torch.Generator) -> None:
        self.module, self.run, self.generator = module, run, generator

    @torch.no_grad()
    def harmless(self, channels: Channels) -> bool:
        """Whether the outputs stay the same when the channels are reordered, and do not when the consumer is left out.

        The last of the axes is taken for the consumer's.
        """
        groups = [torch.randperm(channels.size // channels.groups, generator=self.generator) for _ in range(channels.groups)]
        order = (torch.stack(groups) + torch.arange(channels.groups)[:, None] * len(groups[0])).flatten()
        *produced, consumed = folding(channels, order)
        try:
            outputs = [self.run()]
            for moves in (produced, [consumed]):
                for name, (axis, there) in moves:
                    reorder(self.module.get_parameter(name), axis, there)
                outputs.append(self.run())
        except Exception as error:  # a module that cannot be run, whatever it raises, is one that nothing is proved of
            logger.debug("%s could not be run: %s", type(self.module).__name__, error)
            return False
        for name, (axis, there) in (*produced, consumed):
            reorder(self.module.get_parameter(name), axis, there.argsort())
        before, halfway, after = outputs
        return distance(before, after) < ROUNDING and distance(before, halfway) > CHANGE


def harmless_alone(module: nn.Module, channels: Channels) -> bool:
    """:meth:`Trial.harmless` of a module that is called with hidden states ``[1, tokens, width]`` alone.

    width: of the consumer's outputs. False, too, if the module cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)
    consumer = channels.axes[-1]
    width = module.get_parameter(consumer.parameter).shape[1 - consumer.axis]
    try:
        twin = _copied(module, generator)
        wanted = inspect.signature(twin.forward).parameters.values()
    except Exception as error:  # of a module that cannot be copied, nothing is proved
        logger.debug("%s could not be copied: %s", type(module).__name__, error)
        return False
    count = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in wanted)
    inputs = torch.randn(count, 1, TOKENS, width, generator=generator)
    return Trial(twin, lambda: _tensors(twin(*inputs)), generator).harmless(channels)


class BlockTrial(Trial):
    """A trial of a decoder block, called as the model calls it for token ids ``[1, tokens]``, but with random hidden states.

    The block must be in memory. hidden: its input, ``[1, tokens, width]`` as a rule.
    """

    def __init__(self, replay: Replay, index: int, ids: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        twin = _copied(replay.blocks[index], generator)
        self.hidden = torch.randn(replay.enter(ids).hidden.shape, generator=generator)
        call = replay.call(index, ids)
        self.call = replace(call, arguments=_plain(call.arguments))
        super().__init__(twin, lambda: [hidden_of(self.call(twin, Flow(self.hidden)))], generator)


def trials(replay: Replay, ids: Tensor) -> Iterator[tuple[BlockTrial, list[int]]]:
    """A trial of each structure of blocks that occurs, and the indices of the blocks that have it."""
    alike: dict[str, list[int]] = {}
    for index, block in enumerate(replay.blocks):
        shapes = [tuple(parameter.shape) for parameter in block.parameters()]
        alike.setdefault(f"{block!r} {shapes}", []).append(index)
    for indices in alike.values():
        with replay.residency(indices[0]):
            trial = BlockTrial(replay, indices[0], ids)
        yield trial, indices


def distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference of any output, relative to the largest value of it."""
    return max((float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)


@torch.no_grad()
def _copied(module: nn.Module, generator: torch.Generator) -> nn.Module:
    randoms = {id(p): _random(p, generator) for p in module.parameters()}
    twin = copy.deepcopy(module, randoms).eval().float().cpu()  # what the memo has is not copied
    return twin.requires_grad_(False)


def _random(parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    scale = min(parameter.shape) ** -0.5 if parameter.dim() > 1 else 1.0
    return nn.Parameter(torch.empty(parameter.shape).normal_(0, scale, generator=generator), requires_grad=False)


def _plain(argument: Any) -> Any:
    """An argument with its tensors on the CPU, in float32 those that are of a float type."""
    if isinstance(argument, Tensor):
        tensor = argument.detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor
    if isinstance(argument, dict):
        return {key: _plain(value) for key, value in argument.items()}
    return type(argument)(map(_plain, argument)) if type(argument) in (list, tuple) else argument


def _tensors(output: Any) -> list[Tensor]:
    return [tensor for tensor in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(tensor, Tensor)]
