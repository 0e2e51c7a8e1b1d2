"""Prompts, choices and labels of every format, written out by hand; and files that no question can be made of."""

import gzip
import io
import json
import sys
import types

import pytest

from task_rows import ROWS
from uniprune.data.tasks import FORMATS, HUB, Question, load_task
from uniprune.errors import InputError

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


def test_winogrande_scores_what_follows_the_options(file):
    (question,) = load_task(file(ROWS["winogrande"])).questions
    assert question.choices == (
        ("Ann paid Bea because Ann", " was late ."),
        ("Ann paid Bea because Bea", " was late ."),
    )
    assert question.gold == 1


def test_only_formats_of_free_answers_are_normalised(file):
    normalised = {name for name in FORMATS if load_task(file(ROWS[name])).normalised}
    assert normalised == {"piqa", "arc", "openbookqa", "hellaswag"}


def test_boolq_has_two_kinds_of_labels(file):
    row = {"passage": "Ice floats.", "question": "does ice float", "answer": False}
    assert load_task(file(row)).questions[0].gold == 0


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
    assert asked == [("allenai/ai2_arc", {"name": "ARC-Challenge", "split": "test"})] == [HUB["arc_challenge"]]


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
