"""Zero-shot accuracy: which questions of a task a model has right, and how that compares with another model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from uniprune.common.progress import Progress, silent
from uniprune.common.significance import mcnemar, standard_error
from uniprune.data.tasks import Question, Task
from uniprune.errors import InputError
from uniprune.evaluation.perplexity import NOT_FINITE
from uniprune.evaluation.results import Compared, TaskResult
from uniprune.evaluation.scoring import Score, Tokens, encode, score


@dataclass(frozen=True)
class Answers:
    """A model's answers to a task. ``right``: metric -> whether each question is answered rightly. ``scores``: by choice.

    ``acc`` takes the choice with the highest log-likelihood, ``acc_norm`` the one with the highest per character.
    """

    task: Task
    scores: list[list[Score]]
    right: dict[str, list[bool]]
    cut: int = 0  # questions that the model could not read from their beginning

    def result(self, reference: Answers | None = None) -> TaskResult:
        """The accuracies with their standard errors, and what was asked. reference: another model's answers."""
        facts: dict[str, Any] = {
            "format": self.task.format,
            "questions": len(self.task.questions),
            "questions_cut": self.cut,
            "sha256": self.task.sha256,
        }
        for metric, right in self.right.items():
            facts |= {metric: sum(right) / len(right), f"{metric}_stderr": standard_error(right)}
        if all(len(choices) == 1 for choices in self.scores):  # cloze: perplexity of the answers, each as a whole
            facts["perplexity"] = math.exp(-sum(only.nats for (only,) in self.scores) / len(self.scores))
        if reference is not None:
            facts["against"] = self.against(reference)
        return TaskResult(**facts)

    def against(self, reference: Answers) -> dict[str, Compared]:
        """By metric: the accuracy of a reference on the same questions, the answers gained and lost, McNemar's p."""
        facts = {}
        for metric, theirs in reference.right.items():
            ours = self.right[metric]
            gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
            lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
            accuracy = sum(theirs) / len(theirs)
            facts[metric] = Compared(reference=accuracy, gained=gained, lost=lost, p=mcnemar(gained, lost))
        return facts


def tokenise(task: Task, tokenizer: Any, limit: int) -> list[list[Tokens]]:
    """The choices of every question as tokens, for a model that reads ``limit`` at once.

    Raises InputError that names the task and the question if one cannot be scored.
    """
    questions = []
    for number, question in enumerate(task.questions, 1):
        try:
            questions.append([encode(tokenizer, before, after, limit) for before, after in question.choices])
        except InputError as error:
            raise InputError(f"task {task.name}, question {number}: {error}") from None
    return questions


def answer(
    model: nn.Module, tasks: Sequence[Task], tokens: Sequence[Sequence[Sequence[Tokens]]], progress: Progress = silent
) -> list[Answers]:
    """What a model answers to the questions of several tasks, given as :func:`tokenise` makes them for it, task by task.

    Raises InputError if a log-likelihood is not a number: the first choice would count as the best, and where it is the right
    one a broken model would be perfect.
    """
    found = score(model, [question for questions in tokens for question in questions], progress)
    if any(math.isnan(choice.nats) for choices in found for choice in choices):
        raise InputError(NOT_FINITE)
    scores = iter(found)
    return [
        _marked(task, list(islice(scores, len(task.questions))), cut_of(questions))
        for task, questions in zip(tasks, tokens, strict=True)
    ]


def cut_of(questions: Sequence[Sequence[Tokens]]) -> int:
    """How many questions have lost their beginning to a model's context."""
    return sum(any(choice.cut for choice in question) for question in questions)


def _marked(task: Task, scores: list[list[Score]], cut: int) -> Answers:
    right = {"acc": [_right(*pair) for pair in zip(task.questions, scores, strict=True)]}
    if task.normalised:
        right["acc_norm"] = [_right_per_character(*pair) for pair in zip(task.questions, scores, strict=True)]
    return Answers(task, scores, right, cut)


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
