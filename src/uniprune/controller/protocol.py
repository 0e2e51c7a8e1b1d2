"""What a controller is: what it costs and needs, what it writes, and how it makes a saliency of a local metric."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from uniprune.saliency.record import ControllerRecord as ControllerRecord

if TYPE_CHECKING:
    from torch import Tensor

    from uniprune.saliency.calibration import Calibration
    from uniprune.saliency.metrics import Metric
    from uniprune.sparsity.patterns.protocol import Pattern


@dataclass(frozen=True)
class Cost:
    """What a calibration takes beside the model, for forecasts: all of it per prunable weight.

    flops_per_token: floating-point operations per token of text; a forward pass takes 2, a backward pass 4.
    state_bytes: held in memory all the time, e.g. optimizer states or a copy of the weights; unless they lie on disk.
    disk_bytes: on disk; where blocks are read one at a time, they take the place of ``state_bytes``.
    best_bytes: on disk besides, where the states are in memory: the best so far, while an earlier best is to be kept.
    read_bytes: read in each step of states that lie on disk, or in host memory where a GPU computes.
    written_bytes: written to them in each step.
    shared_budget_read_bytes: read besides, in each step at whose target matrices share a budget.
    mask_bytes: of the masks of a step, one byte a mask bit; 0 if there are none. Where activations are computed again
        (``calibration.recompute``, for controllers with masks only), of one block's; those of all blocks then take bits.
    """

    flops_per_token: float
    state_bytes: float = 0
    disk_bytes: float = 0
    best_bytes: float = 0
    read_bytes: float = 0
    written_bytes: float = 0
    shared_budget_read_bytes: float = 0
    mask_bytes: float = 0


LOCAL = Cost(flops_per_token=2)  # of the local metric alone: one forward pass


class Controller(Protocol):
    """Corrects a local metric by what pruning does to the model; a frozen dataclass, whose fields are its settings.

    A subclass has the defaults below, which ask the least of it, and declares what differs. cost: see :class:`Cost`, without
    default. in_memory: whether it needs the whole model, and what it keeps of it, in the memory of the device that computes;
    else blocks may be there one at a time (``calibration.residency``), and states elsewhere (``calibration.offload``).
    one_process: whether it runs in one process only; else several may share the windows (``common.distributed``). comparable:
    whether its scores are on one scale, so that one budget may compare those of different matrices; then that is the default
    scope. images: whether what it computes is shown the images that go with windows (``models.blocks.last_hidden`` is), and
    leaves their place-holders out of its loss; else it is given text alone. holds_out: whether it needs a window more than
    those that it calibrates on.
    """

    cost: ClassVar[Cost]
    in_memory: ClassVar[bool] = True
    one_process: ClassVar[bool] = True
    comparable: ClassVar[bool] = False
    images: ClassVar[bool] = False
    holds_out: ClassVar[bool] = False

    def step_tokens(self, length: int) -> int:
        """Tokens of one step on windows of ``length``; by default one window's."""
        return length

    def logits(self, vocabulary: int) -> int:
        """Of a vocabulary of so many tokens, how many it computes logits of in a step; by default all."""
        return vocabulary

    @abstractmethod
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
