"""The residual stream: what each block reads and adds to, in one order of its channels for the whole model.

A module that is given the stream reads its channels: they are the inputs of its weight, or what a norm's weight has one of. A
matrix that is given something else and puts out as many channels writes to it, and so does an embedding. Which of them a module
of a block is follows from running the block on a stream in another order: as modules are reordered, first those that are called
first, what is given to the next ones is either what it was, or the same in the new order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from uniprune.checkpoints.layout import names_of
from uniprune.models.blocks import hidden_of
from uniprune.models.channels.folding import Axis, Channels, reorder
from uniprune.models.channels.trial import CHANGE, ROUNDING, BlockTrial, distance, trials
from uniprune.models.linear import input_axis, is_linear
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.models.replay.calls import Flow
from uniprune.models.replay.replay import Replay

logger = logging.getLogger(__name__)
TYPE_ROUNDING = {torch.bfloat16: 0.03, torch.float16: 0.01}  # relative, of what is proved on the model's own weights
Axes = dict[str, int]  # name of a parameter -> the axis, as stored, that the stream's channels lie along


def find_stream(model: nn.Module, consumers: Collection[str], replay: Replay, ids: Tensor) -> Channels | None:
    """The residual stream's channels, if they may be reordered; of what reads them, ``consumers`` by name are grouped by N:M.

    The blocks are proved on copies, one of each structure that occurs; the embeddings, the last norm and the output head are
    tried on the model itself, whose weights are then as they were. None if anything has as many channels and it is not clear
    what they are, e.g. experts, or parts of the model that text alone does not go through.
    ids: token ids ``[1, tokens]`` for the proof; the model's blocks may be in memory one at a time.
    """
    entered = replay.enter(ids).hidden
    if entered.dim() != 3 or len(entered) != 1:
        return None
    width, (prefix, _) = entered.shape[-1], find_blocks(model)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    axes: Axes = {}
    for trial, indices in trials(replay, ids):
        found = _block_axes(trial, order)
        if found is None:
            logger.info(
                "%s.%d: the residual stream stays in its order; another was not proved to be harmless", prefix, indices[0]
            )
            return None
        axes |= {f"{prefix}.{index}.{name}": axis for index in indices for name, axis in found.items()}
    around = _outer_axes(model, replay, ids, width)
    if around is None or not _proved_around(model, replay, ids, around, order):
        logger.info("the residual stream stays in its order: before or after the blocks, another was not proved to be harmless")
        return None
    modules = {name: module for name, module in model.named_modules() if is_linear(module)}
    readers = {id(module) for name, module in modules.items() if axes.get(f"{name}.weight") == input_axis(module)}
    read = tuple(name for name, one in find_matrices(model).items() if id(one.module) in readers and name in consumers)
    names = names_of(model)  # a tied parameter is moved by the first of its names
    unique = {names[id(model.get_parameter(name))][0]: axis for name, axis in (around | axes).items()}
    return Channels(read, width, tuple(Axis(*one) for one in unique.items())) if read else None


# --------------------------------------------------------------------------------------------------------------- blocks


@torch.no_grad()
def _block_axes(trial: BlockTrial, order: Tensor) -> Axes | None:
    """The axes of a block's parameters, if its outputs are proved to follow an order of its inputs. The trial is used up."""
    width, block = len(order), trial.module
    waiting = [name for name, module in block.named_modules() if _as_wide(module, width)]
    axes: Axes = {}
    try:
        before, given = _given(trial, trial.hidden)
        while waiting:
            _, now = _given(trial, trial.hidden[..., order])
            settled = _settled(block, sorted(waiting, key=list(now).index), given, now, order)
            if not settled:
                return None
            for name, found in settled.items():
                waiting.remove(name)
                for parameter, axis in found.items():
                    axes[f"{name}.{parameter}"] = axis
                    reorder(block.get_submodule(name).get_parameter(parameter), axis, order)
        after, _ = _given(trial, trial.hidden[..., order])
    except Exception as error:  # a block that is called otherwise, whatever it raises, is one that nothing is proved of
        logger.debug("%s could not be run: %s", type(block).__name__, error)
        return None
    same, changed = distance([before[..., order]], [after]), distance([before], [after])
    return axes if same < ROUNDING and changed > CHANGE else None


def _settled(
    block: nn.Module, waiting: list[str], before: dict[str, Tensor], now: dict[str, Tensor], order: Tensor
) -> dict[str, Axes]:
    """Of modules, in the order in which they are called, the first ones, of which it is clear what they are; and their axes.

    before, now: what each was given, and is given when the block's inputs are in the new order.
    """
    settled: dict[str, Axes] = {}
    width = len(order)
    for name in waiting:
        module, old, new = block.get_submodule(name), before[name], now[name]
        if new.shape[-1] == width and distance([old[..., order]], [new]) < ROUNDING:
            found = _reading(module, width)
            if found is None:
                break
            settled[name] = found
        elif distance([old], [new]) < ROUNDING:
            settled[name] = _writing(module, width)
            if settled[name]:
                break  # whoever is given its outputs has yet to be given them in the new order
        else:
            break  # what is called before it has yet to be reordered
    return settled


def _as_wide(module: nn.Module, width: int) -> bool:
    """Whether a parameter of a module's own has an axis as long as the stream has channels."""
    return any(width in parameter.shape for parameter in module.parameters(recurse=False))


def _given(trial: BlockTrial, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A block's output, and the first argument of each of its modules, in the order in which they are called."""
    given: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            first = next(iter((*args, *kwargs.values())), None)
            if isinstance(first, Tensor):
                given.setdefault(name, first.detach().clone())

        return hook

    handles = [
        module.register_forward_pre_hook(noting(name), with_kwargs=True) for name, module in trial.module.named_modules()
    ]
    try:
        return hidden_of(trial.call(trial.module, Flow(hidden))), given
    finally:
        for handle in handles:
            handle.remove()


def _reading(module: nn.Module, width: int) -> Axes | None:
    """The axes of a module's own parameters if it is given the stream; None if that is not clear."""
    if is_linear(module):
        return {"weight": input_axis(module)}
    axes = {}
    for name, parameter in module.named_parameters(recurse=False):
        found = [axis for axis, size in enumerate(parameter.shape) if size == width]
        if len(found) > 1 or (found and parameter.dim() > 2):
            return None
        if found:
            axes[name] = found[0]
    return axes


def _writing(module: nn.Module, width: int) -> Axes:
    """The axes of a module's own parameters if it is given something else: it may put out the stream."""
    if isinstance(module, nn.Embedding):
        return {"weight": 1}
    if not is_linear(module):
        return {}
    out = 1 - input_axis(module)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    return ({"weight": out} | ({} if bias is None else {"bias": 0})) if weight.shape[out] == width else {}


# ----------------------------------------------------------------------------------------------------- around the blocks


@torch.no_grad()
def _outer_axes(model: nn.Module, replay: Replay, ids: Tensor, width: int) -> Axes | None:
    """The axes of the parameters outside the blocks; None if one that is as wide is in a module that is not called."""
    called: set[int] = set()
    inner = {id(module) for module in find_blocks(model)[1].modules()}
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(id(module))) for module in model.modules()]
    try:
        replay.around(ids)
    finally:
        for handle in handles:
            handle.remove()
    axes: Axes = {}
    for name, module in model.named_modules():
        if id(module) in inner or not _as_wide(module, width):
            continue
        found = (_writing if isinstance(module, nn.Embedding) else _reading)(module, width)
        if id(module) not in called or found is None:
            return None
        axes |= {f"{name}.{parameter}": axis for parameter, axis in found.items()}
    return axes


@torch.no_grad()
def _proved_around(model: nn.Module, replay: Replay, ids: Tensor, axes: Axes, order: Tensor) -> bool:
    """Whether the first block's inputs, and the logits of the last one's outputs, follow the order of the axes."""
    last = torch.randn(replay.enter(ids).hidden.shape, generator=torch.Generator().manual_seed(1)).to(replay.device)
    last, order = last.to(model.dtype), order.to(replay.device)  # type: ignore[arg-type]
    limit = TYPE_ROUNDING.get(last.dtype, 1e-3)

    def around(last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = replay.around(ids, last).logits
        return replay.enter(ids).hidden.float(), replay.leave(last, ids).float(), logits.float()

    try:
        entered, final, logits = around(last)
        with _reordered(model, axes, order):
            moved = around(last[..., order])
            (_, _, other) = around(last)
    except Exception as error:
        logger.debug("%s could not be run around its blocks: %s", type(model).__name__, error)
        return False
    same = distance([entered[..., order], final[..., order], logits], moved)
    return same < limit and distance([logits], [other]) > CHANGE + limit


@contextmanager
def _reordered(model: nn.Module, axes: Axes, order: Tensor) -> Iterator[None]:
    """Inside ``with``, parameters are in another order along some axes; each once, whatever names it has."""
    unique = {id(parameter): (parameter, axis) for name, axis in axes.items() for parameter in [model.get_parameter(name)]}
    for parameter, axis in unique.values():
        reorder(parameter, axis, order)
    try:
        yield
    finally:
        for parameter, axis in unique.values():
            reorder(parameter, axis, order.argsort())
