"""What ties scores and masks to the model that they were made for. docs/masks.md specifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from uniprune.checkpoints.origin import ModelSource
from uniprune.errors import MismatchError
from uniprune.models.loading import DTYPES
from uniprune.storage.dtypes import BY_DTYPE
from uniprune.storage.record import Count, Facts

if TYPE_CHECKING:
    from uniprune.models.matrices import Matrices

WORDS = {BY_DTYPE[dtype].name: word for word, dtype in DTYPES.items()}  # types as digests spell them, and as people do

Shape = tuple[int, ...]


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

    def check_matrices(self, shapes: Mapping[str, Shape], matrices: Matrices, what: object, model: object) -> None:
        """As :func:`check_shapes`; and a model is to store them the way round that it did.

        The shape of a square one does not tell: gpt-oss has experts of as many inputs as outputs, as ``[in, out]`` in bfloat16,
        ``[out, in]`` in MXFP4.
        """
        check_shapes(shapes, {name: matrix.shape for name, matrix in matrices.items()}, what, model)
        for name in shapes:
            if matrices[name].stored_transposed != (name in self.transposed):
                raise MismatchError(
                    f"{what} was made for another model: {model} stores {name} the other way round, inputs for outputs"
                )

    def check_digests(
        self, found: Mapping[str, str], what: object, model: ModelSource, remedy: str = "give that model"
    ) -> None:
        """Raises MismatchError unless a model's weights are those that ``what`` was made for. found: some of its digests.

        Weights of a GGUF file have the type that they were read in; the error then says which one it has to be.
        """
        of_gguf = model.origin is not None and not model.origin.files
        for name, digest in found.items():
            if digest == self.digests[name]:
                continue
            made, read = (WORDS.get(text.partition(" ")[0]) for text in (self.digests[name], digest))
            if of_gguf and made and made != read:
                raise MismatchError(
                    f"{what} was made with weights in {made}, and {model} was read in {read}; give --dtype {made}"
                )
            raise MismatchError(
                f"{what} was made for another model ({self.made_for}) than {model}, which has other weights in {name}; {remedy}"
            )


def check_shapes(shapes: Mapping[str, Shape], there: Mapping[str, Shape], what: object, model: object) -> None:
    """Raises MismatchError unless a model has all the matrices that ``what`` was made for. there: those that it has."""
    for name, shape in shapes.items():
        found = there.get(name)
        if found != shape:
            but = f", but one of {found}" if found else ""
            raise MismatchError(f"{what} was made for another model: {model} has no matrix {name} of shape {shape}{but}")


def fingerprint(digests: Mapping[str, str]) -> str:
    """One sha256 for a model's matrices. The same weights in other shards have the same fingerprint."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
