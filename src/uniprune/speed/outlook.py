"""Whether a pruned model will be faster on this machine, in a sentence, from a quick measurement of its own shapes.

``bench`` measures thoroughly; this takes seconds: the one shape that most of the weights have, cut to LARGEST of them. Text
that is generated waits for products of one token; a prompt has many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from uniprune.artefacts.reports import Pruning, Realised
from uniprune.checkpoints.origin import Origin, stored_dtype
from uniprune.models.blocks import dtype_of
from uniprune.models.experts import Slice
from uniprune.models.loading import Loaded, dtype_name, model_of
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.protocol import Shape
from uniprune.speed import timing
from uniprune.speed.kernels import BITMASK, DENSE, SEMI_STRUCTURED, TWO_OF_FOUR
from uniprune.speed.results import MARGIN
from uniprune.speed.timing import Conditions, Missing, Result

LARGEST = 1 << 22  # weights of the matrix that is timed
MATRICES = 32  # of this shape, as a model has: they come from memory
TOKEN, PROMPT = 1, 64  # tokens at a time
BUSY = 1.5  # upper quartile / lower of a result, from which on the machine does something else as well
SPARSER = (0.7, 0.9)  # where it might be faster, if it is not at the model's own sparsity
EXPERTS = "expert"  # in the names of experts' matrices
NO_KERNEL = "Fused experts run dense, also with uniprune.accelerate"
DENSE_TYPES = (torch.bfloat16, torch.float32)  # that a dense model could be run in instead


def with_speed(report: Pruning, source: Loaded | Origin, device: torch.device) -> Pruning:
    """A report that says it as well, unless nothing was removed, or what is written are codes. source: of the dense model."""
    dtype = _written_dtype(source, report.matrices)
    if dtype is None or not report.sparsity:
        return report
    experts = _fused(source, report.matrices)
    others = {name: matrix for name, matrix in report.matrices.items() if name not in experts}
    share = 1 - sum(matrix.size for matrix in others.values()) / report.weights
    if not others:
        said = f"{NO_KERNEL}; all that was pruned is in them."
    else:
        said = outlook(report.model_copy(update={"matrices": others}), dtype, device)
        said += f" {NO_KERNEL}: {share:.0%} of what was pruned." if experts else ""
    return report.model_copy(update={"speed": said})


def _fused(source: Loaded | Origin, names: Iterable[str]) -> set[str]:
    """Those of the pruned matrices that are parts of a layer's fused experts, which no kernel here multiplies sparsely."""
    if not any(EXPERTS in name for name in names):
        return set()
    return {name for name, matrix in find_matrices(model_of(source)).items() if isinstance(matrix.module, Slice)}


def outlook(pruned: Realised, dtype: torch.dtype, device: torch.device) -> str:
    """The sentence. pruned: what a run removed. dtype: of the checkpoint."""
    sizes: Counter[Shape] = Counter()
    for matrix in pruned.matrices.values():
        sizes[matrix.shape] += matrix.size
    (rows, columns), _ = sizes.most_common(1)[0]
    some = {(min(rows, max(16, LARGEST // columns)), columns): MATRICES}
    sparsity = pruned.sparsity
    kernels = [BITMASK, *([SEMI_STRUCTURED] if pruned.pattern == str(TWO_OF_FOUR) else [])]
    at = Conditions(device, [dtype], (TOKEN, PROMPT), [sparsity], kernels, seconds=0)
    results, missing = timing.measure(some, at)
    if results and _best(results, TOKEN, sparsity).low < 1 + MARGIN:
        at = Conditions(device, [dtype], (TOKEN,), [more for more in SPARSER if more > sparsity], [BITMASK], seconds=0)
    else:
        types = [dtype, *(other for other in DENSE_TYPES if other != dtype)]
        at = Conditions(device, types, (TOKEN,), [], [], seconds=0)
    further = timing.measure(some, at)[0]
    threads = torch.get_num_threads()
    cpu = f"a CPU with {threads} thread{'s' if threads > 1 else ''}"
    place = cpu if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    found = f"On {place} {verdict(results + further, missing, sparsity, dtype_name(dtype))}"
    busy = any(row.high > BUSY * row.low for row in results + further)
    return f"{found[:-1]} (measured on a busy machine, so it says little)." if busy else found


def verdict(results: Sequence[Result], missing: Sequence[Missing], sparsity: float, dtype: str) -> str:
    """What the measurements say of a model of a sparsity, stored in a type; results: with dense products in other types."""
    sparse = [row for row in results if row.kind != DENSE.kind]
    if not sparse:
        return f"it is no faster than the dense model: no kernel takes its masks in {dtype} ({missing[0].reason.rstrip('.')})."
    token, prompt = (_best(sparse, batch, sparsity) for batch in (TOKEN, PROMPT))
    times = f"{token.kernel} multiplies its matrices {token.speedup:.1f} times as fast as dense {dtype} ones for each new token"
    times += f", {prompt.speedup:.1f} times for a prompt"
    if token.low < 1 + MARGIN:
        said = f"it is no faster than the dense model: {times}"
        more = [row for row in sparse if row.batch == TOKEN and row.sparsity > sparsity and row.low >= 1 + MARGIN]
        first = min(more, key=lambda row: row.sparsity, default=None)
        return f"{said}; at {first.sparsity:.0%} sparsity it would be {first.speedup:.1f}." if first else f"{said}."
    rival = max((row for row in results if row.kind == DENSE.kind), key=lambda row: row.speedup, default=None)
    but = f" (dense {rival.dtype}: {rival.speedup:.1f})" if rival and rival.speedup > 1 + MARGIN else ""
    return f"{times}{but}; loaded in any other way it has the dense model's speed."


def _best(rows: Sequence[Result], batch: int, sparsity: float) -> Result:
    """The fastest kernel at a model's own sparsity; what has a pattern of its own is near it."""
    return max((row for row in rows if row.batch == batch), key=lambda row: (-abs(row.sparsity - sparsity), row.speedup))


def _written_dtype(source: Loaded | Origin, matrices: Iterable[str]) -> torch.dtype | None:
    """The type that a model's pruned matrices are written in, None of codes: the stored one, or that in memory."""
    origin = source.origin
    if origin and (origin.files or origin.quantised):
        return stored_dtype(origin, matrices)
    assert isinstance(source, Loaded)
    return dtype_of(source.model)
