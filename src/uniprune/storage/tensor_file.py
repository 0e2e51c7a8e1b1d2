"""Safetensors files with facts as JSON in their metadata: the container of scores, masks and token files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uniprune.errors import InputError
from uniprune.storage import strict_json
from uniprune.storage.dtypes import BY_DTYPE
from uniprune.storage.files import replacing
from uniprune.storage.record import Record

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "uniprune"

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Metadata(Record):
    """What a tensor file says of itself, under the metadata key ``uniprune``; kind and format are always there."""

    @classmethod
    def checked(cls, path: Path, data: Mapping[str, Any]) -> Self:
        if missing := [name for name in ("kind", "format") if name not in data]:
            raise cls.damaged(path, f"it lacks {missing[0]!r}")
        if data["kind"] == cls.kind_name() and "base" in data and "digests" not in data:
            raise InputError(
                f"{cls.kind_name()} file {path} is damaged: it lacks 'digests', or is from before there were any; make it again"
            )
        return super().checked(path, data)

    @classmethod
    def damaged(cls, path: Path, why: object) -> InputError:
        return InputError(f"{cls.kind_name()} file {path} is damaged: {str(why)[:300]}; make it again, or fetch it again")


Kind = TypeVar("Kind", bound=Metadata)


def header(places: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Metadata | dict[str, str] | None) -> bytes:
    """How a safetensors file begins. places: type, shape and bytes of each tensor, in the order in which they follow."""
    if isinstance(metadata, Metadata):
        metadata = {KEY: json.dumps(metadata.record(), sort_keys=True)}
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, size) in places.items():
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def stream_tensors(path: Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]], facts: Metadata) -> None:
    """Writes a safetensors file one tensor at a time; ``tensors`` come in the order of ``specs``."""
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in specs.items()}
    places = {name: (BY_DTYPE[dtype].name, shape, sizes[name]) for name, (dtype, shape) in specs.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header(places, facts))
        for (name, tensor), expected in zip(tensors, specs, strict=True):
            dtype, shape = specs[expected]
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, tuple(shape))
            file.write(tensor.detach().cpu().contiguous().numpy().data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Metadata) -> None:
    """Writes tensors that are all in memory."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(path, specs, tensors.items(), facts)


@contextmanager
def open_tensors(path: Path, kind: type[Kind]) -> Iterator[tuple[Any, Kind]]:
    """An artefact of one kind: the open file and its facts.

    Raises InputError if the file is missing, not ours, of another kind, of a later format or damaged.
    """
    if path.is_dir():
        inside = path / "pruning" / f"{kind.kind_name()}.safetensors"  # where a pruned checkpoint has its masks
        remedy = inside if inside.is_file() else "a file"
        raise InputError(f"{kind.kind_name()} file {path} is a folder; give {remedy}")
    if not path.is_file():
        raise InputError(f"{kind.kind_name()} file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _facts(path, kind, (file.metadata() or {}).get(KEY))
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from None


def _facts(path: Path, kind: type[Kind], text: str | None) -> Kind:
    if text is None:
        raise InputError(f"{path} was not written by uniprune: it has no metadata {KEY!r}")
    try:
        data = strict_json.parse(text)
    except ValueError as error:
        raise kind.damaged(path, error) from None
    return kind.checked(path, data)
