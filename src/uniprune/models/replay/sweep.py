"""All windows through one block after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uniprune.models.blocks import batches
from uniprune.models.replay.calls import Flow
from uniprune.models.replay.replay import Replay
from uniprune.storage.stash import Stash


class BlockSweep:
    """The decoder blocks of a model over a set of windows, to be run one after the other.

    flows: the inputs of the next block, one for each batch, kept in ``stash``. done: blocks that have been run over the same
    windows before; their outputs are still in the stash.
    """

    def __init__(self, replay: Replay, windows: Tensor, stash: Stash | None = None, done: int = 0) -> None:
        self._replay, self._stash, self._done = replay, stash or Stash(), done
        self._batches = batches(windows)
        self.flows = [self._first(number) for number in range(len(self._batches))]

    def _first(self, number: int) -> Flow:
        """The input that a batch has at the first block to be run."""
        slot = _slot(number, self._done)
        if self._done:
            return Flow.take(self._stash, slot, self._replay.interface.gives)
        return self._replay.enter(self._batches[number]).put(self._stash, slot)

    def over(self, windows: Tensor, stash: Stash) -> BlockSweep:
        """The same blocks over other windows, as far as these are; run them in turn."""
        return BlockSweep(self._replay, windows, stash, self._done)

    def __len__(self) -> int:
        return len(self._replay)

    def __iter__(self) -> Iterator[int]:
        """The indices of the blocks to be run; each block's weights are in memory until the next one is asked for."""
        for index in range(self._done, len(self._replay)):
            with self._replay.residency(index):
                yield index

    @torch.no_grad()
    def run(self, index: int, advance: bool = False) -> None:
        """Runs one block on the current hidden states; with ``advance`` its outputs take their place."""
        for number, flow in enumerate(self.flows):
            output = self._replay.run(index, flow.each(lambda t: t.to(self._replay.device)), self._batches[number])
            if advance:
                self.flows[number] = output.put(self._stash, _slot(number, index + 1))

    def sync(self) -> None:
        """Returns when the inputs of the next block are on the disk, if that is where they are kept."""
        self._stash.sync()


def _slot(batch: int, block: int) -> str:
    """Inputs of one block never overwrite those of the block before: until it is known to be done, they may be needed again."""
    return f"hidden-{batch}-{block % 2}"
