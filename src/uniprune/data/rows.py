"""Rows of data: JSON lines files, and data sets by their hub name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniprune.errors import InputError, first_line
from uniprune.storage import strict_json

Row = dict[str, Any]


def read_jsonl(path: Path, what: str) -> Iterator[tuple[int, Row]]:
    """The objects of a .jsonl file, each with the number of its line, from 1; blank lines are skipped.

    what: what the file is to the user (``text``, ``task``), for the InputError that names a line which is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line, f"{what} {path}, line {number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _parse(line: str, where: str) -> Row:
    try:
        row = strict_json.parse(line)
        if "\\ud" in line.lower():  # an escaped surrogate, which alone is no character, and no tokenizer takes it
            json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        reason = "it has half a character (\\ud800 to \\udfff)" if isinstance(error, UnicodeEncodeError) else error
        raise InputError(f"{where}: {reason}") from None
    return row


def read_hub(path: str, what: str, instead: str = "", **options: Any) -> Iterator[Row]:
    """The rows of a data set by its hub name, through ``datasets``.

    options: what ``datasets.load_dataset`` takes. instead: what else the user may do if it cannot be fetched.
    Raises InputError if it cannot be fetched, or if datasets is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{what} {path} comes through datasets; pip install 'uniprune[data]', or give a file") from None
    try:
        yield from datasets.load_dataset(path, **options)
    except Exception as error:  # datasets raises dozens of kinds for one cause: it cannot be fetched here
        raise InputError(f"{what} {path} cannot be loaded ({first_line(error)}); give a local file{instead}") from error
