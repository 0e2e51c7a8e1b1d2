"""What ``bench`` found, as data: the schema of its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from uniprune.speed.timing import Missing, Result
from uniprune.storage.record import Count, Record

MARGIN = 0.05  # a smaller gain is none, however well it is measured


class Speeds(Record):
    """What ``bench`` returns. shapes: of the matrices, ``out x in``, and how many there are. verdicts: a sentence for each kind
    of mask. missing: kernels that do not run here, and why. notes: how far the figures go.
    """

    kind: Literal["bench"] = "bench"
    model: str
    device: str
    threads: Count
    shapes: dict[str, Count]
    dtypes: list[str]
    batches: list[Count]
    results: list[Result]
    missing: list[Missing]
    verdicts: list[str]
    notes: list[str]
    seconds: float
    versions: dict[str, str]

    @property
    def place(self) -> str:
        """The machine."""
        return f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def fastest(self, kinds: Sequence[str | None], sparsity: float) -> Result | None:
        """The best product with masks of these kinds, at the highest sparsity measured that they reach; None if none was."""
        reached = [row for row in self.results if row.kind in kinds and row.sparsity <= sparsity + MARGIN / 10]
        highest = max((row.sparsity for row in reached), default=None)
        return max((row for row in reached if row.sparsity == highest), key=lambda row: row.low, default=None)
