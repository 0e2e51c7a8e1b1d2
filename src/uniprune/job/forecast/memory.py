"""The bytes that each execution of a run needs, forecast from shapes alone, before a weight is read.

| execution  | weights                   | activations of a step           | what the controller keeps of each weight |
| ---------- | ------------------------- | ------------------------------- | ---------------------------------------- |
| resident   | in memory                 | kept                            | in memory                                |
| recomputed | in memory                 | of a block, computed again      | in memory                                |
| offloaded  | in memory                 | of a block, computed again      | in host memory, beside a GPU's           |
| sharded    | in all processes' memory  | of a block, computed again      | on disk                                  |
| streamed   | read block by block       | of a block, computed again      | on disk                                  |

They are listed from the fastest to the slowest. All give the same masks up to float32 rounding: resident and recomputed bit for
bit on a CPU, while streamed blocks, and several processes, sum in another order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from uniprune.common import distributed
from uniprune.controller.descent.loop import START_TOKENS
from uniprune.controller.passes.streamed import PART_TOKENS
from uniprune.job.options import EXECUTIONS, Execution
from uniprune.job.recipe import Recipe
from uniprune.job.settings import WINDOWS
from uniprune.models import activations
from uniprune.models.blocks import BATCH_TOKENS
from uniprune.models.experts import Batched, Slice
from uniprune.models.matrices import Matrices, Matrix, find_blocks
from uniprune.models.output_head import at_once, output_embeddings
from uniprune.models.residency.streaming import share_keys_and_values, shared_parameter
from uniprune.saliency.sequential import SHARE
from uniprune.saliency.statistics import Gram, Kind, SquaredNorm, additional

CPU = torch.device("cpu")
PROCESS = 420_000_000  # bytes: the interpreter and its libraries
LOGIT = 5 * 4  # bytes per logit of a piece of a window: the float32 tensors that a loss makes of both models' logits
START_LOGIT = 3 * 4  # the same of the start, whose loss is the text's, over the whole vocabulary
SCORING = 20  # bytes per weight of the largest matrix while it is scored and its mask created, in float32
STEPPING = 24  # bytes per weight of the largest matrix while a step moves its dual
SQUARE = 8  # bytes per channel of an input whose squares are summed, in float64
NORMS = 6  # bytes per token and hidden channel that autograd keeps of a block's norms (float32), beside what matrices need
RECOMPUTED = 3  # a block's activations when they are computed again, and what a pass backwards makes of them / what is kept
AT_WORK = 1.25  # memory that a step has taken when its activations are largest / what autograd keeps of them by then
ROUTED = 1.2  # more with routed experts: their tensors have other sizes in every step, which freed memory seldom fits
FRAGMENTATION = 1.2  # memory taken from the system / memory asked of the allocator, for tensors that come and go
LARGE_STEP = 16_384  # tokens of a step that computes about as long as its states take to be read and written


@dataclass(frozen=True)
class Bytes:
    """The bytes that an execution takes in each process.

    memory: on the device that computes. host: of host memory, where that is a GPU. disk: of temporary files beside the output.
    read, written: disk traffic of one step of the controller, or of the whole calibration if there is none. parts: of
    ``memory``: weights, statistics, states, masks, preserved, working.
    """

    memory: int
    host: int = 0
    disk: int = 0
    read: int = 0
    written: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, int], **others: int) -> Bytes:
        """Of the parts in bytes. Only ``working`` fragments the allocator's memory: the others stay where they are."""
        working = int(FRAGMENTATION * parts["working"])
        return cls(PROCESS + sum(parts.values()) - parts["working"] + working, **others, parts=parts)


Needs = dict[Execution, Bytes]
"""What each possible execution takes, the fastest first."""


@dataclass(frozen=True)
class Work:
    """What memory and time depend on.

    model: may be on the meta device. dtype: computed in; stored: the checkpoint's, None if it stores codes (quantised). length:
    tokens of a window. device: that computes. windows: how many there are. compared: whether masks are
    measured, one after the other, instead of written.
    """

    model: torch.nn.Module
    matrices: Matrices
    recipe: Recipe
    dtype: torch.dtype
    stored: torch.dtype | None
    length: int
    device: torch.device = CPU
    windows: int = WINDOWS
    compared: bool = False

    @property
    def prunable(self) -> int:
        """How many weights are prunable."""
        return sum(matrix.size for matrix in self.matrices.values())

    @property
    def read_bytes(self) -> float:
        """What a step reads per prunable weight, of states that lie on disk, or in host memory where a GPU computes."""
        cost = self.recipe.cost
        shared = self.recipe.sparsity is None or not self.recipe.pattern().local
        return cost.read_bytes + cost.shared_budget_read_bytes * shared

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def shares(self) -> dict[str, float]:
        """The fraction of the tokens that each matrix multiplies: of experts the mean that the config's ``num_experts_per_tok``
        implies, or 1 if it does not say; of all other matrices 1."""
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        chosen = getattr(config, "num_experts_per_tok", None)
        experts = Counter(matrix.group for matrix in self.matrices.values())
        return {
            name: min(1.0, chosen / experts[matrix.group]) if isinstance(chosen, int) and _routed(matrix) else 1.0
            for name, matrix in self.matrices.items()
        }

    @cached_property
    def activations(self) -> activations.Activations | None:
        return activations.count(self.model, self.matrices, self.dtype, self.length)

    @property
    def active(self) -> float:
        """How many of the prunable weights a token is multiplied by, on average (active parameters)."""
        return sum(self.shares[name] * matrix.size for name, matrix in self.matrices.items())


def _routed(matrix: Matrix) -> bool:
    """Whether a matrix is of an expert that gets only the tokens routed to it; Llama 4's get tensors as long as all tokens."""
    return matrix.group is not None and not isinstance(getattr(matrix.module, "fused", None), Batched)


def needs(work: Work) -> Needs:
    """What each execution of this work takes that the model admits."""
    _, blocks = find_blocks(work.model)
    looped = work.activations is not None and len(work.activations.kept) != len(blocks)
    whole, once = looped or shared_parameter(blocks), share_keys_and_values(blocks)
    refused = {name for name, traits in EXECUTIONS.items() if (whole and not traits.in_memory) or (once and traits.recompute)}
    parts = _Parts(work)
    forecasts = {execution: forecast for execution, forecast in _needs(parts).items() if execution not in refused}
    if work.compared:
        forecasts |= {name: _or_measured(parts, name, forecasts[name]) for name in forecasts if EXECUTIONS[name].in_memory}
    return forecasts


def _or_measured(parts: _Parts, execution: Execution, calibrated: Bytes) -> Bytes:
    """What a calibration takes or, if that is more, a row of a table while it is measured.

    That is all masks, a byte each, the weights as they were, and the duals that other rows are cut from.
    """
    work = parts.work
    duals = 4 * work.prunable if work.recipe.uses_controller and EXECUTIONS[execution].states != "host" else 0
    held = {"weights": parts.weights, "statistics": parts.observed, "states": duals, "working": parts.working}
    measured = Bytes.of(held | {"preserved": (1 + parts.item) * work.prunable})
    return max(calibrated, replace(calibrated, memory=measured.memory, parts=measured.parts), key=lambda needed: needed.memory)


def _needs(parts: _Parts) -> Needs:
    work, cost, processes = parts.work, parts.work.recipe.cost, distributed.count()
    steps = work.recipe.uses_controller
    states = int(cost.state_bytes * work.prunable / processes)
    saved = int((cost.disk_bytes + cost.best_bytes) * work.prunable / processes) + parts.finals
    saved += parts.hidden if work.recipe.sequential else 0
    masks = int(cost.mask_bytes * work.prunable)
    packed = parts.bits + int(cost.mask_bytes * parts.block)
    held = {"weights": parts.weights, "statistics": parts.observed, "states": states, "preserved": parts.preserved}
    held["masks"] = masks if processes == 1 else packed
    forecasts: Needs = {
        "resident": Bytes.of(held | {"working": max(parts.working, parts.resident_step if steps else 0)}, disk=saved)
    }
    if steps and masks:
        held |= {"masks": packed, "working": max(parts.working, parts.recomputed_step)}
        forecasts["recomputed"] = Bytes.of(held, disk=saved)
        if work.device.type != "cpu":
            here = held | {"states": 0, "working": held["working"] + parts.fetched}
            host = int(cost.state_bytes) * sum(_pinned(matrix.size) for matrix in work.matrices.values()) // processes
            forecasts["offloaded"] = Bytes.of(here, host=host, disk=saved)
    streamed = _streamed(parts)
    if processes > 1:
        share = {"weights": streamed.parts["weights"] + int(parts.item * (parts.inside / processes + 2 * parts.block))}
        moved = {"disk": streamed.disk, "read": streamed.read - 2 * parts.on_disk, "written": streamed.written}
        forecasts["sharded"] = Bytes.of(streamed.parts | share, **moved)  # type: ignore[operator]
    forecasts["streamed"] = streamed
    return forecasts


def _streamed(parts: _Parts) -> Bytes:
    """What the streamed execution takes. Blocks that are memory-mapped are not counted: the system may drop their pages."""
    work, cost, processes = parts.work, parts.work.recipe.cost, distributed.count()
    weights = (work.parameters - parts.inside + (0 if parts.mapped else parts.block)) * parts.item
    held = {"weights": weights, "statistics": parts.observed, "preserved": parts.preserved}
    if not work.recipe.uses_controller:
        return Bytes.of(held | {"working": parts.working}, disk=parts.hidden, read=2 * parts.on_disk)
    per_weight = cost.disk_bytes, work.read_bytes, cost.written_bytes
    states, read, written = (int(size * work.prunable / processes) for size in per_weight)
    return Bytes.of(
        held | {"masks": int(cost.mask_bytes * parts.block), "working": max(parts.working, parts.streamed_step)},
        disk=states + parts.bits + parts.hidden + parts.finals,
        read=2 * parts.on_disk + read,
        written=written,
    )


class Kept(NamedTuple):
    """Bytes kept of a token: all blocks' activations, the largest block's, all blocks' inputs, and one's."""

    whole: float
    largest: float
    inputs: float
    state: float


class _Parts:
    """The quantities that forecasts are sums of: bytes, unless they say otherwise."""

    def __init__(self, work: Work) -> None:
        self.work, self.item = work, work.dtype.itemsize
        _, blocks = find_blocks(work.model)
        self.blocks = len(blocks)
        self.inside = sum(p.numel() for p in blocks.parameters())  # number of weights in all blocks
        self.block = max(sum(p.numel() for p in block.parameters()) for block in blocks)  # of the largest block
        self.tokens = max(work.length, work.recipe.step_tokens(work.length) // distributed.count())  # of a step, in a process
        self.largest = max(matrix.size for matrix in work.matrices.values())  # number of weights of the largest matrix
        self.width = max(matrix.shape[1] for matrix in work.matrices.values())  # channels of the widest input
        config = work.model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.hidden_size = getattr(config, "hidden_size", None) or self.width

    @property
    def weights(self) -> int:
        return self.work.parameters * self.item

    @property
    def on_disk(self) -> int:
        """The weights of all blocks in the checkpoint's files."""
        return self.inside * (self.work.stored.itemsize if self.work.stored else 1)

    @property
    def mapped(self) -> bool:
        """Whether blocks' weights are memory-mapped: on a CPU, in the stored type, and not assembled from single experts."""
        work = self.work
        assembled = any(isinstance(matrix.module, Slice) for matrix in work.matrices.values())
        return work.device.type == "cpu" and work.dtype == work.stored and not assembled

    @property
    def bits(self) -> int:
        """Packed masks: all of this step's, and the share of the next step's that this process creates meanwhile."""
        packed = int(self.work.recipe.cost.mask_bytes * self.work.prunable) // 8
        return packed + packed // distributed.count()

    @property
    def working(self) -> int:
        """The larger of: one matrix while it is scored and its mask created; a batch in a block, without gradients."""
        return max(SCORING * self.largest, int(max(BATCH_TOKENS, self.work.length) * self.passing))

    @property
    def passing(self) -> float:
        """Of a token that passes through a block without gradients: what the block makes of it, with the states around it, and
        the squares of its widest input, which seldom fit where memory was freed."""
        if counted := self.work.activations:
            return (counted.passing + 3 * counted.state) / self.work.length + SQUARE * self.width
        return 16 * self.item * self.width

    @cached_property
    def widths(self) -> dict[str, int]:
        """Inputs and outputs of each matrix, in channels; of an expert's matrix times the fraction of tokens that it gets."""
        return {name: math.ceil(self.work.shares[name] * sum(matrix.shape)) for name, matrix in self.work.matrices.items()}

    @cached_property
    def kept(self) -> Kept:
        """As counted; or, of a model that cannot be, matrices' inputs and outputs, one more of the widest, and the norms."""
        if counted := self.work.activations:
            routed = any(_routed(matrix) for matrix in self.work.matrices.values())
            taken, state = AT_WORK * (ROUTED if routed else 1) / self.work.length, counted.state / self.work.length
            return Kept(taken * sum(counted.kept), taken * max(counted.kept), len(counted.kept) * state, state)
        norms = self.item * self.width + NORMS * self.hidden_size
        whole = self.item * sum(self.widths.values()) + self.blocks * norms
        largest = self.item * _most_of_a_block(self.work.matrices, self.widths) + norms
        return Kept(whole, largest, self.blocks * self.item * self.hidden_size, self.item * self.hidden_size)

    @property
    def gradients(self) -> int:
        """Gradients of one block's matrices, in the type computed in."""
        sizes = {name: matrix.size for name, matrix in self.work.matrices.items()}
        return self.item * _most_of_a_block(self.work.matrices, sizes)

    @property
    def preserved(self) -> int:
        """Masks, a byte each, and weights as they were, of the block that is pruned before the next one is run."""
        sizes = {name: matrix.size for name, matrix in self.work.matrices.items()}
        return (1 + self.item) * _most_of_a_block(self.work.matrices, sizes) if self.work.recipe.sequential else 0

    @property
    def update(self) -> int:
        """The largest matrix while a step updates its state."""
        return STEPPING * self.largest

    @property
    def fetched(self) -> int:
        """The state of the largest matrix: where states lie on disk or in host memory, one at a time is fetched."""
        return int(self.work.recipe.cost.state_bytes) * self.largest

    @property
    def logits(self) -> int:
        """Logits of one piece of a window: of the whole vocabulary at the start, of what the loss looks at in a step."""
        whole: int = output_embeddings(self.work.model).weight.shape[0]
        some = self.work.recipe.logits(whole)
        start = START_LOGIT * at_once(whole) * whole if self.work.recipe.uses_controller else 0
        return max(start, LOGIT * at_once(some) * some)

    @property
    def resident_step(self) -> int:
        """The peak of a step that keeps the activations of all blocks: at its loss, or when the last block's states are updated
        (its own activations are freed by then)."""
        beyond = max(self.logits, self.gradients + self.update - int(self.tokens * self.kept.largest))
        return int(self.tokens * self.kept.whole) + beyond

    @property
    def recomputed_step(self) -> int:
        """The peak of a step that keeps the inputs of all blocks, and the activations and gradients of one block at a time."""
        in_block = int(RECOMPUTED * self.tokens * self.kept.largest)
        inputs = int(self.tokens * self.kept.inputs)
        return inputs + max(in_block + self.gradients, self.gradients + self.update, self.logits)

    @property
    def streamed_step(self) -> int:
        """The peak of a streamed step: a part of its tokens in a block, or the update of one matrix, with the block's gradients
        (float32 where they are sums over several parts); or logits. On top of that four times the final hidden states: of both
        models, their gradient, and that gradient in parts."""
        part = max(PART_TOKENS, self.work.length)
        gradients = self.gradients * (4 // self.item if self.tokens > part else 1)
        final = max(4 * self.tokens, 3 * self.entered) * self.hidden_size * self.item
        in_block = max(int(2 * part * self.kept.largest), self.update + self.fetched)
        return max(in_block + gradients, self.logits) + final

    @property
    def hidden(self) -> int:
        """On disk: the hidden states between two blocks; where the controller runs, the inputs of all blocks in a step."""
        if not self.work.recipe.uses_controller:
            firsts = 1 / SHARE if self.work.recipe.refine else 0  # tokens that are read as the first of a text as well
            return int(2 * (1 + firsts) * self.text * self.kept.state)
        return int(self.entered * self.kept.state * (self.blocks + 3))  # of both models, and their gradient

    @property
    def entered(self) -> int:
        """The most tokens that go through streamed blocks at once: of a step, or of the start of a descent."""
        start = START_TOKENS // distributed.count() if self.work.recipe.cost.mask_bytes else 0
        return min(self.text, max(self.tokens, start))

    @property
    def finals(self) -> int:
        """On disk: the dense model's final hidden states, if the controller comes to the same windows more than once."""
        recipe, length = self.work.recipe, self.work.length
        again = (recipe.steps_within(length) or 0) * recipe.step_tokens(length) > self.work.windows * length
        return self.text * self.item * self.hidden_size if recipe.uses_controller and again else 0

    @property
    def text(self) -> int:
        """Tokens of the calibration text that a process reads."""
        return -(-self.work.windows // distributed.count()) * self.work.length

    @cached_property
    def observed(self) -> int:
        """The statistics of inputs: of all matrices; of one block's where each block is pruned before the next one is run."""
        recipe, wanted = self.work.recipe, self.work.recipe.parsed_metric().statistic
        kinds: tuple[Kind | None, ...] = (wanted,)
        if recipe.refine:
            kinds = Gram, wanted
        elif recipe.uses_controller:
            kinds = SquaredNorm, additional(SquaredNorm, wanted)
        total = 0
        for kind in filter(None, kinds):
            sizes = {name: kind.nbytes(matrix.shape[1]) for name, matrix in self.work.matrices.items()}
            held = _most_of_a_block(self.work.matrices, sizes) if recipe.sequential else sum(sizes.values())
            total += held + max(sizes.values())  # one more while it is added
        return total


def _pinned(size: int) -> int:
    """The elements that PyTorch allocates for a pinned tensor of this many: the next power of two."""
    return 1 << (size - 1).bit_length()


def _most_of_a_block(matrices: Matrices, sizes: Mapping[str, int]) -> int:
    """The largest sum of sizes over the matrices of one block."""
    totals: Counter[int] = Counter()
    for name, size in sizes.items():
        totals[matrices[name].block] += size
    return max(totals.values())
