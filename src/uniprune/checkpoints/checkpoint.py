"""A model's checkpoint: which stored tensors its parameters are made of, and the bits of its matrices as they are stored.

There are two kinds behind one interface: a folder of safetensors files, whose headers are read once, and the files that a model
in memory would be saved as. All that is known of a checkpoint's keys is here: a matrix is named by the key it is stored under.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from uniprune.checkpoints.layout import Computed, Layout, Located, MatrixPart, Region, as_saved, matrix_at, on_load
from uniprune.checkpoints.protocol import Array, Checkpoint, Stored, keys, spell_digest
from uniprune.checkpoints.quantised.formats import Quantised, packed_by, quantised
from uniprune.checkpoints.shards import lacking, named_in, shards_of
from uniprune.errors import InputError
from uniprune.storage.dtypes import BY_DTYPE
from uniprune.storage.outline import Outline, Piece
from uniprune.storage.safetensors_index import Entry, entries

logger = logging.getLogger(__name__)
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PACKED = "runtime.safetensors"  # in its place: a checkpoint in the runtime layout, which uniprune.accelerate opens
ROWS = 1 << 12  # that are compared at a time


class Files(Checkpoint):
    """A folder of safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._layout: Layout | None = None

    @cached_property
    def weights(self) -> Path | None:
        """The file that transformers loads, which has the weights or says where they are; None if there is none.

        A whole file comes before an index, and a name in config.json before both. Some repositories carry the weights a second
        time in another layout; those files are not part of the model.
        """
        whole, index = self.folder / WHOLE, self.folder / INDEX
        if named := named_in(self.folder / "config.json"):
            return self.folder / named
        if whole.is_file() and index.is_file():
            logger.warning("%s has both %s and %s; the first is read, as transformers does", self.folder, WHOLE, INDEX)
        return next((file for file in (whole, index) if file.is_file()), None)

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files that transformers loads; empty if there are none."""
        if self.weights is None or self.weights.suffix == ".safetensors":
            return [self.weights] if self.weights else []
        return [self.folder / name for name in sorted({*shards_of(self.weights).values()})]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by its key. Raises InputError for files that are missing, cut off or damaged."""
        return entries(self.shards)

    @cached_property
    def quantised(self) -> Quantised:
        """Which tensors are stored as codes. Raises InputError where codes and scales do not go together."""
        return quantised(self.folder, self.entries)

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """The tensors that transformers loads: what is stored as codes counts as the weights that it becomes."""
        coded = {part for parts in self.quantised.parts.values() for part in parts}
        return {key: entry for key, entry in self.entries.items() if key not in coded} | self.quantised.tensors

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(shard.stat().st_size for shard in self.shards)

    def layout(self, model: nn.Module) -> Layout:
        """Made once, for the first model that asks: those that do later are of the same files, whatever their layers became.

        Raises InputError, then, unless the files have every parameter and persistent buffer, in the model's shape.
        """
        if self._layout is None:
            shapes = {key: entry.shape for key, entry in self.tensors.items()}
            located = self.quantised.turned(on_load(model, shapes))
            self._check(model, located)
            self._layout = Layout(model, shapes, located)
        return self._layout

    def check_understood(self) -> None:
        """Raises InputError for quantised weights of which it is not known what they are, so that matrices are not found."""
        if why := self.quantised.refused or packed_by(self.entries):
            method = f" ({self.quantised.method})" if self.quantised.method else ""
            raise InputError(f"model {self.folder} is quantised{method}: {why}; give the model that it was made from")

    def _check(self, model: nn.Module, located: Located) -> None:
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        state = model.state_dict()
        missing = [n for n in state.keys() - located.keys() if not any(re.search(pattern, n) for pattern in ignored)]
        outlines = {name: place for name, place in located.items() if isinstance(place, Outline)}
        differs = [name for name, place in outlines.items() if place.shape != tuple(state[name].shape)]
        if missing or differs:
            self.check_understood()
        if missing:
            raise lacking(str(self.folder), getattr(model, "config", None), missing)
        if differs:
            raise InputError(
                f"model {self.folder}: config.json makes {differs[0]} {list(state[differs[0]].shape)}, its files have "
                f"{list(outlines[differs[0]].shape)}; correct config.json, or fetch it again"
            )

    # ---------------------------------------------------------------------------------------------------- matrices

    def __contains__(self, name: object) -> bool:
        return self._find(str(name)) is not None

    def region(self, name: str) -> Region:
        found = self._find(name)
        if found is None:
            raise InputError(f"the checkpoint has no tensor {name}; its keys are like {list(self.tensors)[:3]}")
        return found

    def _find(self, name: str) -> Region | None:
        """A matrix by its name alone, which is its key; or by what a model's parameters are made of, if a model was seen."""
        for key in keys(name):
            stack, _, number = key.removesuffix(".weight").rpartition(".")
            whole = (key, "0", 2), *(((stack, number, 3), (f"{stack}.weight", number, 3)) if number.isdigit() else ())
            for place, index, axes in whole:
                entry = self.tensors.get(place)
                if entry is not None and len(entry.shape) == axes and (axes == 2 or int(index) < entry.shape[0]):
                    *_, rows, columns = entry.shape
                    return Region(name, (rows, columns), (matrix_at(place, int(index), rows, columns),))
        part = self._layout.named.get(name) if self._layout is not None else None
        return part.region if part is not None and all(p.key in self.tensors for p in part.region.pieces) else None

    def entry(self, name: str) -> Entry | None:
        """Where the bytes of a matrix lie, row by row; None if they do not lie together."""
        region = self.region(name)
        first, (_, columns) = region.pieces[0], region.shape
        if len(region.pieces) > 1 or first.strides != (columns, 1):
            return None
        return self.tensors[first.key].part(first.offset, region.shape)

    def stored(self, name: str) -> Stored:
        if (entry := self.entry(name)) is not None:
            return _mapped(entry)
        region = self.region(name)
        first = self.tensors[region.pieces[0].key]
        size = region.shape[0] * region.shape[1] * np.dtype(first.uint).itemsize
        return Stored(first.dtype, size, lambda: self._gathered(region, first.uint).view(np.uint8))

    def nonzero(self, name: str) -> Array:
        return self.tensors[self.region(name).pieces[0].key].nonzero(self.words(name))

    def hasher(self, name: str) -> Any:
        if (entry := self.entry(name)) is not None:
            return entry.hasher()
        bits = hashlib.sha256()
        for key in dict.fromkeys(piece.key for piece in self.region(name).pieces):
            for part in self.tensors[key].auxiliary:
                bits.update(part.array().data)
        return bits

    def words(self, name: str) -> Array:
        if (entry := self.entry(name)) is not None:
            return entry.array()
        region = self.region(name)
        return self._gathered(region, self.tensors[region.pieces[0].key].uint)

    def _gathered(self, region: Region, uint: Any) -> Array:
        """The bits of a matrix that lies in several places, flat."""
        whole = np.empty(region.shape, uint)
        for piece in region.pieces:
            whole[piece.box] = piece.of(self.tensors[piece.key].array())
        return whole.reshape(-1)

    def digest(self, name: str) -> str:
        if (entry := self.entry(name)) is None:
            return super().digest(name)
        bits = hashlib.sha256()
        for part in (*entry.auxiliary, entry):
            for piece in part.pieces():
                bits.update(piece.data)
                if not part.finite(piece):
                    raise InputError(f"{name}: the weights contain NaN or infinity; the checkpoint is broken, fetch it again")
        return spell_digest(entry.dtype, entry.shape, bits)

    def rest(self, names: Iterable[str]) -> list[Stored]:
        return [_mapped(entry) for entry, inside in self.units(names) if not inside]

    def units(self, names: Iterable[str]) -> Iterator[tuple[Entry, list[tuple[str, Piece]]]]:
        """All tensors, or in place of a stack that has one of the named matrices all of its matrices, and the views of
        each that named matrices are made of."""
        used: dict[str, dict[int, list[tuple[str, Piece]]]] = {}
        for name in names:
            for piece in self.region(name).pieces:
                size = math.prod(self.tensors[piece.key].shape[-2:])
                number, offset = divmod(piece.offset, size)
                used.setdefault(piece.key, {}).setdefault(number, []).append((name, piece._replace(offset=offset)))
        for key, entry in self.tensors.items():
            if key not in used:
                yield entry, []
                continue
            size = math.prod(entry.shape[-2:])
            for number in range(math.prod(entry.shape[:-2])):
                yield entry.part(number * size, entry.shape[-2:]), used[key].get(number, [])

    # -------------------------------------------------------------------------------------------------- parameters

    def read(self, place: Outline | Computed, dtype: torch.dtype, device: torch.device, own: bool = False) -> Tensor:
        """A parameter or buffer, in a type and on a device; one that needs neither change nor arrangement is mapped.

        own: then it is a copy, which may be written.
        """
        if isinstance(place, Computed):
            return place.read(lambda key: self._tensor(key, dtype, device))
        first = place.pieces[0]
        if len(place.pieces) == 1 and first == Outline.of(first.key, self.tensors[first.key].shape).pieces[0]:
            return self._tensor(first.key, dtype, device, own)
        whole = torch.empty(place.shape, dtype=dtype, device=device)
        for piece in place.pieces:
            whole[piece.box] = self.tensors[piece.key].view(piece, dtype, device)
        return whole

    def read_matrix(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix by its name, as it is stored."""
        region, entry = self.region(name), self.entry(name)
        first = region.pieces[0]
        if entry is not None:
            whole = entry == self.tensors[first.key]
            return self._tensor(first.key, dtype, device) if whole else entry.values(dtype, device)
        matrix = torch.empty(region.shape, dtype=dtype, device=device)
        for piece in region.pieces:
            matrix[piece.box] = self.tensors[piece.key].view(piece, dtype, device)
        return matrix

    def same(self, one: str, other: str, dtype: torch.dtype) -> bool:
        """Whether two stored tensors have the same values in a type: of tied weights, transformers looks at them in the one it
        loads."""
        first, second = self.tensors[one], self.tensors[other]
        if first.shape != second.shape:
            return False
        width = math.prod(first.shape[1:])
        for start in range(0, first.shape[0], ROWS):
            some = (start * width, (min(ROWS, first.shape[0] - start), *first.shape[1:]))
            a, b = (entry.part(*some).values(dtype, torch.device("cpu")) for entry in (first, second))
            if not torch.equal(a, b):
                return False
        return True

    def _tensor(self, key: str, dtype: torch.dtype, device: torch.device, own: bool = False) -> Tensor:
        """A tensor's weights; of plain ones that need no change the file is mapped, unless they are to be the reader's own."""
        if key in self.quantised.tensors:
            return self.tensors[key].values(dtype, device)
        with safe_open(self.entries[key].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor.to(device, dtype, copy=own)


class Memory(Checkpoint):
    """What a model in memory would be saved as; its weights are as they are when they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layout = Layout(model, *as_saved(model))

    def layout(self, model: nn.Module) -> Layout:
        return self._layout

    def __contains__(self, name: object) -> bool:
        return name in self._layout.named

    def region(self, name: str) -> Region:
        return self._part(name).region

    def _part(self, name: str) -> MatrixPart:
        if name not in self._layout.named:
            raise InputError(f"the model has no matrix {name}; its matrices are like {list(self._layout.named)[:3]}")
        return self._layout.named[name]

    def stored(self, name: str) -> Stored:
        part = self._part(name)
        weight = self._model.get_parameter(part.parameter).detach()
        if part.expert is not None:
            weight = weight[part.expert]
            weight = weight[:, part.rows] if part.along else weight[part.rows]
        return _in_memory(weight.T if part.flipped else weight)

    def rest(self, names: Iterable[str]) -> list[Stored]:
        used = {self._model.get_parameter(self._part(name).parameter).data_ptr() for name in names}
        others = {tensor.data_ptr(): tensor for tensor in self._model.state_dict().values()}  # what is tied is stored once
        return [_in_memory(tensor) for pointer, tensor in others.items() if pointer not in used]


def _mapped(entry: Entry) -> Stored:
    def read() -> Array:  # the file is mapped as a whole: a tensor of no bytes cannot be
        return np.memmap(entry.file, np.uint8, "r")[entry.start : entry.stop]

    return Stored(entry.dtype, entry.stop - entry.start, read)


def _in_memory(tensor: Tensor) -> Stored:
    def read() -> Array:
        bits: Array = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return bits

    return Stored(BY_DTYPE[tensor.dtype].name, tensor.nbytes, read)


# Of the models that were made from a checkpoint's files, which these are. Others are what they would be saved as.
_FILES: WeakKeyDictionary[nn.Module, Files] = WeakKeyDictionary()


def bind(model: nn.Module, files: Files | None) -> None:
    """Says which files a model is made from."""
    if files is not None:
        _FILES[model] = files


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """The checkpoint of a model: the files that it was made from, or those that it would be saved as."""
    return _FILES.get(model) or Memory(model)
