"""A fraction of tiles, each of which is kept or removed whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor

from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns.protocol import BasePattern, Limits, MaskFn, Saliency, Search, Shape, Sizes
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.threshold import Bounds, thresholds
from uniprune.sparsity.views import View


@dataclass(frozen=True)
class Tiled(BasePattern):
    """Removes whole tiles of ``height`` rows and ``width`` inputs, those with the lowest sums of scores.

    For kernels that skip blocks of zeros (BSR). of: how many tiles go, out of which budget group; a row is one of tiles.
    """

    of: Unstructured
    height: int
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.of, Unstructured):
            raise InputError(f"of tiles a fraction goes, not {self.of}; give Tiled(Unstructured(0.8), 16, 16)")
        if not (isinstance(self.height, Integral) and isinstance(self.width, Integral)) or min(self.height, self.width) < 1:
            raise InputError(f"pattern {self} is impossible: tiles have 1 row and 1 input at least (e.g. 0.8@16x16)")

    def __str__(self) -> str:
        return f"{self.of} of {self.height}x{self.width} tiles"

    @classmethod
    def read(cls, text: str, scope: Scope | None, default: Scope) -> Tiled | None:
        match = re.fullmatch(r"([^@]+)@(\d{1,9})x(\d{1,9})", text)
        of = Unstructured.read(match[1], scope, default) if match else None
        return cls(of, int(match[2]), int(match[3])) if match and of else None

    @property
    def spelling(self) -> tuple[str, Scope | None]:
        return f"{self.sparsity}@{self.height}x{self.width}", self.of.scope

    @property
    def sparsity(self) -> float:
        return self.of.sparsity

    @property
    def scope(self) -> Scope:
        return self.of.scope

    @property
    def local(self) -> bool:
        return self.of.local

    @property
    def sample_group(self) -> int:
        return self.width if self.height == 1 else 0

    def unsupported(self, rows: int, columns: int) -> str | None:
        fits = rows % self.height == 0 and columns % self.width == 0
        return None if fits else f"{rows} x {columns} weights are not divisible into {self.height}x{self.width} tiles"

    def removes(self, rows: int, columns: int) -> int:
        return self.of.removes(rows // self.height, columns // self.width) * self.height * self.width

    def group(self, name: str) -> str:
        return self.of.group(name)

    def prepare(self, saliency: Saliency) -> MaskFn:
        return self._tile(self.of.prepare(View(saliency, self.sums)))

    def prepare_from_sample(self, sample: Saliency) -> MaskFn:
        return self._tile(self.of.prepare_from_sample(View(sample, self.sums)))

    def removable(self, shape: Shape, floor: float, ceiling: float) -> Bounds:
        least, most = self.of.removable((shape[0] // self.height, shape[1] // self.width), floor, ceiling)
        return least * self.height * self.width, most * self.height * self.width

    def for_budget(self, saliency: Saliency, sizes: Sizes, removed: int, limits: Limits, search: Search = thresholds) -> MaskFn:
        area = self.height * self.width
        tiles = {name: sizes[name] // area for name in saliency}
        return self._tile(self.of.for_budget(View(saliency, self.sums), tiles, removed // area, limits, search))

    def sums(self, name: str, scores: Tensor) -> Tensor:
        """The sums ``[out / height, in / width]`` of scores ``[out, in]``."""
        rows, columns = scores.shape
        if reason := self.unsupported(rows, columns):
            raise InputError(f"{name}: {reason}; leave it out with --exclude")
        tiles = scores.reshape(rows // self.height, self.height, columns // self.width, self.width)
        return tiles.sum((1, 3))

    def _tile(self, create: MaskFn) -> MaskFn:
        def tiles(name: str, scores: Tensor) -> Tensor:
            mask = create(name, self.sums(name, scores))
            return mask.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)

        return tiles
