"""What is asked of a checkpoint, whatever it lies in: which stored tensors parameters are made of, and the bits of matrices."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from uniprune.checkpoints.layout import Layout, Region
from uniprune.storage.dtypes import BY_NAME
from uniprune.storage.files import readers

Array = np.ndarray[Any, Any]


class Stored(NamedTuple):
    """A stored tensor, or a matrix of it: safetensors' name of its type, bytes, and what reads them."""

    dtype: str
    size: int
    read: Callable[[], Array]


class Checkpoint(ABC):
    """The tensors of a model as they are stored, or would be."""

    @abstractmethod
    def layout(self, model: nn.Module) -> Layout:
        """Where the parameters of a model lie; it may be on the meta device, for only its structure counts."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a matrix of a name."""

    @abstractmethod
    def region(self, name: str) -> Region:
        """Where a matrix lies. Raises InputError if there is none of that name."""

    @abstractmethod
    def stored(self, name: str) -> Stored:
        """A matrix by its name, row by row as it is stored. Raises InputError as :meth:`region`."""

    @abstractmethod
    def rest(self, names: Iterable[str]) -> list[Stored]:
        """The tensors, and the matrices of stacks of them, that are none of the named matrices."""

    def key(self, name: str) -> str:
        """The key of the tensor that a matrix is; of a matrix that is only a part of one, the key that would be its own."""
        key = self.region(name).pieces[0].key
        return key if key in keys(name) else f"{name}.weight"

    def words(self, name: str) -> Array:
        """The bits of a matrix's weights as they are stored: unsigned integers, flat. They may be mapped from a file."""
        stored = self.stored(name)
        return stored.read().view(BY_NAME[stored.dtype].uint)

    def nonzero(self, name: str) -> Array:
        """Which weights of a matrix are not 0, flat; -0.0 is 0, too."""
        nonzero: Array = self.words(name) << 1 != 0
        return nonzero

    def hasher(self, name: str) -> Any:
        """A sha256 of what beside the bits of a matrix's weights decides on them: its scales, if it has some."""
        return hashlib.sha256()

    def digest(self, name: str) -> str:
        """The type, the shape and the sha256 of a matrix's scales and bits, as they are stored."""
        stored, bits = self.stored(name), self.hasher(name)
        bits.update(stored.read().data)
        return spell_digest(stored.dtype, self.region(name).shape, bits)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """Of each named matrix its digest, sorted by name.

        Raises InputError naming the first matrix in a file with NaN or infinity: it is read for its digest anyway.
        """
        with self.digesting(names) as found:
            return found()

    @contextmanager
    def digesting(self, names: Iterable[str]) -> Iterator[Callable[[], dict[str, str]]]:
        """Inside ``with``, the digests are made by other threads; the function given waits for them, as :meth:`digests`."""
        pool = ThreadPoolExecutor(readers())
        made = {name: pool.submit(self.digest, name) for name in sorted(names)}
        try:
            yield lambda: {name: digest.result() for name, digest in made.items()}
        finally:
            pool.shutdown(cancel_futures=True)


def keys(name: str) -> tuple[str, str]:
    """The keys that a matrix of a name may have as a tensor of its own: some checkpoints lack the outermost prefix."""
    return f"{name}.weight", f"{name.partition('.')[2]}.weight"


def spell_digest(dtype: str, shape: tuple[int, ...], bits: Any) -> str:
    return f"{dtype} {shape} {bits.hexdigest()}"
