"""A model whose decoder blocks are spread over the processes: each holds a part of every block, and the whole while it runs.

The parts, and how they come together, are FSDP2's (``torch.distributed.fsdp``): ``fully_shard`` cuts each parameter of a block
along its first dimension into as many pieces as there are processes; ``unshard`` gathers a block in every process, ``reshard``
drops all but the process's own pieces. On CUDA that is NCCL's all-gather, elsewhere gloo's.

Gathering is a collective operation: every process must enter the same blocks in the same order, or all of them hang. They do,
because only the passes enter blocks (``replay.sweep``, ``controller.passes``), and no decision behind a pass is local to one
process: each sweep runs all blocks, first to last or last to first, whatever windows a process has; the number of steps, the
targets, early stops and back-offs follow from sums over all processes; a resumed run starts from the first process's saved
state; and all processes choose this execution together (``job.execution.choose``). Weights that are needed while their block is
not gathered are read from the checkpoint, which is not a collective operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from uniprune.checkpoints.origin import Origin
from uniprune.common import distributed
from uniprune.models.loading import Loaded
from uniprune.models.residency.streaming import Streamer, opened
from uniprune.storage.stash import give_back_memory


class Sharder(Streamer):
    """Brings the parameters of one block at a time together, from the processes that hold them.

    All processes make one, and enter the same blocks in the same order. Parameters outside the blocks are whole in each.
    Raises InputError as Streamer does.
    """

    def __init__(self, model: nn.Module, origin: Origin, dtype: torch.dtype, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(model, origin, dtype, device)
        mesh = init_device_mesh(device.type, (distributed.count(),))
        self._units: list[FSDPModule] = []
        for index in range(len(self._blocks)):
            # FSDP2 gathers a module whenever it is called. Blocks are also bypassed, and called many times in their turn, so
            # the module is one around the block, which nobody calls.
            unit = nn.Sequential(self.fill(index))
            self._units.append(fully_shard(unit, mesh=mesh))
            give_back_memory()
        self._last = 0

    @contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        """Inside ``with``, the block's parameters are whole; the block that a sweep comes to next is on its way."""
        self._units[index].unshard()
        step, self._last = index - self._last, index
        if abs(step) == 1 and 0 <= index + step < len(self._units):
            self._units[index + step].unshard(async_op=True)
        try:
            yield
        finally:
            self._units[index].reshard()
            give_back_memory()


def open_sharded(origin: Origin, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> Loaded:
    """A model as :func:`streaming.open_streamed` gives it, but its blocks lie in the memory of all processes.

    Raises InputError for a model that is not in safetensors files, and as Sharder does.
    """
    return opened(Sharder, origin, tokenizer, dtype, device)
