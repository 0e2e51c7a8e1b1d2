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
from uniprune.matrices import Matrices, Matrix, find_matrices
from uniprune.patterns import NM

logger = logging.getLogger(__name__)

PIECE = 1 << 24  # elements handled at a time where a matrix may be mapped from a file, or large
SWEEPS = 4
BATCH = 512  # groups that exchange channels with each other at a time: time and memory grow with it
STEPS = 4, 32, 256  # the auction's price steps, as fractions of what a channel stands to win
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
    ours = dict(model.named_modules())  # fused experts' matrices are no modules of the model; they stay as they are
    for name, matrix in find_matrices(model).items():
        if ours.get(name) is matrix.module:
            families[name.rpartition(".")[0]].append(matrix)
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
                allowed.append(channels.inside(prefix))
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


# --------------------------------------------------------------------------------------------------------------- search


def kept(scores: Tensor, n: int, m: int, permutation: Tensor | None = None) -> float:
    """The sum of the scores ``[out, in]`` that N:M keeps when the columns are in another order (float64 sum)."""
    total = 0.0
    for rows in _pieces(scores, 0):
        ordered = rows if permutation is None else rows[:, permutation]
        total += float(ordered.reshape(-1, m).topk(n).values.sum(dtype=torch.float64))
    return total


def search(scores: Tensor, n: int, m: int, sweeps: int = SWEEPS, batch: int = BATCH, seed: int = 0) -> Tensor:
    """An order of the columns, int64 ``[in]`` on the CPU, in which N:M keeps much of the scores ``[out, in]``.

    Column j of the reordered matrix is column ``permutation[j]`` of the original. Where nothing better than the
    identity is found, that is returned. Same scores and seed: same order.

    First the columns are dealt out to the groups by their sums, so that large ones do not meet. Then, again and again, each
    group gives up one channel, and all those are handed out anew, in the best way. Let ``t_rg`` be the N-th largest of the
    scores that row r has left in group g: channel i adds ``max(s_ri - t_rg, 0)`` there, which is ``|s_ri - t_rg| / 2`` and
    terms of i alone and g alone, that every assignment has. So the best assignment is the one with the highest sum of L1
    distances. Departures from RIA: which channel leaves is drawn at random, and is another one in every sweep, and at most
    ``batch`` groups exchange channels at a time. The time goes as ``sweeps * batch * in * out``.

    Raises InputError if the columns cannot be grouped, or if a score is NaN or infinite.
    """
    columns = scores.shape[1]
    if reason := NM(n, m).misfit(*scores.shape):
        raise InputError(f"no channel permutation for {n}:{m}: {reason}")
    if not bool(torch.isfinite(scores).all()):
        raise InputError(
            "no channel permutation: the scores contain NaN or infinity; recalibrate, and check the model's weights"
        )
    identity = torch.arange(columns)
    if n == m or columns == m:
        return identity
    generator = torch.Generator().manual_seed(seed)
    groups = max((identity, _dealt(scores, m)), key=lambda order: kept(scores, n, m, order)).reshape(-1, m)
    for _ in range(sweeps):
        groups = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(1))
        for place in range(m):
            for some in torch.split(torch.randperm(len(groups), generator=generator), batch):
                groups[some, place] = _exchanged(scores, groups[some], place, n)
    groups = groups.sort(1).values  # inside a group the lower index goes first, as it wins ties
    found = groups[groups[:, 0].argsort()].flatten()
    return found if kept(scores, n, m, found) > kept(scores, n, m) else identity


def _dealt(scores: Tensor, m: int) -> Tensor:
    """The columns by falling sum, dealt to the groups back and forth: each group gets one of every m-th of them."""
    deals = scores.sum(0, dtype=torch.float64).cpu().argsort(descending=True, stable=True).reshape(m, -1)
    deals[1::2] = deals[1::2].flip(1)
    return deals.T.flatten()


def _exchanged(scores: Tensor, groups: Tensor, place: int, n: int) -> Tensor:
    """The channels ``[groups]`` at one place of each group ``[groups, m]``, handed out anew if that keeps more."""
    leaving = groups[:, place]
    staying = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    value = torch.zeros(len(groups), len(groups), device=scores.device)  # [channel, group]
    for rows in _pieces(scores, 0):
        thresholds = rows[:, staying].topk(n).values[..., -1]
        value += torch.cdist(rows[:, leaving].T.float().contiguous(), thresholds.T.float().contiguous(), p=1)
    value = value.double().cpu()
    entering = _assignment(value)
    better = value[entering, torch.arange(len(groups))].sum() > value.diagonal().sum()
    return leaving[entering] if better else leaving


def _assignment(value: Tensor) -> Tensor:
    """For each column of ``value`` ``[n, n]`` one row, so that the sum of the chosen entries is about the highest.

    Bertsekas' auction (1979) with falling price steps: all rows without a column bid for the one that is worth most to them
    at present prices, up to where their second choice would be better by one step. The sum is at most n of the last steps
    from the highest.
    """
    size = len(value)
    spread = float((value.amax(1) - value.mean(1)).mean())
    if spread <= 0:
        return torch.arange(size)
    prices = torch.zeros(size, dtype=value.dtype)
    for fraction in STEPS:
        owner, column = torch.full((size,), -1), torch.full((size,), -1)
        while len(bidders := (column < 0).nonzero().squeeze(1)):
            best, choice = (value[bidders] - prices).topk(2)
            bids, wanted = best[:, 0] - best[:, 1] + spread / fraction, choice[:, 0]
            highest = torch.zeros_like(prices).scatter_reduce(0, wanted, bids, "amax")
            equal = bids == highest[wanted]  # among equal bids the lowest row wins
            first = torch.full((size,), size).scatter_reduce(0, wanted[equal], bidders[equal], "amin")
            sold = (first < size).nonzero().squeeze(1)
            outbid = owner[sold]
            column[outbid[outbid >= 0]] = -1
            owner[sold], column[first[sold]] = first[sold], sold
            prices += highest
    return owner


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


def _pieces(table: Tensor, axis: int) -> tuple[Tensor, ...]:
    """A matrix in views of at most PIECE elements, cut along one axis."""
    return torch.split(table, max(1, PIECE // max(1, table.shape[1 - axis])), dim=axis)


def _check(name: str, permutation: Tensor, size: int) -> None:
    if not torch.equal(permutation.sort().values.cpu(), torch.arange(size)):
        raise InputError(f"{name}: its permutation is not one of {size} inputs; search for it on this matrix's scores")
