"""Masks block after block, each block calibrated on the outputs of the pruned blocks before it, as in Wanda's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from uniprune.common import distributed
from uniprune.errors import InputError
from uniprune.models import masking
from uniprune.models.matrices import Matrices
from uniprune.saliency.calibration import Calibration, LocalSaliency, open_sweep
from uniprune.saliency.metrics import Metric
from uniprune.saliency.observation import observing, starved, sum_and_check
from uniprune.saliency.record import Starved, both, warn_of_starved
from uniprune.saliency.refine import check, damped, refine
from uniprune.saliency.statistics import Gram
from uniprune.sparsity import bits
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store

SHARE = 16  # one of so many tokens of the text is also read as the first of one,
WEIGHT = 0.25  # and these have so much of the weight that the text has
FIRST = "first-stash"  # their hidden states


class Created(NamedTuple):
    """Masks by matrix name, and which of these matrices are starved experts', if any."""

    masks: Mapping[str, Tensor]
    starved: Starved | None


Run = Callable[[], None]
Create = Callable[[Matrices, Sequence[Run]], Created]
"""Given the matrices of one block, and what runs it over the windows and, if there are any, over first tokens."""


def sequential(calibration: Calibration, metric: Metric, pattern: Pattern) -> Created:
    """Masks created block after block, each block scored on what the pruned blocks before it put out (as Wanda's code does).

    The masks of finished blocks are kept in the run, and those returned may lie there. The model's weights are the same
    afterwards, bit for bit.
    Raises InputError if the pattern needs all scores at once (scope ``model``).
    """

    def create(here: Matrices, runs: Sequence[Run]) -> Created:
        if metric.statistic is None:
            return Created(dict(pattern(LocalSaliency(here, metric, {}))), None)
        (run,) = runs
        with observing(here, metric.statistic, calibration.device) as statistics:
            run()
        sum_and_check(here, statistics)
        return Created(dict(pattern(LocalSaliency(here, metric, statistics))), starved(here, statistics))

    return _by_block(calibration, pattern, create)


def refined(calibration: Calibration, metric: Metric, pattern: Pattern) -> Created:
    """As :func:`sequential`; then the damped error of each matrix (saliency.refine) is lowered before its block runs on.

    Gram matrices count the text's tokens and, with a quarter of their weight, tokens read as the first of a text
    (:func:`first_tokens`): in many models all later tokens attend to the first one, whose hidden state is unlike all others',
    and a window has but one. A matrix that a rule gives another pattern, without a budget by row, keeps the metric's mask.
    Refining takes a Gram matrix of the inputs of each matrix of one block, in float32, beside the metric's own statistic.
    Raises InputError, too, if the pattern has no budget by row.
    """
    check(pattern)
    firsts = first_tokens(calibration.windows)
    weight = WEIGHT * calibration.windows.numel() / len(firsts)

    def create(here: Matrices, runs: Sequence[Run]) -> Created:
        run, run_first = runs
        with observing(here, Gram, calibration.device) as grams:
            run_first()
            for gram in grams.values():
                gram.total *= weight
                gram.tokens = 0
            with observing(here, metric.statistic, calibration.device) as own:
                run()
        sum_and_check(here, grams)
        sum_and_check(here, own)
        better = {
            name: refine(here[name].weight, mask, damped(grams[name].mean), part)
            if (part := pattern.pattern_of(name)).by_row
            else mask
            for name, mask in pattern(LocalSaliency(here, metric, own))
        }
        return Created(better, starved(here, grams))

    return _by_block(calibration, pattern, create, firsts[distributed.rank() :: distributed.count()])


def first_tokens(windows: Tensor) -> Tensor:
    """Windows ``[n, 1]`` of what texts begin with: of BOS, if all windows do; else of any token, one in SHARE."""
    alike = len(windows) > 1 and bool((windows[:, 0] == windows[0, 0]).all())
    return windows[:1, :1] if alike else windows.reshape(-1, 1)[::SHARE]


def _by_block(calibration: Calibration, pattern: Pattern, create: Create, firsts: Tensor | None = None) -> Created:
    """firsts: windows of one token, which go through the same blocks."""
    matrices = calibration.matrices
    if any(matrix.spans for matrix in matrices.values()):
        raise InputError("--sequential cuts block after block, but blocks of this model share weights; leave it out")
    if not pattern.local:
        raise InputError(f"--sequential cuts block after block, but {pattern} needs all scores; use --scope row or matrix")
    store, sweep = open_sweep(calibration)
    run = calibration.run
    sweeps = [sweep]
    if firsts is not None:
        sweeps.append(sweep.over(firsts, Stash(run.aside(FIRST), run.durable) if run else Stash()))
    masks: dict[str, Tensor] = {}
    saved = store.facts.get("record") if store else None
    found = Starved(**saved["starved"]) if saved else None
    for index in calibration.progress(sweep, "pruning block by block", len(sweep)):
        here = {name: matrix for name, matrix in matrices.items() if matrix.block == index}
        created, more = create(here, [partial(one.run, index) for one in sweeps])
        found = both(found, more)
        with masking.applied(here, created):
            for one in sweeps:
                one.run(index, advance=True)
        if store is None:
            masks |= created
        else:
            for name, mask in created.items():
                store[name] = {"mask": bits.pack(mask)}
            for one in sweeps:
                one.sync()
            store.commit({"done": index + 1, "record": {"starved": found.model_dump()} if found else {}})
    if found:  # blocks without any say nothing of how many they have
        found = found.model_copy(update={"of": sum(bool(matrix.group) for matrix in matrices.values())})
        warn_of_starved(found)
    return Created(masks if store is None else StoredMasks(store, matrices), found)


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
