"""What kind of file a corpus is, and how it is compressed: by its first bytes if they are known, else by its suffix."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal, cast

from uniprune.errors import InputError, first_line

Kind = Literal["plain", "wikitext", "json", "csv", "tsv", "parquet", "arrow"]

SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex"), "plain"),
    ".raw": "wikitext",
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), "json"),
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
}
COMPRESSED = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
READABLE = ".txt, .md, .raw, .jsonl, .json, .csv, .tsv, .parquet, .arrow (.gz, .zst, .xz, .bz2 of them)"
BLOCK = 1 << 20

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
_BINARY: dict[bytes, Kind] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}

_DOCUMENT = "convert it to .txt first, with pandoc say"
_ARCHIVE = "unpack it, and give the folder"
_TABLE = "save it as .csv, .jsonl or .parquet"
_TENSOR = "it holds no text; the tokens of an earlier run are a .safetensors file that --save-tokens writes"
_STREAM = "decompress it first, or compress it with gzip, zstd or xz"
_FOREIGN = {  # suffix -> what to do about it
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html", ".htm", ".pptx", ".ipynb"), _DOCUMENT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".sqlite", ".db", ".orc", ".avro", ".h5", ".hdf5", ".tfrecord"), _TABLE),
    **dict.fromkeys((".npy", ".npz", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".gguf"), _TENSOR),
    **dict.fromkeys((".lz4", ".br", ".z", ".lzma", ".snappy"), _STREAM),
}
_SIGNATURES = {  # what a file of some other kind begins with -> what it is, what to do about it
    b"%PDF-": ("a PDF", _DOCUMENT),
    b"{\\rtf": ("a document (RTF)", _DOCUMENT),
    b"PK\x03\x04": ("an archive or an office document (zip)", "unpack it, or convert it to .txt"),
    b"\xd0\xcf\x11\xe0": ("an office document", _DOCUMENT),
    b"7z\xbc\xaf": ("an archive (7z)", _ARCHIVE),
    b"Rar!\x1a": ("an archive (rar)", _ARCHIVE),
    b"SQLite format 3\x00": ("a database", _TABLE),
    b"Obj\x01": ("an Avro file", _TABLE),
    b"\x89HDF": ("an HDF5 file", _TABLE),
    b"\x93NUMPY": ("an array", _TENSOR),
    b"GGUF\x03\x00": ("a model (GGUF)", _TENSOR),
    b"\x80": ("pickled", _TENSOR),
    b"\x04\x22\x4d\x18": ("compressed with lz4", _STREAM),
    b"\xff\xfe": ("UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
}
_HEAD = 4096


@dataclass(frozen=True)
class Format:
    """``compression``: by which program the file is compressed, or None."""

    kind: Kind
    compression: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is text without rows, which has no fields."""
        return self.kind in ("plain", "wikitext")

    @property
    def columnar(self) -> bool:
        """Whether it is stored by column, and read through pyarrow."""
        return self.kind in ("parquet", "arrow")


def suffix_of(path: Path) -> str:
    """The suffix without that of the compression, in lower case: ``.json`` of ``x.JSON.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def recognise(path: Path, what: str) -> Format:
    """The format of a file. what: what it is to the user (``text``, ``task``).

    Raises InputError for what is no text, with what it is and what to do about it.
    """
    with path.open("rb") as file:
        compression = _compression(file.read(8))
    with decompressed(path, compression) as stream, readable(path, what):
        head = stream.read(_HEAD)
    kind = next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), None)
    if kind is None:
        _refuse_foreign(path, head, what)
        kind = SUFFIXES.get(suffix_of(path)) or _of_text(head)
    found = Format(kind, compression)
    if compression and found.columnar:
        raise InputError(f"{what} {path} is {kind} inside {compression}, which cannot be read in parts; decompress it first")
    return found


def _compression(head: bytes) -> str | None:
    return next((compression for magic, compression in _COMPRESSIONS.items() if head.startswith(magic)), None)


def _refuse_foreign(path: Path, head: bytes, what: str) -> None:
    remedy = _FOREIGN.get(suffix_of(path))
    if remedy:
        raise InputError(f"{what} {path}: {suffix_of(path)} cannot be read; {remedy}")
    if head[257:262] == b"ustar":
        raise InputError(f"{what} {path} is an archive (tar); {_ARCHIVE}")
    for magic, (kind, remedy) in _SIGNATURES.items():
        if head.startswith(magic):
            raise InputError(f"{what} {path} is {kind}; {remedy}")
    if b"\0" in head:
        raise InputError(f"{what} {path} is a binary file of no kind that can be read: {READABLE}; convert it to one of them")


def _of_text(head: bytes) -> Kind:
    """The kind of a text whose suffix does not say: JSON if it begins like it, else plain text."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text[:1] == b"{" or text[:2] in (b'["', b"[{") or (text[:1] == b"[" and text[1:].lstrip()[:1] in (b"{", b'"')):
        return "json"
    return "plain"


# ------------------------------------------------------------------------------------------------------------- streams


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Inside ``with``, the errors of a damaged or differently encoded file name it, and say what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        reason = f"{error.reason} near byte {error.start}"
        raise InputError(f"{what} {path} is not UTF-8 ({reason}); convert it: iconv -f latin1 -t UTF-8") from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error, *_zstd_errors()) as error:  # type: ignore[misc]
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it is the disk's
        raise InputError(f"{what} {path} is damaged, or not all of it is there ({first_line(error)}); fetch it again") from None


def decompressed(path: Path, compression: str | None) -> BinaryIO:
    """The decompressed bytes of a file, read ahead by blocks."""
    if compression == "gzip":
        return cast(BinaryIO, io.BufferedReader(gzip.open(path), BLOCK))  # type: ignore[arg-type]
    if compression == "xz":
        return cast(BinaryIO, io.BufferedReader(lzma.open(path), BLOCK))  # type: ignore[arg-type]
    if compression == "bzip2":
        return cast(BinaryIO, io.BufferedReader(bz2.open(path), BLOCK))  # type: ignore[arg-type]
    if compression == "zstd":
        return _zstd(path)
    return path.open("rb", buffering=BLOCK)


def _zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: reading .zst needs zstandard; pip install zstandard") from None
    file = path.open("rb")
    # Files of several frames, as pzstd and concatenation make them, are one stream.
    stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=True)
    return cast(BinaryIO, io.BufferedReader(stream, BLOCK))  # type: ignore[arg-type]


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def decoded(blocks: Iterable[bytes], start: int = 0) -> Iterator[str]:
    """Blocks of UTF-8 as text, with ``\\n`` for every line end and without a byte order mark.

    start: where the blocks begin in their file, for the UnicodeDecodeError.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig" if start == 0 else "utf-8")(), True)
    for block in chain(blocks, [b""]):
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            error.start += start
            raise
        start += len(block)


def blocks_of(stream: BinaryIO, size: int = BLOCK) -> Iterator[bytes]:
    while block := stream.read(size):
        yield block
