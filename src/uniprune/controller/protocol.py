"""What a controller is: what it costs and needs, what it writes, and how it makes a saliency of a local metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from uniprune.saliency.record import ControllerRecord as ControllerRecord

if TYPE_CHECKING:
    from torch import Tensor

    from uniprune.saliency.calibration import Calibration
    from uniprune.saliency.metrics import Metric
    from uniprune.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Cost:
    """What a calibration takes beside the model, for forecasts.

    flops: floating-point operations per prunable weight and token; a forward pass takes 2, a backward pass 4. memory: bytes per
    prunable weight that are held all the time: state, a copy of the weights. disk: bytes per prunable weight that lie on disk,
    beside the memory or, where the model is read block by block, instead; read, written: of them in each step then, and shared:
    how many more are read where matrices share a budget. masks: bytes per prunable weight of masks, of all matrices; of a
    block, and bits of all, where ``calibration.recompute`` is asked for, which only a controller with masks is.
    """

    flops: float
    memory: float = 0
    disk: float = 0
    read: float = 0
    written: float = 0
    shared: float = 0
    masks: float = 0


LOCAL = Cost(flops=2)  # of the local metric alone


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

        targets: the patterns that the scores are for. steps: how many; by default each window is used once.
        Raises InputError for targets and windows that it cannot work with. The model is the same afterwards, bit for bit.
        """
        ...
