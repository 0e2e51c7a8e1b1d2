"""Rows of data, one by one: the JSON values, table rows and columns of a file, compressed or not."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from uniprune.data.formats import BLOCK, Format, blocks_of, decoded, decompressed, readable, recognise
from uniprune.errors import InputError, first_line

Row = dict[str, Any]
Choice = Callable[[str, Sequence[str]], Sequence[str]]
Chosen = Callable[[Sequence[str]], Sequence[str]]
BATCH = 256  # rows of a columnar file in memory at once
VALUE = 1 << 28  # characters of one JSON value, at most
MESSAGE = re.compile(r"\[\s*\{")  # how an array of objects begins
ENTERED = object()  # instead of an array
DECODE = json.JSONDecoder().raw_decode
BOM = b"\xef\xbb\xbf"
NO_SEPARATOR = "\x1f"  # stands in no text
ROWS = {"text", "messages", "conversations", "conversation", "prompt", "article"}  # an object with one of these is a row itself
SPEAKER = {"role", "from"}  # of a message
TEXTS = {"content", "instruction", "question", "completion", "response", "output"}  # so is one with one of these that is a text


def read_rows(path: Path, what: str, choose: Choice | None = None, wanted: str | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with where it stands, for messages: JSON values, or table rows as objects by column.

    what: what the file is to the user (``text``, ``task``). choose: of the names of all columns, those to read; all by default;
    it is told which file they are of. wanted: a field (dots for fields in fields) that makes an object a row.
    Raises InputError that names the row which cannot be read, or the file that has none.
    """
    form = recognise(path, what)
    with readable(path, what):
        if form.columnar:
            yield from _columnar(path, form, what, choose)
        elif form.kind in ("csv", "tsv"):
            yield from _table(path, form, what)
        elif form.kind == "json":
            yield from _json(path, form, what, wanted)
        else:
            raise InputError(
                f"{what} {path}, line 1: not JSON; give rows: JSON lines or an array, .csv, .tsv, .parquet or .arrow"
            )


# ---------------------------------------------------------------------------------------------------------------- JSON


def is_lines(path: Path, form: Format, wanted: str | None = None) -> bool:
    """Whether a JSON file has one value a line: whether its first line is one, and it is neither an array nor all there is, an
    object around rows. wanted: as for :func:`read_rows`."""
    with closing(decompressed(path, form.compression)) as stream:
        head = stream.read(64).removeprefix(BOM).lstrip()
        if head[:1] == b"[":
            return False
        first, _, rest = (head if b"\n" in head else head + stream.readline(VALUE)).partition(b"\n")
        alone = not (rest + stream.read(64)).strip()
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return not (alone and _around(value, wanted))


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and all(isinstance(turn, dict) and turn.keys() & SPEAKER for turn in value)


def parse_line(line: bytes, where: str) -> Any:
    """The JSON value of a line, which may begin with a byte order mark: the first one of a file, or of files put together.

    Raises InputError for anything else, and for what no tokenizer takes.
    """
    try:
        text = line.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({error.reason}); convert the file: iconv -f latin1 -t UTF-8") from None
    try:
        return _checked(json.loads(text), text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {_reason(error)}") from None


def _checked(value: Any, source: str) -> Any:
    """The value. Raises ValueError if its source escapes a surrogate that is alone: that is no character."""
    if "\\ud" in source or "\\uD" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a character (\\ud800 to \\udfff)") from None
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _json(path: Path, form: Format, what: str, wanted: str | None) -> Iterator[tuple[str, Any]]:
    lines = is_lines(path, form, wanted)
    with closing(decompressed(path, form.compression)) as stream:
        name = f"{what} {path}"
        yield from _unwrapped(_by_line(stream, name) if lines else _values(decoded(blocks_of(stream)), name), wanted)


def _by_line(stream: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        if line.removeprefix(BOM).strip():
            where = f"{name}, line {number}"
            yield where, parse_line(line, where)


def _values(blocks: Iterator[str], name: str) -> Iterator[tuple[str, Any]]:
    """The values that stand in a JSON text one after the other: the elements of arrays, or objects over several lines each.

    An array of messages, of less than a BLOCK, is a value: a conversation.
    """
    text = _Unparsed(blocks)
    while text.skip_separators() or not text.ended:
        where = f"{name}, line {text.line}"
        try:
            value = text.parse()
        except (ValueError, RecursionError) as error:
            if text.ended or text.skip_separators() > VALUE or isinstance(error, RecursionError):
                raise InputError(f"{where}: {_reason(error)}") from None
            text.read_on()
        else:
            if value is not ENTERED:
                yield where, value


class _Unparsed:
    """What has been read of a JSON text, and is not parsed yet. ended: whether all has been read."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self._text, self._at = "", 0
        self._lines = 0  # before the text
        self.ended = False

    @property
    def line(self) -> int:
        """Where parsing goes on, counted from 1."""
        return 1 + self._lines + self._text.count("\n", 0, self._at)

    def skip_separators(self) -> int:
        """Goes on to the next value; returns how many characters there are from there on."""
        while self._at < len(self._text) and (self._text[self._at].isspace() or self._text[self._at] in ",]"):
            self._at += 1
        return len(self._text) - self._at

    def parse(self) -> Any:
        """The value here, behind which it then goes on; ENTERED for an array whose elements are the values.

        Raises ValueError for what is no JSON, or may be cut off.
        """
        start, whole = self._at, self.ended
        if self._text[start : start + 1] == "[":
            if len(self._text) - start < BLOCK and not whole:
                raise ValueError
            value, end = _conversation(self._text, start)
        else:
            value, end = DECODE(self._text, start)
        if end == len(self._text) and not whole:  # a number may go on
            raise ValueError
        value = _checked(value, self._text[start:end])
        self._at = end
        return value

    def read_on(self) -> None:
        """Reads as much again as there is, so that a long value is not parsed from its start for every block."""
        self._lines, self._text, self._at = self.line - 1, self._text[self._at :], 0
        more: list[str] = []
        missing = max(BLOCK, len(self._text))
        while missing > 0 and not self.ended:
            block = next(self._blocks, None)
            self.ended = block is None
            more.append(block or "")
            missing -= len(more[-1])
        self._text += "".join(more)


def _conversation(text: str, at: int) -> tuple[Any, int]:
    """The conversation that the array at ``at`` is, and where it ends; ENTERED, and where its elements begin, if it is none."""
    if MESSAGE.match(text, at):
        try:
            value, end = DECODE(text, at)
        except (ValueError, RecursionError):
            return ENTERED, at + 1
        if is_conversation(value):
            return value, end
    return ENTERED, at + 1


def _unwrapped(values: Iterator[tuple[str, Any]], wanted: str | None) -> Iterator[tuple[str, Any]]:
    """The same; of a file that is one object around a list of rows (``{"data": [...]}``) the rows."""
    first, second = next(values, None), next(values, None)
    if first is None:
        return
    where, value = first
    if second is None and (name := _around(value, wanted)):
        yield from ((f'{where}, "{name}" {number}', row) for number, row in enumerate(value[name], 1))
        return
    yield first
    if second is not None:
        yield second
        yield from values


def _around(value: Any, wanted: str | None) -> str | None:
    """The field with the rows of an object that is around a list of them, and none itself."""
    if not isinstance(value, dict) or ROWS & value.keys() or any(isinstance(value.get(name), str) for name in TEXTS):
        return None
    if wanted is not None and {wanted, wanted.partition(".")[0]} & value.keys():
        return None
    lists = [name for name, inner in value.items() if _is_rows(inner)]
    return lists[0] if len(lists) == 1 else None


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


# -------------------------------------------------------------------------------------------------------------- tables


def _table(path: Path, form: Format, what: str) -> Iterator[tuple[str, Any]]:
    rows = _cells(path, form, what)
    _, names = next(rows, ("", []))
    for where, row in rows:
        if any(row[len(names) :]):
            raise InputError(
                f"{where}: {len(row)} cells, and the first line has {len(names)}; a text that has the separator is to be quoted"
            )
        yield where, dict(zip(names, row, strict=False))


def read_cells(path: Path, what: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table as they are, the first one too; nothing of a file of another kind. Raises as :func:`read_rows`."""
    form = recognise(path, what)
    if form.kind in ("csv", "tsv"):
        with readable(path, what):
            yield from _cells(path, form, what)


def _cells(path: Path, form: Format, what: str) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(VALUE)
    with closing(decompressed(path, form.compression)) as stream:
        lines = lines_of(decoded(blocks_of(stream)))
        first = next(lines, "")
        # Half of Europe's programs write semicolons, since their commas are decimal.
        delimiter = "\t" if form.kind == "tsv" else "," if "," in first else max(";\t|", key=first.count)
        # In a single column nothing separates, and its texts have all of these, unquoted.
        reader = csv.reader(_again(first, lines), delimiter=delimiter if delimiter in first else NO_SEPARATOR)
        try:
            for row in reader:
                if row or reader.line_num == 1:
                    yield f"{what} {path}, line {reader.line_num}", row
        except csv.Error as error:
            raise InputError(f"{what} {path}, line {reader.line_num}: not {form.kind.upper()} ({error})") from None


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, which are ``\\n`` alone."""
    left = ""
    for block in blocks:
        *lines, left = (left + block).split("\n")
        yield from (line + "\n" for line in lines)
    if left:
        yield left


def _columnar(path: Path, form: Format, what: str, choose: Choice | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{what} {path}: reading .{form.kind} needs pyarrow; pip install pyarrow") from None
    read = _parquet if form.kind == "parquet" else _arrow
    number = 0
    try:
        for batch in read(path, partial(choose, f"{what} {path}") if choose else None):
            for start in range(0, batch.num_rows, BATCH):
                for row in batch.slice(start, BATCH).to_pylist():
                    number += 1
                    yield f"{what} {path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        kind = "a Parquet" if form.kind == "parquet" else "an Arrow"
        raise InputError(f"{what} {path} is not {kind} file, or damaged ({first_line(error)}); fetch it again") from None


def _parquet(path: Path, choose: Chosen | None) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, pre_buffer=False) as file:
        columns = None if choose is None else list(choose(file.schema_arrow.names))
        yield from file.iter_batches(batch_size=BATCH, columns=columns)


def _arrow(path: Path, choose: Chosen | None) -> Iterator[Any]:
    """Files of Arrow's and of Feather's format, and streams, as datasets saved to disk are."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = pyarrow.ipc.open_stream(source)
            batches = iter(reader)
        else:
            batches = map(reader.get_batch, range(reader.num_record_batches))
        columns = None if choose is None else list(choose(reader.schema.names))
        yield from (batch.select(columns) if columns else batch for batch in batches)


# ----------------------------------------------------------------------------------------------------------------- hub


def read_hub(path: str, what: str, instead: str = "", **options: Any) -> Iterator[Row]:
    """The rows of a Hub dataset, through ``datasets``.

    options: what ``datasets.load_dataset`` takes. instead: what else the user may do if it cannot be fetched.
    Raises InputError if it cannot be fetched, or if datasets is not installed.
    """
    with reachable(path, what, instead):
        yield from load_hub(path, what, instead, **options)


def load_hub(path: str, what: str, instead: str = "", **options: Any) -> Any:
    """What ``datasets.load_dataset`` returns; as :func:`read_hub`."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{what} {path} comes through datasets; pip install datasets, or give a file") from None
    with reachable(path, what, instead):
        return datasets.load_dataset(path, **options)


def commit_of(path: str, what: str, revision: str | None) -> str | None:
    """The commit that a revision of a Hub dataset is now; None where the Hub is not asked, or does not answer.

    Raises InputError if there is no such revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().dataset_info(path, revision=revision).sha
    except RevisionNotFoundError:
        raise InputError(f"{what} {path} has no revision {revision!r}; leave it out, or see its page on the Hub") from None
    except Exception:  # whatever is wrong, datasets meets it, too, if its cache is no way out
        return None


@contextmanager
def reachable(path: str, what: str, instead: str = "") -> Iterator[None]:
    """Inside ``with``, what goes wrong with a Hub dataset is an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # datasets raises dozens of kinds for one cause: it cannot be fetched here
        raise InputError(f"{what} {path} cannot be loaded ({first_line(error)}); give a local file{instead}") from error
