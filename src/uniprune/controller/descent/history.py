"""What has happened in a descent so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from uniprune.controller.protocol import ControllerRecord
from uniprune.controller.start import warn_without_gradient
from uniprune.errors import InputError
from uniprune.saliency.record import Starved
from uniprune.storage.runs import OLDER

Verdict = Literal["better", "worse", "diverged"]

DIVERGED = 1.5  # times the held-out KL of the start
PATIENCE = 2  # checks without improvement after which a descent ends


@dataclass
class DescentHistory:
    """What a descent has done and found: beside the states, all that is saved of it, and all that the report says of it.

    done: steps that need not be taken any more. tokens: descended on. loss: of each step the KL in nats per token. flips: of
    each step the share of mask bits that it changed, at its threshold if matrices share one. held_out_loss: of each check, in
    nats per token, the start's first; best: the lowest. stale: checks since the best one that found neither improvement nor
    divergence. backed_off: how often the descent diverged. without_gradient: matrices that no gradient has reached. starved:
    see ``observation.starved``.
    """

    done: int = 0
    tokens: int = 0
    loss: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    best: float = math.inf
    stale: int = 0
    backed_off: int = 0
    without_gradient: list[str] = field(default_factory=list)
    starved: Starved | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> DescentHistory:
        """The history that was saved as the facts of a store, which are empty at first.

        Raises InputError for facts of another version.
        """
        names = {entry.name for entry in fields(cls)}
        if facts and facts.keys() != names:
            raise InputError(OLDER)
        starved = facts.get("starved")
        return cls(**{**facts, "starved": Starved(**starved) if starved else None})

    def facts(self) -> dict[str, Any]:
        """What is saved: JSON data."""
        return asdict(self) | {"starved": self.starved.model_dump() if self.starved else None}

    def judge(self, held_out_loss: float) -> Verdict:
        """Enters the result of a check, and says what it means; the start is the first best."""
        start = not self.held_out_loss
        self.held_out_loss.append(held_out_loss)
        if start or held_out_loss < self.best:
            self.best = held_out_loss
            self.stale = 0
            return "better"
        if not held_out_loss <= DIVERGED * self.held_out_loss[0]:  # also NaN
            self.backed_off += 1
            return "diverged"
        self.stale += 1
        return "worse"

    @property
    def stalled(self) -> bool:
        """Whether the last checks found neither improvement nor divergence, so that the descent is to end."""
        return self.stale == PATIENCE

    @property
    def scale(self) -> float:
        """The factor of the step size, which each divergence halves."""
        return 0.5**self.backed_off

    def record(self, steps: int, every: int) -> ControllerRecord:
        """The record of a descent that is over. steps: as planned. every: so many of them lie between two checks."""
        warn_without_gradient(self.without_gradient)
        return ControllerRecord(
            objective="KL",
            steps=steps,
            tokens=self.tokens,
            loss=self.loss,
            held_out_loss=self.held_out_loss,
            best_held_out_loss=self.best,
            judged_every=every,
            flips=self.flips,
            backed_off=self.backed_off,
            without_gradient=self.without_gradient,
            starved=self.starved,
        )
