"""What happened while weights were scored, for reports and for the metadata of scores."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field

from uniprune.storage.record import Count, Facts

logger = logging.getLogger(__name__)


class Starved(Facts):
    """Experts' ``matrices`` that saw fewer tokens than ``tokens_under``, ``of`` all of them, and are scored by magnitude."""

    matrices: list[str]
    of: Count
    tokens_under: Count

    def __add__(self, other: Starved) -> Starved:
        """Those of two parts of one model."""
        return Starved(matrices=self.matrices + other.matrices, of=self.of + other.of, tokens_under=self.tokens_under)


def both(one: Starved | None, other: Starved | None) -> Starved | None:
    """Those of two parts of one model, if either has any."""
    return one + other if one and other else one or other


def warn_of_starved(starved: Starved | None) -> None:
    """Warns of experts that are scored by magnitude."""
    if starved is not None and starved.matrices:
        logger.warning(
            "%d of %d experts' matrices saw under %d calibration tokens, e.g. %s; they are scored by magnitude: use more text",
            len(starved.matrices),
            starved.of,
            starved.tokens_under,
            starved.matrices[0],
        )


class ControllerRecord(Facts):
    """What happened in a calibration by a controller, for ``pruning.json`` and the report; further fields are kept.

    objective, unit: what ``loss`` is, e.g. KL in nats per token. loss: at each step. held_out_loss: on windows that no step
    saw, the start's first; best_held_out_loss: that of the result. judged_every: steps between two of them. flips: the share of
    masks that each step changed. backed_off: how often the descent diverged and went on from the best state at half the step
    size. targets: the patterns that it was calibrated for. steps: as planned; it may end sooner.
    without_gradient: matrices that no step could move.
    """

    model_config = ConfigDict(strict=False)  # controllers of others fill it, too

    objective: str = "loss"
    unit: str = "nats per token"
    steps: int | None = Field(default=None, ge=0)
    tokens: int = Field(default=0, ge=0)
    loss: list[float] = []
    held_out_loss: list[float] = []
    best_held_out_loss: float | None = None
    judged_every: int | None = None
    flips: list[float] = []
    backed_off: int = Field(default=0, ge=0)
    targets: list[str] = []
    without_gradient: list[str] = []
    starved: Starved | None = None

    @property
    def judged_at(self) -> list[float]:
        """The step after which each value of ``held_out_loss`` was measured."""
        done, checks = len(self.loss), max(1, len(self.held_out_loss) - 1)
        every = self.judged_every or done / checks
        return [min(index * every, done) for index in range(len(self.held_out_loss))]


class ScoringRecord(NamedTuple):
    """How scores came to be, for reports: what a controller did, or of a local metric which experts are starved, if any."""

    controller: ControllerRecord | None = None
    starved: Starved | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Those that there are, by the names that reports have for them."""
        return {name: value for name, value in self._asdict().items() if value is not None}
