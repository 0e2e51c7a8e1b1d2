"""The runtime layout: a checkpoint folder whose pruned matrices are packed, to be mapped from disk and multiplied by.

One safetensors file holds of each packed matrix ``NAME.values`` (kept weights row after row, and padding) and ``NAME.bits``
(uint8 ``[rows, ceil(columns / 8)]``), and every other tensor of the checkpoint as it is; docs/runtime.md specifies it. It has
another name than transformers looks for, which would draw the matrices that it does not find at random.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from uniprune.artefacts import reports
from uniprune.artefacts.binding import fingerprint
from uniprune.artefacts.reports import ModelFacts
from uniprune.checkpoints.checkpoint import PACKED, Files
from uniprune.checkpoints.companion_files import copy_companions
from uniprune.checkpoints.origin import Origin, resolve
from uniprune.checkpoints.protocol import spell_digest
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, versions
from uniprune.errors import InputError
from uniprune.models.loading import skeleton
from uniprune.models.matrices import Matrix, find_matrices
from uniprune.runtime.linear import nothing_to_pack, too_dense, unsupported
from uniprune.runtime.native import PADDING, library
from uniprune.runtime.packed import count, pack_into
from uniprune.storage import files, tensor_file
from uniprune.storage.dtypes import BY_NAME, PLAIN
from uniprune.storage.record import Count, Facts, Record, Shape
from uniprune.storage.runs import check_none_unfinished
from uniprune.storage.safetensors_index import Entry
from uniprune.storage.safetensors_index import entries as files_entries

LINE = 64  # bytes: values are padded to whole lines of a cache
PIECE = 4 << 20  # bytes copied at a time

Array = np.ndarray[Any, Any]
Opened = TypeVar("Opened")
Places = dict[str, tuple[str, tuple[int, ...], int]]


class Provenance(Facts):
    """What was packed. fingerprint: of the pruned matrices; model, pattern and masks_sha256: what the pruned folder says."""

    fingerprint: str
    model: ModelFacts | None = None
    pattern: str | None = None
    masks_sha256: str | None = None


class PackedMatrix(Facts):
    """A matrix in the file. shape: (out, in); key: of the tensor that it was in the checkpoint, perhaps transposed."""

    shape: Shape
    key: str
    transposed: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """The shape of the tensor that it was."""
        return self.shape[::-1] if self.transposed else self.shape


class RuntimeFacts(tensor_file.Metadata):
    """The metadata of the file."""

    kind: Literal["runtime"] = "runtime"
    matrices: Annotated[dict[str, PackedMatrix], Field(min_length=1)]
    source: Provenance
    versions: dict[str, str] = {}


class Packing(Record):
    """``pruning.json`` of ``pack --runtime``.

    packed: how many matrices are. left_dense: the other prunable ones, and why. bytes: of the file's tensors; ratio: to those
    of the checkpoint, of all tensors and of the packed matrices alone. seconds: by stage.
    """

    kind: Literal["packing"] = "packing"
    source: Provenance
    packed: Count
    left_dense: dict[str, str]
    bytes: Count
    ratio: float
    ratio_of_packed: float
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Verbatim:
    """A tensor that is stored as it is."""

    key: str
    entry: Entry

    @property
    def places(self) -> Places:
        return {self.key: (self.entry.dtype, self.entry.shape, self.entry.stop - self.entry.start)}

    def parts(self) -> Iterator[tuple[str, int, Array]]:
        """What is to be written: tensor, offset in it, bytes."""
        size = self.entry.stop - self.entry.start
        if size:
            whole = np.memmap(self.entry.file, np.uint8, "r", self.entry.start, (size,))
            yield from ((self.key, start, whole[start : start + PIECE]) for start in range(0, size, PIECE))


@dataclass(frozen=True)
class ToPack:
    """A matrix that is packed on the way; ``kept`` of its weights are not zero."""

    name: str
    key: str
    entry: Entry
    shape: tuple[int, int]
    transposed: bool
    kept: int

    @property
    def facts(self) -> PackedMatrix:
        return PackedMatrix(shape=self.shape, key=self.key, transposed=self.transposed)

    @property
    def places(self) -> Places:
        width, (rows, columns) = BY_NAME[self.entry.dtype].size, self.shape
        size = -(-(self.kept + PADDING) * width // LINE) * LINE
        packed_row = -(-columns // 8)
        return {
            f"{self.name}.values": (self.entry.dtype, (size // width,), size),
            f"{self.name}.bits": ("U8", (rows, packed_row), rows * packed_row),
        }

    def parts(self) -> Iterator[tuple[str, int, Array]]:
        (values, (dtype, (length,), _)), (bits, _) = self.places.items()
        words = self.entry.array().reshape(self.entry.shape)
        room = torch.empty(length, dtype=PLAIN[dtype])
        try:
            packed = pack_into(np.ascontiguousarray(words.T) if self.transposed else words, room, self.kept)
        except ValueError as error:
            raise InputError(f"{self.entry.file}: {self.name}: {error}; pack it again") from None
        yield from ((key, 0, tensor.view(torch.uint8).numpy().ravel()) for key, tensor in ((values, room), (bits, packed)))


class Examined(NamedTuple):
    """A prunable matrix of the checkpoint: its digest, and how it is packed or why it is not."""

    digest: str
    found: ToPack | str


def pack(folder: str | Path, output: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> Packing:
    """Writes a pruned checkpoint folder in the runtime layout; returns the report that is written as pruning.json, too.

    Matrices with few zeros, fused experts and all other tensors are stored as they are; the report names those matrices.
    Raises InputError if the folder or the output cannot be used as they are, if no matrix is sparse, or if the kernel, which
    packs, too, is not there and cannot be compiled.
    """
    output = files.path_of(output)
    watch = Stopwatch()
    library()
    origin = resolve(folder)
    files.check_output_folder(output, overwrite, origin.path)
    check_none_unfinished(output)
    checkpoint = origin.files
    if checkpoint is None:
        raise InputError(f"{origin} is no pruned checkpoint folder; give one, as prune and apply write it")
    if origin.quantised:
        raise InputError(
            f"{origin} is quantised ({origin.quantised}), which the kernel cannot multiply by; uniprune.accelerate packs it in "
            "memory, dequantised"
        )
    matrices = find_matrices(skeleton(origin))
    with watch("read"), ThreadPoolExecutor(files.readers()) as pool:
        results = pool.map(lambda name: _examined(checkpoint, name, matrices[name]), matrices)
        examined = dict(zip(matrices, results, strict=True))
    left = {name: result.found for name, result in examined.items() if isinstance(result.found, str)}
    packed = [result.found for result in examined.values() if isinstance(result.found, ToPack)]
    if not packed:
        raise nothing_to_pack(left)
    source = _provenance(origin, fingerprint({name: result.digest for name, result in examined.items()}))
    taken = {tensor.key for tensor in packed}
    others = [Verbatim(key, entry) for key, entry in checkpoint.entries.items() if key not in taken]
    if twice := {key for tensor in packed for key in tensor.places} & {tensor.key for tensor in others}:
        raise InputError(f"{origin} has a tensor {min(twice)}, the name of a packed matrix; it cannot be packed")
    tensors: list[ToPack | Verbatim] = [*packed, *others]
    size = _bytes(tensors)
    dense = sum(entry.stop - entry.start for entry in checkpoint.entries.values())
    files.check_disk_space(output, size)
    facts = RuntimeFacts(matrices={tensor.name: tensor.facts for tensor in packed}, source=source, versions=versions())
    with files.new_folder(output) as temporary:
        with watch("write"):
            _write(temporary / PACKED, tensors, facts, progress)
            copy_companions(checkpoint, temporary, index=False)  # of files that will not be there
        report = Packing(
            source=source,
            packed=len(packed),
            left_dense=left,
            bytes=size,
            ratio=size / dense,
            ratio_of_packed=_bytes(packed) / sum(tensor.entry.stop - tensor.entry.start for tensor in packed),
            versions=versions(),
            seconds=watch.seconds,
        )
        report.write(temporary / files.REPORT)
    return report


def _bytes(tensors: Sequence[ToPack | Verbatim]) -> int:
    return sum(size for tensor in tensors for _, _, size in tensor.places.values())


def _examined(checkpoint: Files, name: str, matrix: Matrix) -> Examined:
    """Reads a matrix, once. Raises InputError if it has NaN or infinity."""
    entry = checkpoint.entry(name)
    key = checkpoint.key(name)
    alone = entry is not None and checkpoint.entries.get(key) == entry
    reason = unsupported(matrix, PLAIN.get(entry.dtype) if entry else None) if alone else "it is a part of a larger tensor"
    if entry is None or reason:
        return Examined(checkpoint.digest(name), reason or "")
    sha256 = hashlib.sha256()
    kept = 0
    dtype = PLAIN[entry.dtype]
    for piece in entry.pieces():
        sha256.update(piece.data)
        nonzero, finite = count(piece, dtype)
        if not finite:
            raise InputError(f"{name}: the weights contain NaN or infinity; the checkpoint is broken, make it again")
        kept += nonzero
    digest = spell_digest(entry.dtype, entry.shape, sha256)
    packed = ToPack(name, key, entry, matrix.shape, matrix.stored_transposed, kept)
    return Examined(digest, too_dense(kept, matrix.size) or packed)


def _provenance(origin: Origin, fingerprint: str) -> Provenance:
    report = reports.report_of(origin.folder)
    if report is None:
        return Provenance(fingerprint=fingerprint)
    pattern = None if isinstance(report, reports.ExpertRemoval) else report.pattern
    pruning = {"masks_sha256": report.masks_sha256} if isinstance(report, reports.Pruning) else {}
    return Provenance(fingerprint=fingerprint, model=report.model, pattern=pattern, **pruning)


def _write(path: Path, tensors: Sequence[ToPack | Verbatim], facts: RuntimeFacts, progress: Progress) -> None:
    """The file, by several threads. Wider types come first, so that each tensor begins at a multiple of its width."""
    places = {key: place for tensor in tensors for key, place in tensor.places.items()}
    places = dict(sorted(places.items(), key=lambda item: -BY_NAME[item[1][0]].size if item[1][0] in BY_NAME else -1))
    head = tensor_file.header(places, facts)
    sizes = [len(head), *(size for _, _, size in places.values())]
    starts = dict(zip(places, accumulate(sizes), strict=False))
    with path.open("wb") as file, ThreadPoolExecutor(files.readers()) as pool:
        file.write(head)
        file.truncate(sum(sizes))
        file.flush()

        def write(tensor: ToPack | Verbatim) -> None:
            if isinstance(tensor, Verbatim) and _copied(tensor.entry, file.fileno(), starts[tensor.key]):
                return
            for key, offset, part in tensor.parts():
                _write_all(file.fileno(), part, starts[key] + offset)

        for _ in progress(pool.map(write, tensors), "pack", len(tensors)):
            pass
    files.sync(path)


def _copied(entry: Entry, file: int, offset: int) -> bool:
    """Copies a tensor within the system, where that can: several times as fast as through this process."""
    place, left = entry.start, entry.stop - entry.start
    try:
        with entry.file.open("rb") as source:
            while left and (done := os.copy_file_range(source.fileno(), file, left, place, offset)):
                place, offset, left = place + done, offset + done, left - done
    except (AttributeError, OSError):  # other systems than Linux; from one file system to another
        return False
    return not left


def _write_all(file: int, part: Array, offset: int) -> None:
    """A call to the system may write less than it is asked to."""
    rest = memoryview(part)  # type: ignore[arg-type]
    while len(rest):
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


# ------------------------------------------------------------------------------------------------------------- reading


class RuntimeFiles(Files):
    """A folder in the runtime layout, with the keys and shapes of the checkpoint that it was made of.

    Raises InputError if it is damaged.
    """

    @cached_property
    def weights(self) -> Path:
        return self.folder / PACKED

    @cached_property
    def facts(self) -> RuntimeFacts:
        with tensor_file.open_tensors(self.weights, RuntimeFacts) as (_, facts):
            return facts

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor of the checkpoint; of a packed one there are no bytes."""
        entries = files_entries([self.weights])
        for name, matrix in self.facts.matrices.items():
            values = entries.pop(f"{name}.values", None)
            if values is None or entries.pop(f"{name}.bits", None) is None or matrix.key in entries:
                raise RuntimeFacts.damaged(self.weights, f"it lacks values or bits of {name[:80]!r}, or has its weights, too")
            entries[matrix.key] = Entry(self.weights, values.dtype, matrix.stored, 0, 0)
        return entries

    def packed(self, name: str, dtype: torch.dtype, kind: Callable[[Tensor, Tensor, tuple[int, int]], Opened]) -> Opened:
        """A packed matrix as ``kind`` makes it of values, bits and shape; values of the type ``dtype`` are mapped."""
        try:
            values, bits = (self._file.get_tensor(f"{name}.{part}") for part in ("values", "bits"))
            if values.data_ptr() % values.itemsize:  # in files that others wrote
                values = values.clone()
            return kind(values.to(dtype), bits, self.facts.matrices[name].shape)
        except ValueError as error:
            raise RuntimeFacts.damaged(self.weights, f"{name[:80]!r}: {error}") from None

    @cached_property
    def _file(self) -> Any:
        """Open for as long as this lives, so that its header is read once."""
        return safe_open(self.weights, framework="pt")


@dataclass(frozen=True)
class RuntimeOrigin(Origin):
    """Where a model in the runtime layout lies."""

    @cached_property
    def files(self) -> RuntimeFiles:
        return RuntimeFiles(self.folder)
