"""Accuracy: which questions of a task a model has right, and how that compares with another model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from uniprune.common.progress import Progress, silent
from uniprune.common.significance import mcnemar, standard_error
from uniprune.errors import InputError
from uniprune.evaluation.generation import write
from uniprune.evaluation.perplexity import NOT_FINITE, exp
from uniprune.evaluation.results import Accuracy, Compared, TaskResult
from uniprune.tasks.catalogue import FIELDS, capability_of
from uniprune.tasks.formats import FORMATS
from uniprune.tasks.question import Prompt, Question, Task
from uniprune.tasks.scoring import Score, Tokens, encode, score

Asked = Sequence[Tokens]
"""A question as a model reads it: its choices, or the prompt that it goes on with, of which nothing is scored."""


@dataclass(frozen=True)
class Answers:
    """A model's answers to a task. ``right``: metric -> whether each question is answered rightly. ``scores``: by choice.

    ``acc`` takes the choice with the highest log-likelihood, ``acc_norm`` the one with the highest per character. Where answers
    are written, ``acc`` is the first thing that they are judged by; ``others``: the rest, metric -> truths.
    """

    task: Task
    scores: list[list[Score]]
    right: dict[str, list[bool]]
    cut: int = 0  # questions that the model could not read from their beginning
    others: dict[str, list[bool]] | None = None
    judged: str | None = None  # what ``acc`` is, where answers are written
    written: Sequence[str] = ()

    def result(self, reference: Answers | None = None) -> TaskResult:
        """The accuracies with their standard errors, and what was asked. reference: another model's answers."""
        task = self.task
        facts: dict[str, Any] = {
            "format": task.format,
            "questions": len(task.questions),
            "questions_cut": self.cut,
            "num_fewshot": task.fewshot,
            "capability": capability_of(task.name, task.format),
            "sha256": task.sha256,
            "metric": self.judged,
            "others": {metric: accuracy(truths) for metric, truths in (self.others or {}).items()},
            "parts": self._parts(),
        }
        for metric, right in self.right.items():
            facts |= {metric: sum(right) / len(right), f"{metric}_stderr": standard_error(right)}
        if self.scores and all(
            len(choices) == 1 for choices in self.scores
        ):  # cloze: perplexity of the answers, each as a whole
            facts["perplexity"] = exp(-sum(only.nats for (only,) in self.scores) / len(self.scores))
        if reference is not None:
            facts["against"] = self.against(reference)
        return TaskResult(**facts)

    def against(self, reference: Answers) -> dict[str, Compared]:
        """By metric: the accuracy of a reference on the same questions, the answers gained and lost, McNemar's p."""
        return {metric: compared(self.right[metric], theirs) for metric, theirs in reference.right.items()}

    def _parts(self) -> dict[str, Accuracy]:
        """By subject, and by the groups of subjects that MMLU has, which come first."""
        subjects = self.task.subjects
        if len(set(subjects)) < 2:
            return {}
        groups = [FIELDS.get(subject) for subject in subjects]
        names = [*dict.fromkeys(filter(None, groups)), *dict.fromkeys(subjects)]
        parts = {name: [*self._of(name, groups), *self._of(name, subjects)] for name in names}
        return {name: accuracy(truths) for name, truths in parts.items()}

    def _of(self, name: str, labels: Sequence[str | None]) -> Iterator[bool]:
        return (truth for truth, label in zip(self.right["acc"], labels, strict=True) if label == name)


def accuracy(truths: Sequence[bool]) -> Accuracy:
    """How many are true, with the standard error."""
    return Accuracy(value=sum(truths) / len(truths), stderr=standard_error(truths), n=len(truths))


def compared(ours: Sequence[bool], theirs: Sequence[bool]) -> Compared:
    """Answers to the same questions beside those of a reference."""
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return Compared(reference=sum(theirs) / len(theirs), gained=gained, lost=lost, p=mcnemar(gained, lost))


def tokenise(task: Task, tokenizer: Any, limit: int) -> list[list[Tokens]]:
    """Every question as tokens, for a model that reads ``limit`` at once: its choices, or its prompt.

    Raises InputError that names the task and the question if one cannot be scored.
    """
    questions = []
    for number, question in enumerate(task.questions, 1):
        try:
            questions.append(_encoded(question, tokenizer, limit))
        except InputError as error:
            raise InputError(f"task {task.name}, question {number}: {error}") from None
    return questions


def _encoded(question: Question | Prompt, tokenizer: Any, limit: int) -> list[Tokens]:
    if isinstance(question, Question):
        known: dict[str, int] = {}  # lengths of contexts, which choices mostly share
        return [encode(tokenizer, before, after, limit, known) for before, after in question.choices]
    room = limit - question.tokens
    if room < 1:
        raise InputError(f"{question.tokens} new tokens do not fit the model's context of {limit}")
    ids = tokenizer.encode(question.text)
    if not ids:
        raise InputError("the prompt is empty")
    return [Tokens(ids[-room:], 0, max(0, len(ids) - room))]


def answer(
    model: nn.Module,
    tasks: Sequence[Task],
    tokens: Sequence[Sequence[Asked]],
    progress: Progress = silent,
    tokenizer: Any = None,
) -> list[Answers]:
    """What a model answers to the questions of several tasks, given as :func:`tokenise` makes them for it, task by task.

    tokenizer: reads what is written; needed for tasks whose answers are.
    Raises InputError if a log-likelihood is not finite: the first choice would count as the best, and where it is the right
    one a broken model would be perfect.
    """
    judged = [FORMATS[task.format].judge is not None for task in tasks]
    scored = [list(questions) for questions, written in zip(tokens, judged, strict=True) if not written]
    found = score(model, [question for questions in scored for question in questions], progress)
    if not all(math.isfinite(choice.nats) for choices in found for choice in choices):
        raise InputError(NOT_FINITE)
    scores = iter(found)
    return [
        _judged(task, write(model, tokenizer, task.questions, questions, progress), cut_of(questions))
        if written
        else _marked(task, list(islice(scores, len(task.questions))), cut_of(questions))
        for task, questions, written in zip(tasks, tokens, judged, strict=True)
    ]


def cut_of(questions: Sequence[Asked]) -> int:
    """How many questions have lost their beginning to a model's context."""
    return sum(any(choice.cut for choice in question) for question in questions)


def _marked(task: Task, scores: list[list[Score]], cut: int) -> Answers:
    questions = [question for question in task.questions if isinstance(question, Question)]
    right = {"acc": [_right(*pair) for pair in zip(questions, scores, strict=True)]}
    if FORMATS[task.format].normalised:
        right["acc_norm"] = [_right_per_character(*pair) for pair in zip(questions, scores, strict=True)]
    return Answers(task, scores, right, cut)


def _judged(task: Task, written: Sequence[str], cut: int) -> Answers:
    judge = FORMATS[task.format].judge
    assert judge is not None
    found: dict[str, list[bool]] = {}
    for question, text in zip(task.questions, written, strict=True):
        assert isinstance(question, Prompt)
        for metric, truths in judge(question.expected, text).items():
            found.setdefault(metric, []).extend(truths)
    first, *rest = found
    return Answers(task, [], {"acc": found[first]}, cut, {metric: found[metric] for metric in rest}, first, written)


def _right(question: Question, scores: Sequence[Score]) -> bool:
    if len(scores) == 1:
        return scores[0].greedy
    return _best([choice.nats for choice in scores]) == question.gold


def _right_per_character(question: Question, scores: Sequence[Score]) -> bool:
    """The space before an answer does not count; an empty answer is never the best."""
    lengths = [len(after) - 1 for _, after in question.choices]
    return _best([one.nats / size if size else -math.inf for one, size in zip(scores, lengths, strict=True)]) == question.gold


def _best(values: Sequence[float]) -> int:
    """Of equal ones the first."""
    return max(range(len(values)), key=lambda index: values[index])
