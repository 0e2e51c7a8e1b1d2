"""Masks files made of, and into, what other tools use: pruned checkpoints, arrays, boolean tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from uniprune.artefacts.mask_tools import Array, CheckedMasks, Dense, Record, Source, _find_weights
from uniprune.checkpoints.checkpoint import Checkpoint
from uniprune.errors import InputError, MismatchError, first_line
from uniprune.models.matrices import Matrix
from uniprune.storage import tensor_file
from uniprune.storage.files import check_disk_space, check_output_file


class PlainFacts(tensor_file.Metadata):
    """The metadata of masks for other tools; for people."""

    kind: Literal["plain masks"] = "plain masks"
    base: str
    base_name: str
    pattern: str


def from_checkpoint(
    pruned: Source, model: Source, output: Path, *, check_bits: bool = True, dtype: str | None = None, overwrite: bool = False
) -> Record:
    """Writes the masks of a pruned checkpoint: what is 0 there, or -0.0, is removed. The file is bound to the dense model.

    A weight that is 0 in the dense model counts as removed, too. check_bits: refuse a checkpoint whose other weights are not
    bitwise the dense model's; turn it off for one that was tuned after pruning. dtype: as for :func:`verify`.
    Raises InputError, or MismatchError naming the first matrix that is not the model's.
    """
    check_output_file(output, overwrite, Path(pruned), Path(model))
    dense = Dense(model, dtype)
    shapes = {name: dense.checkpoint.region(name).shape for name in dense.matrices}
    weights = _find_weights(pruned, shapes)

    def masks() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            alive = weights.alive(name)
            if check_bits and not _same(weights, dense.checkpoint, name, alive):
                raise MismatchError(f"{pruned} has other kept weights in {name} than {model}; if it was tuned: --no-check-bits")
            mask = torch.from_numpy(alive).reshape(shape)
            yield name, mask.T if dense.matrices[name].stored_transposed else mask

    return dense.write(output, list(shapes), masks(), f"zeros of {pruned}")


def _same(pruned: Checkpoint, dense: Checkpoint, name: str, alive: Array) -> bool:
    """Whether a matrix has the same weights in two checkpoints where they are not 0, bit for bit."""
    beside = pruned.hasher(name).digest() == dense.hasher(name).digest()
    return beside and not (alive & (pruned.words(name) != dense.words(name))).any()


def to_plain(
    masks: Path, output: Path, model: Source | None = None, *, dtype: str | None = None, overwrite: bool = False
) -> Record:
    """Writes masks for other tools: a safetensors file with a uint8 tensor of 0 and 1 (keep) for each weight.

    A tensor has the key and the shape that the checkpoint has the weight by, ``[in, out]`` where that is transposed.
    model: the masks must be of it, and the keys are its own; without it they are ``<matrix>.weight``. dtype: as for verify.
    """
    check_output_file(output, overwrite, masks, *([] if model is None else [Path(model)]))
    file = CheckedMasks(masks)
    dense = None if model is None else Dense(model, dtype).of(file)
    keys = {name: dense.checkpoint.key(name) if dense is not None else f"{name}.weight" for name in file}
    specs = {keys[name]: (torch.uint8, file.stored(name)) for name in file}
    check_disk_space(output, file.size)
    tensors = ((keys[n], (mask.T if n in file.transposed else mask).to(torch.uint8)) for n, mask in file.items())
    plain = PlainFacts(base=file.facts.base, base_name=file.facts.base_name, pattern=file.facts.pattern)
    tensor_file.stream_tensors(output, specs, tensors, plain)
    return {"pattern": file.facts.pattern, "matrices": len(file)}


def from_plain(plain: Path, model: Source, output: Path, *, dtype: str | None = None, overwrite: bool = False) -> Record:
    """Writes a masks file, bound to a model, from other tools' masks: .safetensors or .npz, of booleans or integers 0 and 1.

    An array is named by the checkpoint's key, and then has the shape of that tensor, or by the matrix, and then is
    ``[out, in]``; packed bits are refused. Matrices without an array stay dense. dtype: as for :func:`verify`.
    Raises InputError naming the first array that is not a mask.
    """
    check_output_file(output, overwrite, plain, Path(model))
    given = _read(plain, lambda file: set(file.keys()))
    dense = Dense(model, dtype)
    named = {name: spelled for name in dense.matrices for spelled in (name, dense.checkpoint.key(name)) if spelled in given}
    left = sorted(given - {*named.values()})
    if left or not named:
        raise InputError(f"{plain} must have an array for each matrix to prune of {model}, and no other; left over: {left[:3]}")
    masks = ((name, _read_mask(plain, spelled, dense.matrices[name])) for name, spelled in named.items())
    return dense.write(output, list(named), masks, f"masks of {plain.name}")


def _read(path: Path, read: Callable[[Any], Any]) -> Any:
    """What ``read`` gets from a file of plain masks."""
    try:
        with np.load(path, allow_pickle=False) if path.suffix == ".npz" else safe_open(path, "np") as file:
            return read(file)
    except Exception as error:  # of damaged files, zipfile, numpy and safetensors raise all kinds
        raise InputError(f"{path} cannot be read as .npz or .safetensors: {first_line(error)}") from error


def _read_mask(path: Path, spelled: str, matrix: Matrix) -> Tensor:
    array = _read(path, lambda file: np.asarray(file[spelled] if path.suffix == ".npz" else file.get_tensor(spelled)))
    flip = matrix.stored_transposed and spelled != matrix.name
    shape = matrix.shape[::-1] if flip else matrix.shape
    if array.shape != shape or array.dtype.kind not in "bui" or ((array != 0) & (array != 1)).any():
        raise InputError(f"{path}: {spelled} is {array.dtype} {list(array.shape)}, not {list(shape)} of booleans or 0 and 1")
    mask = torch.from_numpy(array != 0)
    return mask.T if flip else mask
