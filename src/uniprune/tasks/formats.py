"""Which format a row is of, and the question that it asks: a format is recognised by its fields, wherever the row is from."""

from __future__ import annotations

import ast
import json
from typing import Any

from uniprune.errors import InputError
from uniprune.tasks.choices import CHOICES
from uniprune.tasks.question import Format, Prompt, Question, Row
from uniprune.tasks.written import WRITTEN

FORMATS: dict[str, Format] = {**CHOICES, **WRITTEN}


def prepared(row: Any, where: str) -> Row:
    """A row with the fields of its format: the letters' columns of a table of MMLU are its ``choices``.

    Raises InputError for what is no object.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object, which is in braces, with the fields of a question")
    names = {str(name).lower(): name for name in row}
    if {"question", "a", "b", "c", "d", "answer"} <= names.keys():
        found = {name: row[names[name]] for name in ("question", "answer")}
        found |= {"choices": [row[names[letter]] for letter in "abcd"]}
        return found | ({"subject": row[names["subject"]]} if "subject" in names else {})
    return row


def recognise(row: Row, where: str) -> str:
    """The format of a row. Raises InputError for fields of none."""
    for name, form in FORMATS.items():
        if form.fields.keys() <= row.keys():
            return name
    known = "; ".join(f"{name} ({', '.join(form.fields)})" for name, form in FORMATS.items())
    raise InputError(f"{where}: the fields {', '.join(map(str, row))[:300]} are of no known format: {known}")


def question_of(row: Row, name: str, where: str) -> Question | Prompt:
    """What a row asks. Raises InputError if it is not labelled, or not of the format."""
    form = FORMATS[name]
    for field, kind in form.fields.items():
        row = _typed(row, field, kind)
        if not isinstance(row.get(field), kind):
            raise InputError(f'{where}: no {kind.__name__} field "{field}", which the format {name} has')
    try:
        question = form.question(row)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:  # a field may be anything
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: not a labelled row of the format {name} ({reason})") from None
    if isinstance(question, Question) and not 0 <= question.gold < len(question.choices):
        raise InputError(f"{where}: label {question.gold} is none of {len(question.choices)} choices; give a labelled split")
    return question


def solved(row: Row, name: str, where: str) -> str:
    """A row as a solved example. Raises InputError as :func:`question_of`, and for a format that has no answers."""
    form, question = FORMATS[name], question_of(row, name, where)
    if form.solved is not None:
        return form.solved(row)
    if isinstance(question, Prompt):
        raise InputError(f"the rows of the format {name} have no answers, so none can be an example: leave out --num-fewshot")
    return question.solved


def _typed(row: Row, field: str, kind: type) -> Row:
    """The row with a list or an object in place of its text, as a column of a table, or of a published data set, has it."""
    value = row.get(field)
    if kind not in (list, dict) or not isinstance(value, str):
        return row
    for read in (json.loads, ast.literal_eval):
        try:
            return row | {field: read(value)}
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return row
