"""What a run would do, found out without reading a single weight."""

from __future__ import annotations

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from uniprune.artefacts.reports import ExpertCounts
from uniprune.checkpoints.origin import Origin
from uniprune.controller.passes import PART_TOKENS
from uniprune.job.recipe import Recipe
from uniprune.models.blocks import BATCH_TOKENS
from uniprune.models.experts import Slice
from uniprune.models.loading import dtype_name
from uniprune.models.matrices import Matrices, find_blocks, left_dense
from uniprune.saliency.statistics import Gram, Kind, SquaredNorm, beside
from uniprune.sparsity.constraints import spell
from uniprune.sparsity.patterns import Pattern
from uniprune.sparsity.structure import Structure, structure
from uniprune.storage.record import Count, Facts, Record, Shape

PROCESS = 350_000_000  # bytes: the interpreter and its libraries
SCORING = 20  # bytes per weight of the largest matrix while it is scored and cut, in float32
STEPPING = 32  # the same while its dual is moved
RAGGED = 1.1  # what the allocator loses


@dataclass(frozen=True)
class Needs:
    """Bytes of memory that a run needs with the whole model in memory, and block by block; and of disk for its state then.

    blocks: of the weights of all blocks. block: of the largest one.
    """

    resident: int
    streamed: int
    scratch: int
    blocks: int = 0
    block: int = 0

    def sharded(self, processes: int) -> int:
        """Bytes for each of N processes that hold the blocks together: its part, the block that runs, the one to come."""
        return self.streamed + int(RAGGED * (self.blocks / processes + 2 * self.block))


@dataclass(frozen=True)
class Work:
    """What is to be done, as far as memory and time depend on it.

    model: may be on the meta device. dtype: to compute in; stored: as the checkpoint has the weights, None of codes. length: of
    a window.
    """

    model: torch.nn.Module
    matrices: Matrices
    recipe: Recipe
    dtype: torch.dtype
    stored: torch.dtype | None
    length: int

    @property
    def prunable(self) -> int:
        """How many weights are prunable."""
        return sum(matrix.size for matrix in self.matrices.values())

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class Group(Facts):
    """Matrices of one kind: the same place in every block, the same shape (out, in), and what they get."""

    name: str
    count: Count
    shape: Shape
    weights: Count
    pattern: str | None
    unsupported: str | None


class Plan(Record):
    """What ``plan`` returns. Sizes are bytes, times seconds; the forecasts are estimates and say so in the table.

    memory: of the execution that would be chosen; ``memory_resident`` and ``memory_streamed``: of either. disk: of the output;
    scratch: beside it, while the run lasts. size: what the archive may take, if that was asked for; sparsity_for_size: what
    meets it.
    quantised: how the files store weights as codes, if they do; they are dequantised to ``dtype``.
    experts: what is kept of them, if some are to be removed whole; disk is then the smaller model's.
    left_dense: matrices in the blocks that are never pruned, and why. shared: those that several modules multiply by, and are
    pruned once, and how many modules. fits: whether every matrix can have the pattern.
    """

    kind: Literal["plan"] = "plan"
    model: str
    parameters: Count
    prunable: Count
    groups: list[Group]
    matrices: dict[str, Shape]
    pattern: str | None
    structure: Structure | None
    sparsity: float | None
    sparsity_of_model: float | None
    dtype: str
    quantised: str | None = None
    tokens: Count
    execution: str
    memory: Count
    memory_resident: Count
    memory_streamed: Count
    disk: Count
    scratch: Count
    seconds: float
    size: Count | None = None
    sparsity_for_size: float | None = None
    experts: ExpertCounts | None = None
    left_dense: dict[str, str] = {}
    shared: dict[str, Count] = {}
    fits: bool


def make_plan(
    origin: Origin,
    work: Work,
    pattern: Pattern | None,
    unsupported: Mapping[str, str],
    tokens: int,
    device: torch.device,
    needed: Needs,
    execution: str,
) -> Plan:
    """The plan of a run on ``tokens`` of calibration text; unsupported: matrices that cannot have the pattern, and why."""
    matrices, prunable, parameters = work.matrices, work.prunable, work.parameters
    groups: dict[tuple[str, tuple[int, int], str | None], list[str]] = defaultdict(list)
    for name, matrix in matrices.items():
        gets = spell(pattern.part(name)) if pattern else None
        groups[kind_of(name), matrix.shape, gets].append(name)
    rows = [
        Group(
            name=name,
            count=len(names),
            shape=shape,
            weights=len(names) * shape[0] * shape[1],
            pattern=gets,
            unsupported=unsupported.get(names[0]),
        )
        for (name, shape, gets), names in groups.items()
    ]
    removed = _removed(pattern, matrices) if pattern else None
    return Plan(
        model=str(origin),
        parameters=parameters,
        prunable=prunable,
        groups=rows,
        matrices={name: matrix.shape for name, matrix in matrices.items()},
        pattern=str(pattern) if pattern else None,
        structure=structure(pattern) if pattern else None,
        sparsity=removed / prunable if removed is not None else None,
        sparsity_of_model=removed / parameters if removed is not None else None,
        dtype=dtype_name(work.dtype),
        quantised=str(origin.quantised) if origin.quantised else None,
        tokens=tokens,
        execution=execution,
        memory=needed.streamed if execution == "streamed" else needed.resident,
        memory_resident=needed.resident,
        memory_streamed=needed.streamed,
        disk=((origin.files.size if origin.files else 0) or parameters * work.dtype.itemsize) + prunable // 8,
        scratch=needed.scratch if execution == "streamed" else 0,
        seconds=work.recipe.cost.flops * prunable * tokens / _flops(work.dtype, device),
        left_dense={name: why for name, (_, why) in left_dense(work.model).items()},
        shared={name: len(matrix.modules) for name, matrix in matrices.items() if matrix.others or matrix.spans},
        fits=all(row.unsupported is None for row in rows),
    )


def kind_of(name: str) -> str:
    """What the names of matrices at the same place of every block, and of every expert, have in common."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _removed(pattern: Pattern, matrices: Matrices) -> float:
    """How many weights a pattern will remove: of a common budget its sparsity, of others what each matrix loses."""
    if pattern.local:
        return sum(pattern.part(name).sparsity * matrix.size for name, matrix in matrices.items())
    return pattern.sparsity * sum(matrix.size for matrix in matrices.values())


def needs(work: Work) -> Needs:
    """What pruning would take, from the shapes alone.

    Streamed, the weights of blocks that are computed with in the type they are stored in are pages of the checkpoint, which the
    system keeps as long as there is room.
    """
    matrices, prunable, parameters = work.matrices, work.prunable, work.parameters
    recipe, item, cost = work.recipe, work.dtype.itemsize, work.recipe.cost
    step_tokens, corrected = recipe.step_tokens(work.length), recipe.corrected
    _, blocks = find_blocks(work.model)
    inside = sum(p.numel() for p in blocks.parameters())
    block = max(sum(p.numel() for p in one.parameters()) for one in blocks)
    largest = max(matrix.size for matrix in matrices.values())
    widths = sum(sum(matrix.shape) for matrix in matrices.values())  # activations that a backward pass keeps, per token
    in_block = 2 * _most_of_a_block(matrices, {name: sum(matrix.shape) for name, matrix in matrices.items()})
    width = max(matrix.shape[1] for matrix in matrices.values())
    passing = BATCH_TOKENS * 16 * width * item
    resident = parameters * item + SCORING * largest + passing + int(cost.memory * prunable)
    observed = _observed(work)
    resident += observed + corrected * (step_tokens * item * widths + STEPPING * largest)
    mapped = work.dtype == work.stored and not any(
        isinstance(m.module, Slice) for m in matrices.values()
    )  # those are put together
    stepping = PART_TOKENS * item * in_block + (item + 1) * block + STEPPING * largest
    streamed = (parameters - inside + (0 if mapped else block)) * item + max(SCORING * largest, passing, corrected * stepping)
    hidden = max(step_tokens, BATCH_TOKENS) * item * width * (len(blocks) + 4)
    scratch = int(cost.disk * prunable) + corrected * hidden
    whole, by_block = PROCESS + int(RAGGED * resident), PROCESS + int(RAGGED * (streamed + observed))
    return Needs(whole, by_block, scratch, inside * item, block * item)


def _observed(work: Work) -> int:
    """Bytes of the statistics of inputs: of a block's matrices where it is pruned before the next one is run, else of all."""
    recipe, wanted = work.recipe, work.recipe.parsed_metric().statistic
    kinds: tuple[Kind | None, ...] = (wanted,)
    if recipe.refine:
        kinds = Gram, beside(Gram, wanted)
    elif recipe.corrected:
        kinds = SquaredNorm, beside(SquaredNorm, wanted)
    total = 0
    for kind in filter(None, kinds):
        sizes = {name: kind.nbytes(matrix.shape[1]) for name, matrix in work.matrices.items()}
        held = _most_of_a_block(work.matrices, sizes) if recipe.sequential else sum(sizes.values())
        total += held + max(sizes.values())  # one more while it is added
    return total


def _most_of_a_block(matrices: Matrices, sizes: Mapping[str, int]) -> int:
    """The most that the matrices of one block have together."""
    totals: Counter[int] = Counter()
    for name, size in sizes.items():
        totals[matrices[name].block] += size
    return max(totals.values())


def free_memory(device: torch.device) -> int:
    """Bytes that a process may take on a device. ``torchrun``'s processes share the memory of their machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of this machine, from a matrix product that takes a blink."""
    size = 8192 if device.type == "cuda" else 1024  # a small one would measure how fast a GPU is called
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 0.5 * 2 * size**3 / best  # attention, norms and scoring take about as long again as the products
