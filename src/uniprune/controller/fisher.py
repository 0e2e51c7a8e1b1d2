"""The controller that stops at the start: local scores times the gradients at the outputs, and no descent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from uniprune.controller.bounds import COUNT, check_bounds
from uniprune.controller.passes.opening import open_passes
from uniprune.controller.protocol import Controller, ControllerRecord, Cost
from uniprune.controller.schedule import in_steps, step_windows
from uniprune.controller.start import sensitivities, warn_without_gradient
from uniprune.models.matrices import Matrices
from uniprune.saliency.calibration import Calibration, LocalSaliency
from uniprune.saliency.metrics import Metric
from uniprune.saliency.observation import starved
from uniprune.saliency.statistics import Statistics
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.storage import runs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fisher(Controller):
    """The local score times the RMS of the loss's gradient at a weight's output, and no descent.

    With Wanda as the local metric, the square of a score is the squared weight times the diagonal of the Fisher information, if
    inputs and output gradients are taken to be independent (as in K-FAC, arXiv 1503.05671). The factor is the same for a whole
    row, so N:M masks and budgets by row are those of the metric alone. A budget for a matrix or the model is distributed over
    rows by what their outputs are worth to the loss, the idea of F-Wanda (arXiv 2608.00481).

    batch_tokens: tokens that go through the model at once. The result does not depend on it. More take more memory; a model
    that is read block by block is then read fewer times.
    """

    cost: ClassVar[Cost] = Cost(flops_per_token=4)
    in_memory: ClassVar[bool] = False
    one_process: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    batch_tokens: int = 1024

    def __post_init__(self) -> None:
        check_bounds("fisher", self, {"batch_tokens": COUNT})

    def step_tokens(self, length: int) -> int:
        """Tokens of one batch of windows of ``length``."""
        return step_windows(self.batch_tokens, length) * length

    def calibrate(
        self,
        calibration: Calibration,
        metric: Metric,
        targets: Sequence[Pattern],
        steps: int | None = None,
        seed: int = 0,
    ) -> tuple[Mapping[str, Tensor], ControllerRecord]:
        """The scores, computed when they are asked for, and the record. steps: the most batches to use."""
        if targets and all(target.pattern_of(name).by_row for target in targets for name in calibration.matrices):
            logger.warning(
                "--controller fisher changes nothing at %s, which is decided within rows: none is faster", targets[0]
            )
        batches = in_steps(calibration.windows, self.batch_tokens)[:steps]
        windows = torch.cat(batches)
        with ExitStack() as stack:
            passes = open_passes(calibration, calibration.run or stack.enter_context(runs.temporary()))
            stack.enter_context(passes.network)
            start = sensitivities(passes, windows, metric.statistic, calibration.run, self.batch_tokens, calibration.progress)
        warn_without_gradient(start.without_gradient)
        record = ControllerRecord(
            objective="cross-entropy",
            steps=len(batches),
            tokens=windows.numel(),
            without_gradient=start.without_gradient,
            starved=starved(calibration.matrices, start.norms),
        )
        return _Weighted(calibration.matrices, metric, start.statistics, start.gradients), record


class _Weighted(LocalSaliency):
    """Local scores, each row times its factor (``factors``: matrix name -> ``[out]``)."""

    def __init__(self, matrices: Matrices, metric: Metric, statistics: Statistics, factors: Mapping[str, Tensor]) -> None:
        super().__init__(matrices, metric, statistics)
        self._factors = factors

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name) * self._factors[name].float()[:, None]
