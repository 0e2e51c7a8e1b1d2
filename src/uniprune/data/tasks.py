"""Multiple-choice tasks: a row of a data set -> the texts that a language model is asked to score, and which is right.

The prompts are those of lm-evaluation-harness 0.4.13, zero-shot, to the letter: accuracies compare only if they are. A format
is recognised by its fields, wherever the rows come from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from uniprune.data.rows import Row, read_hub, read_rows
from uniprune.errors import InputError


@dataclass(frozen=True)
class Question:
    """``choices``: pairs of a context and its continuation, whose log-likelihoods compete. ``gold``: index of the right one.

    A question with one choice is a cloze: right if every token of the continuation is the likeliest.
    """

    choices: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Format:
    """How the rows of a data set become questions.

    fields: what a row has beside its label, by which the format is recognised. normalised: whether acc_norm is reported.
    """

    fields: Mapping[str, type]
    question: Callable[[Row], Question]
    normalised: bool = False


@dataclass(frozen=True)
class Task:
    """The questions of one data set."""

    name: str
    format: str
    questions: tuple[Question, ...]

    @property
    def normalised(self) -> bool:
        return FORMATS[self.format].normalised

    @property
    def sha256(self) -> str:
        """Hash of all questions: accuracies of different models compare if it is equal."""
        return hashlib.sha256(repr([astuple(question) for question in self.questions]).encode()).hexdigest()


def load_task(source: str, limit: int | None = None) -> Task:
    """A task by its name (one of ``HUB``) or from a file of rows (.jsonl, .json, .parquet, ...); the first ``limit`` rows.

    Raises InputError for an unknown name, a file of no known format, and a row without what the format needs.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} is not positive; leave it out to ask all questions")
    questions, found = [], ""
    for where, row in islice(_rows(source), limit):
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object, which is in braces, with the fields of a question")
        found = found or _recognise(row, where)
        questions.append(_question(row, found, where))
    if not questions:
        raise InputError(f"task {source} is empty")
    return Task(source, found, tuple(questions))


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """Rows, each with where it stands, for messages."""
    if source in HUB:
        name, options = HUB[source]
        rows = enumerate(read_hub(name, "task", **options), 1)
        return ((f"task {source}, row {number}", row) for number, row in rows)
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"task {source!r} is neither one of {', '.join(HUB)} nor an existing file of rows, .jsonl say")
    return read_rows(path, "task")


def _recognise(row: Row, where: str) -> str:
    for name, form in FORMATS.items():
        if form.fields.keys() <= row.keys():
            return name
    known = "; ".join(f"{name} ({', '.join(form.fields)})" for name, form in FORMATS.items())
    raise InputError(f"{where}: the fields {', '.join(row)[:300]} are of no known format: {known}")


def _question(row: Row, name: str, where: str) -> Question:
    form = FORMATS[name]
    for field, kind in form.fields.items():
        if not isinstance(row.get(field), kind):
            raise InputError(f'{where}: no {kind.__name__} field "{field}", which the format {name} has')
    try:
        question = form.question(row)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:  # a field may be anything
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: not a labelled row of the format {name} ({reason})") from None
    if not 0 <= question.gold < len(question.choices):
        raise InputError(f"{where}: label {question.gold} is none of {len(question.choices)} choices; give a labelled split")
    return question


# ----------------------------------------------------------------------------------------------------------- formats


def _asked(context: str, answers: Sequence[str], gold: int) -> Question:
    """One context, and answers that follow it after a space."""
    return Question(tuple((context, f" {answer}") for answer in answers), gold)


def _piqa(row: Row) -> Question:
    return _asked(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Row) -> Question:
    choices = row["choices"]
    return _asked(f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))


def _openbookqa(row: Row) -> Question:
    choices = row["choices"]
    return _asked(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"].lstrip()))


def _winogrande(row: Row) -> Question:
    """The options fill the gap, and what is scored is the text after it: the same for both, after two contexts."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError('no "_" in the sentence')
    contexts = before + row["option1"], before + row["option2"]
    return Question(tuple((context, f" {after.strip()}") for context in contexts), int(row["answer"]) - 1)


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _asked(_without_brackets(context), [_without_brackets(ending) for ending in row["endings"]], int(row["label"]))


def _without_brackets(text: str) -> str:
    """HellaSwag's WikiHow part has headings in brackets: ``[header] ... [title] ... [step] ...``."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(row: Row) -> Question:
    gold = row["label"] if "label" in row else row["answer"]  # SuperGLUE's copy and BoolQ's own
    return _asked(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(gold))


def _rte(row: Row) -> Question:
    context = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return _asked(context, ["True", "False"], int(row["label"]))


def _mmlu(row: Row) -> Question:
    """The letters compete. The answer is an index, as the Hub's dataset has it, or a letter."""
    subject, letters = str(row.get("subject") or "").replace("_", " "), "ABCDEFGHIJ"[: len(row["choices"])]
    about = f" about {subject}" if subject else ""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
    context = (
        f"The following are multiple choice questions (with answers){about}.\n\n{row['question'].strip()}\n{choices}\nAnswer:"
    )
    answer = row["answer"]
    return _asked(context, letters, letters.index(answer) if isinstance(answer, str) and answer in letters else int(answer))


def _lambada(row: Row) -> Question:
    context, _, word = row["text"].rpartition(" ")
    return _asked(context, [word], 0)


FORMATS: dict[str, Format] = {
    "piqa": Format({"goal": str, "sol1": str, "sol2": str}, _piqa, normalised=True),
    "arc": Format({"question": str, "choices": dict, "answerKey": str}, _arc, normalised=True),
    "openbookqa": Format({"question_stem": str, "choices": dict, "answerKey": str}, _openbookqa, normalised=True),
    "winogrande": Format({"sentence": str, "option1": str, "option2": str}, _winogrande),
    "hellaswag": Format({"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list}, _hellaswag, normalised=True),
    "boolq": Format({"passage": str, "question": str}, _boolq),
    "rte": Format({"sentence1": str, "sentence2": str}, _rte),
    "mmlu": Format({"question": str, "choices": list, "answer": object}, _mmlu),
    "lambada": Format({"text": str}, _lambada),
}

HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "piqa": ("baber/piqa", {"split": "validation"}),
    "arc_easy": ("allenai/ai2_arc", {"name": "ARC-Easy", "split": "test"}),
    "arc_challenge": ("allenai/ai2_arc", {"name": "ARC-Challenge", "split": "test"}),
    "openbookqa": ("allenai/openbookqa", {"name": "main", "split": "test"}),
    "winogrande": ("allenai/winogrande", {"name": "winogrande_xl", "split": "validation"}),
    "hellaswag": ("Rowan/hellaswag", {"split": "validation"}),
    "boolq": ("aps/super_glue", {"name": "boolq", "split": "validation"}),
    "rte": ("nyu-mll/glue", {"name": "rte", "split": "validation"}),
    "lambada": ("EleutherAI/lambada_openai", {"name": "default", "split": "test"}),
}
"""Task names -> data sets and splits, those that lm-evaluation-harness takes."""
