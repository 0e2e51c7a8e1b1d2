"""Masks as other tools have them: what their files look like, told apart by the keys in them (docs/masks.md)."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from uniprune.checkpoints.checkpoint import Files
from uniprune.errors import InputError, first_line
from uniprune.storage import tensor_file
from uniprune.storage.files import replacing

PICKLED = (".pt", ".pth", ".bin")
NESTED = ("model_state_dict", "state_dict")  # where a file that holds more has a model's state
META = "__meta__"


@dataclass(frozen=True)
class Format:
    """How a tool keeps masks.

    A mask's key is the weight's, without ``drops`` at its end, and ``tail``. order: of the bits that eight weights are packed
    into; None if a mask has a value for each weight. by_row: whether each row begins with a byte of its own. shape: what stands
    in place of ``tail`` in the key of the weight's shape. weight_tail: what does in the key of the weight itself, where weights
    other than a layer's ``weight`` may be masked. files: endings of the files that masks are exported to.
    """

    tail: str = ""
    drops: str = ""
    order: Literal["big", "little"] | None = None
    by_row: bool = False
    shape: str | None = None
    weight_tail: str | None = None
    files: tuple[str, ...] = (".safetensors", *PICKLED)

    @property
    def mark(self) -> str:
        """The end of a key by which a file of this format is known."""
        return (".weight" if self.weight_tail else "") + (self.tail or self.shape or "")

    def key(self, weight: str, tail: str | None = None) -> str:
        """The key of a weight's mask; or of what else there is of it."""
        return weight.removesuffix(self.drops) + (self.tail if tail is None else tail)

    def masks(self, keys: Iterable[str]) -> dict[str, str]:
        """Keys of weights -> those of their masks."""
        keys, found = {*keys}, {}
        for key in sorted(keys):
            if key.endswith(self.tail) and key != META and not (self.shape and key.endswith(self.shape)):
                weight = key.removesuffix(self.tail)
                weight += "" if weight.endswith(self.drops) else self.drops
                if self.weight_tail is None or weight.endswith(".weight") or weight + self.weight_tail in keys:
                    found[weight] = key
        return found

    def packed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a mask's packed bits."""
        return (*shape[:-1], -(-shape[-1] // 8)) if self.by_row else (-(-math.prod(shape) // 8),)

    def encode(self, mask: Tensor) -> Tensor:
        """A mask as this format has it: packed bits, or a boolean for each weight."""
        if self.order is None:
            return mask
        bits = (mask if self.by_row else mask.flatten()).contiguous().numpy()
        return torch.from_numpy(np.packbits(bits, axis=-1, bitorder=self.order))

    def decode(self, found: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The boolean mask of a weight of a shape. Raises ValueError if it is none."""
        if found.layout != torch.strided or found.is_meta or found.is_quantized:
            raise ValueError("it is no plain tensor")
        if tuple(found.shape) == shape:
            if ((found != 0) & (found != 1)).any():
                raise ValueError("it is not all 0 and 1")
            return found != 0
        if self.order is None or found.dtype != torch.uint8 or tuple(found.shape) != self.packed(shape):
            raise ValueError(f"the weight is {list(shape)}")
        bits = np.unpackbits(found.contiguous().numpy(), axis=-1, bitorder=self.order)
        used = shape[-1] if self.by_row else math.prod(shape)
        if bits[..., used:].any():
            raise ValueError("bits are set beyond its last weight")
        return torch.from_numpy(bits[..., :used].astype(bool)).reshape(shape)


# The first whose mark a file has counts; ``boolean`` takes any.
FORMATS = {
    "modelopt": Format("._weight_mask", ".weight"),
    "torch-prune": Format("_mask", weight_tail="_orig"),
    "compressed-tensors": Format(".bitmask", ".weight", "little", by_row=True, shape=".shape", files=(".safetensors",)),
    "maskllm": Format(".mask", order="big", files=(".npz",)),
    "patch": Format(order="big", shape=".__shape__", files=(".npz",)),
    "boolean": Format(files=(".safetensors",)),
}


def has(keys: Iterable[str], mark: str) -> bool:
    return any(key.endswith(mark) for key in keys)


def marked(keys: Iterable[str]) -> bool:
    """Whether some keys are those of masks, and not of weights."""
    keys = {*keys}
    return any(format.mark and has(keys, format.mark) for format in FORMATS.values())


class Foreign(Mapping[str, Tensor]):
    """Masks of another tool: a file, or a folder of safetensors files; keys of weights -> tensors as they are there.

    Raises InputError if it cannot be read. Of pickled files tensors alone are made (torch's ``weights_only``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = self._guarded(lambda: _opened(path))
        self.name = next((name for name, format in FORMATS.items() if has(self._read, format.mark)), "boolean")
        self.format = FORMATS[self.name]
        self._keys = self.format.masks(self._read)

    def __getitem__(self, weight: str) -> Tensor:
        tensor: Tensor = self._guarded(self._read[self._keys[weight]])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def mask(self, weight: str, shape: tuple[int, ...]) -> Tensor:
        """The boolean mask of a weight. Raises InputError if there is another thing in its place."""
        found = self[weight]
        try:
            if (stated := self.shape(weight)) not in (None, shape):
                raise ValueError(f"its weight is {list(stated or ())} there, {list(shape)} in the model")
            return self.format.decode(found, shape)
        except (ValueError, RuntimeError) as error:
            what = f"{str(found.dtype).removeprefix('torch.')} {[*found.shape]}"
            raise InputError(f"{self.path}: {self._keys[weight]} is {what}, no mask of 0 and 1: {first_line(error)}") from None

    def shape(self, weight: str) -> tuple[int, ...] | None:
        """The shape that the file says a weight has."""
        key = None if self.format.shape is None else self.format.key(weight, self.format.shape)
        if key not in self._read:
            return None
        stated = self._guarded(self._read[key])
        return tuple(stated.flatten().tolist()) if stated.numel() < 8 else ()

    def _guarded(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except InputError:
            raise
        except Exception as error:  # of damaged files zipfile, numpy, torch and safetensors raise all kinds
            kinds = f".npz, .safetensors, {', '.join(PICKLED)}"
            raise InputError(f"{self.path} cannot be read as masks ({kinds}): {first_line(error)}") from error


Readers = Mapping[str, Callable[[], Tensor]]


def _opened(path: Path) -> Readers:
    """What reads each tensor of a file or folder."""
    if path.is_dir():
        return {key: read for shard in Files(path).shards for key, read in _safetensors(shard).items()}
    if not path.is_file():
        raise InputError(f"{path} cannot be read as masks: there is no such file")
    if path.suffix == ".npz":
        arrays = np.load(path, allow_pickle=False)
        return {key: partial(_array, arrays, key) for key in arrays.files}
    if path.suffix in PICKLED:
        return {key: partial(_itself, tensor) for key, tensor in _state(path).items()}
    return _safetensors(path)


def _safetensors(path: Path) -> Readers:
    file: Any = safe_open(path, framework="pt")
    return {key: partial(file.get_tensor, key) for key in [*file.keys()]}


def _array(arrays: Any, key: str) -> Tensor:
    return torch.from_numpy(arrays[key])


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch saved; of nothing else than tensors objects are made.

    They are mapped from the file, but for one in torch's old format, which has no places to map.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    while isinstance(state, dict) and (inner := next((key for key in NESTED if isinstance(state.get(key), dict)), None)):
        state = state[inner]
    if not isinstance(state, dict):
        raise InputError(f"{path} cannot be read as masks: it holds {type(state).__name__}, no state dict")
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


# ------------------------------------------------------------------------------------------------------------- writing


class ExportFacts(tensor_file.Metadata):
    """What an exported file says of itself, where its format has room for that; for people."""

    kind: Literal["exported masks"] = "exported masks"
    base: str
    base_name: str
    pattern: str


def write(
    path: Path, name: str, shapes: Mapping[str, tuple[int, ...]], masks: Iterable[tuple[str, Tensor]], facts: ExportFacts
) -> None:
    """Writes masks in a format. shapes: of the weights by their keys, in the order of ``masks``.

    All but pickled files are written mask by mask.
    """
    format = FORMATS[name]
    tensors = (pair for weight, mask in masks for pair in _tensors(format, weight, mask))
    if path.suffix == ".npz":
        about = {META: np.array(json.dumps(facts.record(), sort_keys=True))} if name == "patch" else {}
        _write_npz(path, about, tensors)
    elif path.suffix in PICKLED:
        with replacing(path) as temporary:
            torch.save(dict(tensors), temporary)
    else:
        specs = {key: spec for weight, shape in shapes.items() for key, spec in _specs(format, weight, shape).items()}
        tensor_file.stream_tensors(path, specs, tensors, facts)


def _tensors(format: Format, weight: str, mask: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield format.key(weight), format.encode(mask)
    if format.shape is not None:
        yield format.key(weight, format.shape), torch.tensor(mask.shape)


def _specs(format: Format, weight: str, shape: tuple[int, ...]) -> tensor_file.Specs:
    """Type and shape of what :func:`_tensors` yields."""
    packed = (torch.bool, shape) if format.order is None else (torch.uint8, format.packed(shape))
    stated = {} if format.shape is None else {format.key(weight, format.shape): (torch.int64, (len(shape),))}
    return {format.key(weight): packed, **stated}


def _write_npz(path: Path, about: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """An archive of arrays, compressed, as numpy reads them."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in chain(about.items(), ((key, tensor.numpy()) for key, tensor in tensors)):
            with archive.open(_member(key), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _member(key: str) -> zipfile.ZipInfo:
    """With no time, so that equal masks are equal bytes."""
    member = zipfile.ZipInfo(f"{key}.npy")
    member.compress_type = zipfile.ZIP_DEFLATED
    return member
