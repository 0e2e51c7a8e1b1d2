"""Tasks from where their rows are: a data set on the Hub, a file of rows, a folder with the splits of a data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from uniprune.data.rows import read_cells, read_hub, read_rows
from uniprune.data.text import IGNORED
from uniprune.errors import InputError
from uniprune.storage.files import check_again_readable, path_of
from uniprune.tasks.catalogue import NAMES, listed
from uniprune.tasks.examples import Examples
from uniprune.tasks.formats import FORMATS, prepared, question_of, recognise, solved
from uniprune.tasks.question import Row, Task

Rows = Iterator[tuple[str, Any]]  # each with where it stands, for messages
SPLITS = {name: name for name in ("test", "validation", "train", "dev")} | {"valid": "validation", "val": "validation"}


@dataclass(frozen=True)
class TaskRows:
    """``asked``: the rows that are asked. ``examples``: the solved ones of another split; None if there is none."""

    asked: Callable[[], Rows]
    examples: Callable[[], Rows] | None = None
    fewshot: int = 0


def load_task(source: str, limit: int | None = None, fewshot: int | None = None) -> Task:
    """A task by its name, from a file of rows (.jsonl, .json, .csv, .parquet, ...), or from a folder of its splits.

    limit: how many rows, the first; of each subject where a data set has several. fewshot: solved examples before each
    question, by default as the name's published protocol has it. They come from the training split (MMLU: dev), or, for rows
    without one, from the other rows.
    Raises InputError for an unknown name, rows of no known format, a row without what the format needs, too few examples.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} is not positive; leave it out to ask all questions")
    if fewshot is not None and fewshot < 0:
        raise InputError(f"--num-fewshot {fewshot} is negative")
    found = _located(source)
    count = found.fewshot if fewshot is None else fewshot
    rows, form = _first(found.asked(), limit)
    if not rows:
        raise InputError(f"task {source} is empty")
    examples = _examples(found, form, count)
    questions, subjects = [], []
    for where, row in rows:
        question = question_of(row, form, where)
        try:
            before = "".join(f"{solved(one, form, f'{where}, an example')}\n\n" for one in examples.of(row))
        except InputError as error:
            raise InputError(f"task {source}: {error}") from None
        format = FORMATS[form]
        questions.append(question.after((format.about(row) if format.about else "") + before))
        subjects.append(format.subject(row) if format.subject else "")
    return Task(source, form, tuple(questions), count, tuple(subjects) if any(subjects) else ())


def _first(rows: Rows, limit: int | None) -> tuple[list[tuple[str, Row]], str]:
    """The rows that are asked, and their format, which is the first one's."""
    prepared_rows = ((where, prepared(row, where)) for where, row in rows)
    first = next(prepared_rows, None)
    if first is None:
        return [], ""
    where, row = first
    form, rest = recognise(row, where), chain([first], prepared_rows)
    subject = FORMATS[form].subject
    if limit is None or subject is None:
        return list(islice(rest, limit)), form
    found: dict[str, list[tuple[str, Row]]] = {}
    for where, row in rest:
        group = found.setdefault(subject(row), [])
        if len(group) < limit:
            group.append((where, row))
    return [pair for group in found.values() for pair in group], form


def _examples(found: TaskRows, form: str, count: int) -> Examples:
    format = FORMATS[form]
    own = found.examples is None
    pool: list[Row] = []
    if count:
        rows = (found.examples or found.asked)()
        pool = [prepared(row, where) for where, row in rows]
    return Examples(pool, format, count, without_itself=own or not format.itself)


# --------------------------------------------------------------------------------------------------------- where rows are


def _located(source: str) -> TaskRows:
    if data := listed(source):
        return TaskRows(
            lambda: _hub(source, data.path, split=data.split, **data.options),
            lambda: _hub(source, data.path, split=data.examples, **data.options),
            data.fewshot,
        )
    path = path_of(source)
    if path.is_dir():
        return _splits(path)
    check_again_readable("task", source)
    if not path.is_file():
        other = "; its rules need lm-evaluation-harness: --lm-eval ifeval" if source == "ifeval" else ""
        raise InputError(
            f"task {source!r} is neither one of {', '.join(NAMES)} nor an existing file of rows, .jsonl say, or a folder{other}"
        )
    return TaskRows(lambda: _file(path))


def _hub(source: str, path: str, **options: Any) -> Rows:
    rows = enumerate(read_hub(path, "task", **options), 1)
    return ((f"task {source}, row {number}", row) for number, row in rows)


def _splits(folder: Path) -> TaskRows:
    """A data set on disk, files or folders by split: ``test.jsonl``, ``train-00000-of-00001.parquet``, ``dev/anatomy_dev.csv``.

    Asked is the split that lm-evaluation-harness takes of data sets of this format, if it is there.
    """
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if named := re.match(rf"({'|'.join(SPLITS)})(?![a-z])", path.name):
            inside = sorted(path.rglob("[!.]*")) if path.is_dir() else [path]
            splits.setdefault(SPLITS[named.group(1)], []).extend(file for file in inside if _has_rows(file))
    wanted = ["test", "validation"]
    if not any(splits.get(name) for name in wanted):
        raise InputError(f"task {folder} is a folder without test.* or validation.*; give those, or one file of rows")
    form = _first(_files([path for name in wanted for path in splits.get(name, [])]), 1)[1]
    usual = next((data for name, data in NAMES.items() if name.startswith(form)), NAMES["mmlu"])
    asked = splits.get(usual.split) or splits[next(name for name in wanted if splits.get(name))]
    examples = next((splits[name] for name in (usual.examples, "train", "dev") if name in splits), None)
    return TaskRows(lambda: _files(asked), None if examples is None else lambda: _files(examples))


def _has_rows(path: Path) -> bool:
    """Whether a path is a file, and none that only accompanies data, as ``save_to_disk`` writes some beside its tables."""
    return path.is_file() and not IGNORED.fullmatch(path.name)


def _files(paths: list[Path]) -> Rows:
    for path in paths:
        yield from _file(path)


def _file(path: Path) -> Rows:
    """The rows of a file. MMLU's own tables have no head: question, four choices, a letter; the file's name is the subject."""
    head = next(read_cells(path, "task"), None)
    if head is None or len(head[1]) != 6 or head[1][-1] not in ("A", "B", "C", "D"):
        return read_rows(path, "task")
    subject = re.sub(r"_(test|val|dev)$", "", path.stem)
    names = ("question", "A", "B", "C", "D", "answer")
    return ((where, dict(zip(names, row, strict=False)) | {"subject": subject}) for where, row in read_cells(path, "task"))
