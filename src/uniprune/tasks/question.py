"""What a model is asked: choices whose log-likelihoods compete, or a prompt that it goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """``choices``: pairs of a context and its continuation, whose log-likelihoods compete. ``gold``: index of the right one.

    A question with one choice is a cloze: right if every token of the continuation is the likeliest.
    """

    choices: tuple[tuple[str, str], ...]
    gold: int

    def after(self, text: str) -> Question:
        """The same, asked after a text: what the task is about, solved examples."""
        return replace(self, choices=tuple((text + context, answer) for context, answer in self.choices)) if text else self

    @property
    def solved(self) -> str:
        """The context and its right answer: an example for another question."""
        return "".join(self.choices[self.gold])


@dataclass(frozen=True)
class Prompt:
    """A text that the model continues greedily. ``expected``: what the format judges the continuation by.

    ``stop``: texts before which it ends. ``tokens``: how many are written at most.
    """

    text: str
    expected: Any
    stop: tuple[str, ...] = ()
    tokens: int = 256

    def after(self, text: str) -> Prompt:
        """The same, asked after a text."""
        return replace(self, text=text + self.text)


@dataclass(frozen=True)
class Format:
    """How the rows of a data set become questions.

    fields: what a row has beside its label, by which the format is recognised. normalised: whether acc_norm is reported.
    solved: the row as an example; by default the question and its right answer. about: what stands before everything.
    subject: the part of the data set that a row is of; examples are of the same part. first: whether examples are the first
    ones that there are, instead of random ones. itself: whether a question may be among its examples, as
    lm-evaluation-harness has it where a data set has a test split; else it draws one more, and leaves the question out.
    judge: of a format whose answers are written: metric -> what of it is right, the one that counts as accuracy first.
    """

    fields: Mapping[str, type]
    question: Callable[[Row], Question | Prompt]
    normalised: bool = False
    solved: Callable[[Row], str] | None = None
    about: Callable[[Row], str] | None = None
    subject: Callable[[Row], str] | None = None
    first: bool = False
    itself: bool = False
    judge: Callable[[Any, str], dict[str, list[bool]]] | None = None


@dataclass(frozen=True)
class Task:
    """The questions of one data set. ``fewshot``: number of solved examples before each. ``subjects``: of each question."""

    name: str
    format: str
    questions: tuple[Question | Prompt, ...]
    fewshot: int = 0
    subjects: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of all questions: accuracies of different models compare if it is equal."""
        return hashlib.sha256(repr([astuple(question) for question in self.questions]).encode()).hexdigest()
