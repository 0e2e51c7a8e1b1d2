"""Times matrix products on this machine, dense against sparse, for matrices of given shapes.

Random weights do, so no model is read. To be fair:

- Both sides have the same masked weights and tokens, and must give the same. They take turns, shape by shape. Every round
  gives one ratio for the whole model, each side being the sum over shapes of count * time. The median round counts, with the
  quartiles as its range, so that a machine that drifts or is busy does not decide.
- Rounds go through copies of each matrix, as many as the model has or no cache can hold: a model that generates text reads all
  its weights from memory for every token. Over one small matrix again and again, the dense side would look faster than it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from uniprune.common.progress import Progress, silent
from uniprune.errors import InputError, first_line
from uniprune.models.loading import dtype_name
from uniprune.sparsity.patterns.protocol import Pattern, Shape
from uniprune.speed.kernels import DENSE, SPARSE, Kernel, check_product
from uniprune.storage.record import Facts

CACHE = 256 << 20  # bytes that the dense copies of the matrices exceed together, so that they come from memory
QUEUED = 32  # products that a GPU is given at once, at least: of one alone, the call and the wait would be measured
WARM_UP, ROUNDS = 1, 7  # rounds that do not count, and the fewest that do

Timer = Callable[[Kernel, Sequence[Any], Tensor], float]


class Result(Facts):
    """A kernel at one sparsity, over the matrices of the whole model.

    kind: of its masks. speedup: time of the dense product ``against`` (its dtype) / time of this one, the median of
    ``rounds``; low, high: its quartiles. seconds: of this one with every matrix, the median. left_dense: shapes that the
    kernel does not take, and why; they are dense on both sides.
    """

    kind: str
    kernel: str
    dtype: str
    against: str
    batch: int
    sparsity: float
    speedup: float
    low: float
    high: float
    rounds: int
    seconds: float
    left_dense: dict[str, str]


class Missing(Facts):
    """A kernel that does not run here, and why."""

    kind: str
    kernel: str
    dtype: str
    reason: str


def clock(kernel: Kernel, weights: Sequence[Any], tokens: Tensor) -> float:
    """Seconds of the products of tokens with some weights in turn; a GPU is waited for."""
    start = time.perf_counter()
    for weight in weights:
        kernel.multiply(weight, tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Conditions:
    """Under what products are timed.

    batches: tokens at a time. sparsities: fractions removed, of patterns that take any. seconds: for each kernel, dtype,
    sparsity and batch; eight rounds are made even if they take longer, as with the shapes of a large model on a CPU.
    """

    device: torch.device
    dtypes: Sequence[torch.dtype]
    batches: Sequence[int]
    sparsities: Sequence[float]
    kernels: Sequence[Kernel] = SPARSE
    seconds: float = 1.0
    timer: Timer = clock


@dataclass(frozen=True)
class Case:
    """What is measured next; ``against`` is the dtype of the dense product beside it."""

    kernel: Kernel
    pattern: Pattern
    dtype: torch.dtype
    against: torch.dtype


@dataclass(frozen=True)
class Side:
    """One side of a race: copies of a matrix as the kernel has it, tokens ``[largest batch, in]`` to multiply with them."""

    kernel: Kernel
    copies: list[Any]
    tokens: Tensor

    def time(self, turn: int, batch: int, timer: Timer) -> float:
        """Seconds of one product. A GPU is given many at once, so that launches overlap with work as in a model."""
        if self.tokens.device.type == "cpu":
            weights = [self.copies[turn % len(self.copies)]]
        else:
            weights = self.copies * -(-QUEUED // len(self.copies))
        return timer(self.kernel, weights, self.tokens[:batch]) / len(weights)


@dataclass(frozen=True)
class Race:
    """Matrices of one shape: how many the model has, and both sides."""

    count: int
    dense: Side
    sparse: Side

    def run(self, turn: int, batch: int, timer: Timer) -> tuple[float, float]:
        """Seconds of one product with every matrix, dense and sparse; the sides take turns in going first."""
        if turn % 2:
            dense = self.dense.time(turn, batch, timer)
            return self.count * dense, self.count * self.sparse.time(turn, batch, timer)
        sparse = self.sparse.time(turn, batch, timer)
        return self.count * self.dense.time(turn, batch, timer), self.count * sparse


def measure(
    shapes: Mapping[Shape, int], conditions: Conditions, progress: Progress = silent
) -> tuple[list[Result], list[Missing]]:
    """Times every kernel against the dense product of its dtype, and the dense products of all dtypes against the first's.

    shapes: of the matrices ``(out, in)``, and how many there are.
    """
    kernels, dtypes, sparsities = conditions.kernels, conditions.dtypes, sorted(conditions.sparsities)
    cases = [Case(DENSE, DENSE.patterns([])[0], dtype, dtypes[0]) for dtype in dtypes[1:]]
    cases += [Case(k, pattern, dtype, dtype) for k in kernels for dtype in dtypes for pattern in k.patterns(sparsities)]
    results: list[Result] = []
    missing: dict[tuple[Kernel, torch.dtype], Missing] = {}
    for case in progress(cases, "kernels", len(cases)):
        kernel, dtype = case.kernel, case.dtype
        if (kernel, dtype) in missing:
            continue  # what failed at one sparsity is not tried at the others
        try:
            results += _measure(case, shapes, conditions)
        except Exception as error:  # whatever a kernel raises is the reason why it is missing
            missing[kernel, dtype] = Missing(
                kind=kernel.kind, kernel=kernel.name, dtype=dtype_name(dtype), reason=first_line(error)
            )
    return results, list(missing.values())


@torch.no_grad()
def _measure(case: Case, shapes: Mapping[Shape, int], conditions: Conditions) -> list[Result]:
    """A result for each batch. Raises InputError if the kernel takes none of the shapes, or what it raises itself."""
    device, batches = conditions.device, conditions.batches
    left = {shape: reason for shape in shapes if (reason := _unsupported(case, shape, device))}
    if len(left) == len(shapes):
        raise InputError(next(iter(left.values())))
    item = case.against.itemsize
    enough = -(-CACHE // (item * sum(rows * columns for rows, columns in shapes)))
    races = [
        _prepare(case, DENSE if shape in left else case.kernel, shape, count, min(count, enough), conditions)
        for shape, count in shapes.items()
    ]
    left_dense = {f"{rows} x {columns}": reason for (rows, columns), reason in left.items()}
    results = []
    for batch in batches:
        rounds = _rounds(races, batch, conditions)
        ratios = [dense / sparse for dense, sparse in rounds]
        low, middle, high = quantiles(ratios, method="inclusive")
        results.append(
            Result(
                kind=case.kernel.kind,
                kernel=case.kernel.name,
                dtype=dtype_name(case.dtype),
                against=dtype_name(case.against),
                batch=batch,
                sparsity=case.pattern.sparsity,
                speedup=middle,
                low=low,
                high=high,
                rounds=len(rounds),
                seconds=median(sparse for _, sparse in rounds),
                left_dense=left_dense,
            )
        )
    return results


def _unsupported(case: Case, shape: Shape, device: torch.device) -> str | None:
    return case.pattern.unsupported(*shape) or case.kernel.unsupported(shape, case.dtype, device)


def _prepare(case: Case, kernel: Kernel, shape: Shape, count: int, copies: int, conditions: Conditions) -> Race:
    """Random matrices of one shape, dense and as ``kernel`` has them; raises InputError if their products differ."""
    device, batches = conditions.device, conditions.batches
    random = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(shape, generator=random, device=device)
    if kernel is not DENSE:
        scores = torch.rand(shape, generator=random, device=device)
        weight *= next(mask for _, mask in case.pattern({"": scores}))
    tokens = torch.randn(max(batches), shape[1], generator=random, device=device)
    sides = [
        Side(one, _copies(one, weight.to(dtype), copies), tokens.to(dtype))
        for one, dtype in ((DENSE, case.against), (kernel, case.dtype))
    ]
    for batch in batches:
        check_product(*(side.kernel.multiply(side.copies[0], side.tokens[:batch]) for side in sides))
    return Race(count, *sides)


def _copies(kernel: Kernel, weight: Tensor, count: int) -> list[Any]:
    """A weight as the kernel wants it, several times."""
    first = kernel.compress(weight)
    # A CPU compresses 200 times slower than it copies; on a GPU not every PyTorch can copy a 2:4 tensor.
    return [first, *(kernel.compress(weight) if weight.is_cuda else kernel.copy(first) for _ in range(count - 1))]


def _rounds(races: Sequence[Race], batch: int, conditions: Conditions) -> list[tuple[float, float]]:
    """Rounds of (dense, sparse) seconds, over the matrices of all shapes."""
    rounds: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(rounds) < WARM_UP + ROUNDS or time.perf_counter() - start < conditions.seconds:
        times = [race.run(len(rounds), batch, conditions.timer) for race in races]
        rounds.append((sum(dense for dense, _ in times), sum(sparse for _, sparse in times)))
    return rounds[WARM_UP:]
