"""What a controller is: what it costs and needs, what it writes, and how it makes a saliency of a local metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

    from uniprune.saliency.calibration import Calibration
    from uniprune.saliency.metrics import Metric
    from uniprune.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Cost:
    """What a calibration takes beside the model, for forecasts.

    flops: floating-point operations per prunable weight and token; a forward pass takes 2, a backward pass 4. memory: bytes per
    prunable weight that are held all the time: state, masks, a copy of the weights. disk: bytes per prunable weight that lie on
    disk instead where the model is read block by block.
    """

    flops: float
    memory: float = 0
    disk: float = 0


LOCAL = Cost(flops=2)  # of the local metric alone


class ControllerRecord(BaseModel):
    """What happened in a calibration by a controller, for ``pruning.json`` and the report; further fields are kept.

    objective, unit: what ``loss`` is, e.g. KL in nats per token. loss: at each step. held_out_loss: on windows that no step
    saw, the start's first; best_held_out_loss: that of the result. judged_every: steps between two of them. flips: the share of
    masks that each step changed. targets: the patterns that it was calibrated for. steps: as planned; it may end sooner.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    objective: str = "loss"
    unit: str = "nats per token"
    steps: int | None = Field(None, ge=0)
    tokens: int = Field(0, ge=0)
    loss: list[float] = []
    held_out_loss: list[float] = []
    best_held_out_loss: float | None = None
    judged_every: int | None = None
    flips: list[float] = []
    targets: list[str] = []

    @property
    def judged_at(self) -> list[float]:
        """The step after which each value of ``held_out_loss`` was measured."""
        done, checks = len(self.loss), max(1, len(self.held_out_loss) - 1)
        every = self.judged_every or done / checks
        return [min(index * every, done) for index in range(len(self.held_out_loss))]


class Controller(Protocol):
    """Corrects a local metric by what pruning does to the model; a frozen dataclass, whose fields are its settings.

    cost: per weight, see :class:`Cost`. in_memory: whether it needs the whole model in memory; else the blocks may be there one
    at a time (``calibration.residency``). one_process: whether it runs in one process only; else several may share the windows
    (``common.distributed``). comparable: whether its scores are on one scale, so that one budget may compare those of
    different matrices; then that is the default scope.
    """

    cost: ClassVar[Cost]
    in_memory: ClassVar[bool]
    one_process: ClassVar[bool]
    comparable: ClassVar[bool]

    def step_tokens(self, length: int) -> int:
        """Tokens of one step on windows of ``length``."""
        ...

    def calibrate(
        self,
        calibration: Calibration,
        metric: Metric,
        targets: Sequence[Pattern],
        steps: int | None = None,
        seed: int = 0,
    ) -> tuple[Mapping[str, Tensor], ControllerRecord]:
        """The saliency of every matrix, float32 ``[out, in]``, higher = keep, and the record of how it came to be.

        targets: the patterns that the scores are for. steps: how many; by default so many that each window is used once.
        Raises InputError for targets and windows that it cannot work with. The model is the same afterwards, bit for bit.
        """
        ...
