"""Masks files as things of their own: verify, compare, combine, count and convert them. docs/masks.md specifies the format.

Everything streams: one matrix is in memory at a time, as packed bits where that will do. Outputs are checked before the work
starts, and appear whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uniprune.artefacts.binding import Binding, fingerprint
from uniprune.artefacts.masks import MasksFacts, MasksFile, write_masks
from uniprune.checkpoints.checkpoint import Files, checkpoint_of
from uniprune.checkpoints.origin import Origin, resolve
from uniprune.checkpoints.protocol import Checkpoint
from uniprune.common.matrix_names import split_at_block
from uniprune.errors import InputError, MismatchError
from uniprune.models import loading
from uniprune.models.matrices import find_matrices
from uniprune.sparsity import bits
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import MaskFn
from uniprune.sparsity.patterns.ruled import Ruled
from uniprune.sparsity.structure import spelled
from uniprune.sparsity.views import View
from uniprune.storage import safetensors_index
from uniprune.storage.files import check_output_file, path_of

KERNELS = (NM(2, 4), NM(4, 8))  # patterns that there are kernels for; they take groups with fewer, too

Array = np.ndarray[Any, Any]
ModelPath = str | Path
Record = dict[str, Any]


class CheckedMasks(MasksFile):
    """A masks file that is complete and agrees with itself, in the order of its tensors; else InputError when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            super().__init__(path)
            found = safetensors_index.entries([path])
            _check_facts(self.facts, found)
        except ValueError as error:
            raise MasksFacts.damaged(path, error) from None
        self.shapes = {name: self.shapes[name] for name in found}

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(rows * columns for rows, columns in self.shapes.values())


def _check_facts(facts: MasksFacts, entries: Mapping[str, safetensors_index.Entry]) -> None:
    """Raises ValueError unless the facts are of the file's tensors."""
    shapes, transposed, digests = facts.shapes, facts.transposed, facts.digests
    if not entries or not entries.keys() == shapes.keys() == digests.keys() or not entries.keys() >= {*transposed}:
        raise ValueError("its masks, shapes, digests and transposed matrices are not of the same names")
    if facts.base != fingerprint(digests):
        raise ValueError("its base is not the fingerprint that its digests make")
    for name, entry in entries.items():
        rows, columns = shape = shapes[name]
        count = -(-rows * columns // 8)
        if (entry.dtype, entry.shape) != ("U8", (count,)):
            raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, which is no mask of {list(shape)}")
        stored = shape[::-1] if name in transposed else shape
        if not re.fullmatch(rf"\w+ {re.escape(str(stored))} [0-9a-f]{{64}}", digests[name]):
            raise ValueError(f"{name} has a digest that is not of {stored}")
        used = rows * columns % 8  # bits beyond these would be counted as kept weights
        if used and np.fromfile(entry.file, np.uint8, 1, offset=entry.stop - 1)[0] >> used:
            raise ValueError(f"{name} has bits set beyond its last weight")


def _about(file: CheckedMasks) -> dict[str, str]:
    """What the masks are of."""
    return {"base": file.facts.base, "base_name": file.facts.base_name, "pattern": file.facts.pattern}


def verify(
    masks: str | Path, model: ModelPath | None = None, pruned: ModelPath | None = None, *, dtype: str | None = None
) -> Record:
    """Checks all that a masks file says; returns what was checked, and the realised sparsity.

    Always: the file is complete, its names, shapes and sizes agree, and its masks have the pattern it claims, whole tiles,
    exact budgets and rules included. Other claims (of a union, say), and sparsities of six digits, which may have been rounded,
    cannot be checked: ``checked`` then lacks ``pattern``.
    model: the file was made for it: names, shapes, orientation, bits of the weights. dtype: only for sources that are not
    safetensors. pruned: in this checkpoint, or GGUF file, every weight that a mask removes is 0; quantised or not.
    Raises InputError or MismatchError naming the first matrix at fault.
    """
    check_has_model(dtype, model)
    masks = path_of(masks)
    file = CheckedMasks(masks)
    create = _check_pattern(file)
    weights = None
    if pruned is not None:
        found = resolve(pruned)
        weights = find_weights(found, {name: file.stored(name) for name in file}, None)
        check_orientation(found, file)
    if model is not None:
        Dense(model, dtype).of(file)
    kept = 0
    for name, mask in file.items():
        kept += int(mask.sum())
        if create:
            _compare(file, name, mask, create)
        if weights is not None:
            nonzero = weights.nonzero(name)
            keep = (mask.T if name in file.transposed else mask).numpy().reshape(-1)
            if left := np.count_nonzero(nonzero & ~keep):
                raise MismatchError(f"{pruned} was not pruned by {masks}: {name}: {left} weights that it removes are not 0")
    asked = {"pattern": create, "model": model, "pruned": pruned}
    return {
        "format": file.facts.format,
        **_about(file),
        "checked": ["file", *(name for name, item in asked.items() if item is not None)],
        "matrices": len(file),
        "sparsity": 1 - kept / file.size,
    }


def _check_pattern(file: CheckedMasks) -> MaskFn | None:
    """What creates the pattern that masks claim to have, from themselves as scores; None for a claim that cannot be checked.

    A mask has a pattern if, and only if, the pattern creates that very mask from it.
    """
    try:
        pattern = spelled(file.facts.pattern)
        if isinstance(pattern, Ruled):
            pattern.check(file.shapes)
        return None if pattern is None else pattern.prepare(View(file, lambda _, mask: mask.float()))
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None


def _compare(file: CheckedMasks, name: str, mask: Tensor, create: MaskFn) -> None:
    """Raises InputError at the first weight of a mask that its pattern would not keep, or would."""
    claim = f"{file.path}: {name} is not {file.facts.pattern}"
    try:
        wrong = (create(name, mask.float()) != mask).nonzero()
    except InputError as error:
        raise InputError(f"{claim}: {error}") from None
    if len(wrong):
        row, column = wrong[0].tolist()
        what = "would not keep" if mask[row, column] else "would keep"
        raise InputError(f"{claim}, which {what} the weight in row {row}, input {column}")


def kept_per(mask: Tensor, run: int) -> Array:
    """How many weights a mask keeps in each ``run`` of consecutive inputs: a row, or a group of N:M."""
    counts: Array = np.einsum("rk->r", mask.contiguous().numpy().view(np.uint8).reshape(-1, run), dtype=np.int32)
    return counts


def find_weights(source: ModelPath | Origin, shapes: Mapping[str, tuple[int, ...]], dtype: str | None) -> Checkpoint:
    """A pruned checkpoint, if it has these matrices in these shapes: as it stores them, or dequantised from a GGUF file."""
    origin = resolve(source)
    if origin.files is None:
        dense = Dense(source, dtype)
        checkpoint, missing = dense.checkpoint, shapes.keys() - dense.matrices.keys()
    else:
        checkpoint, missing = origin.files, set(loading.find_names(origin, shapes))
    for name, shape in shapes.items():
        if name in missing or checkpoint.region(name).shape != shape:
            if origin.files is not None:
                origin.files.check_understood()
            raise MismatchError(f"{source} has no matrix {name} of shape {shape}")
    return checkpoint


def check_orientation(origin: Origin, file: CheckedMasks) -> None:
    """Raises MismatchError if a model stores a square matrix the other way round than the one that masks were made for."""
    square = {name: shape for name, shape in file.shapes.items() if len({*shape}) == 1}
    if square:
        matrices = find_matrices(loading.skeleton(origin))
        known = {name: shape for name, shape in square.items() if name in matrices}
        file.facts.check_matrices(known, matrices, file.path, origin)


def diff(a: str | Path, b: str | Path, *, force: bool = False) -> Record:
    """Counts the weights that both files keep, only ``a`` and only ``b``, and their Jaccard similarity, in all and by matrix.

    The similarity is what both keep / what either keeps, and 1 where neither keeps anything.
    Raises InputError for files of different matrices, and MismatchError for different base models unless ``force``.
    """
    a, b = path_of(a), path_of(b)
    first, second = CheckedMasks(a), CheckedMasks(b)
    same = _check_comparable(first, second, force)
    matrices = {}
    for name in first:
        one, other = first.packed(name), second.packed(name)
        both = bits.kept_count(one & other)
        matrices[name] = _overlap(both, bits.kept_count(one) - both, bits.kept_count(other) - both)
    total = _overlap(*(sum(found[key] for found in matrices.values()) for key in ("both", "only_a", "only_b")))
    return {"a": _about(first), "b": _about(second), "same_base": same, **total, "matrices": matrices}


def _overlap(both: int, only_a: int, only_b: int) -> Record:
    either = both + only_a + only_b
    return {"both": both, "only_a": only_a, "only_b": only_b, "jaccard": both / either if either else 1.0}


def intersect(files: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> Record:
    """Writes masks that keep what all of the files keep; returns their pattern and realised sparsity.

    Of N:M masks at most N of every M are left: fewer than N:M says, but kernels for N:M take them.
    Raises InputError for files of different matrices, MismatchError for different base models.
    """
    return _combine("intersection", np.bitwise_and, list(map(path_of, files)), path_of(output), overwrite)


def union(files: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> Record:
    """Writes masks that keep what any of the files keeps; returns their pattern and realised sparsity.

    Of N:M masks up to M of every M may be left, and kernels for N:M do not take those. Raises as :func:`intersect`.
    """
    return _combine("union", np.bitwise_or, list(map(path_of, files)), path_of(output), overwrite)


def _combine(kind: str, operation: Callable[..., Array], paths: Sequence[Path], output: Path, overwrite: bool) -> Record:
    check_output_file(output, overwrite, *paths)
    if len(paths) < 2:
        raise InputError(f"{kind} of {len(paths)} masks files: give two or more")
    files = [CheckedMasks(path) for path in paths]
    first = files[0]
    for other in files[1:]:
        _check_comparable(first, other)

    def combined(name: str) -> Array:
        return reduce(operation, (file.packed(name) for file in files))

    sparsity = 1 - sum(bits.kept_count(combined(name)) for name in first) / first.size  # a second pass: the header goes first
    parts = " and ".join(f"({file.facts.pattern})" for file in files)
    pattern = f"{kind} of {parts}, sparsity {sparsity:.6g}"
    masks = ((name, bits.unpack(torch.from_numpy(combined(name)), shape)) for name, shape in first.shapes.items())
    write_masks(output, masks, first.shapes, first.facts, pattern)
    return {"pattern": pattern, "matrices": len(first), "sparsity": sparsity}


def _check_comparable(a: CheckedMasks, b: CheckedMasks, force: bool = False) -> bool:
    """Whether two files are of one base model; raises InputError or MismatchError if they cannot be compared."""
    for name in a.shapes | b.shapes:
        one, other = (file.shapes.get(name, "missing") for file in (a, b))
        if one != other:
            raise InputError(f"{a.path} and {b.path} are of different matrices: {name} is {one} and {other}")
    same = a.facts.base == b.facts.base
    if not same and not force:
        names = " and ".join(f"{file.facts.base_name} ({file.facts.base[:12]})" for file in (a, b))
        raise MismatchError(f"{a.path} and {b.path} were made for different models: {names}")
    return same


def stats(masks: str | Path) -> Record:
    """What masks look like, in all, by block (names up to their first number, as ``model.layers.0``) and by matrix.

    Sparsity; rows (outputs) and columns (inputs) of which nothing is kept; weights kept per row, by quartiles; ``at_most``:
    whether no M consecutive inputs keep more than N, for 2:4 and 4:8.
    """
    masks = path_of(masks)
    file = CheckedMasks(masks)
    matrices = {name: _statistics(mask) for name, mask in file.items()}
    blocks: dict[str, list[Record]] = {}
    for name, found in matrices.items():
        blocks.setdefault(split_at_block(name)[0] or name, []).append(found)
    return {
        **_about(file),
        **_totals([*matrices.values()]),
        "blocks": {block: _totals(found) for block, found in blocks.items()},
        "matrices": matrices,
    }


def _statistics(mask: Tensor) -> Record:
    rows = kept_per(mask, mask.shape[1])
    quartiles = np.quantile(rows, (0, 0.25, 0.5, 0.75, 1)).tolist()
    fits = {str(nm): not nm.unsupported(*mask.shape) and bool((kept_per(mask, nm.m) <= nm.n).all()) for nm in KERNELS}
    return {
        "shape": list(mask.shape),
        "weights": mask.numel(),
        "kept": int(rows.sum()),
        "sparsity": 1 - int(rows.sum()) / mask.numel(),
        "empty_rows": int((rows == 0).sum()),
        "empty_columns": int((~mask.any(0)).sum()),
        "kept_per_row": dict(zip(("min", "q1", "median", "q3", "max"), quartiles, strict=True)),
        "at_most": fits,
    }


def _totals(parts: Sequence[Mapping[str, Any]]) -> Record:
    sums: dict[str, Any] = {key: sum(part[key] for part in parts) for key in ("weights", "kept", "empty_rows", "empty_columns")}
    fits = {str(nm): all(part["at_most"][str(nm)] for part in parts) for nm in KERNELS}
    return sums | {"sparsity": 1 - sums["kept"] / sums["weights"], "at_most": fits}


def check_has_model(dtype: str | None, model: ModelPath | None) -> None:
    """Raises InputError for a type without the model that is to be read in it."""
    if model is None and dtype is not None:
        raise InputError("--dtype is what the model is read in; give it with --model, or leave it out")


def check_keeps_type(origin: Origin, dtype: str | None) -> None:
    """Raises InputError for a type that weights of safetensors files, which are taken as they are, are to be read in."""
    if loading.parse_dtype(dtype) and origin.files:
        raise InputError(f"weights of {origin} keep their type; leave --dtype out, which is for a GGUF file")


class Dense:
    """The dense model that masks belong to: its matrices by structure, its weights as they are stored."""

    def __init__(self, source: ModelPath | Origin, dtype: str | None) -> None:
        self.origin = origin = resolve(source)
        check_keeps_type(origin, dtype)
        chosen, cpu = loading.parse_dtype(dtype), torch.device("cpu")
        model = loading.skeleton(origin) if origin.files else loading.load_weights(origin, chosen, cpu)
        self.checkpoint, self.matrices = checkpoint_of(model), find_matrices(model)
        self._model = model

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The shape of a tensor of the checkpoint; None if it has no such tensor."""
        if isinstance(self.checkpoint, Files):
            tensor = self.checkpoint.tensors.get(key)
            return None if tensor is None else tensor.shape
        weight = self._model.state_dict().get(key)
        return None if weight is None else tuple(weight.shape)

    def nonzero(self, key: str) -> Array | None:
        """Which weights of a tensor of the checkpoint are not 0, in its shape; None if it has no such tensor."""
        if isinstance(self.checkpoint, Files):
            tensor = self.checkpoint.tensors.get(key)
            return None if tensor is None else tensor.nonzero(tensor.array()).reshape(tensor.shape)
        weight = self._model.state_dict().get(key)
        return None if weight is None else (weight != 0).numpy()

    def of(self, file: CheckedMasks) -> Dense:
        """This model, if the masks were made for it; else raises MismatchError."""
        file.facts.check_matrices(file.shapes, self.matrices, file.path, self.origin)
        file.facts.check_digests(self.checkpoint.digests(file), file.path, self.origin)
        return self

    def write(self, output: Path, names: Sequence[str], masks: Iterable[tuple[str, Tensor]], pattern: str) -> Record:
        """Writes masks ``[out, in]``, in the order of ``names``, as a file bound to this model; returns what was written."""
        masked = {name: self.matrices[name] for name in names}
        shapes = {name: matrix.shape for name, matrix in masked.items()}
        binding = Binding.of(
            masked,
            self.checkpoint.digests(names),
            str(self.origin),
            prunable=sum(matrix.size for matrix in self.matrices.values()),
        )
        removed = write_masks(output, masks, shapes, binding, pattern)
        size = sum(matrix.size for matrix in masked.values())
        return {
            "base": binding.base,
            "base_name": binding.base_name,
            "pattern": pattern,
            "matrices": len(names),
            "left_dense": [name for name in self.matrices if name not in shapes],
            "sparsity": sum(removed[name] * matrix.size for name, matrix in masked.items()) / size,
        }
