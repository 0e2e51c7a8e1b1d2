"""Formats whose answers are written by the model: a row -> a prompt, and a judgement of what it wrote.

As lm-evaluation-harness 0.4.13 has them, prompts, stop texts and all.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from uniprune.errors import InputError
from uniprune.tasks.instructions import CHECKS, ELSEWHERE, follows, revised
from uniprune.tasks.question import Format, Prompt, Row

ENDS = "</s>", "<|im_end|>"
TOKENS = {"gsm8k": 256, "ifeval": 1280}  # that are written at most


# ---------------------------------------------------------------------------------------------------- exact match


def _gsm8k(row: Row) -> Prompt:
    if not re.search(r"\d", _bare(str(row["answer"]))):
        raise InputError(
            f"the answer {row['answer']!r:.60} has no number: rows of a question and an answer are judged by theirs (gsm8k); "
            "give choices instead, or answers that are numbers"
        )
    return Prompt(f"Question: {row['question']}\nAnswer:", str(row["answer"]), ("Question:", *ENDS), TOKENS["gsm8k"])


def _gsm8k_solved(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


def _same_number(expected: str, written: str) -> dict[str, list[bool]]:
    """strict: the number after ``####``, as the examples have it. flexible: the last number that stands anywhere."""
    strict = re.search(r"#### (-?[0-9.,]+)", written)
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", written)
    right = _bare(expected)
    found = {"strict": strict.group(1) if strict else None, "flexible": numbers[-1] if numbers else None}
    return {metric: [number is not None and _bare(number.strip()) == right] for metric, number in found.items()}


def _bare(answer: str) -> str:
    """The final answer without what may be spelled in several ways."""
    final = re.sub(r"(?s).*#### ", "", answer.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", final).lower()


# --------------------------------------------------------------------------------------------------- instructions

Rules = tuple[tuple[str, dict[str, Any]], ...]


def _ifeval(row: Row) -> Prompt:
    names, settings = row["instruction_id_list"], row["kwargs"]
    if len(names) != len(settings):
        raise ValueError(f"{len(names)} instructions, but kwargs of {len(settings)}")
    rules = [(name, _settings(name, dict(given or {}))) for name, given in zip(names, settings, strict=True)]
    if not rules:
        raise ValueError("no instruction")
    return Prompt(row["prompt"], tuple(rules), tokens=TOKENS["ifeval"])


def _settings(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a rule's check is called with, of a row that has all rules' settings, most of them null."""
    if name in ELSEWHERE:
        raise ValueError(f"{name} is checked by lm-evaluation-harness alone: --lm-eval ifeval")
    if name not in CHECKS:
        raise ValueError(f"unknown instruction {name!r}; known are {', '.join(CHECKS)}")
    wanted = list(inspect.signature(CHECKS[name]).parameters)[1:]
    found = {key: given[key] for key in wanted if given.get(key)}
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(f"{name} needs {', '.join(missing)} in kwargs")
    return found


def _followed(rules: Rules, written: str) -> dict[str, list[bool]]:
    """Prompts of which every instruction is followed, and instructions. loose: by one of the answer's revisions."""
    strict = [follows(written, *rule) for rule in rules]
    loose = [any(follows(text, *rule) for text in revised(written)) for rule in rules]
    return {
        "prompt_strict": [all(strict)],
        "prompt_loose": [all(loose)],
        "instruction_strict": strict,
        "instruction_loose": loose,
    }


WRITTEN: dict[str, Format] = {
    "ifeval": Format({"prompt": str, "instruction_id_list": list, "kwargs": list}, _ifeval, itself=True, judge=_followed),
    "gsm8k": Format({"question": str, "answer": object}, _gsm8k, solved=_gsm8k_solved, itself=True, judge=_same_number),
}
