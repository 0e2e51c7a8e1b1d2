"""Will a pruned model be faster here? The command ``bench``: speeds of its matrix products, and what follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from uniprune.checkpoints.origin import resolve
from uniprune.common.fused import current
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, versions
from uniprune.errors import InputError
from uniprune.models.experts import Slice
from uniprune.models.loading import DTYPES, parse_device, skeleton
from uniprune.models.matrices import find_matrices
from uniprune.speed import timing
from uniprune.speed.kernels import DENSE, SPARSE
from uniprune.speed.results import MARGIN, Speeds
from uniprune.speed.settings import Measurement
from uniprune.speed.timing import Conditions, Missing, Result

DEFAULTS = Measurement()
BUSY = 1.25  # upper quartile / lower of a usual result, from which on the machine does something else as well
RESTLESS = "Rounds differed widely: the machine is busy. Measure again when it is idle."
EXPERTS = (
    "{} of {} matrices are parts of fused experts, which uniprune.accelerate leaves dense: what is measured of them is no "
    "speed-up of the model."
)
COVERAGE = (
    "Measured: the products of the prunable matrices in eager PyTorch. Not measured: attention, norms, embeddings and output "
    "head, which dilute any speed-up, and other runtimes."
)


def bench(
    source: str | Path,
    *,
    dtypes: Sequence[str] = DEFAULTS.dtypes,
    batches: Sequence[int] = DEFAULTS.batches,
    sparsities: Sequence[float] = DEFAULTS.sparsities,
    device: str | None = None,
    seconds: float = 1.0,
    progress: Progress = silent,
) -> Speeds:
    """Times the products of a model's matrices on this machine, dense against every sparse kernel that PyTorch has here.

    source: a folder (dense or pruned), hub name or GGUF file, of which shapes alone are read. dtypes: ``float32``,
    ``bfloat16``, ``float16``. batches: tokens at a time. sparsities: fractions removed. seconds: for each kernel, dtype,
    sparsity and batch, at least. Raises InputError for settings that cannot be measured.
    """
    asked = Measurement.of(dtypes=dtypes, batches=batches, sparsities=sparsities, device=device)
    types = list(dict.fromkeys(asked.dtypes))
    counts, fractions = list(dict.fromkeys(asked.batches)), list(dict.fromkeys(asked.sparsities))
    _check(types, counts, fractions)
    place = parse_device(device)
    origin = resolve(source)
    matrices = find_matrices(skeleton(origin))
    shapes = Counter(matrix.shape for matrix in matrices.values())
    fused = sum(isinstance(matrix.module, Slice) for matrix in matrices.values())
    at, watch = Conditions(place, [DTYPES[name] for name in types], counts, fractions, seconds=seconds), Stopwatch()
    with watch("measure"), current(place):
        results, missing = timing.measure(shapes, at, progress)
    busy = results and median(result.high / result.low for result in results) > BUSY
    return Speeds(
        model=str(origin),
        device="CPU" if place.type == "cpu" else torch.cuda.get_device_name(place),
        threads=torch.get_num_threads(),
        shapes={f"{rows} x {columns}": count for (rows, columns), count in shapes.items()},
        dtypes=types,
        batches=counts,
        results=results,
        missing=missing,
        verdicts=verdicts(results, missing),
        notes=[COVERAGE, *([EXPERTS.format(fused, len(matrices))] if fused else []), *([RESTLESS] if busy else [])],
        seconds=watch.seconds["measure"],
        versions=versions(),
    )


def _check(dtypes: Sequence[str], batches: Sequence[int], sparsities: Sequence[float]) -> None:
    for name, values in (("dtype", dtypes), ("batch", batches), ("sparsities", sparsities)):
        if not values:
            raise InputError(f"{name} is empty; leave it out for the defaults")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown; use some of {', '.join(DTYPES)}")
    for batch in batches:
        if batch < 1:
            raise InputError(f"batch {batch} is impossible; give the tokens at a time, 1 or more")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise InputError(f"sparsity {sparsity} is not between 0 and 1; give the fraction removed, e.g. 0.9")


def verdicts(results: Sequence[Result], missing: Sequence[Missing]) -> list[str]:
    """One sentence for each kind of mask: whether its products are faster here, with how many tokens, from which sparsity."""
    dense = [result for result in results if result.kind == DENSE.kind]
    sentences = []
    for kind in dict.fromkeys(kernel.kind for kernel in SPARSE):
        found, lacking = [r for r in results if r.kind == kind], [m for m in missing if m.kind == kind]
        if found:
            sentences.append(_verdict(found, lacking, dense))
        elif lacking:
            reason = lacking[0].reason.rstrip(".")
            sentences.append(f"{kind}: no kernel for it here ({reason}); a pruned model runs at dense speed.")
    return sentences


def _verdict(found: Sequence[Result], missing: Sequence[Missing], dense: Sequence[Result]) -> str:
    """The sentence of a kind of mask that there is a kernel for."""
    clauses = []
    for dtype, batch in dict.fromkeys((row.dtype, row.batch) for row in found):
        rows = [row for row in found if (row.dtype, row.batch) == (dtype, batch)]
        clauses.append(f"in {dtype} at batch {batch} {_clause(rows, dense)}")
    if missing:
        clauses.append(f"no kernel in {' and '.join(one.dtype for one in missing)}")
    if left := found[0].left_dense:
        clauses.append(f"matrices of {', '.join(left)} stay dense")
    return f"{found[0].kind} ({found[0].kernel}): {'; '.join(clauses)}."


def _clause(rows: Sequence[Result], dense: Sequence[Result]) -> str:
    """What a kernel does in one dtype at one batch. rows: by rising sparsity."""
    start, last = first_faster(rows), rows[-1]
    if start is None:
        best = max(rows, key=lambda row: row.speedup)
        certainly = "certainly " if best.speedup >= 1 + MARGIN else ""  # the median round is faster, too many others are not
        return f"not {certainly}faster ({best.speedup:.2f}x the dense speed at best, at {_level(best)})"
    more = "" if start is last else f", {last.speedup:.2f}x at {_level(last)}"
    return f"faster from {_level(start)} on ({start.speedup:.2f}x{more}){_rival(rows, dense)}"


def first_faster(rows: Sequence[Result], bar: float = 1.0) -> Result | None:
    """The lowest sparsity from which on a kernel is faster than ``bar`` times its dense product.

    Faster: three quarters of the rounds are so by more than a trifle. rows: by rising sparsity.
    """
    found = None
    for row in reversed(rows):
        if row.low < bar * (1 + MARGIN):
            break
        found = row
    return found


def _rival(rows: Sequence[Result], dense: Sequence[Result]) -> str:
    """Where the dense product is faster in another dtype: from which sparsity on that is beaten, too."""
    dtype, batch = rows[0].dtype, rows[0].batch
    speeds = {row.dtype: row.speedup for row in dense if row.batch == batch} | {row.against: 1.0 for row in dense}
    if dtype not in speeds:
        return ""
    best = max(speeds, key=lambda name: speeds[name])
    gain = speeds[best] / speeds[dtype]
    if gain <= 1:
        return ""
    rival, beaten = f"than dense {best} ({gain:.2f}x)", first_faster(rows, gain)
    return f", and {rival} from {_level(beaten)} on" if beaten else f", but never {rival}"


def _level(row: Result) -> str:
    return f"{100 * row.sparsity:g}%"
