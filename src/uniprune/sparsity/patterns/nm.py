"""N of every M consecutive inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor

from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns.protocol import BasePattern, MaskFn, Pattern, Saliency
from uniprune.sparsity.top import top


@dataclass(frozen=True)
class NM(BasePattern):
    """Keeps ``n`` of every ``m`` consecutive inputs of a row. ``NM(1, 4)`` removes three quarters."""

    n: int
    m: int
    local = True
    by_row = True

    def __post_init__(self) -> None:
        if not (isinstance(self.n, Integral) and isinstance(self.m, Integral) and 1 <= self.n <= self.m):
            raise InputError(f"pattern {self} is impossible: N:M keeps N of every M inputs, so 1 <= N <= M (e.g. 2:4)")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def read(cls, text: str, scope: Scope | None, default: Scope) -> NM | None:
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        if match and scope is not None:
            raise InputError(f"scope {scope!r} does not go with {text}: N:M is cut within groups of {match[2]} inputs")
        return cls(int(match[1]), int(match[2])) if match else None

    @property
    def spelling(self) -> tuple[str, Scope | None]:
        return str(self), None

    @property
    def sparsity(self) -> float:
        return (self.m - self.n) / self.m  # 1 - 4 / 5 is not 0.2

    @property
    def sample_group(self) -> int:
        return self.m

    def unsupported(self, rows: int, columns: int) -> str | None:
        return None if columns % self.m == 0 else f"{columns} inputs are not divisible by {self.m}"

    def removes(self, rows: int, columns: int) -> int:
        return rows * columns // self.m * (self.m - self.n)

    def prepare(self, saliency: Saliency) -> MaskFn:
        return self._create

    def _create(self, name: str, scores: Tensor) -> Tensor:
        if reason := self.unsupported(*scores.shape):
            raise InputError(f"{name}: {reason}, as {self} needs; leave it out with --exclude")
        return top(scores.reshape(-1, self.m), self.n).reshape(scores.shape)


DENSE = NM(1, 1)


def spell(pattern: Pattern) -> str:
    """A pattern as people name it."""
    return "dense" if pattern == DENSE else str(pattern)
