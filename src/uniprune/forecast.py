"""What a run would do, found out without reading a single weight."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch

from uniprune.matrices import Matrices
from uniprune.models import Origin
from uniprune.patterns import Pattern

# Bytes per prunable weight that a controller holds beside the model: duals and moments, masks, a working copy.
STATE = {"none": 0, "feedback": 9, "paper": 20}
# Floating-point operations per prunable weight and token: a forward pass takes 2, a backward pass 4.
WORK = {"none": 2, "feedback": 8, "paper": 6}


@dataclass(frozen=True)
class Group:
    """Matrices of one kind: the same place in every block, the same shape (out, in)."""

    name: str
    count: int
    shape: tuple[int, int]
    weights: int
    misfit: str | None


@dataclass(frozen=True)
class Plan:
    """Sizes are bytes, times seconds; the forecasts are estimates and say so in the table."""

    model: str
    parameters: int
    prunable: int
    groups: list[Group]
    matrices: dict[str, tuple[int, int]]
    pattern: str | None
    sparsity: float | None
    sparsity_of_model: float | None
    dtype: str
    tokens: int
    memory: int
    disk: int
    seconds: float

    @property
    def fits(self) -> bool:
        return all(group.misfit is None for group in self.groups)

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def make_plan(
    origin: Origin,
    model: torch.nn.Module,
    matrices: Matrices,
    pattern: Pattern | None,
    dtype: torch.dtype,
    tokens: int,
    device: torch.device,
    controller: str,
) -> Plan:
    """The plan of pruning ``matrices`` of ``model`` (which may be on the meta device) with ``tokens`` of calibration.

    controller: what corrects the local saliency.
    """
    groups: dict[tuple[str, tuple[int, int]], list[str]] = defaultdict(list)
    for name, matrix in matrices.items():
        groups[re.sub(r"\.\d+\.", ".*.", name), matrix.shape].append(name)
    rows = [
        Group(name, len(names), shape, len(names) * shape[0] * shape[1], pattern.misfit(*shape) if pattern else None)
        for (name, shape), names in groups.items()
    ]
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    prunable = sum(matrix.size for matrix in matrices.values())
    removed = pattern.sparsity * prunable if pattern else None
    largest = max(matrix.size for matrix in matrices.values())
    return Plan(
        model=str(origin),
        parameters=parameters,
        prunable=prunable,
        groups=rows,
        matrices={name: matrix.shape for name, matrix in matrices.items()},
        pattern=str(pattern) if pattern else None,
        sparsity=pattern.sparsity if pattern else None,
        sparsity_of_model=removed / parameters if removed is not None else None,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        # weights; one matrix of float32 scores and what cutting it needs; the activations of one batch;
        # the controller's state, masks and activations of all blocks
        memory=parameters * dtype.itemsize
        + 16 * largest
        + 2048 * 4 * 64 * max(m.shape[1] for m in matrices.values())
        + STATE[controller] * prunable
        + (controller != "none") * 1024 * dtype.itemsize * sum(sum(m.shape) for m in matrices.values()),
        disk=(sum(shard.stat().st_size for shard in origin.shards) or parameters * dtype.itemsize) + prunable // 8,
        seconds=WORK[controller] * prunable * tokens / _flops(dtype, device),
    )


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of this machine, from a matrix product that takes a blink."""
    size = 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 0.5 * 2 * size**3 / best  # attention, norms and scoring take about as long again as the products
