"""Safetensors files with facts as JSON in their metadata: the container of scores, masks and token files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uniprune.errors import InputError
from uniprune.storage import strict_json
from uniprune.storage.files import replacing

FORMAT = 1
KEY = "uniprune"
DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32"}

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def stream_tensors(path: Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Writes a safetensors file one tensor at a time; ``tensors`` come in the order of ``specs``.

    facts: JSON data, written under the metadata key ``uniprune``.
    """
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps({"format": FORMAT, **facts}, sort_keys=True)}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), expected in zip(tensors, specs, strict=True):
            dtype, shape = specs[expected]
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, tuple(shape))
            file.write(tensor.detach().cpu().contiguous().numpy().data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors that are all in memory."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(path, specs, tensors.items(), facts)


@contextmanager
def open_tensors(path: Path, kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An artefact of one kind (``scores``, ``masks``, ``tokens``): the open file and its facts.

    Raises InputError if the file is missing, not ours, of another kind, of a later format or from before there were digests.
    """
    if not path.is_file():
        raise InputError(f"{kind} file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _facts(path, kind, (file.metadata() or {}).get(KEY))
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from None


def _facts(path: Path, kind: str, text: str | None) -> dict[str, Any]:
    if text is None:
        raise InputError(f"{path} was not written by uniprune: it has no metadata {KEY!r}")
    try:
        facts = strict_json.parse(text)
        strict_json.check(facts, {"kind": str, "format": int})
    except ValueError as error:
        raise damaged(kind, path, error) from None
    if facts["kind"] != kind:
        raise InputError(f"{path} holds {facts['kind'][:80]}, not {kind}")
    if facts["format"] > FORMAT:
        raise InputError(f"{path} has format {facts['format']}, this version reads up to {FORMAT}; upgrade")
    if "base" in facts and "digests" not in facts:
        raise InputError(f"{kind} file {path} is damaged: it lacks 'digests', or is from before there were any; make it anew")
    return facts


def damaged(kind: str, path: Path, reason: object) -> InputError:
    """The error for an artefact that does not agree with itself."""
    return InputError(f"{kind} file {path} is damaged: {str(reason)[:300]}; make it again, or fetch it again")
