"""Rows in the format of every data set of tasks, made up: for comparisons where the data sets themselves cannot be had."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from uniprune.tasks.formats import FORMATS
from uniprune.tasks.question import Prompt, Task

Row = dict[str, Any]

_LINES = (
    "river stone bread window copper winter garden engine letter music salt paper cloud market teacher island glass thunder",
    "candle mirror forest bridge silver harbor planet hammer violin desert orange castle lantern pepper",
)
WORDS = [word for line in _LINES for word in line.split()]
ODD = [
    "naïve café",
    "a  double space",
    "50% [sic]",
    "«quoted»",
    "日本語",
    "tab\there",
    "x_1 = 2",
    'it\'s "so"',
    "1,000",
    "\u2028sep",
]


class Maker:
    """Words and sentences of one seed; some of them odd, since prompts are compared to the letter."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def words(self, least: int, most: int) -> str:
        found = [self.random.choice(WORDS) for _ in range(self.random.randint(least, most))]
        if self.random.random() < 0.15:
            found.insert(self.random.randrange(len(found) + 1), self.random.choice(ODD))
        return " ".join(found)

    def sentence(self, end: str = ".") -> str:
        text = self.words(3, 9)
        return text[:1].upper() + text[1:] + end + self.random.choice(["", "", "", " "])

    def options(self, count: int) -> list[str]:
        return [self.words(1, 4) for _ in range(count)]


def _piqa(make: Maker) -> Row:
    return {"goal": make.sentence(""), "sol1": make.sentence(), "sol2": make.sentence(), "label": make.random.randrange(2)}


def _arc(make: Maker) -> Row:
    count = make.random.choice([3, 4, 4, 5])
    labels = make.random.choice(["ABCDE", "12345"])[:count]
    choices = {"text": make.options(count), "label": list(labels)}
    return {
        "id": make.words(1, 1),
        "question": make.sentence("?"),
        "choices": choices,
        "answerKey": make.random.choice(labels),
    }


def _openbookqa(make: Maker) -> Row:
    choices = {"text": make.options(4), "label": list("ABCD")}
    answer = make.random.choice("ABCD")
    return {
        "id": make.words(1, 1),
        "question_stem": make.sentence(""),
        "choices": choices,
        "answerKey": make.random.choice(["", " "]) + answer,
    }


def _winogrande(make: Maker) -> Row:
    begin = make.words(2, 6) + " " if make.random.random() < 0.9 else ""
    sentence = f"{begin}_ {make.words(2, 6)} ."
    one, two = make.options(2)
    return {"sentence": sentence, "option1": one, "option2": two, "answer": make.random.choice("12")}


def _hellaswag(make: Maker) -> Row:
    marked = f"[header] {make.words(2, 4)} [title] {make.words(2, 4)} [step]" if make.random.random() < 0.5 else make.sentence()
    return {
        "ind": make.random.randrange(10**6),
        "activity_label": make.words(1, 2),
        "ctx_a": marked,
        "ctx_b": make.random.choice(["", make.words(1, 3)]),
        "endings": [make.random.choice(["", "[substeps] "]) + make.sentence() for _ in range(4)],
        "label": str(make.random.randrange(4)),
    }


def _boolq(make: Maker) -> Row:
    return {"passage": make.sentence() + " " + make.sentence(), "question": make.words(3, 6), "label": make.random.randrange(2)}


def _rte(make: Maker) -> Row:
    return {"sentence1": make.sentence(), "sentence2": make.sentence(), "label": make.random.randrange(2)}


def _sciq(make: Maker) -> Row:
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    support = make.random.choice(["", " " + make.sentence(), make.sentence() + "\n" + make.sentence()])
    return {"question": make.sentence("?"), "support": support} | dict(zip(names, make.options(4), strict=True))


def _race(make: Maker) -> Row:
    def problem() -> Row:
        question = make.random.choice([make.sentence("?"), make.words(2, 5) + "  _  ."])
        return {"question": question, "options": make.options(4), "answer": make.random.choice("ABCD")}

    problems = [problem() for _ in range(make.random.randint(1, 4))]
    return {"article": " ".join(make.sentence() for _ in range(3)), "problems": str(problems)}


def _mmlu(make: Maker) -> Row:
    facts = {"question": make.random.choice(["", " "]) + make.sentence("?"), "subject": "abstract_algebra"}
    return facts | {"choices": make.options(4), "answer": make.random.randrange(4)}


def _lambada(make: Maker) -> Row:
    return {"text": make.sentence() + " " + make.words(4, 9)}


def _gsm8k(make: Maker) -> Row:
    one, two = make.random.randrange(2, 60), make.random.randrange(2, 60)
    first, second = make.random.sample(WORDS, 2)
    question = f"Ann has {one} {first}s and {two} {second}s. How many things does she have?"
    return {
        "question": question,
        "answer": f"She has {one} + {two} = <<{one}+{two}={one + two}>>{one + two}.\n#### {one + two:,}",
    }


MAKERS: dict[str, Callable[[Maker], Row]] = {
    "piqa": _piqa,
    "arc": _arc,
    "openbookqa": _openbookqa,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "boolq": _boolq,
    "rte": _rte,
    "sciq": _sciq,
    "race": _race,
    "mmlu": _mmlu,
    "lambada": _lambada,
    "gsm8k": _gsm8k,
}
SPLITS = {  # the asked one, and that of the examples, as the harness's configurations name them
    **dict.fromkeys(("piqa", "winogrande", "hellaswag", "boolq", "rte"), ("validation", "train")),
    **dict.fromkeys(("arc", "openbookqa", "sciq", "gsm8k"), ("test", "train")),
    "mmlu": ("test", "dev"),
    **dict.fromkeys(("race", "lambada"), ("test", "test")),
}
ROWS, EXAMPLES = 100, 40


def write(name: str, folder: Path) -> Path:
    """The splits of a made-up data set in a folder, which is returned; the first example is an asked row, too."""
    make = Maker(sum(map(ord, name)))
    asked, examples = ([MAKERS[name](make) for _ in range(count)] for count in (ROWS, EXAMPLES))
    examples[0] = asked[0]
    split, other = SPLITS[name]
    place = folder / name
    place.mkdir(parents=True)
    for called, rows in ((other, examples), (split, asked)):
        (place / f"{called}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


ANSWERS = [
    "",
    " ",
    "#### 12",
    "She has 3 + 4 = 7.\n#### 7",
    "#### 1,234.",
    "#### -3",
    "#### $5",
    "The answer is $1,234.50",
    "so 12. And 13, or 14",
    "#### 7 and later #### 8",
    "no number at all",
    "3.5.",
    "####7",
    "It is 12 apples.",
]
NUMBERS = ["x\n#### 7", "#### 12", "1,234", "-3", "#### 5", "1234.50", "14", "8", "#### 3.5", "#### 1234", "a. #### $12."]
"""Written answers and expected ones: every pair is judged."""

RULES: list[tuple[str, Row]] = [
    ("keywords:existence", {"keywords": ["river", "st.ne"]}),
    ("keywords:frequency", {"keyword": " river ", "frequency": 2, "relation": "at least"}),
    ("keywords:frequency", {"keyword": "river", "frequency": 2, "relation": "less than"}),
    ("keywords:forbidden_words", {"forbidden_words": ["salt", "river"]}),
    ("keywords:letter_frequency", {"letter": "R", "let_frequency": 3, "let_relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 6, "let_relation": "less than"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"num_words": 6, "relation": "at least"}),
    ("length_constraints:number_words", {"num_words": 6, "relation": "less than"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "River"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "stone"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_content:postscript", {"postscript_marker": "By the way"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ("detectable_format:multiple_sections", {"section_spliter": " Section ", "num_sections": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say river."}),
    ("startend:end_checker", {"end_phrase": " The end. "}),
    ("startend:quotation", {}),
    ("punctuation:no_comma", {}),
]
WRITTEN = [
    "",
    "  \n",
    "The river meets the river, and stone.",
    "Stone by the RIVER\n\nriver, then salt",
    "'River' is one.\n\n\n\n\"River's\" two",
    "stone. And more\n***\nriver",
    "***\nstone\n***\n\n***\nriver",
    "one *** two ***",
    "[name] lives in [place]\nP.S. and p. p. s too",
    "a\nP.P.S more\nby the way",
    "* one\n* two",
    "- one\n* two\n  - three\n**bold** no bullet",
    "My answer is maybe. Or not",
    "*a* and **b** and * * and ****",
    "Section 1\nriver\nSection 2\nstone",
    "Section1 Section 2 section 3",
    '```json\n{"a": [1, 2]}\n```',
    '{"a": 1}',
    "{'a': 1}",
    "<<river>>\nstone",
    "<< >> <<>>",
    "one ****** two",
    "same ****** same",
    "****** one ****** two ******",
    "one ******  ****** two",
    "say river. Yes, the end.",
    '"stone and river. The end."',
    '"',
    "Intro line\n* one\n* two\nOutro",
    "Sure:\n\nriver runs\n\nRiver, again\n\n",
    "rivers, salty, estuaries: eeee RRR",
]
"""Written answers for every rule."""


# ------------------------------------------------------------------------------------------------------- what we make of them


def digest(requests: Sequence[Any]) -> str:
    """Hash of what a model was asked, row by row."""
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()


def requests_of(task: Task) -> list[list[list[str]]]:
    """The contexts and continuations of a task; of prompts the text alone."""
    return [
        [[one.text]] if isinstance(one, Prompt) else [[before, after] for before, after in one.choices]
        for one in task.questions
    ]


def our_numbers() -> list[list[bool]]:
    judge = FORMATS["gsm8k"].judge
    assert judge is not None
    return [[truths[0] for truths in judge(expected, written).values()] for expected in NUMBERS for written in ANSWERS]


def our_rules() -> list[list[bool]]:
    found = []
    judge = FORMATS["ifeval"].judge
    assert judge is not None
    for name, settings in RULES:
        row = {"prompt": "Say river.", "instruction_id_list": [name], "kwargs": [settings]}
        prompt = FORMATS["ifeval"].question(row)
        assert isinstance(prompt, Prompt)
        for written in WRITTEN:
            marks = judge(prompt.expected, written)
            found.append([marks["prompt_strict"][0], marks["prompt_loose"][0]])
    return found


def bits(marks: list[list[bool]]) -> str:
    return "".join(str(int(mark)) for pair in marks for mark in pair)
