"""Masks files made of, and into, what other tools use: their masks in their formats, and pruned checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uniprune.artefacts.mask_formats import FORMATS, ExportFacts, Foreign, marked, write
from uniprune.artefacts.mask_tools import (
    KERNELS,
    Array,
    CheckedMasks,
    Dense,
    ModelPath,
    Record,
    check_has_model,
    check_keeps_type,
    find_weights,
    kept_per,
)
from uniprune.checkpoints import hub
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.layout import Region
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.protocol import Checkpoint
from uniprune.errors import InputError, MismatchError
from uniprune.models.matrices import Matrix
from uniprune.storage.files import check_disk_space, check_output_file, path_of

ENDINGS = {end for format in FORMATS.values() for end in format.files}  # of masks in a file, which are no name on the Hub


def import_masks(
    source: ModelPath,
    model: ModelPath,
    output: Path,
    *,
    check_bits: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Writes a masks file, bound to a dense model, from another tool's masks or from a pruned checkpoint's zeros.

    source: a file or folder in one of the formats of docs/masks.md, which are told apart by their keys; or a pruned checkpoint:
    a folder, a GGUF file or one on the Hub. check_bits: as for :func:`from_checkpoint`. dtype: as for :func:`verify`.
    """
    path = path_of(source)
    if not path.exists() and path.suffix.lower() not in ENDINGS and hub.parse(str(source)) is not None:
        path = resolve(source).path
    if path.suffix.lower() == ".gguf" or (path.is_dir() and not marked(Files(path).entries)):
        return from_checkpoint(source, model, output, check_bits=check_bits, dtype=dtype, overwrite=overwrite)
    return from_foreign(path, model, output, dtype=dtype, overwrite=overwrite)


def from_checkpoint(
    pruned: ModelPath,
    model: ModelPath,
    output: str | Path,
    *,
    check_bits: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Writes the masks of a pruned checkpoint: what is 0 there, or -0.0, is removed. The file is bound to the dense model.

    A weight that is 0 in the dense model counts as removed, too. check_bits: refuse a checkpoint whose other weights are not
    bitwise the dense model's; turn it off for one that was tuned after pruning. dtype: as for :func:`verify`.
    Raises InputError, or MismatchError naming the first matrix that is not the model's.
    """
    output = path_of(output)
    check_output_file(output, overwrite, path_of(pruned), path_of(model))
    origin, found = resolve(model), resolve(pruned)
    if origin.files:
        check_keeps_type(found, dtype)  # the type is for whichever is a GGUF file
    dense = Dense(origin, None if origin.files else dtype)
    shapes = {name: dense.checkpoint.region(name).shape for name in dense.matrices}
    weights = find_weights(found, shapes, dtype)

    def masks() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            nonzero = weights.nonzero(name)
            if check_bits and not _same(weights, dense.checkpoint, name, nonzero):
                raise MismatchError(f"{pruned} has other kept weights in {name} than {model}; if it was tuned: --no-check-bits")
            mask = torch.from_numpy(nonzero).reshape(shape)
            yield name, mask.T if dense.matrices[name].stored_transposed else mask

    return dense.write(output, list(shapes), masks(), f"zeros of {pruned}")


def _same(pruned: Checkpoint, dense: Checkpoint, name: str, nonzero: Array) -> bool:
    """Whether a matrix has the same weights in two checkpoints where they are not 0, bit for bit."""
    same_scales = pruned.hasher(name).digest() == dense.hasher(name).digest()
    return same_scales and not (nonzero & (pruned.words(name) != dense.words(name))).any()


def from_foreign(
    source: str | Path, model: ModelPath, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Record:
    """Writes a masks file, bound to a model, from another tool's masks; their pattern is N:M if they are that, exactly.

    A mask is named by the checkpoint's key, and then has the shape of that tensor, also of one that several matrices are parts
    of (a stack of experts); or by the matrix, and then is ``[out, in]``. Matrices without a mask stay dense. Masks of other
    weights may not remove any that is not 0 anyway. dtype: as for :func:`verify`. Raises InputError naming the first mask that
    cannot be one.
    """
    source, output = path_of(source), path_of(output)
    check_output_file(output, overwrite, source, path_of(model))
    given, dense = Foreign(source), Dense(model, dtype)
    named = {
        name: spelled
        for name in dense.matrices
        for spelled in (name, f"{name}.weight", dense.checkpoint.key(name))
        if spelled in given
    }
    whole = Wholes(given, dense, named)
    names = [name for name in dense.matrices if name in named or name in whole]
    left = sorted({*given} - {*named.values()})
    if not names:
        raise InputError(f"{source} has no mask of any matrix of {model}; its keys are like {left[:3]}")
    for weight in left:
        _check_harmless(given, weight, dense, whole)

    def masks() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, _mask_of(given, named[name], dense.matrices[name]) if name in named else whole.mask(name)

    pattern = _pattern(masks()) or f"masks of {source.name}"
    return {"format": given.name, **dense.write(output, names, masks(), pattern)}


def _mask_of(given: Foreign, spelled: str, matrix: Matrix) -> Tensor:
    flip = matrix.stored_transposed and spelled != matrix.name
    mask = given.mask(spelled, matrix.shape[::-1] if flip else matrix.shape)
    return mask.T if flip else mask


def _pattern(masks: Iterator[tuple[str, Tensor]]) -> str | None:
    """The N:M that kernels have which every mask is exactly."""
    possible = {*KERNELS}
    for _, mask in masks:
        possible = {nm for nm in possible if not nm.unsupported(*mask.shape) and bool((kept_per(mask, nm.m) == nm.n).all())}
    return next((str(nm) for nm in KERNELS if nm in possible), None)


class Wholes:
    """Masks of stored tensors that prunable matrices are parts of: stacks of experts, projections stored as one.

    alone: the matrices that have a mask of their own, and its key. keys: of these masks -> those of the tensors.
    """

    def __init__(self, given: Foreign, dense: Dense, alone: Mapping[str, str]) -> None:
        self._given, self._dense, taken = given, dense, {*alone.values()}
        self._regions: dict[str, Region] = {name: dense.checkpoint.region(name) for name in dense.matrices if name not in alone}
        keys = {piece.key for region in self._regions.values() for piece in region.pieces}
        spelled = {key: next((one for one in (key, f"{key}.weight") if one in given), None) for key in keys}
        self._spelled = {key: one for key, one in spelled.items() if one and one not in taken and dense.shape(key)}
        self.keys = {one: key for key, one in self._spelled.items()}
        self._read = lru_cache(2)(self._mask)  # of a stack all matrices are asked for, one after the other

    def __contains__(self, name: str) -> bool:
        """Whether a matrix without a mask of its own is, at least in part, in a tensor that has one."""
        return any(piece.key in self._spelled for piece in self._regions[name].pieces)

    def mask(self, name: str) -> Tensor:
        """The mask ``[out, in]`` of a matrix; what lies in a tensor without one is kept."""
        region = self._regions[name]
        keep = np.ones(region.shape, np.bool_)
        for piece in region.pieces:
            if piece.key in self._spelled:
                keep[piece.box] = piece.of(self._read(piece.key))
        mask = torch.from_numpy(keep)
        return mask.T if self._dense.matrices[name].stored_transposed else mask

    def outside(self, weight: str, shape: tuple[int, ...]) -> Array:
        """Which elements of the tensor that a mask's key stands for, in its shape, are in no matrix that is masked by it."""
        outside = np.ones(shape, np.bool_)
        for region in self._regions.values():
            for piece in region.pieces:
                if self._spelled.get(piece.key) == weight:
                    piece.of(outside.reshape(-1))[...] = False
        return outside

    def _mask(self, key: str) -> Array:
        """The mask of a stored tensor, flat."""
        mask: Array = self._given.mask(self._spelled[key], self._dense.shape(key) or ()).numpy().reshape(-1)
        return mask


def _check_harmless(given: Foreign, weight: str, dense: Dense, whole: Wholes) -> None:
    """Raises InputError if a mask removes a weight that is not 0, but of the matrices that take theirs from it."""
    key = whole.keys.get(weight)
    nonzero = dense.nonzero(key or weight)
    if nonzero is None or (nonzero & ~given.mask(weight, nonzero.shape).numpy() & whole.outside(weight, nonzero.shape)).any():
        what = f"{given.path} has a mask of {weight}, which"
        if key:
            raise InputError(f"{what} removes weights that are not prunable, or have another mask; correct it")
        raise InputError(f"{what} is not among the prunable matrices of {dense.origin}; leave it out")


def export_masks(
    masks: str | Path,
    output: str | Path,
    format: str = "boolean",
    model: ModelPath | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Writes masks for another tool, in one of the formats of docs/masks.md.

    A mask has the key and the shape that the checkpoint has the weight by, ``[in, out]`` where that is transposed.
    model: the masks must be of it, and the keys are its own; without it they are ``<matrix>.weight``. dtype: as for verify.
    """
    masks, output = path_of(masks), path_of(output)
    if format not in FORMATS:
        raise InputError(f"format {format!r:.100} is unknown; use one of {', '.join(FORMATS)}")
    if output.suffix not in (files := FORMATS[format].files):
        raise InputError(f"output {output}: masks in format {format} are in a file that ends in {' or '.join(files)}")
    check_has_model(dtype, model)
    sources = [masks, *([] if model is None else [path_of(model)])]
    check_output_file(output, overwrite, *sources, suffix=output.suffix)
    file = CheckedMasks(masks)
    dense = None if model is None else Dense(model, dtype).of(file)
    keys = {name: dense.checkpoint.key(name) if dense is not None else f"{name}.weight" for name in file}
    check_disk_space(output, file.size // (1 if FORMATS[format].order is None else 8))
    stored = ((keys[name], mask.T if name in file.transposed else mask) for name, mask in file.items())
    facts = ExportFacts(base=file.facts.base, base_name=file.facts.base_name, pattern=file.facts.pattern)
    write(output, format, {keys[name]: file.stored(name) for name in file}, stored, facts)
    return {"format": format, "pattern": file.facts.pattern, "matrices": len(file)}
