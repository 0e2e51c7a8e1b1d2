"""Rows of ``{"image": ..., "text": ...}``: from files of rows, folders of them, and Hub datasets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from uniprune.data.parts import File, HubShard, Part
from uniprune.data.rows import reachable, read_rows
from uniprune.data.text import NAMED, Text, Use, open_text
from uniprune.errors import InputError, first_line

IMAGE, NAME, TEXT = "image", "file_name", "text"  # the first two are an image, or the name of its file


class Pair(NamedTuple):
    """An image that is not read yet, and its text. where: for messages; folder: what names of files start from."""

    image: Any
    text: str
    where: str
    folder: Path | None


def has_images(text: Text, use: Use) -> bool:
    """Whether the first row of a text's first file has an image, too. Who says which field is the text is given that alone."""
    if text.field is not None or text.source in NAMED or text.source.endswith(".safetensors"):
        return False
    return any(_is_pair(row) for _, row, _ in _first(open_text(text, use)[0]))


def pairs(text: Text, use: Use) -> Iterator[Pair]:
    """The rows that have an image and a text. Raises InputError for a row that has neither in the shape of the first."""
    for part in open_text(text, use):
        for where, row, folder in _rows(part):
            if not _is_pair(row):
                raise InputError(f'{where}: no fields "image" and "text", as other rows have')
            image, written = row.get(IMAGE, row.get(NAME)), row[TEXT]
            if image is not None and isinstance(written, str) and written.strip():
                yield Pair(image, written, where, folder)


def _is_pair(row: Any) -> bool:
    return isinstance(row, dict) and TEXT in row and (IMAGE in row or NAME in row)


def _first(part: Part) -> Iterator[tuple[str, Any, Path | None]]:
    if isinstance(part, HubShard) and part.data.column_names:
        yield part.name, dict.fromkeys(part.data.column_names), None
        return
    if not isinstance(part, File) or not part.format.plain:
        yield from (row for _, row in zip(range(1), _rows(part), strict=False))


def _rows(part: Part) -> Iterator[tuple[str, Any, Path | None]]:
    if isinstance(part, File):
        yield from ((where, row, part.path.parent) for where, row in read_rows(part.path, "text"))
    elif isinstance(part, HubShard):
        with reachable(part.name, "text"):
            yield from ((f"text {part.name}, row {number}", row, None) for number, row in enumerate(part.data, 1))


def opened(pair: Pair) -> Any:
    """The image of a pair, RGB: of a file, of bytes, or as ``datasets`` has it. Raises InputError if it is none."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(f"{pair.where}: reading images needs Pillow; pip install pillow") from None
    image = pair.image
    if isinstance(image, dict):  # as datasets stores images in tables
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, str):
            image = Image.open((pair.folder or Path()) / image)
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        if not isinstance(image, Image.Image):
            raise ValueError(f"it is {type(image).__name__}, not the name of a file, or its bytes")
        return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{pair.where}: its image cannot be read ({first_line(error)}); leave the row out") from error
