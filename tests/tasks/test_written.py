"""What lm-evaluation-harness asked and judged, as benchmarks/tasks.py wrote it down, where it need not be installed."""

import json
from pathlib import Path

import pytest

import made_up_tasks
from uniprune.errors import InputError
from uniprune.tasks.instructions import CHECKS, revised
from uniprune.tasks.loading import load_task

HARNESS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "tasks.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    for name in made_up_tasks.MAKERS:
        made_up_tasks.write(name, place)
    return place


def test_an_answer_that_is_no_number_cannot_be_judged_as_one(tmp_path):
    """Words for answers would always be wrong, and nobody told."""
    (tmp_path / "capitals.jsonl").write_text('{"question": "Of France?", "answer": "Paris"}\n')
    with pytest.raises(InputError, match=r"capitals.jsonl, line 1: the answer 'Paris' has no number: .*give choices instead"):
        load_task(str(tmp_path / "capitals.jsonl"))


def test_hidden_files_are_no_rows(tmp_path):
    (tmp_path / "t" / "test").mkdir(parents=True)
    (tmp_path / "t" / "test" / ".DS_Store").write_bytes(b"\0\1")
    (tmp_path / "t" / "test" / "a.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    assert len(load_task(str(tmp_path / "t")).questions) == 1


@pytest.mark.parametrize("row", HARNESS["rows"], ids=lambda row: f"{row['task']}-{row['num_fewshot']}")
def test_prompts_are_those_of_the_harness(folder, row):
    """Contexts and continuations of 100 rows of every format, examples included, to the letter."""
    assert row["rows"] == made_up_tasks.ROWS
    task = load_task(str(folder / row["task"]), fewshot=row["num_fewshot"])
    assert made_up_tasks.digest(made_up_tasks.requests_of(task)) == row["requests_sha256"]


def test_numbers_are_judged_as_by_the_harness():
    assert made_up_tasks.bits(made_up_tasks.our_numbers()) == HARNESS["numbers"]


def test_rules_are_judged_as_by_the_harness():
    assert made_up_tasks.bits(made_up_tasks.our_rules()) == HARNESS["rules"]


def test_every_rule_is_tried_and_both_followed_and_not():
    assert {name for name, _ in made_up_tasks.RULES} == CHECKS.keys()
    marks = made_up_tasks.our_rules()
    count = len(made_up_tasks.WRITTEN)
    for number, (name, _) in enumerate(made_up_tasks.RULES):
        strict = {strict for strict, _ in marks[number * count : (number + 1) * count]}
        assert strict == {True, False}, name


def test_revisions():
    assert revised("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
