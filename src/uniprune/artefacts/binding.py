"""What ties scores and masks to the model that they were made for. docs/masks.md specifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from uniprune.storage.record import Count, Facts

if TYPE_CHECKING:
    from uniprune.models.matrices import Matrices


class Binding(Facts):
    """A model's pruned matrices, by the bits of their weights.

    base: their fingerprint. base_name: what the model was called, for people. digests: matrix name -> dtype, shape and hash of
    the stored tensor. transposed: the matrices that the checkpoint stores as ``[in, out]``. prunable: weights of the model that
    could have been chosen, these included, if they were counted.
    """

    base: str
    base_name: str
    digests: dict[str, str]
    transposed: list[str]
    prunable: Count | None = None

    @classmethod
    def of(cls, matrices: Matrices, digests: Mapping[str, str], name: str, prunable: int) -> Binding:
        """The binding to these matrices of a model called ``name``. digests: as ``Checkpoint.digests`` gives them."""
        transposed = [key for key, matrix in matrices.items() if matrix.stored_transposed]
        found = dict(digests)
        return cls(base=fingerprint(found), base_name=name, digests=found, transposed=transposed, prunable=prunable)

    @property
    def made_for(self) -> str:
        """The model, as errors name it."""
        return f"{self.base_name}, {self.base[:12]}"


def fingerprint(digests: Mapping[str, str]) -> str:
    """One sha256 for a model's matrices. The same weights in other shards have the same fingerprint."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
