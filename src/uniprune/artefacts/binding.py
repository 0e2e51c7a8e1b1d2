"""What ties scores and masks to the model that they were made for."""

from __future__ import annotations

from uniprune.storage.record import Facts


class Binding(Facts):
    """A model's pruned matrices, by the bits of their weights; docs/masks.md specifies it.

    base: their fingerprint. base_name: what the model was called, for people. digests: matrix name -> dtype, shape and hash of
    the stored tensor. transposed: the matrices that the checkpoint stores as ``[in, out]``.
    """

    base: str
    base_name: str
    digests: dict[str, str]
    transposed: list[str]

    @property
    def made_for(self) -> str:
        """The model, as errors name it."""
        return f"{self.base_name}, {self.base[:12]}"
