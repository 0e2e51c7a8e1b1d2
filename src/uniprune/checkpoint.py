"""Pruned checkpoints: the source's own files, with zeros. And the fingerprint that ties artefacts to a model.

A checkpoint is copied file by file, then the pruned weights are zeroed inside the copied safetensors files, in place and a
piece at a time. So every other byte is the source's: dtype, shards, tensor order, metadata; and a checkpoint larger than
memory is no problem. The result is a dense checkpoint that plain transformers, and every runtime that loads those, accepts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniprune import masks as masking
from uniprune.errors import InputError, UniPruneError
from uniprune.matrices import Matrices
from uniprune.models import Loaded, Origin
from uniprune.runs import sync
from uniprune.shards import NAMES, entries, key_of

REPORT = "pruning.json"  # written last: a folder without it is incomplete
MASKS = "pruning/masks.safetensors"  # not beside the weights: some runtimes load every safetensors file that lies there
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
LEFT = {REPORT, "README.md", ".gitattributes"}  # not true of the pruned model


def fingerprint(source: Loaded | Origin, names: Iterable[str], matrices: Matrices | None = None) -> str:
    """sha256 over name, shape, dtype and bits of the named matrices, as the checkpoint stores them.

    The same weights in other shards have the same fingerprint. Weights that lie in no safetensors file (GGUF, a model
    built in memory) are taken from ``matrices``.
    """
    origin = source if isinstance(source, Origin) else source.origin
    digest = hashlib.sha256()
    if origin is not None and origin.shards:
        keys = entries(origin.shards)
        ordered = sorted(names)
        found = [keys[key_of(f"{name}.weight", keys)] for name in ordered]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(lambda entry: hashlib.sha256(entry.array().data), found)
            for name, entry, one in zip(ordered, found, digests, strict=True):
                digest.update(_line(name, entry.dtype, entry.shape, one))
    else:
        assert matrices is not None
        for name in sorted(names):
            weight = matrices[name].parameter.detach().cpu().contiguous()
            bits = hashlib.sha256(weight.view(torch.uint8).numpy().data)
            digest.update(_line(name, NAMES[weight.dtype], tuple(weight.shape), bits))
    return digest.hexdigest()


def _line(name: str, dtype: str, shape: tuple[int, ...], bits: Any) -> bytes:
    return f"{name} {dtype} {shape} {bits.hexdigest()}\n".encode()


def checkpoint_bytes(origin: Origin, weights: int = 0) -> int:
    """The size that a pruned copy will have on disk; ``weights``: bytes of a model that has yet to be materialised."""
    return sum(shard.stat().st_size for shard in origin.shards) or 2 * weights


# --------------------------------------------------------------------------------------------------------- output folder


def check_output_folder(path: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raises InputError if ``path`` may not become an output folder, before any work is done.

    Only folders that this package wrote (or empty ones) are ever replaced, however the flags are set.
    """
    if source is not None:
        here, there = path.resolve(), source.resolve()
        if here == there or there in here.parents or here in there.parents:
            raise InputError(f"output {path} and model {source} overlap; give another output folder")
    if path.is_file():
        raise InputError(f"output {path} is a file; give the name of a folder")
    if path.is_dir() and any(path.iterdir()):
        if not (path / REPORT).is_file():
            raise InputError(f"output folder {path} exists and was not written by uniprune; give another name")
        if not overwrite:
            raise InputError(f"output folder {path} exists; give another name, or --overwrite")


def check_disk_space(path: Path, needed: int) -> None:
    """Raises InputError if the disk that ``path`` lies on has less than ``needed`` bytes free."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"output {path} needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; make room")


@contextmanager
def new_folder(path: Path, inside: Path | None = None) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the ``with`` block ends well, and vanishes otherwise.

    inside: where it lies, on the same disk: the folder of a run, so that who goes on with a killed run removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in inside.glob("output-*") if inside else ():
        shutil.rmtree(left)
    where: dict[str, Any] = (
        {"prefix": "output-", "dir": inside} if inside else {"prefix": f".partial-{path.name}-", "dir": path.parent}
    )
    temporary = Path(tempfile.mkdtemp(**where))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            retired = Path(tempfile.mkdtemp(**where))
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(source: Loaded | Origin, masks: Mapping[str, Tensor], transposed: Iterable[str], folder: Path) -> None:
    """Writes the pruned checkpoint, tokenizer and generation config into an existing, empty folder.

    masks: matrix name -> boolean ``[out, in]``; transposed: those whose weight is stored as ``[in, out]``.
    """
    origin = source if isinstance(source, Origin) else source.origin
    if origin is not None and origin.shards:
        _copy(origin, folder)
    else:
        assert isinstance(source, Loaded)
        source.model.save_pretrained(folder)  # type: ignore[operator]
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
    keys = entries(Origin("output", folder).shards)
    flipped = set(transposed)

    def zero(name: str) -> None:
        entry, mask = keys[key_of(f"{name}.weight", keys)], masks[name]
        stored = mask.T if name in flipped else mask
        if tuple(stored.shape) != entry.shape:
            raise UniPruneError(f"{name}: the mask is {tuple(stored.shape)}, the checkpoint's tensor {entry.shape}")
        masking.apply_to_array(entry.array("r+"), stored)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(zero, masks))
    for shard in {entry.file for entry in keys.values()}:
        sync(shard)


def _copy(origin: Origin, folder: Path) -> None:
    for file in sorted(origin.folder.iterdir()):
        if file.is_file() and file.name not in LEFT and (file.suffix not in WEIGHTS or file in origin.shards):
            shutil.copyfile(file, folder / file.name)
            (folder / file.name).chmod(0o644)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes pruning.json, the file that makes an output folder complete."""
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
