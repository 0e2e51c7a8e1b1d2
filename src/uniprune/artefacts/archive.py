"""Archives: a pruned checkpoint folder in one smaller file, and the same folder back, bit for bit.

Every file is cut into chunks of at most 4 MiB; the chunks of a safetensors file end where its tensors end. A chunk of weights
is turned into planes of bytes that compress: the places of its zeros as one bit each, and of the other weights sign and
exponent apart from the mantissa. docs/archive.md specifies the format. Its reader need not know of tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np

from uniprune.artefacts import writer
from uniprune.artefacts.archive_codec import GROUP, WORDS, Array, Chunk, Zstd, decode, encode, xor
from uniprune.checkpoints.protocol import keys
from uniprune.common.progress import Progress, silent
from uniprune.errors import InputError
from uniprune.storage import dtypes, safetensors_index, strict_json
from uniprune.storage.files import check_disk_space, check_output_file, check_output_folder, new_folder, path_of, replacing
from uniprune.storage.runs import check_none_unfinished

SUFFIX = ".upz"
MAGIC = b"\x89UPZ\r\n\x1a\n"  # as PNG's: a transfer that changes line ends is seen at once
FORMAT = 1
HEADER = struct.Struct("<8sQQQ32s")  # magic, format, offset and size of the index, its sha256
CHUNK = 1 << 22  # bytes; the largest chunk
SAMPLE = 32  # chunks that are packed before all others where there are many, to know the disk that they will take
INDEX = 1 << 25  # bytes; the largest index, enough for a terabyte


@dataclass
class ArchiveMember:
    """One file on its way into an archive, or out of it."""

    name: str
    size: int
    chunks: list[Chunk]
    sha256: str = ""
    digest: Any = field(default_factory=hashlib.sha256)


def pack(
    folder: str | Path, output: str | Path, *, overwrite: bool = False, level: int = 3, progress: Progress = silent
) -> dict[str, Any]:
    """Writes every file of a checkpoint folder into one archive; returns the number of files, the bytes and their ratio.

    level: zstandard's, for bytes that are no tensor (mostly the tokenizer); weights are coded in one way only.
    Raises InputError if the folder or the output cannot be used as they are, or the disk has no room for the archive.
    """
    folder, output = path_of(folder), path_of(output)
    zstd = Zstd(level)
    _check_archive(folder, output, overwrite)
    files = _survey(folder)
    try:
        check_disk_space(output, sum(file.size for file in files))
    except InputError:  # a large folder is often packed because there is no room for another one of its size
        check_disk_space(output, _packed_bytes(folder, files, zstd))
    with replacing(output) as temporary, temporary.open("wb") as archive:
        archive.write(bytes(HEADER.size))
        for file, chunk, raw in progress(_contents(folder, files), "pack", sum(len(file.chunks) for file in files)):
            file.digest.update(raw)
            layout, pieces = encode(chunk, raw, zstd)
            if chunk.words:
                delta = zstd.bytes(xor(raw, _words(folder, files, chunk.words)))
                if len(delta) < sum(map(len, pieces)):
                    layout, pieces = "bits", [delta]
            chunk.words = chunk.words if layout == "bits" else ()
            chunk.layout, chunk.pieces = layout, [len(piece) for piece in pieces]
            archive.writelines(pieces)
        index = _index(files)
        offset = archive.tell()
        archive.write(index)
        archive.seek(0)
        archive.write(HEADER.pack(MAGIC, FORMAT, offset, len(index), hashlib.sha256(index).digest()))
    return _facts(files, offset + len(index))


def unpack(path: str | Path, output: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Writes the folder that an archive holds and verifies every file's sha256; returns what :func:`pack` returned.

    Raises InputError if the archive is damaged, and then leaves the output as it was.
    """
    path, output = path_of(path), path_of(output)
    zstd = Zstd()
    check_output_folder(output, overwrite, path)
    check_none_unfinished(output)
    if not path.is_file():
        raise InputError(f"archive {path} does not exist")
    with path.open("rb") as archive:
        files = _read_index(archive, path)
        check_disk_space(output, sum(file.size for file in files))
        archive.seek(HEADER.size)
        with new_folder(output) as folder:
            for file in files:
                try:
                    (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file.name).touch(exist_ok=False)
                except OSError as error:  # two of this name, or one that this system cannot have
                    raise InputError(f"archive {path}: {file.name[:80]!r} cannot be written ({error.strerror})") from None
            steps = ((file, chunk) for file in files for chunk in file.chunks)
            for file, chunk in progress(steps, "unpack", sum(len(file.chunks) for file in files)):
                pieces = [archive.read(size) for size in chunk.pieces]
                words = _words(folder, files, chunk.words) if chunk.words else None
                try:
                    raw = decode(chunk, pieces, zstd, words)
                except (ValueError, zstd.error) as error:
                    raise _damaged(path, f"a piece of {file.name!r} does not unpack ({error})") from None
                file.digest.update(raw)
                with (folder / file.name).open("ab") as target:
                    target.write(raw)
            for file in files:
                if file.digest.hexdigest() != file.sha256:
                    raise _damaged(path, f"{file.name!r} is not what was packed")
    return _facts(files, path.stat().st_size)


def _facts(files: list[ArchiveMember], size: int) -> dict[str, Any]:
    total = sum(file.size for file in files)
    return {"files": len(files), "bytes": total, "archive_bytes": size, "ratio": size / max(total, 1)}


# ------------------------------------------------------------------------------------------------------------ writing


def _check_archive(folder: Path, output: Path, overwrite: bool) -> None:
    """Raises InputError if this folder cannot be packed into this file, before any work is done."""
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} is no folder with .safetensors files; give the folder of a checkpoint")
    check_output_file(output, overwrite, folder, suffix=SUFFIX)


def _survey(folder: Path) -> list[ArchiveMember]:
    """Every file of the folder, cut into chunks; the masks last, because they are compared with the weights."""
    files: list[ArchiveMember] = []
    weights: dict[str, tuple[int, safetensors_index.Entry]] = {}
    for path in sorted(folder.rglob("*"), key=lambda path: (path == folder / writer.MASKS, path)):
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file():
            raise InputError(f"{path} is neither a file nor a folder; remove it")
        name = path.relative_to(folder).as_posix()
        _check_name(name, folder)
        tensors = _tensors(path) if path.suffix == ".safetensors" else {}
        size = path.stat().st_size
        chunks = list(_chunks(tensors, size, weights if name == writer.MASKS else {}))
        weights |= {key: (len(files), entry) for key, entry in tensors.items()}
        files.append(ArchiveMember(name, size, chunks))
    return files


def _tensors(path: Path) -> dict[str, safetensors_index.Entry]:
    """A safetensors file's tensors, in order; none if it is damaged: it is then packed as what it is, bytes."""
    try:
        ordered = sorted(safetensors_index.entries([path]).items(), key=lambda item: (item[1].start, item[1].stop))
    except InputError:
        return {}
    stops = [0, *(entry.stop for _, entry in ordered)]
    return dict(ordered) if all(stop <= entry.start for stop, (_, entry) in zip(stops, ordered, strict=False)) else {}


def _chunks(
    tensors: Mapping[str, safetensors_index.Entry], size: int, weights: Mapping[str, tuple[int, safetensors_index.Entry]]
) -> Iterator[Chunk]:
    """A file as chunks of tensors and of what lies between them. ``weights`` are given for the file of their masks."""
    position = 0
    for name, entry in tensors.items():
        yield from (Chunk("bytes", "u8", length) for _, length in _cut(entry.start - position, CHUNK))
        position = entry.stop
        key = next((key for key in keys(name) if key in weights), None)
        if key is not None:
            yield from _mask_chunks(entry.stop - entry.start, *weights[key])
            continue
        word = dtypes.word(entry.dtype)
        for _, length in _cut(entry.stop - entry.start, CHUNK):
            yield Chunk("tensor", word if length % WORDS[word][0] == 0 else "u8", length)
    yield from (Chunk("bytes", "u8", length) for _, length in _cut(size - position, CHUNK))


def _mask_chunks(size: int, number: int, weight: safetensors_index.Entry) -> Iterator[Chunk]:
    """A mask in chunks, each for at most 4 MiB of the weight that it is of (and that is stored the same way round)."""
    width = WORDS[dtypes.word(weight.dtype)][0]
    count = (weight.stop - weight.start) // width
    for start, length in _cut(size, CHUNK // (8 * width)):
        first, number_of = 8 * start, min(count - 8 * start, 8 * length)
        words = (number, weight.start + first * width, number_of, width) if size == -(-count // 8) else ()
        yield Chunk("tensor", "u8", length, words=words)


def _cut(size: int, step: int) -> Iterable[tuple[int, int]]:
    """Start and length of each of the pieces that ``size`` bytes are cut into."""
    return ((start, min(step, size - start)) for start in range(0, size, step))


def _contents(folder: Path, files: list[ArchiveMember]) -> Iterator[tuple[ArchiveMember, Chunk, bytes]]:
    for file in files:
        with (folder / file.name).open("rb") as source:
            for chunk in file.chunks:
                raw = source.read(chunk.size)
                if len(raw) < chunk.size:
                    raise InputError(f"{folder / file.name} became shorter while it was read; try again")
                yield file, chunk, raw


def _packed_bytes(folder: Path, files: list[ArchiveMember], zstd: Zstd) -> int:
    """The disk that the archive takes: no more than the files do; of many chunks, as much as some of them are packed to."""
    whole = sum(file.size for file in files)
    chunks: list[tuple[Path, int, Chunk]] = []
    for file in files:
        starts = accumulate((chunk.size for chunk in file.chunks), initial=0)
        chunks += [(folder / file.name, start, chunk) for start, chunk in zip(starts, file.chunks, strict=False)]
    if len(chunks) <= 8 * SAMPLE:
        return whole
    some, packed = random.Random(0).sample(chunks, SAMPLE), 0
    for path, start, chunk in some:
        with path.open("rb") as source:
            source.seek(start)
            packed += sum(map(len, encode(chunk, source.read(chunk.size), zstd)[1]))
    return whole * packed // sum(chunk.size for *_, chunk in some)


def _words(folder: Path, files: list[ArchiveMember], words: tuple[int, ...]) -> Array:
    number, offset, count, width = words
    return np.fromfile(folder / files[number].name, f"<u{width}", count, offset=offset)


def _index(files: list[ArchiveMember]) -> bytes:
    records = []
    for file in files:
        chunks = [[chunk.layout, chunk.word, chunk.size, chunk.pieces, *chunk.words] for chunk in file.chunks]
        records.append({"path": file.name, "size": file.size, "sha256": file.digest.hexdigest(), "chunks": chunks})
    return json.dumps({"files": records}, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------------------ reading


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"archive {path} is damaged: {reason[:200]}; fetch it again")


def _read_index(archive: BinaryIO, path: Path) -> list[ArchiveMember]:
    """The index, if everything in it is possible; InputError before memory for what it describes is taken."""
    head = archive.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise InputError(f"{path} is not an archive of uniprune's; give a {SUFFIX} file that `uniprune pack` wrote")
    _, version, offset, size, sha256 = HEADER.unpack(head)
    if version != FORMAT:
        raise InputError(f"archive {path} has format {version}, this version reads {FORMAT}; upgrade")
    if offset < HEADER.size or size > INDEX or offset + size != os.fstat(archive.fileno()).st_size:
        raise _damaged(path, "it is cut off, or its header is wrong")
    archive.seek(offset)
    text = archive.read(size)
    if hashlib.sha256(text).digest() != sha256:
        raise _damaged(path, "its index is not what was written")
    files: list[ArchiveMember] = []
    try:
        for record in strict_json.parse(text)["files"]:
            _check_name(record["path"], path)
            chunks = [_parse_chunk(files, *chunk) for chunk in record["chunks"]]
            if sum(chunk.size for chunk in chunks) != _natural(record["size"]):
                raise ValueError("the chunks of a file do not make up its size")
            files.append(ArchiveMember(record["path"], record["size"], chunks, record["sha256"]))
        if HEADER.size + sum(sum(chunk.pieces) for file in files for chunk in file.chunks) != offset:
            raise ValueError("its pieces do not fill it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its index makes no sense ({error})") from None
    return files


def _parse_chunk(before: list[ArchiveMember], layout: str, word: str, size: int, pieces: list[int], *words: int) -> Chunk:
    """One chunk of the index, with ``before`` the files before its own; ValueError, KeyError, TypeError if it cannot be."""
    width = WORDS[word][0]
    number, unit = {"bits": (1, 1), "dense": (width, width), "sparse": (1 + width, width), "scaled": (2, 2 * GROUP)}[layout]
    if not 0 < _natural(size) <= CHUNK or size % unit or (layout == "scaled" and word != "bf16"):
        raise ValueError("a chunk has an impossible size")
    if len(pieces) != number or sum(map(_natural, pieces)) > 2 * CHUNK or bool(words) != (layout == "bits"):
        raise ValueError("a chunk has impossible pieces")
    if words:
        other, offset, count, wide = map(_natural, words)
        if wide not in (1, 2, 4, 8) or count * wide > CHUNK or -(-count // 8) != size:
            raise ValueError("a chunk is compared with an impossible number of words")
        if other >= len(before) or offset + count * wide > before[other].size:
            raise ValueError("a chunk is compared with words that are not there")
    return Chunk(layout, word, size, pieces, words)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a size is not a natural number")
    return value


def _check_name(name: str, place: Path) -> None:
    """Raises InputError for names that could lead out of a folder, on any system, or that not every system can show."""
    escapes = {"", ".", ".."} & {*name.split("/")} or "\\" in name or PureWindowsPath(name).drive
    if escapes or not name.isprintable():
        raise InputError(f"{place} has a file named {name[:80]!r}, which archives may not; rename it")
