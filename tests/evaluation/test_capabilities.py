"""Capabilities by hand: means of the tasks that ask for each, which stand beside them."""

import math
import re
from pathlib import Path

import pytest

from uniprune.common.formatting import NONE
from uniprune.evaluation.capabilities import capabilities
from uniprune.evaluation.results import Capability, Compared, Evaluation, TaskResult
from uniprune.reporting.capabilities import capabilities as table
from uniprune.reporting.capabilities import parts
from uniprune.reporting.summary import ReportedModel
from uniprune.tasks.catalogue import CAPABILITIES, FIELDS, NAMES, SUITES, capability_of, listed
from uniprune.tasks.formats import FORMATS


def task(name, acc, error=0.03, reference=None, **facts):
    against = {} if reference is None else {"acc": Compared(reference=reference, gained=1, lost=2, p=1.0)}
    return TaskResult(questions=10, acc=acc, acc_stderr=error, capability=capability_of(name), against=against, **facts)


def test_means_of_ours_and_of_the_harness():
    tasks = {name: task(name, acc, reference=0.8) for name, acc in (("piqa", 0.6), ("boolq", 0.5), ("winogrande", 0.7))}
    tasks["x/own.jsonl"] = task("x/own.jsonl", 0.1)  # of no capability
    harness = {
        "humaneval": {"pass@1": 0.2, "pass@1_stderr": 0.04},
        "gsm8k": {
            "exact_match,strict-match": 0.2,
            "exact_match_stderr,strict-match": 0.04,
            "exact_match,flexible-extract": 0.9,
        },
        "piqa": {"acc": 0.0},  # asked by both: ours counts
        "wikitext": {"word_perplexity": 9.0},
    }
    beside = {"gsm8k": {"exact_match,strict-match": Compared(reference=0.5, gained=0, lost=3, p=0.25)}}
    found = capabilities(tasks, harness, beside)
    assert list(found) == ["reasoning", "language", "code"]
    assert found["language"] == Capability(tasks=["boolq"], acc=0.5, stderr=0.03, reference=0.8)
    assert found["code"] == Capability(tasks=["humaneval"], acc=0.2, stderr=0.04)
    reasoning = found["reasoning"]
    assert reasoning.tasks == ["piqa", "winogrande", "gsm8k"]
    assert reasoning.acc == pytest.approx(0.5)
    assert reasoning.reference == pytest.approx(0.7)
    assert reasoning.stderr == pytest.approx(math.sqrt(0.03**2 + 0.03**2 + 0.04**2) / 3)


def test_a_reference_or_an_error_that_is_not_known_of_all_is_none_of_the_mean():
    found = capabilities({"piqa": task("piqa", 0.6, None, 0.8), "winogrande": task("winogrande", 0.4)}, {}, {})
    assert found["reasoning"] == Capability(tasks=["piqa", "winogrande"], acc=0.5)


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        (["arc_easy", "mmlu", "mmlu_stem", "mmlu_social_sciences", "mmlu_anatomy"], ["arc_easy", "mmlu"]),
        (["mmlu_stem", "mmlu_anatomy", "mmlu_virology"], ["mmlu_anatomy", "mmlu_virology"]),
        (["mmlu_stem", "mmlu_humanities"], ["mmlu_stem", "mmlu_humanities"]),
        (["mmlu", "mmlu_pro"], ["mmlu", "mmlu_pro"]),
    ],
)
def test_what_the_harness_has_means_of_counts_once(rows, counted):
    found = capabilities({}, {name: {"acc": 0.5} for name in rows}, {})
    assert found["knowledge"].tasks == counted


def test_tables_show_the_parts():
    groups = {
        "STEM": {"value": 0.5, "n": 4},
        "anatomy": {"value": 0.25, "stderr": 0.1, "n": 2},
        "virology": {"value": 0.75, "n": 2},
    }
    mmlu = task("mmlu", 0.5, reference=0.6, parts=groups)
    result = Evaluation(model="m", tasks={"mmlu": mmlu, "arc_easy": task("arc_easy", 0.3)})
    result = result.model_copy(update={"capabilities": capabilities(result.tasks, {}, {})})
    subjects = [ReportedModel("m", None, (result,))]
    assert table(subjects).rows == [
        ["knowledge", "m", ("40.0%", 0.4), ("2.1%", pytest.approx(0.0212, abs=1e-4)), NONE, NONE, "mmlu, arc_easy"]
    ]
    assert [row[2] for row in parts(subjects).rows] == ["STEM"]
    assert [row[2] for row in parts(subjects, every=True).rows] == ["anatomy", "virology"]


def test_the_catalogue_is_whole():
    """Suites name tasks that there are, every task asks for something, and MMLU has its 57 subjects."""
    assert {name for suite in SUITES.values() for name in (*suite.tasks, *suite.fewshot)} <= NAMES.keys()
    assert all(capability_of(name) for name in NAMES)
    assert all(capability_of("own.jsonl", form) for form in FORMATS)
    assert len(FIELDS) == 57
    assert [list(FIELDS.values()).count(name) for name in ("STEM", "humanities", "social sciences", "other")] == [
        19,
        13,
        12,
        13,
    ]
    assert listed("mmlu_anatomy").options == {"name": "anatomy"}
    assert listed("mmlu_cooking") is None
    assert capability_of("mmlu_anatomy") == "knowledge"
    assert capability_of("own.jsonl") is None
    names = [name for tasks in CAPABILITIES.values() for name in tasks]
    assert len(names) == len(set(names))


def test_the_page_shows_names_formats_and_suites():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    assert all(f"`{name}`" in page for name in NAMES)
    rows = {row[0]: row[1:] for row in re.findall(r"^\| ([\w-]+) \| (.*?) \| (.*?) \|", page, re.MULTILINE)}
    assert rows.keys() >= FORMATS.keys() | SUITES.keys()
    for name, suite in SUITES.items():
        tasks = [f"{task} ({suite.fewshot[task]}-shot)" if task in suite.fewshot else task for task in suite.tasks]
        assert rows[name] == (", ".join(tasks), suite.source)
    for name, form in FORMATS.items():
        assert all(f"`{field}`" in rows[name][0] for field in form.fields)
