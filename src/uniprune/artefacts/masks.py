"""Masks files: one bit a weight, bound to their model; docs/masks.md specifies the format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from uniprune.artefacts.binding import Binding
from uniprune.sparsity import bits as bits_module
from uniprune.storage.record import Shape
from uniprune.storage.tensor_file import Metadata, open_tensors, stream_tensors


class MasksFacts(Binding, Metadata):
    """The metadata of a masks file. pattern: what the masks claim to be."""

    kind: Literal["masks"] = "masks"
    pattern: str
    shapes: dict[str, Shape]


def digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and bits of masks, in the order of the names: of a file's and of those in memory the same."""
    found = hashlib.sha256()
    for name in sorted(masks):
        found.update(f"{name} {tuple(masks[name].shape)}\n".encode())
        found.update(bits_module.pack(masks[name]).cpu().numpy().data)
    return found.hexdigest()


class MasksFile(Mapping[str, Tensor]):
    """Masks on disk, unpacked one matrix at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_tensors(path, MasksFacts) as (_, self.facts):
            self.shapes: dict[str, tuple[int, int]] = dict(self.facts.shapes)
        self.transposed = set(self.facts.transposed)

    def __getitem__(self, name: str) -> Tensor:
        return bits_module.unpack(torch.from_numpy(self.packed(name)), self.shapes[name])

    def stored(self, name: str) -> tuple[int, int]:
        """The shape of a matrix in the checkpoint."""
        return self.shapes[name][::-1] if name in self.transposed else self.shapes[name]

    def packed(self, name: str) -> bits_module.Array:
        """The bits of one mask, as ``bits.pack`` makes them; a private mapping of the file."""
        with safe_open(self._path, framework="pt") as file:
            bits: bits_module.Array = file.get_tensor(name).numpy()
            return bits

    def removed(self) -> dict[str, float]:
        """The fraction of weights that each mask removes."""
        sizes = {name: rows * columns for name, (rows, columns) in self.shapes.items()}
        return {name: 1 - bits_module.kept_count(self.packed(name)) / size for name, size in sizes.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_masks(
    path: Path, cut: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, int]], binding: Binding, pattern: str
) -> dict[str, float]:
    """Writes masks as they are cut, packed; returns the fraction of weights that each one removes.

    binding: to the model, that of a scores or masks file say. pattern: what the masks claim to be.
    """
    removed: dict[str, float] = {}

    def packed() -> Iterator[tuple[str, Tensor]]:
        for name, mask in cut:
            removed[name] = bits_module.sparsity_of(mask)
            yield name, bits_module.pack(mask).cpu()

    specs = {name: (torch.uint8, (-(-rows * columns // 8),)) for name, (rows, columns) in shapes.items()}
    facts = MasksFacts(
        base=binding.base,
        base_name=binding.base_name,
        digests=binding.digests,
        transposed=binding.transposed,
        prunable=binding.prunable,
        pattern=pattern,
        shapes=dict(shapes),
    )
    stream_tensors(path, specs, packed(), facts)
    return removed
