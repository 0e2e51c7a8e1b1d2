"""Prompts, choices and labels of every format, written out by hand; and files that no question can be made of."""

import ast
import csv
import gzip
import io
import json
import re
import sys
import types
from random import Random

import pytest

from task_rows import ROWS
from uniprune.errors import InputError
from uniprune.tasks.catalogue import NAMES
from uniprune.tasks.formats import FORMATS
from uniprune.tasks.loading import load_task
from uniprune.tasks.question import Question

EXPECTED = {
    "piqa": ("Question: Boil water\nAnswer:", [" Use heat.", " Use ice."], 0),
    "arc": ("Question: What falls?\nAnswer:", [" rain", " hills", " air"], 0),
    "openbookqa": ("Plants need", [" salt", " light"], 1),
    "hellaswag": ("Baking: How to bake. Mix The dough", [" rises.", "  sings  well."], 0),
    "boolq": ("Ice floats.\nQuestion: does ice float?\nAnswer:", [" no", " yes"], 1),
    "rte": ("Ice floats.\nQuestion: Ice sinks. True or False?\nAnswer:", [" True", " False"], 1),
    "mmlu": (
        "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
        "What is 2 + 2?\nA. three\nB. four\nC. five\nD. six\nAnswer:",
        [" A", " B", " C", " D"],
        1,
    ),
    "lambada": ("He opened the old", [" door"], 0),
    "sciq": ("Ice is cold.\nQuestion: What melts?\nAnswer:", [" iron", " air", " fire", " ice"], 3),
    "race": (
        "Article: Tom has a dog.\n\nTom has a dog\nQuestion: Who has it?\nAnswer: Tom\nThe dog is  _  .",
        [" red", " Tom's", " big", " old"],
        1,
    ),
}
PROMPTS = {
    "gsm8k": ("Question: What is 2 + 2?\nAnswer:", "2 and 2 is <<2+2=4>>4.\n#### 4", 256),
    "ifeval": (
        "Write a poem without commas.",
        (("punctuation:no_comma", {}), ("length_constraints:number_words", {"num_words": 3, "relation": "at least"})),
        1280,
    ),
}


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "task.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts(file, name):
    context, answers, gold = EXPECTED[name]
    task = load_task(file(ROWS[name]))
    assert task.format == name
    assert task.questions == (Question(tuple((context, answer) for answer in answers), gold),)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_are_gone_on_with(file, name):
    text, expected, tokens = PROMPTS[name]
    (prompt,) = load_task(file(ROWS[name])).questions
    assert (prompt.text, prompt.expected, prompt.tokens) == (text, expected, tokens)


def test_winogrande_scores_what_follows_the_options(file):
    (question,) = load_task(file(ROWS["winogrande"])).questions
    assert question.choices == (
        ("Ann paid Bea because Ann", " was late ."),
        ("Ann paid Bea because Bea", " was late ."),
    )
    assert question.gold == 1


def test_only_formats_of_free_answers_are_normalised():
    assert {name for name, format in FORMATS.items() if format.normalised} == {"piqa", "arc", "openbookqa", "hellaswag", "sciq"}


def test_boolq_has_two_kinds_of_labels(file):
    row = {"passage": "Ice floats.", "question": "does ice float"}
    rows = [row | {"answer": answer} for answer in (False, True, "False", "true", "0", 1)]
    assert [question.gold for question in load_task(file(*rows)).questions] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(InputError, match="label -1 is none of 2 choices"):
        load_task(file(row | {"answer": "maybe"}))


def test_limit_takes_the_first_rows_and_the_hash_sees_them(file):
    path = file(ROWS["rte"], ROWS["rte"] | {"label": 0}, {"torn": 1})
    two = load_task(path, 2)
    assert [question.gold for question in two.questions] == [1, 0]
    assert two.sha256 == load_task(path, 2).sha256 != load_task(path, 1).sha256


def test_names_go_through_datasets(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return iter([ROWS["arc"]])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_task("arc_challenge").format == "arc"
    assert (
        asked
        == [("allenai/ai2_arc", {"name": "ARC-Challenge", "split": "test"})]
        == [(NAMES["arc_challenge"].path, {"name": "ARC-Challenge", "split": NAMES["arc_challenge"].split})]
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"a": 1, "b": 2}], "line 1: the fields a, b are of no known format: piqa"),
        ([ROWS["piqa"], {"goal": "x", "sol1": "y", "label": 0}], 'line 2: no str field "sol2", which the format piqa has'),
        ([ROWS["piqa"] | {"goal": None}], 'line 1: no str field "goal"'),
        ([ROWS["piqa"] | {"label": -1}], "line 1: label -1 is none of 2 choices"),
        ([ROWS["piqa"] | {"label": ""}], "line 1: not a labelled row of the format piqa"),
        ([{key: ROWS["rte"][key] for key in ("sentence1", "sentence2")}], "rte .no field 'label'"),
        ([ROWS["arc"] | {"answerKey": "9"}], "not a labelled row of the format arc"),
        ([ROWS["winogrande"] | {"sentence": "No gap."}], 'no "_" in the sentence'),
        ([ROWS["mmlu"] | {"choices": ["a", None, "c", "d"]}], "a choice is null"),
        ([ROWS["mmlu"] | {"choices": [str(number) for number in range(12)]}], "12 choices, more than the 10 letters"),
        ([ROWS["mmlu"] | {"answer": ""}], "line 1: not a labelled row of the format mmlu"),
        ([ROWS["mmlu"] | {"answer": "AB"}], "line 1: not a labelled row of the format mmlu"),
        (
            [ROWS["arc"] | {"choices": {"text": ["a", "b"], "label": "AB"}, "answerKey": ""}],
            "not a labelled row of the format arc",
        ),
        (
            [ROWS["race"] | {"problems": [{"question": "?", "options": list("abcd"), "answer": ""}]}],
            "a labelled row of the format race",
        ),
        ([ROWS["winogrande"] | {"answer": "0"}], "label -1 is none of 2 choices"),
        ([[1]], "line 1: not a JSON object"),
    ],
)
def test_bad_files_name_the_line(file, rows, message):
    with pytest.raises(InputError, match=message):
        load_task(file(*rows))


def test_bad_requests(file):
    with pytest.raises(InputError, match="'picqa' is neither one of piqa, arc_easy"):
        load_task("picqa")
    with pytest.raises(InputError, match="limit 0 is not positive"):
        load_task(file(ROWS["rte"]), 0)


def parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    out = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.json", lambda rows: json.dumps(rows, indent=1).encode()),
        ("t.json.gz", lambda rows: gzip.compress(lines(rows))),
        ("t.parquet", parquet),
        ("validation-00000-of-00001", parquet),
        ("t.jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows)),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_files_of_any_kind_of_rows(tmp_path, file, format, name, write):
    rows = [ROWS[format]] * 3
    (tmp_path / name).write_bytes(write(rows))
    task = load_task(str(tmp_path / name))
    assert task.questions == load_task(file(*rows)).questions
    assert task.format == format


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_one_row_is_that_row(tmp_path, file, format, name):
    """It may hold a list of objects itself, as a file with rows inside one object does: the problems of an article."""
    row = ROWS[format] | ({"problems": ast.literal_eval(ROWS["race"]["problems"])} if format == "race" else {})
    (tmp_path / name).write_text(json.dumps(row if name == "t.jsonl" else [row]))
    assert load_task(str(tmp_path / name)).questions == load_task(file(ROWS[format], ROWS[format])).questions[:1]


def test_a_table_of_questions(tmp_path, file):
    (tmp_path / "t.csv").write_text('goal,sol1,sol2,label\n"To boil, heat",water,ice,0\n')
    (question,) = load_task(str(tmp_path / "t.csv")).questions
    assert question == load_task(file({"goal": "To boil, heat", "sol1": "water", "sol2": "ice", "label": 0})).questions[0]


def test_mmlu_answers_may_be_letters(file):
    row = ROWS["mmlu"]
    index, letter, plain = load_task(file(row, row | {"answer": "B"}, {k: row[k] for k in row if k != "subject"})).questions
    assert index == letter
    assert plain.choices[0][0].startswith(
        "The following are multiple choice questions (with answers).\n\nWhat is 2 + 2?\nA. three"
    )
    with pytest.raises(InputError, match="label 4 is none of 4 choices"):
        load_task(file(row | {"answer": 4}))


# ------------------------------------------------------------------------------------------------------------ few-shot


def arc(number):
    return ROWS["arc"] | {"question": f"What is {number}?", "answerKey": str(1 + number % 3)}


def asked_of(contexts):
    """The numbers of the questions in a prompt, the examples' first."""
    return [[int(number) for number in re.findall(r"What is (\d+)\?", context)] for context in contexts]


def drawn(pool, count):
    """The rows that a sampler of this seed takes for one question after the other."""
    random = Random(1234)
    while True:
        yield random.sample(pool, count)


def test_examples_of_a_folder_come_from_its_training_split(tmp_path):
    """test.* is asked, the examples are random rows of train.*, in the order in which they are drawn."""
    for split, numbers in (("test", range(5)), ("train", range(100, 120))):
        (tmp_path / f"{split}.jsonl").write_bytes(lines([arc(number) for number in numbers]))
    task = load_task(str(tmp_path), fewshot=2)
    assert task.fewshot == 2
    expected = [[*examples, number] for number, examples in zip(range(5), drawn(range(100, 120), 2), strict=False)]
    assert asked_of(question.choices[0][0] for question in task.questions) == expected
    (before, *_), *_ = (question.choices for question in task.questions)
    example = f"Question: What is {expected[0][0]}?\nAnswer: {['rain', 'hills', 'air'][expected[0][0] % 3]}\n\n"
    assert before[0].startswith(example)
    assert before[0].endswith("\n\nQuestion: What is 0?\nAnswer:")
    assert load_task(str(tmp_path)).questions == load_task(str(tmp_path / "test.jsonl")).questions


def test_examples_of_a_file_are_its_other_rows(file):
    """One more row is drawn, and the question left out where it is among them."""
    path = file(*(arc(number) for number in range(6)))
    task = load_task(path, limit=4, fewshot=2)
    expected = []
    for number, examples in zip(range(4), drawn(range(6), 3), strict=False):
        expected.append([*[one for one in examples if one != number][:2], number])
    assert asked_of(question.choices[0][0] for question in task.questions) == expected


def test_a_row_that_is_there_twice_is_no_example_of_itself(file):
    path = file(*[arc(0)] * 5, arc(1))
    with pytest.raises(InputError, match="--num-fewshot 2 needs as many solved rows beside the question itself; there are 1"):
        load_task(path, fewshot=2)
    task = load_task(path, limit=5, fewshot=1)
    assert asked_of(question.choices[0][0] for question in task.questions) == [[1, 0]] * 5


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"ifeval"}))
def test_every_format_has_examples(file, name):
    """The question and its right answer, then an empty line."""
    field = next(field for field in FORMATS[name].fields if isinstance(ROWS[name][field], str) and field != "problems")
    rows = [ROWS[name], ROWS[name] | {field: f"Well, {ROWS[name][field]}"}]
    alone, (first, second) = load_task(file(*rows)).questions, load_task(file(*rows), fewshot=1).questions
    if name == "gsm8k":
        assert first.text == f"{alone[1].text} {ROWS[name]['answer']}\n\n{alone[0].text}"
        return
    about = "The following are multiple choice questions (with answers) about elementary mathematics.\n\n" * (name == "mmlu")
    solved = "Well, He opened the old  door" if name == "lambada" else alone[1].solved.removeprefix(about)
    for mine, plain in zip(first.choices, alone[0].choices, strict=True):
        assert mine == (f"{about}{solved}\n\n{plain[0].removeprefix(about)}", plain[1])
    assert second.gold == alone[1].gold


def test_there_is_no_example_of_what_has_no_answer(file):
    with pytest.raises(InputError, match=r"task .*: the rows of the format ifeval have no answers.*leave out --num-fewshot"):
        load_task(file(ROWS["ifeval"], ROWS["ifeval"] | {"prompt": "Write."}), fewshot=1)


def test_too_few_examples(file, tmp_path):
    with pytest.raises(InputError, match="--num-fewshot 5 needs as many solved rows beside the question itself; there are 2"):
        load_task(file(arc(0), arc(1)), fewshot=5)
    with pytest.raises(InputError, match="--num-fewshot -1 is negative"):
        load_task(file(arc(0)), fewshot=-1)


def test_names_have_examples_of_their_protocol(monkeypatch):
    splits = []

    def load_dataset(path, split, **options):
        splits.append(split)
        return iter([ROWS["gsm8k"] | {"question": f"{split} {number}?"} for number in range(8)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = load_task("gsm8k", limit=2)
    assert (task.fewshot, splits) == (5, ["test", "train"])
    assert [len(re.findall("Question: train ", prompt.text)) for prompt in task.questions] == [5, 5]
    assert load_task("gsm8k", limit=2, fewshot=0).questions[0].text == "Question: test 0?\nAnswer:"


# ---------------------------------------------------------------------------------------------------------------- MMLU


def mmlu(subject, number):
    return ROWS["mmlu"] | {"subject": subject, "question": f"What is {number}?", "answer": number % 4}


def test_examples_of_mmlu_are_the_first_of_the_subject(tmp_path):
    """The Hub's folder: the split dev, and what trains nobody beside it."""
    splits = {
        "test-00000-of-00001.parquet": [mmlu(subject, 1) for subject in ("anatomy", "sociology", "anatomy")],
        "dev-00000-of-00001.parquet": [mmlu(subject, n) for n in range(10, 16) for subject in ("sociology", "anatomy")],
        "validation-00000-of-00001.parquet": [mmlu("anatomy", 3)],
        "auxiliary_train-00000-of-00001.parquet": [mmlu("anatomy", 4)],
    }
    for name, rows in splits.items():
        (tmp_path / name).write_bytes(parquet(rows))
    task = load_task(str(tmp_path), fewshot=5)
    assert asked_of(question.choices[0][0] for question in task.questions) == [[10, 11, 12, 13, 14, 1]] * 3
    assert [question.choices[0][0].partition("\n")[0][-12:] for question in task.questions] == [
        "out anatomy.",
        "t sociology.",
        "out anatomy.",
    ]
    assert task.subjects == ("anatomy", "sociology", "anatomy")
    with pytest.raises(InputError, match="--num-fewshot 7 needs as many solved rows; there are 6 of the subject 'anatomy'"):
        load_task(str(tmp_path), fewshot=7)


def test_a_limit_counts_for_each_subject(file):
    path = file(*(mmlu(subject, number) for subject in ("anatomy", "virology") for number in range(5)))
    assert load_task(path, limit=2).subjects == ("anatomy",) * 2 + ("virology",) * 2


def test_tables_of_mmlu(tmp_path, file):
    """The authors' own: a file for each subject, without a head, letters for answers; and with one."""
    for split in ("test", "dev", "val"):
        (tmp_path / split).mkdir()
        for subject in ("anatomy", "virology"):
            content = "".join(f'"What is {number}?","three, say",four,five,six,{"ABCD"[number]}\n' for number in range(3))
            (tmp_path / split / f"{subject}_{split}.csv").write_text(content)
    task = load_task(str(tmp_path), fewshot=3)
    assert task.subjects == ("anatomy",) * 3 + ("virology",) * 3
    assert [question.gold for question in task.questions] == [0, 1, 2] * 2
    assert "\n\nWhat is 0?\nA. three, say\nB. four\nC. five\nD. six\nAnswer: A\n\n" in task.questions[0].choices[0][0]
    row = {"question": "What is 1?", "choices": ["three, say", "four", "five", "six"], "answer": 1, "subject": "anatomy"}
    assert load_task(str(tmp_path / "test" / "anatomy_test.csv")).questions[1] == load_task(file(row)).questions[0]
    (tmp_path / "headed.csv").write_text('Question,A,B,C,D,Answer,Subject\nWhat is 1?,"three, say",four,five,six,B,anatomy\n')
    assert load_task(str(tmp_path / "headed.csv")).questions == load_task(file(row)).questions


# ------------------------------------------------------------------------------------------------------ tables, folders


@pytest.mark.parametrize("spelled", [json.dumps, str])
@pytest.mark.parametrize("name", ["arc", "openbookqa", "hellaswag", "mmlu", "race", "ifeval"])
def test_columns_of_lists_and_objects(tmp_path, file, name, spelled):
    """In a table they are text: JSON, or as Python writes them."""
    row = {key: value if isinstance(value, str | int) else spelled(value) for key, value in ROWS[name].items()}
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, row)
    writer.writeheader()
    writer.writerow(row)
    (tmp_path / "t.csv").write_text(out.getvalue())
    assert load_task(str(tmp_path / "t.csv")).questions == load_task(file(ROWS[name])).questions


def test_the_split_of_a_folder_is_the_one_that_is_usual(tmp_path):
    """PIQA's test split has no labels; ARC's has."""
    for name, form, split in (("piqa", "piqa", "validation"), ("arc", "arc", "test")):
        (tmp_path / name).mkdir()
        for number, one in enumerate(("test", "validation")):
            field = next(iter(FORMATS[form].fields))
            (tmp_path / name / f"{one}.json").write_text(json.dumps([ROWS[form] | {field: one}] * (number + 1)))
        assert split in load_task(str(tmp_path / name)).questions[0].choices[0][0]
    (tmp_path / "piqa" / "validation.json").unlink()
    assert "test" in load_task(str(tmp_path / "piqa")).questions[0].choices[0][0]
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"a folder without test\.\* or validation"):
        load_task(str(tmp_path / "other"))


def test_a_data_set_that_was_saved_to_disk(tmp_path):
    """Beside the table of a split lie files that say what it is."""
    datasets = pytest.importorskip("datasets")
    splits = {"test": range(3), "train": range(100, 110)}
    found = {split: datasets.Dataset.from_list([arc(number) for number in numbers]) for split, numbers in splits.items()}
    datasets.DatasetDict(found).save_to_disk(tmp_path / "arc")
    task = load_task(str(tmp_path / "arc"), fewshot=1)
    assert [numbers[-1] for numbers in asked_of(question.choices[0][0] for question in task.questions)] == [0, 1, 2]


def test_rules_that_are_checked_elsewhere(file):
    with pytest.raises(InputError, match="language:response_language is checked by lm-evaluation-harness alone"):
        load_task(
            file(ROWS["ifeval"] | {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]})
        )
    for changes, message in (
        ({"instruction_id_list": ["punctuation:no_dash"], "kwargs": [{}]}, "unknown instruction 'punctuation:no_dash'"),
        ({"kwargs": [{}]}, "2 instructions, but kwargs of 1"),
        ({"kwargs": [{}, {"num_words": 3}]}, "length_constraints:number_words needs relation in kwargs"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(file(ROWS["ifeval"] | changes))
    with pytest.raises(InputError, match="--lm-eval ifeval"):
        load_task("ifeval")
