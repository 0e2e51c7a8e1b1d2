"""Records: what is written is read back through the same class, and what is no such file is refused by file and field."""

import json
import math
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

import made_up
from uniprune.artefacts.reports import Permutation, Pruning, read_report
from uniprune.artefacts.scores import ScoresFacts
from uniprune.errors import InputError
from uniprune.evaluation.request import EvaluationKeywords, EvaluationRequest, SweepKeywords, SweepRequest
from uniprune.evaluation.results import Check, Evaluation, Protocol, Sweep
from uniprune.job.options import RunKeywords, RunOptions
from uniprune.storage.record import Facts, Record, Shape

KINDS = {
    Pruning: made_up.pruning(),
    Evaluation: made_up.evaluation(
        tasks=made_up.tasks(),
        closeness=made_up.closeness(),
        generations=made_up.generations(),
        protocol={"request": {"windows": 4, "tasks": ["piqa"]}, "machine": {"device": "cpu", "kind": "AVX2", "threads": 2}},
    ),
    Sweep: made_up.sweep(),
    Permutation: {
        "model": {"name": "m"},
        "pattern": "2:4",
        "permuted": {"a": {"kept_before": 0.5, "kept_after": 0.75}},
        "seconds": {"search": 1.5},
    },
    Check: {
        "result": "r.json",
        "reproduced": False,
        "same_machine": True,
        "differences": [{"what": "perplexity", "recorded": 1.0, "found": None, "within": False}],
        "versions": {"recorded": {}, "now": {"torch": "2"}},
    },
}


class Part(Facts):
    shape: Shape
    share: float | None = None


class Toy(Record):
    kind: Literal["toy"] = "toy"
    name: str
    parts: dict[str, Part] = Field(default_factory=dict)


def written(path, **facts):
    path.write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind_name())
def test_files_are_read_through_the_class_that_wrote_them(tmp_path, kind):
    """A file from before there were kinds reads the same; what the class knows of it, it writes as it was."""
    old = kind.read(written(tmp_path / "old.json", **KINDS[kind]))
    old.write(tmp_path / "new.json")
    found = json.loads((tmp_path / "new.json").read_text())
    assert found == {"kind": kind.kind_name(), "format": 1, **json.loads(json.dumps(KINDS[kind]))}
    assert kind.read(tmp_path / "new.json") == old
    assert json.loads(json.dumps(old.record())) == found


def test_only_what_was_given_is_written():
    assert Toy(name="a").record() == {"kind": "toy", "format": 1, "name": "a"}
    part = {"shape": (2, 3), "share": None}
    assert Toy(name="a", parts={"p": Part(**part)}).record()["parts"] == {"p": part}


def test_a_later_versions_keys_are_kept(tmp_path):
    facts = {"kind": "toy", "format": 1, "name": "a", "mood": {"x": [1, None]}, "parts": {"p": {"shape": [2, 3], "new": "é"}}}
    found = Toy.read(written(tmp_path / "t.json", **facts))
    assert found.model_extra == {"mood": {"x": [1, None]}}
    assert json.loads(json.dumps(found.record())) == facts


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": "a", "format": 2}, "has format 2, this version reads up to 1; upgrade"),
        ({"name": "a", "format": 10**400}, "this version reads up to 1"),
        ({"name": "a", "format": "1"}, "is damaged: format: Input should be a valid integer"),
        ({"name": "a", "format": 0}, "is damaged: format: "),
        ({"name": "a", "kind": "sweep"}, "holds sweep, not toy"),
        ({"name": "a", "kind": 5}, "is damaged: kind: Input should be 'toy'"),
        ({}, "is damaged: it lacks 'name'; make it again"),
        ({"name": 5}, "is damaged: name: Input should be a valid string"),
        ({"name": "a", "parts": {"p": {"shape": [2]}}}, "is damaged: it lacks 'parts.p.shape.1'"),
        (
            {"name": "a", "parts": {"p": {"shape": [2, True]}}},
            r"is damaged: parts\.p\.shape\.1: Input should be a valid integer",
        ),
        ({"name": "a", "parts": {"p": {"shape": [2, 2**63]}}}, r"is damaged: parts\.p\.shape\.1: "),
        ({"name": "a", "parts": {"p": {"shape": [2, 3], "share": "0.5"}}}, r"is damaged: parts\.p\.share: "),
    ],
)
def test_what_is_no_such_file_is_refused_by_field(tmp_path, facts, message):
    with pytest.raises(InputError, match=message) as error:
        Toy.read(written(tmp_path / "toy.json", **facts))
    assert "toy.json" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["", "[]", "{", "5", '{"name": "a", "name": "b"}', "[" * 100_000, '{"a": ' * 100_000])
def test_what_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "toy.json").write_text(text)
    with pytest.raises(InputError, match=r"toy\.json cannot be read: "):
        Toy.read(tmp_path / "toy.json")


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match=r"gone\.json cannot be read: No such file"):
        Toy.read(Path("gone.json"))


def test_numbers_come_back_bit_for_bit_and_so_does_half_a_character(tmp_path):
    values = [0.1 + 0.2, 5e-324, math.inf, -math.inf]
    record = Toy(name="\ud800", parts={f"é{index}": Part(shape=(1, 1), share=value) for index, value in enumerate(values)})
    record.write(tmp_path / "toy.json")
    found = Toy.read(tmp_path / "toy.json")
    assert [part.share for part in found.parts.values()] == values
    assert found.name == "\ud800"
    assert Toy.read(written(tmp_path / "odd.json", name="a", **{"half \ud800": 1})).model_extra == {"half ?": 1}


def test_records_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Toy(name="a").name = "b"


def test_a_report_is_told_by_what_is_in_it(tmp_path):
    for kind in (Pruning, Permutation):
        assert type(read_report(written(tmp_path / "pruning.json", **KINDS[kind]))) is kind


def test_a_request_of_a_later_version_can_be_shown_and_not_repeated():
    known, later = {"windows": 4, "tasks": ["piqa"]}, {"windows": 4, "mood": "good"}
    assert Protocol.model_validate({"request": known}).request == EvaluationRequest(windows=4, tasks=("piqa",))
    assert Protocol.model_validate({"request": later}).request == later


def test_results_that_are_committed_are_read():
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "check.json"
    found = Evaluation.read(results)
    assert found.perplexity > 1
    assert isinstance(found.protocol.request, EvaluationRequest)
    assert json.loads(json.dumps(found.record())) == {"kind": "evaluation", "format": 1, **json.loads(results.read_text())}


@pytest.mark.parametrize(
    ("keywords", "settings"),
    [(RunKeywords, RunOptions), (EvaluationKeywords, EvaluationRequest), (SweepKeywords, SweepRequest)],
)
def test_keywords_are_the_settings(keywords, settings):
    assert keywords.__annotations__.keys() | keywords.__optional_keys__ == settings.model_fields.keys()


def test_scores_of_a_run_without_a_controller_say_nothing_of_one():
    """What is not there is not in the file: the bytes of an artefact are what they were before there were records."""
    binding = {"base": "b", "base_name": "m", "digests": {"a": "F32"}, "transposed": []}
    facts = ScoresFacts(**binding, matrices=["a"], comparable=False, recipe={"scope": None}, versions={})
    expected = {"matrices": ["a"], "comparable": False, "recipe": {"scope": None}, "versions": {}}
    assert facts.record() == {"kind": "scores", "format": 1} | binding | expected
