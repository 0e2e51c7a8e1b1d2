"""Accuracies and their comparison, from scores by hand."""

import math
from itertools import product

import pytest

from conftest import tiny_model
from uniprune.common.significance import mcnemar, standard_error
from uniprune.errors import InputError
from uniprune.evaluation.answers import Answers, answer, tokenise
from uniprune.evaluation.results import Compared
from uniprune.tasks.question import Question, Task
from uniprune.tasks.scoring import Score, score


def asked(monkeypatch, task, scores):
    """The answers of a model that gives these log-likelihoods, question by question."""
    given = [[value if isinstance(value, Score) else Score(value, False) for value in row] for row in scores]
    monkeypatch.setattr("uniprune.evaluation.answers.score", lambda model, questions, progress: given)
    return answer(None, [task], [[]], None)[0]


def choices(*answers, gold):
    return Question(tuple(("Q:", f" {text}") for text in answers), gold)


def test_acc_and_acc_norm(monkeypatch):
    task = Task("t", "piqa", (choices("yes", "certainly not", gold=1), choices("äh", "no", gold=0), choices("", "no", gold=0)))
    found = asked(monkeypatch, task, [[-4.0, -13.0], [-2.0, -2.0], [-1.0, -9.0]])
    # per character -4/3 < -13/13; of equal ones the first counts; characters, not bytes; nothing is never best per character
    assert found.right == {"acc": [False, True, True], "acc_norm": [True, True, False]}
    record = found.result()
    assert record.acc == record.acc_norm == pytest.approx(2 / 3)
    assert record.acc_stderr == pytest.approx(math.sqrt((2 * (1 / 3) ** 2 + (2 / 3) ** 2) / 2 / 3))
    assert (record.format, record.questions, record.sha256) == ("piqa", 3, task.sha256)


def test_formats_without_free_answers_have_no_acc_norm(monkeypatch):
    found = asked(monkeypatch, Task("t", "rte", (choices("True", "False", gold=1),)), [[-2.0, -1.0]])
    assert found.right == {"acc": [True]}
    assert found.result().acc_stderr is None
    assert found.result().acc_norm is None


def test_cloze_is_right_if_greedy(monkeypatch):
    task = Task("t", "lambada", (choices("door", gold=0), choices("sea", gold=0)))
    found = asked(monkeypatch, task, [[Score(-1.0, True)], [Score(-3.0, False)]])
    assert found.right == {"acc": [True, False]}
    assert found.result().perplexity == pytest.approx(math.exp(2))


def test_answers_gained_and_lost(monkeypatch):
    task = Task("t", "rte", tuple(choices("True", "False", gold=0) for _ in range(6)))
    dense = Answers(task, [], {"acc": [True, True, True, False, False, True]})
    pruned = Answers(task, [], {"acc": [True, False, False, True, False, False]})
    expected = Compared(reference=4 / 6, gained=1, lost=3, p=mcnemar(1, 3))
    assert pruned.against(dense) == {"acc": expected}


@pytest.mark.parametrize(("gained", "lost"), product(range(5), repeat=2))
def test_mcnemar_counts_coins(gained, lost):
    """All ways in which so many fair coins fall: those at least as far from even, of all."""
    flips = list(product((0, 1), repeat=gained + lost))
    extreme = sum(abs(2 * sum(flip) - gained - lost) >= abs(gained - lost) for flip in flips)
    assert mcnemar(gained, lost) == pytest.approx(extreme / len(flips))


def test_mcnemar_of_many():
    assert mcnemar(10_000, 10_000) == pytest.approx(1.0)
    assert 0 < mcnemar(900, 1100) < 1e-4


def test_standard_error():
    assert standard_error([True, True]) == 0
    assert standard_error([True]) is None


def test_the_question_that_cannot_be_asked_is_named(tokenizer):
    task = Task("t.jsonl", "lambada", (choices("door", gold=0), choices("a long answer " * 9, gold=0)))
    with pytest.raises(InputError, match=r"task t\.jsonl, question 2: the answer .* can score 1 to 16"):
        tokenise(task, tokenizer, 16)


def test_tasks_are_answered_in_order(tokenizer):
    model = tiny_model()
    tasks = [
        Task("t", "piqa", tuple(choices("yes", "no " * count, gold=0) for count in counts)) for counts in ((1, 4, 2), (3, 5))
    ]
    tokens = [tokenise(task, tokenizer, 128) for task in tasks]
    for found, questions in zip(answer(model, tasks, tokens), tokens, strict=True):
        for together, question in zip(found.scores, questions, strict=True):
            (alone,) = score(model, [question])
            assert [one.nats for one in together] == pytest.approx([one.nats for one in alone], abs=1e-4)


def test_a_broken_model_has_no_accuracy(monkeypatch):
    """Of scores that are no numbers the first would be the best: with the right choice first, 100 %."""
    task = Task("t", "piqa", (choices("yes", "no", gold=0),))
    with pytest.raises(InputError, match="not finite"):
        asked(monkeypatch, task, [[math.nan, math.nan]])
    with pytest.raises(InputError, match="not finite"):  # the head overflows for a token that no choice has
        asked(monkeypatch, task, [[-math.inf, -math.inf]])
