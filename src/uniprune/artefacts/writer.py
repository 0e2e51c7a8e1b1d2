"""Pruned checkpoints: the source's own files, with zeros.

A checkpoint's safetensors files are copied piece by piece, with the pruned weights zeroed on the way. So every other byte
is the source's: dtype, shards, tensor order, metadata; and a checkpoint larger than memory is no problem. The result is a dense
checkpoint that plain transformers, and every runtime that loads those, accepts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniprune.artefacts.masks import MasksFile
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.companion_files import copy_companions, copy_terms
from uniprune.checkpoints.layout import as_dequantised
from uniprune.checkpoints.origin import Origin
from uniprune.checkpoints.protocol import spell_digest
from uniprune.checkpoints.quantised.codes import Coded
from uniprune.errors import InputError
from uniprune.models.loading import Loaded
from uniprune.sparsity.bits import Array, apply_to_array, apply_to_codes, pack
from uniprune.storage.files import FILE, readers, sync
from uniprune.storage.outline import Piece
from uniprune.storage.safetensors_index import Entry

MASKS = "pruning/masks.safetensors"  # not beside the weights: some runtimes load every safetensors file that lies there
# Bytes of a shard that a thread has in memory at a time: few enough for its core's cache, and whole bytes of packed masks.
PIECE = 256 << 10

Views = list[tuple[str, Piece]]  # parts of a stored tensor: the matrix that each is a part of, and where in both it lies


def checkpoint_bytes(origin: Origin, weights: int = 0) -> int:
    """The size that a pruned copy will have on disk; ``weights``: bytes of a model that has no safetensors files yet."""
    return origin.files.size if origin.files else weights


# ------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    source: Loaded | Origin,
    masks: MasksFile | None,
    folder: Path,
    check: Callable[[str, str], None] | None = None,
) -> None:
    """Writes the pruned checkpoint, tokenizer and generation config into an existing, empty folder.

    masks: none leaves the weights as they are. check: called with the name and digest (``Checkpoint.digest``) of each matrix as
    it was read, from any thread; what it raises ends the writing. So a checkpoint is read once and written once.
    Raises UniPruneError if a mask has not the shape of its matrix.
    """
    origin = source.origin
    if origin is not None and origin.files:
        files = origin.files
        _copy_companions(files, folder)
    else:
        assert isinstance(source, Loaded)
        with as_dequantised(source.model):
            source.model.save_pretrained(folder)  # type: ignore[operator]
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        _spell_as_before(folder, source.tokenizer)
        files = Files(folder)
        files.layout(source.model)
    copy_terms(origin, folder)
    if masks is not None:
        _check_shapes(files, masks)
    pieces = list(_pieces(files, masks or ()))
    if check:  # parts of stored tensors are not read one by one while they are written
        for name in {name for *_, entry, inside in pieces for name, _ in inside if entry and not _alone(files, inside, entry)}:
            check(name, files.digest(name))

    def write(shard: Path, start: int, stop: int, entry: Entry | None, inside: Views) -> None:
        if masks is None or entry is None or not inside:
            _transfer(shard, folder / shard.name, start, stop)
            return
        packed = _packed(masks, inside[0][0]) if _alone(files, inside, entry) else _assembled(masks, inside, entry)
        bits = _transfer(shard, folder / shard.name, start, stop, entry, packed)
        if check and _alone(files, inside, entry):
            check(inside[0][0], spell_digest(entry.dtype, entry.shape, bits))

    with ThreadPoolExecutor(readers()) as pool:
        written = [(piece[0], pool.submit(write, *piece)) for piece in pieces]
        try:
            for shard, parts in groupby(written, key=itemgetter(0)):
                for _, part in parts:
                    part.result()
                sync(folder / shard.name)  # the disk works while the next shard is written
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _spell_as_before(folder: Path, tokenizer: Any) -> None:
    """Adds to what transformers 5 has saved how version 4 spells it, which other readers look for.

    Without ``rope_theta`` of its own MLX and transformers 4 take 10,000 for it, silently, and without the share of a head that
    is rotated another one; the tokenizer's class 4 lacks, and the one that it has in its place hands out token types unless it
    is told, which ``generate`` then refuses.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        rotary = dict(part.get("rope_parameters") or {})
        if part.get("model_type", "").startswith("gemma3") and "sliding_attention" in rotary:  # others, too, have one by layer
            part.setdefault("rope_local_base_freq", rotary["sliding_attention"]["rope_theta"])
            rotary = dict(rotary["full_attention"])
        if "rope_theta" in rotary:
            part.setdefault("rope_theta", rotary.pop("rope_theta"))
            neox = part["model_type"].startswith("gpt_neox")
            if neox:
                part.setdefault("rotary_emb_base", part["rope_theta"])
            if (share := rotary.pop("partial_rotary_factor", None)) is not None:
                part.setdefault("rotary_pct" if neox else "partial_rotary_factor", share)
            if rotary.get("rope_type", "default") != "default" or "mrope_section" in rotary:
                part.setdefault("rope_scaling", rotary)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.exists():
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts.get("tokenizer_class") == "TokenizersBackend":
            facts["tokenizer_class"] = "PreTrainedTokenizerFast"
            facts.setdefault("model_input_names", list(tokenizer.model_input_names))
            file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _check_shapes(files: Files, masks: MasksFile) -> None:
    for name in masks:
        shape, stored = masks.stored(name), files.region(name).shape
        if shape != stored:
            raise InputError(
                f"{name}: the mask is {shape}, the checkpoint's tensor {stored}; give the model that it was made for"
            )


def _pieces(files: Files, names: Iterable[str]) -> Iterator[tuple[Path, int, int, Entry | None, Views]]:
    """All bytes of the files, in order: (file, start, stop, the tensor that lies there or None, and what of it is named)."""
    units: dict[Path, list[Any]] = {shard: [] for shard in files.shards}
    for entry, inside in files.units(names):
        units[entry.file].append((entry.start, entry.stop, entry, inside))
    for shard, found in units.items():
        end, size = 0, shard.stat().st_size
        for start, stop, entry, inside in sorted(found, key=itemgetter(0, 1)):
            if end < start:
                yield shard, end, start, None, []
            yield shard, start, stop, entry, inside
            end = stop
        if end < size:
            yield shard, end, size, None, []


def _alone(files: Files, inside: Views, entry: Entry) -> bool:
    """Whether a tensor is a matrix, all of it, row by row."""
    return len(inside) == 1 and files.entry(inside[0][0]) == entry


def _packed(masks: MasksFile, name: str) -> Array:
    """A mask's bits in the order of the stored tensor."""
    return masks.packed(name) if name not in masks.transposed else pack(masks[name].T).numpy()


def _assembled(masks: MasksFile, inside: Views, entry: Entry) -> Array:
    """The bits of a tensor of which several matrices are parts, or a part of one."""
    keep = np.ones(math.prod(entry.shape), np.bool_)
    for name, piece in inside:
        mask = masks[name].T if name in masks.transposed else masks[name]
        piece.of(keep)[...] = mask[piece.box].numpy()
    return pack(torch.from_numpy(keep)).numpy()


def _transfer(
    source: Path, target: Path, start: int, stop: int, entry: Entry | None = None, packed: Array | None = None
) -> Any:
    """Copies bytes ``start`` to ``stop`` to the same place in another file, or the same one, and zeroes what the mask removes.

    entry: the tensor that lies there. packed: the mask's bits, in the order of its weights. Returns the sha256 of what lies
    beside it and of what was read, if there is a mask.
    """
    if packed is None and source == target:
        return None
    bits, buffer = None, np.empty(min(PIECE, stop - start), dtype=np.uint8)
    with source.open("rb", buffering=0) as reading, target.open("r+b", buffering=0) as writing:
        reading.seek(start)
        writing.seek(start)
        for offset in range(0, stop - start, PIECE):
            piece = buffer[: min(PIECE, stop - start - offset)]
            _all(reading.readinto, piece)
            if entry is not None and packed is not None:
                bits = bits or entry.hasher()
                bits.update(piece.data)
                _zero(piece, packed[offset // entry.width :], entry)
            _all(writing.write, piece)
    return bits


def _zero(piece: Array, packed: Array, entry: Entry) -> None:
    """Zeroes what the mask removes in some bytes of a tensor."""
    if isinstance(entry, Coded):
        apply_to_codes(piece, packed, entry.width, entry.code.zero)
    else:
        apply_to_array(piece.view(entry.uint), packed)


def _all(transfer: Callable[[Any], int | None], piece: Array) -> None:
    """A call to the system may move less than it is asked to."""
    rest = memoryview(piece)  # type: ignore[arg-type]
    while len(rest):
        moved = transfer(rest)
        if not moved:
            raise OSError(None, "a file ended before its size")
        rest = rest[moved:]


def _copy_companions(files: Files, folder: Path) -> None:
    """The files beside the weights as they are, and empty files as large as the shards."""
    copy_companions(files, folder)
    for file in files.shards:
        (folder / file.name).touch()
        os.truncate(folder / file.name, file.stat().st_size)
        (folder / file.name).chmod(FILE)
