"""Where methods calibrate: one model in memory, one text; what several rows can share is computed once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from uniprune.common.progress import Progress
from uniprune.common.provenance import Stopwatch
from uniprune.controller.controllers import any_sparsity
from uniprune.errors import UniPruneError
from uniprune.job.prepare import Job
from uniprune.job.recipe import Recipe
from uniprune.job.scoring import fitting, scored
from uniprune.models.matrices import Matrices
from uniprune.saliency.calibration import Calibration, LocalSaliency, observed
from uniprune.saliency.metrics import Metric
from uniprune.saliency.observation import starved
from uniprune.saliency.record import ScoringRecord, warn_of_starved
from uniprune.saliency.statistics import Kind, Statistics
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.views import Scores
from uniprune.storage.runs import Run


class Scored(NamedTuple):
    """Scores of matrices, the seconds that they took if they were made here, what a row says of the calibration."""

    saliency: Scores
    seconds: float | None
    record: ScoringRecord


class CalibrationCache:
    """The calibrations that rows ask for, each made once.

    run: where the progress of calibrations is kept, each in a part of its own, by a name.
    """

    def __init__(self, job: Job, run: Run, progress: Progress) -> None:
        self.job, self._run, self.progress = job, run, progress
        self._statistics: dict[Kind, tuple[Statistics, float]] = {}
        self._for_any: dict[str, Scored] = {}
        self._failed: dict[object, tuple[type[UniPruneError], str]] = {}  # no errors: they hold what their frames held
        self.resumed: set[str] = set()  # calibrations that an earlier run began

    @property
    def model(self) -> nn.Module:
        return self.job.loaded.model

    @property
    def matrices(self) -> Matrices:
        return self.job.matrices

    @property
    def tokens(self) -> Tensor:
        """The calibration samples."""
        return self.job.windows.tokens

    def local(self, metric: Metric) -> Scored:
        """Scores by a local metric. The pass over the text is that of every metric that wants the same statistic."""
        statistics, seconds = self._observed(metric.statistic)
        saliency = LocalSaliency(self.matrices, metric, statistics)
        return Scored(saliency, seconds, ScoringRecord(starved=saliency.starved))

    def _observed(self, kind: Kind | None) -> tuple[Statistics, float | None]:
        if kind is None:
            return {}, None
        if kind not in self._statistics:
            watch = Stopwatch()
            with self._tried_once(kind), watch("pass"):
                found = observed(self.job.calibration(self.progress), kind)
            self._statistics[kind] = found, watch.seconds["pass"]
            warn_of_starved(starved(self.matrices, found))
        return self._statistics[kind]

    def corrected(self, recipe: Recipe, targets: Sequence[Pattern], name: str) -> Scored:
        """Scores by the recipe's controller; an interrupted calibration of this name goes on."""
        watch = Stopwatch()
        with watch("calibrate"):
            saliency, record = scored(self.calibration(name), recipe, targets)
        return Scored(saliency, watch.seconds["calibrate"], record)

    def for_any(self, recipe: Recipe, name: str) -> Scored:
        """Scores by the recipe's controller for sparsities of all kinds, calibrated once."""
        if name not in self._for_any:
            with self._tried_once(name):
                self._for_any[name] = self.corrected(recipe, fitting(any_sparsity(), self.job.shapes), name)
        return self._for_any[name]

    @contextmanager
    def _tried_once(self, calibration: object) -> Iterator[None]:
        """What fails inside ``with`` is not tried again for another row: the same error is raised at once."""
        if calibration in self._failed:
            kind, message = self._failed[calibration]
            raise kind(message)
        try:
            yield
        except UniPruneError as error:
            self._failed[calibration] = type(error), str(error)
            raise

    def calibration(self, name: str) -> Calibration:
        """A calibration that is interrupted goes on, under the same name."""
        part = Run(self._run.folder / _folder(name))
        if part.folder.is_dir():
            self.resumed.add(name)
        part.folder.mkdir(exist_ok=True)
        return self.job.calibration(self.progress, part)

    def forget(self, name: str) -> None:
        """Deletes the progress of a calibration whose row is written."""
        shutil.rmtree(self._run.folder / _folder(name), ignore_errors=True)


def _folder(name: str) -> str:
    return f"row-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
