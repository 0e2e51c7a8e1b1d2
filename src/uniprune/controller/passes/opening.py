"""The passes for a calibration: in memory, or block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uniprune.controller.passes.protocol import Passes
from uniprune.controller.passes.resident import Resident
from uniprune.controller.passes.streamed import Streamed
from uniprune.controller.straight_through import StraightThrough
from uniprune.models.matrices import find_blocks
from uniprune.models.replay.replay import Replay
from uniprune.storage.stash import Stash

if TYPE_CHECKING:
    from uniprune.saliency.calibration import Calibration
    from uniprune.storage.runs import Run


def open_passes(calibration: Calibration, run: Run) -> Passes:
    """The passes of a calibration's model, with a network that has no masks yet. run: where hidden states of blocks may lie."""
    network, (_, blocks) = StraightThrough(calibration.matrices), find_blocks(calibration.model)
    if not calibration.streamed:
        return Resident(calibration.model, blocks, network, calibration.recompute)
    replay = Replay.probed(calibration.model, blocks, calibration.windows, calibration.residency)
    return Streamed(calibration.model, replay, network, Stash(run.aside()))
