"""Instructions whose following a program can check, of IFEval (Zhou et al., 2311.07911): the same answers as its own checks.

Rules that need a language detector or a sentence tokeniser are not here; ``--lm-eval ifeval`` has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[..., bool]
_PUNCTUATION = set(".,?!'\"")


def _compared(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f'relation {relation!r} is neither "less than" nor "at least"')
    return count < wanted if relation == "less than" else count >= wanted


def _keywords(answer: str, keywords: list[str]) -> bool:
    return all(re.search(word, answer, re.IGNORECASE) for word in keywords)


def _keyword_frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(len(re.findall(keyword.strip(), answer, re.IGNORECASE)), relation, frequency)


def _forbidden_words(answer: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Parts between ``***``; the first and the last may be empty, and then do not count."""
    parts = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and sum(parts) == num_paragraphs


def _words(answer: str, num_words: int, relation: str) -> bool:
    return _compared(len(re.findall(r"\w+", answer)), relation, num_words)


def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """The word that begins a paragraph (after blank lines), up to its punctuation, and how many there are."""
    parts = answer.split("\n\n")
    full = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > full or not (paragraph := parts[nth_paragraph - 1].strip()):
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    end = next((place for place, letter in enumerate(word) if letter in _PUNCTUATION), len(word))
    return full == num_paragraphs and word[:end].lower() == first_word.lower()


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _postscript(answer: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, marker.lower()), answer.lower()))


def _bullets(answer: str, num_bullets: int) -> bool:
    starred, dashed = (re.findall(mark, answer, re.MULTILINE) for mark in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(starred) + len(dashed) == num_bullets


def _constrained(answer: str) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def _highlights(answer: str, num_highlights: int) -> bool:
    """Text between stars that is not empty; what stands between two of them each counts as such once more."""
    single = sum(bool(found.strip("*").strip()) for found in re.findall(r"\*[^\n\*]*\*", answer))
    double = sum(bool(found[2:-2].strip()) for found in re.findall(r"\*\*[^\n\*]*\*\*", answer))
    return single + double >= num_highlights


def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", answer)) - 1 >= num_sections


def _json(answer: str) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(answer: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", answer))


def _two_responses(answer: str) -> bool:
    """Two different ones around ``******``; nothing may be empty but what is before the first and after the last."""
    parts = [part.strip() for part in answer.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _repeated(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _no_comma(answer: str) -> bool:
    return "," not in answer


CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeated,
    "startend:end_checker": _end,
    "startend:quotation": _quoted,
    "punctuation:no_comma": _no_comma,
}
ELSEWHERE = (
    "language:response_language",
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
)


def follows(answer: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether an answer follows one instruction; an empty one follows none."""
    return bool(answer.strip()) and CHECKS[name](answer, **settings)


def revised(answer: str) -> list[str]:
    """An answer as it is and without what chat models like to add: the first line, the last one, both, and stars."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]
