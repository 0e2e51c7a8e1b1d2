"""Pruned checkpoints: the source's own files, with zeros. And the fingerprint that ties artefacts to a model.

A checkpoint's safetensors files are written anew piece by piece, with the pruned weights zeroed on the way. So every other byte
is the source's: dtype, shards, tensor order, metadata; and a checkpoint larger than memory is no problem. The result is a dense
checkpoint that plain transformers, and every runtime that loads those, accepts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniprune.artefacts.masks import MasksFile
from uniprune.errors import InputError, UniPruneError
from uniprune.models.loading import Loaded, Origin
from uniprune.models.matrices import Matrices
from uniprune.sparsity import bits as bits_module
from uniprune.storage.files import REPORT, sync
from uniprune.storage.safetensors_index import NAMES, Entry, entries, key_of

MASKS = "pruning/masks.safetensors"  # not beside the weights: some runtimes load every safetensors file that lies there
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
# Bytes of a shard that a thread has in memory at a time: few enough for its core's cache, and whole bytes of packed masks.
PIECE = 256 << 10
LEFT = {REPORT, "README.md", ".gitattributes"}  # not true of the pruned model


def digests(source: Loaded | Origin, names: Iterable[str], matrices: Matrices | None = None) -> dict[str, str]:
    """Of each named matrix its dtype, shape and the sha256 of its bits, as the checkpoint stores them; sorted by name.

    Weights that lie in no safetensors file (GGUF, a model built in memory) are taken from ``matrices``.
    Raises InputError naming the first matrix in a file with NaN or infinity: it is read for its digest anyway.
    """
    origin = source if isinstance(source, Origin) else source.origin
    ordered = sorted(names)
    if origin is not None and origin.shards:
        keys = entries(origin.shards)
        found = [keys[key_of(f"{name}.weight", keys)] for name in ordered]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(ordered, pool.map(_digest_of, ordered, found), strict=True))
    assert matrices is not None
    lines = []
    for name in ordered:
        weight = matrices[name].parameter.detach().cpu().contiguous()
        bits = hashlib.sha256(weight.view(torch.uint8).numpy().data)
        lines.append(_digest(NAMES[weight.dtype], tuple(weight.shape), bits))
    return dict(zip(ordered, lines, strict=True))


def _digest_of(name: str, entry: Entry) -> str:
    bits = hashlib.sha256()
    for piece in entry.pieces():
        bits.update(piece.data)
        if not entry.finite(piece):
            raise InputError(f"{name}: the weights contain NaN or infinity; the checkpoint is broken, fetch it again")
    return _digest(entry.dtype, entry.shape, bits)


def fingerprint(digests: Mapping[str, str]) -> str:
    """One sha256 for a model's matrices. The same weights in other shards have the same fingerprint."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(dtype: str, shape: tuple[int, ...], bits: Any) -> str:
    return f"{dtype} {shape} {bits.hexdigest()}"


def checkpoint_bytes(origin: Origin, weights: int = 0) -> int:
    """The size that a pruned copy will have on disk; ``weights``: bytes of a model that has yet to be materialised."""
    return sum(shard.stat().st_size for shard in origin.shards) or 2 * weights


# ------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    source: Loaded | Origin,
    masks: MasksFile | None,
    folder: Path,
    check: Callable[[str, str], None] | None = None,
) -> None:
    """Writes the pruned checkpoint, tokenizer and generation config into an existing, empty folder.

    masks: none leaves the weights as they are. check: called with the name and digest (see :func:`digests`) of each matrix as
    it was read, from any thread; what it raises ends the writing. So a checkpoint is read once and written once.
    Raises UniPruneError if a mask has not the shape of its matrix.
    """
    origin = source if isinstance(source, Origin) else source.origin
    if origin is not None and origin.shards:
        _copy_beside(origin, folder)
    else:
        assert isinstance(source, Loaded)
        source.model.save_pretrained(folder)  # type: ignore[operator]
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        origin = Origin("output", folder)
    keys = entries(origin.shards)
    pruned = {key_of(f"{name}.weight", keys): name for name in masks or ()}
    tensors = keys.unstacked(pruned)

    def write(shard: Path, start: int, stop: int, key: str | None) -> None:
        name = pruned.get(key or "")
        if masks is None or name is None:
            _transfer(shard, folder / shard.name, start, stop)
            return
        entry, packed = tensors[key or ""], masks.packed(name)
        shape = masks.shapes[name]
        if name in masks.transposed:  # the mask is [out, in], the tensor [in, out]
            packed, shape = bits_module.pack(masks[name].T).numpy(), shape[::-1]
        if shape != entry.shape:
            raise UniPruneError(f"{name}: the mask is {shape}, the checkpoint's tensor {entry.shape}")
        bits = _transfer(shard, folder / shard.name, start, stop, entry.uint, packed)
        if check:
            check(name, _digest(entry.dtype, entry.shape, bits))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = [(piece[0], pool.submit(write, *piece)) for piece in _pieces(origin.shards, tensors)]
        try:
            for shard, parts in groupby(written, key=itemgetter(0)):
                for _, part in parts:
                    part.result()
                sync(folder / shard.name)  # the disk works while the next shard is written
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pieces(files: Iterable[Path], keys: Mapping[str, Entry]) -> Iterator[tuple[Path, int, int, str | None]]:
    """All bytes of the files, in order: (file, start, stop, the key of the tensor that lies there or None)."""
    for file in files:
        end = 0
        inside = [(entry.start, entry.stop, key) for key, entry in keys.items() if entry.file == file]
        for start, stop, key in sorted(inside):
            if end < start:
                yield file, end, start, None
            yield file, start, stop, key
            end = stop
        if end < file.stat().st_size:
            yield file, end, file.stat().st_size, None


def _transfer(
    source: Path, target: Path, start: int, stop: int, kind: Any = np.uint8, packed: bits_module.Array | None = None
) -> Any:
    """Copies bytes ``start`` to ``stop`` to the same place in another file, or the same one, and zeroes what the mask removes.

    kind: unsigned integers as large as the weights. packed: the mask's bits, in the order of the weights. Returns the sha256 of
    what was read, if there is a mask.
    """
    if packed is None and source == target:
        return None
    bits, buffer = hashlib.sha256(), np.empty(min(PIECE, stop - start), dtype=np.uint8)
    with source.open("rb", buffering=0) as reading, target.open("r+b", buffering=0) as writing:
        reading.seek(start)
        writing.seek(start)
        for offset in range(0, stop - start, PIECE):
            piece = buffer[: min(PIECE, stop - start - offset)]
            _all(reading.readinto, piece)
            if packed is not None:
                bits.update(piece.data)
                weights = piece.view(kind)
                bits_module.apply_to_array(weights, packed[offset // weights.itemsize // 8 :])
            _all(writing.write, piece)
    return bits if packed is not None else None


def _all(transfer: Callable[[Any], int | None], piece: bits_module.Array) -> None:
    """A call to the system may move less than it is asked to."""
    rest = memoryview(piece)  # type: ignore[arg-type]
    while len(rest):
        moved = transfer(rest)
        if not moved:
            raise OSError(None, "a file ended before its size")
        rest = rest[moved:]


def beside(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that go with the weights into a pruned one: config, tokenizer and the like."""
    return [
        file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in LEFT and file.suffix not in WEIGHTS
    ]


def _copy_beside(origin: Origin, folder: Path) -> None:
    """The files beside the weights as they are, and empty files as large as the shards."""
    for file in beside(origin.folder):
        shutil.copyfile(file, folder / file.name)
        (folder / file.name).chmod(0o644)
    for file in origin.shards:
        (folder / file.name).touch()
        os.truncate(folder / file.name, file.stat().st_size)
        (folder / file.name).chmod(0o644)
