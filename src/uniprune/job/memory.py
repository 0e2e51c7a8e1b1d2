"""Bytes that a run needs, by the way that it is executed: found from the shapes alone, before a weight is read.

| execution  | weights                   | activations of a step           | what the controller keeps of each weight |
| ---------- | ------------------------- | ------------------------------- | ---------------------------------------- |
| resident   | in memory                 | kept                            | in memory                                |
| recomputed | in memory                 | of a block, computed again      | in memory                                |
| offloaded  | in memory                 | of a block, computed again      | in host memory, beside a GPU's           |
| sharded    | in all processes' memory  | of a block, computed again      | on disk                                  |
| streamed   | read block by block       | of a block, computed again      | on disk                                  |

All give the same masks. They are listed from the fastest to the slowest.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from uniprune.common import distributed
from uniprune.controller.passes import PART_TOKENS
from uniprune.job.options import Execution
from uniprune.job.recipe import WINDOWS, Recipe
from uniprune.models.blocks import BATCH_TOKENS
from uniprune.models.experts import Batched, Slice
from uniprune.models.matrices import Matrices, Matrix, find_blocks
from uniprune.models.output_head import PIECE, output_embeddings
from uniprune.saliency.statistics import Gram, Kind, SquaredNorm, beside

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
PROCESS = 350_000_000  # bytes: the interpreter and its libraries
LOGIT = 5 * 4  # bytes per logit of a piece of a window, of both models, with what becomes of them
SCORING = 20  # bytes per weight of the largest matrix while it is scored and cut, in float32
STEPPING = 24  # the same while its dual is moved
NORMS = 6  # bytes that a block keeps for each token and channel between the blocks, beyond its matrices': norms are in float32
RAGGED = 1.1  # what the allocator loses
LARGE_STEP = 16_384  # tokens in which a step computes about as long as its states take from the disk and back
TRAFFIC = 10_000_000_000  # bytes a step that are worth a warning
GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # Linux's: the control groups of this process, of all
LIMITS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}  # version 2, 1


@dataclass(frozen=True)
class Bytes:
    """What an execution takes, in each process.

    memory: where it computes. host: beside a GPU's memory. disk: beside the output, while the run lasts. read, written: from
    and to the disk in a step of the controller, or in all if there is none. parts: of the memory, by what they are for.
    """

    memory: int
    host: int = 0
    disk: int = 0
    read: int = 0
    written: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, int], **others: int) -> Bytes:
        """What lasts lies there in a piece; of what comes and goes the allocator loses some."""
        working = int(RAGGED * parts["working"])
        return cls(PROCESS + sum(parts.values()) - parts["working"] + working, **others, parts=parts)


Needs = dict[Execution, Bytes]
"""The ways that a run can be executed, the fastest first."""


@dataclass(frozen=True)
class Work:
    """What is to be done, as far as memory and time depend on it.

    model: may be on the meta device. dtype: to compute in; stored: as the checkpoint has the weights, None of codes. length: of
    a window. device: where.
    """

    model: torch.nn.Module
    matrices: Matrices
    recipe: Recipe
    dtype: torch.dtype
    stored: torch.dtype | None
    length: int
    device: torch.device = CPU

    @property
    def prunable(self) -> int:
        """How many weights are prunable."""
        return sum(matrix.size for matrix in self.matrices.values())

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def shares(self) -> dict[str, float]:
        """Of the tokens, how many go through each matrix: an expert is given those that its router sends there, where the
        configuration says ``num_experts_per_tok``; elsewhere all."""
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        chosen = getattr(config, "num_experts_per_tok", None)
        fellows = Counter(matrix.group for matrix in self.matrices.values())
        return {
            name: min(1.0, chosen / fellows[matrix.group]) if isinstance(chosen, int) and _routed(matrix) else 1.0
            for name, matrix in self.matrices.items()
        }

    @property
    def met(self) -> float:
        """How many of the prunable weights a token is multiplied by."""
        return sum(self.shares[name] * matrix.size for name, matrix in self.matrices.items())


def _routed(matrix: Matrix) -> bool:
    """Whether a matrix is an expert's that is given some tokens alone; Llama 4's have room for all."""
    return matrix.group is not None and not isinstance(getattr(matrix.module, "fused", None), Batched)


def needs(work: Work) -> Needs:
    """What pruning would take."""
    parts, corrected, cost, processes = _Parts(work), work.recipe.corrected, work.recipe.cost, distributed.count()
    states, saved = int(cost.memory * work.prunable / processes), int(cost.disk * work.prunable / processes) + parts.finals
    masks, packed = int(cost.masks * work.prunable), parts.bits + int(cost.masks * parts.block)
    held = {"weights": parts.weights, "statistics": parts.observed, "states": states}
    held["masks"] = masks if processes == 1 else packed
    found: Needs = {"resident": Bytes.of(held | {"working": max(parts.working, parts.kept if corrected else 0)}, disk=saved)}
    if corrected and masks:
        held |= {"masks": packed, "working": max(parts.working, parts.again)}
        found["recomputed"] = Bytes.of(held, disk=saved)
        if work.device.type != "cpu":
            here = held | {"states": 0, "working": held["working"] + parts.visiting}
            host = int(cost.memory) * sum(_pinned(matrix.size) for matrix in work.matrices.values()) // processes
            found["offloaded"] = Bytes.of(here, host=host, disk=saved)
    streamed = _streamed(parts)
    if processes > 1:
        share = {"weights": streamed.parts["weights"] + int(parts.item * (parts.inside / processes + 2 * parts.block))}
        moved = {"disk": streamed.disk, "read": streamed.read - 2 * parts.on_disk, "written": streamed.written}
        found["sharded"] = Bytes.of(streamed.parts | share, **moved)  # type: ignore[operator]
    found["streamed"] = streamed
    return found


def _streamed(parts: _Parts) -> Bytes:
    """Weights of blocks that are computed with on a CPU in the type that they are stored in are pages of the checkpoint, which
    the system keeps as long as there is room."""
    work, cost, processes = parts.work, parts.work.recipe.cost, distributed.count()
    weights = (work.parameters - parts.inside + (0 if parts.mapped else parts.block)) * parts.item
    held = {"weights": weights, "statistics": parts.observed}
    if not work.recipe.corrected:
        return Bytes.of(held | {"working": parts.working}, disk=parts.hidden, read=2 * parts.on_disk)
    states, read, written = (int(size * work.prunable / processes) for size in (cost.disk, work.recipe.read, cost.written))
    return Bytes.of(
        held | {"masks": int(cost.masks * parts.block), "working": max(parts.working, parts.stepping)},
        disk=states + parts.bits + parts.hidden + parts.finals,
        read=2 * parts.on_disk + read,
        written=written,
    )


class _Parts:
    """The parts that the forecasts are made of: bytes, unless they say otherwise."""

    def __init__(self, work: Work) -> None:
        self.work, self.item = work, work.dtype.itemsize
        _, blocks = find_blocks(work.model)
        self.blocks = len(blocks)
        self.inside = sum(p.numel() for p in blocks.parameters())  # weights
        self.block = max(sum(p.numel() for p in one.parameters()) for one in blocks)  # weights of the largest
        self.tokens = max(work.length, work.recipe.step_tokens(work.length) // distributed.count())
        self.largest = max(matrix.size for matrix in work.matrices.values())  # weights
        self.width = max(matrix.shape[1] for matrix in work.matrices.values())  # of the widest input
        config = work.model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.flow = getattr(config, "hidden_size", None) or self.width  # of what goes from block to block

    @property
    def weights(self) -> int:
        return self.work.parameters * self.item

    @property
    def on_disk(self) -> int:
        """The weights of all blocks in the checkpoint's files."""
        return self.inside * (self.work.stored.itemsize if self.work.stored else 1)

    @property
    def mapped(self) -> bool:
        """Whether weights of blocks are pages of the checkpoint's files."""
        work = self.work
        together = any(isinstance(matrix.module, Slice) for matrix in work.matrices.values())  # those are put together
        return work.device.type == "cpu" and work.dtype == work.stored and not together

    @property
    def bits(self) -> int:
        """Masks of a step, and of those of the next one what a process creates meanwhile."""
        packed = int(self.work.recipe.cost.masks * self.work.prunable) // 8
        return packed + packed // distributed.count()

    @property
    def working(self) -> int:
        """One matrix while it is scored and cut, or a batch on its way through a block without gradients."""
        passing = max(BATCH_TOKENS, self.work.length) * 16 * self.width * self.item
        return max(SCORING * self.largest, passing)

    @cached_property
    def widths(self) -> dict[str, int]:
        """What a token has on both sides of each matrix, in numbers; on both sides of an expert's on average."""
        return {name: math.ceil(self.work.shares[name] * sum(matrix.shape)) for name, matrix in self.work.matrices.items()}

    @cached_property
    def per_token(self) -> int:
        """What a block keeps of a token: what its matrices are given, what they put out, what comes of the widest, norms."""
        return self.item * (_most_of_a_block(self.work.matrices, self.widths) + self.width) + NORMS * self.flow

    @property
    def gradients(self) -> int:
        """Those of one block's matrices, summed in float32 where a step goes through it in parts, and one matrix's step."""
        sizes = {name: matrix.size for name, matrix in self.work.matrices.items()}
        return self.item * _most_of_a_block(self.work.matrices, sizes)

    @property
    def moving(self) -> int:
        """The largest matrix while its state is moved."""
        return STEPPING * self.largest

    @property
    def visiting(self) -> int:
        """The state of the largest matrix, where states lie elsewhere and come one at a time."""
        return int(self.work.recipe.cost.memory) * self.largest

    @property
    def logits(self) -> int:
        """Those of a piece of a window in a step, of the commonest tokens; all tokens' in the start's."""
        return LOGIT * PIECE * _vocabulary(self.work)

    @property
    def kept(self) -> int:
        """The most that a step holds with the activations of all blocks kept: at its loss, or when the last block moves."""
        widths = sum(self.widths.values())
        activations = self.tokens * (self.item * (widths + self.blocks * self.width) + NORMS * self.blocks * self.flow)
        return activations + max(self.logits, self.gradients + self.moving - self.tokens * self.per_token)

    @property
    def again(self) -> int:
        """The same with the inputs of all blocks kept, and the activations of one and their gradients."""
        inputs = self.tokens * self.item * self.blocks * self.flow
        return inputs + max(2 * self.tokens * self.per_token + self.gradients, self.gradients + self.moving, self.logits)

    @property
    def stepping(self) -> int:
        """The most that a step holds block by block from disk: a part of its tokens in a block, the block's masks and
        gradients, one matrix on the move; and the final hidden states of both models, their gradient, and it in pieces."""
        part = max(PART_TOKENS, self.work.length)
        gradients = self.gradients * (4 // self.item if self.tokens > part else 1)
        final = 4 * self.tokens * self.flow * self.item
        in_block = max(2 * part * self.per_token, self.moving + self.visiting)
        return max(in_block + gradients, self.logits) + final

    @property
    def hidden(self) -> int:
        """Of the disk: hidden states between the blocks, of a step those that go into each block."""
        if not self.work.recipe.corrected:
            return 2 * self.text * self.item * self.flow
        return max(self.tokens, BATCH_TOKENS) * self.item * self.width * (self.blocks + 4)

    @property
    def finals(self) -> int:
        """Of the disk: the dense model's final hidden states, of windows that a controller sees again."""
        recipe, length = self.work.recipe, self.work.length
        again = (recipe.steps_within(length) or 0) * recipe.step_tokens(length) > self.text
        return self.text * self.item * self.flow if recipe.corrected and again else 0

    @property
    def text(self) -> int:
        """Tokens of the calibration text."""
        return (self.work.recipe.windows or WINDOWS) * self.work.length

    @cached_property
    def observed(self) -> int:
        """The statistics of inputs: of a block's matrices where it is pruned before the next one is run, else of all."""
        recipe, wanted = self.work.recipe, self.work.recipe.parsed_metric().statistic
        kinds: tuple[Kind | None, ...] = (wanted,)
        if recipe.refine:
            kinds = Gram, beside(Gram, wanted)
        elif recipe.corrected:
            kinds = SquaredNorm, beside(SquaredNorm, wanted)
        total = 0
        for kind in filter(None, kinds):
            sizes = {name: kind.nbytes(matrix.shape[1]) for name, matrix in self.work.matrices.items()}
            held = _most_of_a_block(self.work.matrices, sizes) if recipe.sequential else sum(sizes.values())
            total += held + max(sizes.values())  # one more while it is added
        return total


def _pinned(size: int) -> int:
    """Of the host, per byte of a weight: PyTorch takes a power of two for each pinned tensor."""
    return 1 << (size - 1).bit_length()


def _vocabulary(work: Work) -> int:
    """Of the logits that a step computes."""
    size: int = output_embeddings(work.model).weight.shape[0]
    settings = work.recipe.parsed_controller()
    return size if getattr(settings, "labels", 0) else min(size, getattr(settings, "vocabulary", size))


def _most_of_a_block(matrices: Matrices, sizes: Mapping[str, int]) -> int:
    """The most that the matrices of one block have together."""
    totals: Counter[int] = Counter()
    for name, size in sizes.items():
        totals[matrices[name].block] += size
    return max(totals.values())


def warn_of_traffic(work: Work, execution: str, needed: Bytes) -> None:
    """Says so if states will come from the disk and go there more often than they need to."""
    moved = needed.read + needed.written
    small = work.recipe.step_tokens(work.length) < LARGE_STEP
    if execution in ("sharded", "streamed") and work.recipe.corrected and small and moved > TRAFFIC:
        logger.warning(
            "each step of the controller reads %.0f GB from the disk and writes %.0f GB, however many tokens it has; larger "
            "steps are fewer: --set batch_tokens=%d",
            needed.read / 1e9,
            needed.written / 1e9,
            LARGE_STEP,
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a process may take on a device. ``torchrun``'s processes share the memory of their machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]

    free = min(int(psutil.virtual_memory().available), left_by_groups())
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def left_by_groups() -> float:
    """Bytes that this process's control groups leave it: a container, or the job of a batch system, may have less than the
    machine, and whoever takes more is killed. Infinity where there is no limit."""
    try:
        groups = [line.split(":", 2) for line in GROUPS.read_text().splitlines()]
    except OSError:  # no Linux
        return math.inf
    left = math.inf
    for _, kinds, path in groups:
        kind = "memory" if "memory" in kinds.split(",") else kinds
        if kind in LIMITS:
            root = MOUNTED / kind
            place = root / path.lstrip("/")  # inside a container it may not be there, but the root is then the container's
            inside = [folder for folder in (place, *place.parents) if folder.is_relative_to(root)]
            left = min(left, *(_left(folder, *LIMITS[kind]) for folder in inside))
    return left


def _left(group: Path, limit: str, taken: str) -> float:
    """Of one control group; what it holds of files is dropped where there is need of room."""
    try:
        most, held = (group / limit).read_text().strip(), int((group / taken).read_text())
    except (OSError, ValueError):
        return math.inf
    return math.inf if most == "max" else max(0, int(most) - held + _files(group / "memory.stat"))


def _files(stat: Path) -> int:
    try:
        facts = dict(line.split() for line in stat.read_text().splitlines())
        return sum(int(facts.get(f"total_{name}", facts.get(name, 0))) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 0
