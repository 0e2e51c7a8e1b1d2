"""Scores and masks on disk: safetensors with one JSON string of facts, written atomically and streamed.

    scores.safetensors   <matrix>: float32 [out, in]
    masks.safetensors    <matrix>: uint8 [ceil(out * in / 8)], bit-packed, see masks.pack

The facts stand under the metadata key ``uniprune``: which model the file belongs to (``base``, see checkpoint.fingerprint),
how it was made, and for masks the shapes. No time of day: the same run writes the same bytes.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uniprune import masks as masking
from uniprune import objects, shards
from uniprune.errors import InputError

FORMAT = 1
KEY = "uniprune"
DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32"}

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside ``with``, a write that fails (a full disk) says where: the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the ``with`` block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".partial-{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(path):
            yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_file(path: Path, overwrite: bool, *sources: Path, suffix: str = ".safetensors") -> None:
    """Raises InputError if ``path`` exists and may not be replaced, or may not be written, before any work is done.

    sources: files and folders that are read meanwhile, and never written to.
    """
    if path.suffix != suffix:
        raise InputError(f"output {path} is a {suffix[1:]} file; let its name end in {suffix}")
    if path.is_dir():
        raise InputError(f"output {path} is a folder; give a file name")
    for source in sources:
        if source.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"output {path} is, or lies in, the input {source}; give another place")
    if path.exists() and not overwrite:
        raise InputError(f"output {path} exists; give another name, or --overwrite")
    check_place(path)


def check_place(path: Path) -> None:
    """Raises InputError unless an output may be made at ``path``: below folders only, and where one may write."""
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {path} cannot be made: nothing can be written in {parent}; give another place")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a result file, at once or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
        file.flush()
        os.fsync(file.fileno())


def binding(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of an artefact's facts those that tie it to its model: what is made of it has them, too."""
    return {key: facts[key] for key in ("base", "base_name", "digests", "transposed")}


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
        facts = objects.parse(text)
        objects.check(facts, {"kind": str, "format": int})
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


class ScoresFile(Mapping[str, Tensor]):
    """A saliency on disk, read one matrix at a time; InputError when it is opened, unless it agrees with itself."""

    KINDS: ClassVar[Mapping[str, type]] = {
        "matrices": list,
        "comparable": bool,
        "digests": dict,
        "transposed": list,
        "base": str,
        "base_name": str,
    }

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_tensors(path, "scores") as (_, self.facts):
            found = shards.entries([path])
        try:
            objects.check(self.facts, self.KINDS)
            names = self.facts["matrices"]
            if not names or sorted(map(str, names)) != sorted(found) or self.facts["digests"].keys() != found.keys():
                raise ValueError("its scores, matrices and digests are not of the same names")
            for name, entry in found.items():
                if entry.dtype != "F32" or len(entry.shape) != 2 or 0 in entry.shape:
                    raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, which are no scores")
                if not isinstance(self.facts["digests"][name], str) or not self.facts["digests"][name]:
                    raise ValueError(f"{name} has no digest")
        except ValueError as error:
            raise damaged("scores", path, error) from None
        self.shapes = {name: (found[name].shape[0], found[name].shape[1]) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            scores = file.get_tensor(name)
        assert isinstance(scores, Tensor)
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_scores(
    path: Path, scores: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, int]], facts: Mapping[str, Any]
) -> None:
    """Writes scores as they come, in the order of ``shapes``."""
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    stream_tensors(path, specs, scores, {"kind": "scores", "matrices": list(shapes), **facts})


class MasksFile(Mapping[str, Tensor]):
    """Masks on disk, unpacked one matrix at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_tensors(path, "masks") as (_, facts):
            self.facts = facts
        self.shapes: dict[str, tuple[int, int]] = {name: (rows, cols) for name, (rows, cols) in facts["shapes"].items()}
        self.transposed = set(facts["transposed"])

    def __getitem__(self, name: str) -> Tensor:
        return masking.unpack(torch.from_numpy(self.packed(name)), self.shapes[name])

    def packed(self, name: str) -> masking.Array:
        """The bits of one mask, as masks.pack has them; they map the file, privately."""
        with safe_open(self._path, framework="pt") as file:
            bits: masking.Array = file.get_tensor(name).numpy()
            return bits

    def removed(self) -> dict[str, float]:
        """The fraction of weights that each mask removes."""
        return {name: 1 - masking.kept(self.packed(name)) / (rows * cols) for name, (rows, cols) in self.shapes.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_masks(
    path: Path, cut: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, int]], facts: Mapping[str, Any]
) -> dict[str, float]:
    """Writes masks as they are cut, packed; returns the fraction of weights that each one removes."""
    removed: dict[str, float] = {}

    def packed() -> Iterator[tuple[str, Tensor]]:
        for name, mask in cut:
            removed[name] = masking.removed(mask)
            yield name, masking.pack(mask)

    specs = {name: (torch.uint8, (-(-rows * columns // 8),)) for name, (rows, columns) in shapes.items()}
    shape_facts = {name: list(shape) for name, shape in shapes.items()}
    stream_tensors(path, specs, packed(), {"kind": "masks", "shapes": shape_facts, **facts})
    return removed
