"""GGUF files, of which several may be one model: ``model-00001-of-00003.gguf``, as llama.cpp splits large ones."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Sequence
from pathlib import Path

from uniprune.errors import InputError

SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)", re.IGNORECASE)
MOST = 1000  # parts
COUNT = 8  # where a file says how many tensors it has


def siblings(name: str) -> list[str]:
    """The files of the model that a file is of, in their order; the file alone if it is all of it."""
    found = SPLIT.fullmatch(name)
    if found is None or not 0 < int(found["count"]) <= MOST:
        return [name]
    count = int(found["count"])
    return [f"{found['stem']}-{number:05d}-of-{count:05d}{found['ending']}" for number in range(1, count + 1)]


def first_parts(files: Collection[str]) -> list[str]:
    """The GGUF files among some, of those that are one model the first."""
    return sorted(file for file in files if file.lower().endswith(".gguf") and siblings(file)[0] == file)


def parts(file: Path) -> list[Path]:
    """The files of the model that a file is of. Raises InputError unless they lie beside it."""
    every = [file.with_name(name) for name in siblings(file.name)]
    if missing := [part for part in every if not part.is_file()]:
        raise InputError(f"model {file} is one of {len(every)} files, and {missing[0]} is not there; put it beside")
    return every


def merge(files: Sequence[Path], target: Path) -> None:
    """Writes the files of a model as one: transformers reads no more.

    The first has all settings; of the tensors, headers and bytes are copied, and only their offsets change. Raises InputError
    without the package gguf.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(f"model {files[0]}: reading GGUF needs the gguf package; pip install 'uniprune[gguf]'") from None
    readers = [GGUFReader(file) for file in files]
    first = readers[0]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    end = max(field.offset + sum(part.nbytes for part in field.parts) for field in first.fields.values())
    head = bytearray(first.data[:end])
    struct.pack_into("<Q", head, COUNT, len(tensors))
    offset = 0
    for tensor in tensors:
        head += b"".join(part.tobytes() for part in tensor.field.parts[:-1]) + struct.pack("<Q", offset)
        offset += _padded(tensor.n_bytes, first.alignment)
    with target.open("wb") as file:
        file.write(head.ljust(_padded(len(head), first.alignment), b"\0"))
        for tensor in tensors:
            file.write(tensor.data.tobytes().ljust(_padded(tensor.n_bytes, first.alignment), b"\0"))


def _padded(size: int, alignment: int) -> int:
    return -(-int(size) // alignment) * alignment
