"""Masks block after block, each block calibrated on the outputs of the pruned blocks before it, as in Wanda's code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.errors import InputError
from uniprune.models import masking
from uniprune.models.blocks import Residency, device_of, resident
from uniprune.models.matrices import Matrices
from uniprune.saliency import refine as refine_module
from uniprune.saliency import statistics as statistics_module
from uniprune.saliency.calibration import SWEEP, LocalSaliency, _blocks
from uniprune.saliency.metrics import Metric
from uniprune.saliency.statistics import Gram, observing, pool
from uniprune.sparsity import bits
from uniprune.sparsity.patterns import Pattern
from uniprune.storage.runs import Run
from uniprune.storage.tensor_store import Store


def sequential(
    model: nn.Module,
    matrices: Matrices,
    windows: Tensor,
    metric: Metric,
    pattern: Pattern,
    progress: Progress = silent,
    refine: bool = False,
    residency: Residency = resident,
    run: Run | None = None,
) -> Mapping[str, Tensor]:
    """Masks cut block after block, each block scored on what the pruned blocks before it put out (as Wanda's code does).

    refine: lower each matrix's reconstruction error on those inputs before its block runs on (see saliency.refine); that
    takes a Gram matrix per matrix of one block, in float32. residency: of a model whose blocks are in memory one at a
    time. run: where the masks of finished blocks are kept, and the states between them; the masks returned may lie there.
    The model's weights are the same afterwards, bit for bit.
    Raises InputError if the pattern needs all scores at once (scope ``model``), or with ``refine`` has no budget by row.
    """
    if any(matrix.spans for matrix in matrices.values()):
        raise InputError("--sequential cuts block after block, but blocks of this model share weights; leave it out")
    if not pattern.local:
        raise InputError(f"--sequential cuts block after block, but {pattern} needs all scores; use --scope row or matrix")
    if refine:
        refine_module.check(pattern)
    kind = Gram if refine else metric.statistic
    store = Store(run, SWEEP) if run else None
    runner = _blocks(model, distributed.share(windows), residency, run, store)
    masks: dict[str, Tensor] = {}
    for index in progress(runner, "pruning block by block", len(runner)):
        here = {name: matrix for name, matrix in matrices.items() if matrix.block == index}
        if kind:
            with observing(here, kind, device_of(model)) as statistics:
                runner.run(index)
            pool(here, statistics)
            statistics_module.starved(here, statistics)
        else:
            statistics = {}
        cut = dict(pattern(LocalSaliency(here, metric, statistics)))
        if refine:
            cut = {name: refine_module.refine(here[name].weight, m, statistics[name].mean, pattern) for name, m in cut.items()}
        with masking.applied(here, cut):
            runner.run(index, advance=True)
        if store is None:
            masks |= cut
        else:
            for name, mask in cut.items():
                store[name] = {"mask": bits.pack(mask)}
            store.commit({"done": index + 1})
    return masks if store is None else StoredMasks(store, matrices)


class StoredMasks(Mapping[str, Tensor]):
    """The masks of a sweep on disk, unpacked one matrix at a time."""

    def __init__(self, store: Store, matrices: Matrices) -> None:
        self._store, self._matrices = store, matrices

    def __getitem__(self, name: str) -> Tensor:
        return bits.unpack(self._store.tensor(name, "mask"), self._matrices[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)
