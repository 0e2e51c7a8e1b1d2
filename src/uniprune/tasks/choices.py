"""Multiple-choice formats: a row of a data set -> the texts that a language model is asked to score, and which is right.

The prompts are those of lm-evaluation-harness 0.4.13, to the letter: accuracies compare only if they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from uniprune.tasks.question import Format, Question, Row


def _asked(context: str, answers: Sequence[str], gold: int) -> Question:
    """One context, and answers that follow it after a space."""
    if any(answer is None for answer in answers):
        raise ValueError("a choice is null")
    return Question(tuple((context, f" {answer}") for answer in answers), gold)


def _place(labels: Sequence[str], wanted: str) -> int:
    """Where a label stands. Raises ValueError if it is none: in a text of letters ``str.index`` finds '' and several, too."""
    return [*labels].index(wanted)


def _piqa(row: Row) -> Question:
    return _asked(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Row) -> Question:
    choices = row["choices"]
    return _asked(f"Question: {row['question']}\nAnswer:", choices["text"], _place(choices["label"], row["answerKey"]))


def _openbookqa(row: Row) -> Question:
    choices = row["choices"]
    return _asked(row["question_stem"], choices["text"], _place(choices["label"], row["answerKey"].lstrip()))


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
    return _asked(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], _truth(gold))


def _truth(value: Any) -> int:
    """A label as it stands in a table: a number, or a truth value in words."""
    return {"true": 1, "false": 0}.get(word, -1) if (word := str(value).strip().lower()).isalpha() else int(value)


def _rte(row: Row) -> Question:
    context = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return _asked(context, ["True", "False"], int(row["label"]))


def _sciq(row: Row) -> Question:
    answers = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _asked(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", answers, 3)


def _race(row: Row) -> Question:
    """The last question about an article; those before it stand there with their answers."""
    *before, last = row["problems"]
    context = f"Article: {row['article']}\n\n" + "".join(map(_race_solved, before)) + last["question"]
    return _asked(context, last["options"][:4], _place("ABCD", last["answer"]))


def _race_solved(problem: dict[str, Any]) -> str:
    """An answer fills the gap that a question may end with (``  _  .``)."""
    question, answer = problem["question"], problem["options"][_place("ABCD", problem["answer"])]
    return f"{question[:-5]}{answer}\n" if question.endswith("  _  .") else f"Question: {question}\nAnswer: {answer}\n"


LETTERS = "ABCDEFGHIJ"


def _mmlu(row: Row) -> Question:
    """The letters compete. The answer is an index, as the Hub's data set has it, or a letter."""
    letters = LETTERS[: len(row["choices"])]
    if len(letters) < len(row["choices"]):
        raise ValueError(f"{len(row['choices'])} choices, more than the {len(LETTERS)} letters")
    if None in row["choices"]:
        raise ValueError("a choice is null")
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
    answer = row["answer"]
    gold = _place(letters, answer) if answer in [*letters] else int(answer)
    return _asked(f"{row['question'].strip()}\n{choices}\nAnswer:", letters, gold)


def _mmlu_subject(row: Row) -> str:
    return str(row.get("subject") or "")


def _mmlu_about(row: Row) -> str:
    subject = _mmlu_subject(row).replace("_", " ")
    return f"The following are multiple choice questions (with answers){f' about {subject}' if subject else ''}.\n\n"


def _lambada(row: Row) -> Question:
    context, _, word = row["text"].rpartition(" ")
    return _asked(context, [word], 0)


def _lambada_solved(row: Row) -> str:
    """The harness puts a space before an answer that begins with one."""
    (context, word) = _lambada(row).choices[0]
    return f"{context} {word}"


CHOICES: dict[str, Format] = {
    "piqa": Format({"goal": str, "sol1": str, "sol2": str}, _piqa, normalised=True),
    "arc": Format({"question": str, "choices": dict, "answerKey": str}, _arc, normalised=True, itself=True),
    "openbookqa": Format({"question_stem": str, "choices": dict, "answerKey": str}, _openbookqa, normalised=True, itself=True),
    "winogrande": Format({"sentence": str, "option1": str, "option2": str}, _winogrande),
    "hellaswag": Format({"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list}, _hellaswag, normalised=True),
    "boolq": Format({"passage": str, "question": str}, _boolq),
    "rte": Format({"sentence1": str, "sentence2": str}, _rte),
    "sciq": Format(
        {"question": str, "support": str, "correct_answer": str, "distractor1": str, "distractor2": str, "distractor3": str},
        _sciq,
        normalised=True,
        itself=True,
    ),
    "race": Format({"article": str, "problems": list}, _race, itself=True),
    "mmlu": Format(
        {"question": str, "choices": list, "answer": object},
        _mmlu,
        about=_mmlu_about,
        subject=_mmlu_subject,
        first=True,
        itself=True,
    ),
    "lambada": Format({"text": str}, _lambada, solved=_lambada_solved, itself=True),
}
