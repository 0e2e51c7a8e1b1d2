"""What a run would do, found out without reading a single weight."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch

from uniprune.artefacts.reports import ExpertCounts
from uniprune.checkpoints.origin import Origin
from uniprune.common.matrix_names import kind_of
from uniprune.job.forecast.memory import Bytes, Needs, Work
from uniprune.job.options import EXECUTIONS, Execution
from uniprune.models.loading import dtype_name
from uniprune.models.matrices import Matrices, left_dense
from uniprune.sparsity.patterns.nm import spell
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.patterns.ruled import Ruled
from uniprune.sparsity.structure import Structure, structure
from uniprune.storage.record import Count, Facts, Record, Shape

FORWARD = 2  # floating-point operations per weight and token of a pass forwards
# Bytes per second that are taken for granted: to measure them, plan would have to write.
DISK, BUS = 2e9, 2e10  # of an NVMe disk, of pinned memory to a GPU


class Forecast(Facts):
    """What one execution would take in each process: ``memory`` where it computes, of the ``host`` beside a GPU's, of the
    ``disk`` beside the output while the run lasts; bytes ``read`` from and ``written`` to the disk in all; ``seconds``."""

    memory: Count
    host: Count
    disk: Count
    read: Count
    written: Count
    seconds: float


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

    execution: the one that would be chosen, ``none`` if none fits; executions: what each would take; memory, scratch (of the
    disk beside the output, while the run lasts) and seconds: of the chosen one. disk: of the output. size: what the archive may
    take, if that was asked for; sparsity_for_size: what meets it.
    quantised: how the files store weights as codes, if they do; they are dequantised to ``dtype``.
    experts: what is kept of them, if some are to be removed whole; disk is then the smaller model's.
    left_dense: matrices in the blocks that are never pruned, and why. shared: those that several modules multiply by, and are
    pruned once, and how many modules. fits: whether every matrix can have the pattern, or the recipe says what it gets instead.
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
    executions: dict[str, Forecast]
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
    needed: Needs,
    execution: str,
    refused: bool,
) -> Plan:
    """The plan of a run on ``tokens`` of calibration text; unsupported: matrices that cannot have the pattern, and why.

    refused: whether the recipe does not say what those get instead.
    """
    matrices, prunable, parameters = work.matrices, work.prunable, work.parameters
    groups: dict[tuple[str, tuple[int, int], str | None], list[str]] = defaultdict(list)
    for name, matrix in matrices.items():
        gets = _gets(pattern, name) if pattern else None
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
    executions = _forecasts(work, needed, tokens)
    chosen = executions.get(execution, executions["resident"])
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
        memory=chosen.memory,
        executions=executions,
        disk=((origin.files.size if origin.files else 0) or parameters * work.dtype.itemsize) + prunable // 8,
        scratch=chosen.disk,
        seconds=chosen.seconds,
        left_dense={name: why for name, (_, why) in left_dense(work.model).items()},
        shared={name: len(matrix.modules) for name, matrix in matrices.items() if matrix.others or matrix.spans},
        fits=not (refused and unsupported),
    )


def _forecasts(work: Work, needed: Needs, tokens: int) -> dict[str, Forecast]:
    """What each execution would take on ``tokens`` of calibration text."""
    recipe = work.recipe
    step = recipe.step_tokens(work.length)
    steps = recipe.steps_within(work.length) or math.ceil(tokens / step)
    worked = steps * step if recipe.uses_controller else tokens  # tokens that go through the model
    rate = _flops(work.dtype, work.device)
    times = steps if recipe.uses_controller else 1
    return {
        execution: Forecast(
            memory=takes.memory,
            host=takes.host,
            disk=takes.disk,
            read=times * takes.read,
            written=times * takes.written,
            seconds=flop(work, execution) * worked / rate + times * seconds_moving(work, execution, takes),
        )
        for execution, takes in needed.items()
    }


def flop(work: Work, execution: Execution) -> float:
    """Floating-point operations per token of a calibration."""
    again = FORWARD if work.recipe.uses_controller and EXECUTIONS[execution].recompute else 0
    return (work.recipe.cost.flops_per_token + again) * work.active


def seconds_moving(work: Work, execution: Execution, takes: Bytes) -> float:
    """Seconds of a step in which bytes come and go: from and to the disk, and a GPU."""
    moved = takes.read + takes.written
    fetched = EXECUTIONS[execution].states == "host"
    onto = (work.read_bytes + work.recipe.cost.written_bytes) * work.prunable if fetched else moved
    return moved / DISK + (onto / BUS if work.device.type != "cpu" else 0)


def _gets(pattern: Pattern, name: str) -> str:
    """What a matrix gets, as people read it; of a budget that it shares within the range of a rule, that too."""
    rule = pattern.rule(name) if isinstance(pattern, Ruled) else None
    return spell(pattern.pattern_of(name)) + (f", {rule.what} here" if rule and rule.limits else "")


def _removed(pattern: Pattern, matrices: Matrices) -> float:
    """How many weights a pattern will remove: of a common budget its sparsity, of others what each matrix loses."""
    if pattern.local:
        return sum(pattern.pattern_of(name).removes(*matrix.shape) for name, matrix in matrices.items())
    return pattern.sparsity * sum(matrix.size for matrix in matrices.values())


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
