"""A checkpoint with some of the experts: which stored tensors it has, and its files.

Where a parameter's values for each expert lie is known from the layout. What is kept takes the first experts' places in the
files: their keys where each expert has its own, their rows where one tensor has all. No value is changed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.layout import Located
from uniprune.errors import InputError
from uniprune.storage import strict_json, tensor_file
from uniprune.storage.files import sync
from uniprune.storage.outline import Outline, Piece, Shape, contiguous
from uniprune.storage.safetensors_index import Entry

Kept = Mapping[str, Sequence[int]]
"""The numbers of the experts that are kept, by the name of the parameter that has a part for each."""


class Selection(NamedTuple):
    """What a stored tensor is made of: another one, or, along an axis of it, the parts with some numbers."""

    key: str
    axis: int = 0
    numbers: tuple[int, ...] | None = None

    def shape(self, whole: Shape) -> Shape:
        """Of what is selected of a tensor."""
        return whole if self.numbers is None else (*whole[: self.axis], len(self.numbers), *whole[self.axis + 1 :])


def selected(shapes: Mapping[str, Shape], located: Located, axes: Mapping[str, int], kept: Kept) -> dict[str, Selection]:
    """The tensors of a checkpoint with the experts that are kept, by their keys, in the order of ``shapes``.

    shapes: of the tensors as they are; located: where parameters lie in them. axes: of each parameter that has a part for each
    expert, the axis. Raises InputError for one that is stored in another way than by experts.
    """
    found: dict[str, Selection | None] = {}  # None: of an expert that is not kept
    for name, axis in axes.items():
        place, numbers = located.get(name), kept[name]
        if not isinstance(place, Outline):
            raise InputError(f"{name} is computed from stored tensors, so no expert can be taken out of them")
        alone: dict[Any, dict[int, str]] = {}
        for piece in place.pieces:
            if piece.shape[axis] == place.shape[axis]:
                found[piece.key] = Selection(piece.key, _stored_axis(name, piece, axis, shapes[piece.key]), tuple(numbers))
            elif piece.shape[axis] == 1:
                where = piece.offset, piece.strides, piece.start[:axis], piece.start[axis + 1 :]
                alone.setdefault(where, {})[piece.start[axis]] = piece.key
            else:
                raise InputError(f"{name}: {piece.key} has some of its experts; it must have one, or all of them")
        for keys in alone.values():
            found |= dict.fromkeys(keys.values())
            found |= {keys[index]: Selection(keys[number]) for index, number in enumerate(numbers)}
    return {key: selection for key in shapes if (selection := found.get(key, Selection(key))) is not None}


def _stored_axis(name: str, piece: Piece, axis: int, shape: Shape) -> int:
    """The axis of a stored tensor that a parameter's axis is."""
    for stored, stride in enumerate(contiguous(shape)):
        if stride == piece.strides[axis] and shape[stored] == piece.shape[axis]:
            return stored
    raise InputError(f"{name}: its experts are no axis of {piece.key}; they cannot be taken out of it")


def stored(files: Files, tensors: Mapping[str, Selection]) -> dict[str, Selection]:
    """What these tensors are in the files: of those that are stored as codes, the codes and their scales."""
    found: dict[str, Selection] = {}
    for key, selection in tensors.items():
        layer, new = selection.key.removesuffix("weight"), key.removesuffix("weight")
        for part in files.quantised.parts.get(selection.key, (selection.key,)):
            by_expert = files.entries[part].shape[:1] == files.tensors[selection.key].shape[:1]  # not one for all of them
            found[new + part.removeprefix(layer)] = selection._replace(key=part) if by_expert else Selection(part)
    return found


def write(files: Files, tensors: Mapping[str, Selection], folder: Path, parameters: int) -> None:
    """Writes the files of a checkpoint that has these tensors, each in the file where its key was; and their index.

    parameters: how many the model then has, which an index may say.
    """
    shards: dict[Path, list[str]] = {}
    for key in tensors:
        shards.setdefault(files.entries[key].file, []).append(key)
    for shard, unsorted in shards.items():
        # Each begins at a multiple of its width, as the library's readers need, if wider types come first.
        keys = sorted(unsorted, key=lambda key: -_width(files.entries[tensors[key].key]))
        with (folder / shard.name).open("wb") as file:
            file.write(tensor_file.header({key: _outline(files, tensors[key]) for key in keys}, _metadata(shard)))
            for key in keys:
                for part in _parts(files, tensors[key]):
                    file.write(part.data)
        sync(folder / shard.name)
    if files.weights is not None and files.weights.suffix == ".json":
        index = strict_json.parse(files.weights.read_bytes())
        index["weight_map"] = {key: files.entries[key].file.name for key in tensors}
        totals = {"total_size": size(files, tensors), "total_parameters": parameters}
        if isinstance(about := index.get("metadata"), dict):
            about |= {name: total for name, total in totals.items() if name in about}
        (folder / files.weights.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def size(files: Files, tensors: Mapping[str, Selection]) -> int:
    """Bytes of the tensors."""
    return sum(_outline(files, selection)[2] for selection in tensors.values())


def _width(entry: Entry) -> int:
    """Whole bytes of an element: 0 of types that share bytes (F4), which may begin anywhere."""
    return (entry.stop - entry.start) // max(1, math.prod(entry.shape))


def _outline(files: Files, selection: Selection) -> tuple[str, Shape, int]:
    """Type, shape and bytes of a tensor."""
    entry = files.entries[selection.key]
    nbytes = entry.stop - entry.start
    if selection.numbers is not None:
        nbytes = nbytes * len(selection.numbers) // entry.shape[selection.axis]
    return entry.dtype, selection.shape(entry.shape), nbytes


def _parts(files: Files, selection: Selection) -> Iterator[np.ndarray[Any, Any]]:
    """The bytes of a tensor, in pieces."""
    entry = files.entries[selection.key]
    whole = np.memmap(entry.file, np.uint8, "r")[entry.start : entry.stop]
    if selection.numbers is None:
        yield whole
        return
    before, inside = entry.shape[: selection.axis], entry.shape[selection.axis]
    rows = whole.reshape(math.prod(before), inside, -1)
    for row in rows:
        for number in selection.numbers:
            yield row[number]


def _metadata(shard: Path) -> Any:
    """What a safetensors file says of itself, or None."""
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return strict_json.parse(file.read(length)).get("__metadata__")
