"""How much autograd keeps of a pass through a model's blocks, counted on a copy of the model that has shapes but no contents.

So whatever blocks compute is counted: attention without a kernel that computes it again, several residual streams, states of
linear attention. A formula over matrices would have to know them all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.models.blocks import hidden_in, last_hidden, rerouted, with_hidden
from uniprune.models.experts import FusedExperts, Slice
from uniprune.models.live import Live
from uniprune.models.matrices import Matrices, find_blocks
from uniprune.models.replay.calls import handed_on, split_arguments

logger = logging.getLogger(__name__)

LONGEST = 512  # tokens that are counted at most; some blocks (Mamba) take them one by one


@dataclass(frozen=True)
class Activations:
    """Bytes for one window of tokens.

    kept: for each call of a block in a pass, what autograd keeps of it. state: the hidden states between two blocks, and what
    else the one puts out and the other is given. passing: the most that a block has of tensors beside its input, without
    gradients.
    """

    kept: tuple[int, ...]
    state: int
    passing: int


def count(model: nn.Module, matrices: Matrices, dtype: torch.dtype, length: int) -> Activations | None:
    """The activations of a model, which may be on the meta device, for a window of ``length`` tokens in a type, where the
    inputs of these matrices are kept.

    Of longer windows than ``LONGEST`` they are reckoned: each token takes a share, and each pair of tokens. None for models
    whose passes depend on what tokens are, beside the choice of experts.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    slices = [matrix.module for matrix in matrices.values() if isinstance(matrix.module, Slice)]
    fused = {one.fused.name: one.fused for one in slices}
    wanted = {id(one.whole) for one in slices}
    wanted |= {id(matrix.parameter) for matrix in matrices.values() if not isinstance(matrix.module, Slice)}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            twin = _meta_copy(model, dtype, wanted)
            experts = [one.first_of(twin.get_submodule(name)) for name, one in fused.items()]
            if length <= LONGEST:
                return _counted(twin, experts, length)
            half, whole = (_counted(twin, experts, tokens) for tokens in (LONGEST // 2, LONGEST))
    except Exception as error:  # whatever a model without contents raises, nothing is known of it
        logger.debug("activations of %s cannot be counted: %s", type(model).__name__, error)
        return None
    ratio = length / LONGEST
    kept = zip(half.kept, whole.kept, strict=True)
    return Activations(
        kept=tuple(int(_reckoned(small, large, ratio)) for small, large in kept),
        state=int(whole.state * ratio),
        passing=int(_reckoned(half.passing, whole.passing, ratio)),
    )


def _reckoned(half: int, whole: int, ratio: float) -> float:
    """What ``ratio`` times the length takes, if a x + b x^2 takes these at half the length and at the whole."""
    square = max(0, 2 * (whole - 2 * half))
    return (whole - square) * ratio + square * ratio**2


def _meta_copy(model: nn.Module, dtype: torch.dtype, wanted: Collection[int]) -> nn.Module:
    """The same model with parameters of a type that have no contents, wherever those of ``model`` lie. wanted: the ids of those
    that get a gradient, so that what they are multiplied by is kept.
    """
    contents: dict[int, Any] = {}
    for parameter in model.parameters():
        kind = dtype if parameter.is_floating_point() else parameter.dtype
        contents[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=id(parameter) in wanted)
    for buffer in model.buffers():
        contents[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, contents).eval()  # a skeleton has dropout, with which attention keeps all its weights


def _counted(model: nn.Module, experts: Sequence[FusedExperts], length: int) -> Activations:
    """Of blocks that look alike the first is run; the others hand their input on."""
    _, blocks = find_blocks(model)
    found: dict[Any, tuple[int, Any]] = {}  # what a block looks like -> bytes kept, output
    calls: list[int] = []
    states: list[int] = []
    passing: list[int] = []
    before: Any = None  # what the last block put out
    storages: dict[int, Tensor] = {}  # kept ones, which live until they are counted

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def route(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        looks = type(blocks[index]), tuple((name, p.shape) for name, p in blocks[index].named_parameters())

        def block(*args: Any, **kwargs: Any) -> Any:
            nonlocal before
            hidden = hidden_in(args, kwargs)
            handed = {before[place] for place in handed_on(before, split_arguments(args, kwargs)[1]).values()}
            states.append(hidden.nbytes + sum(tensor.nbytes for tensor in handed))
            if looks not in found:
                hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
                run = partial(forward, hidden, *args[1:]) if args else partial(forward, hidden_states=hidden)
                given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                with torch.no_grad(), Live() as live:
                    run(**given)
                passing.append(live.most)
                storages.clear()
                output = run(**given)
                weights = {parameter.untyped_storage()._cdata for parameter in blocks[index].parameters()}
                kept = sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in weights)
                found[looks] = kept, output
            size, output = found[looks]
            calls.append(size)
            before = with_hidden(output, hidden)
            return before

        return block

    def chosen(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: experts[index].run_first(nn.Module.__call__, *args, **kwargs)

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(rerouted((one.module for one in experts), chosen))
        stack.enter_context(rerouted(blocks, route))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        last_hidden(model, torch.zeros(1, length, dtype=torch.int64))
    return Activations(tuple(calls), max(states), max(passing))
