"""The one sentence of a report: what was pruned, what it costs, what it saves, whether anything is faster."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

import made_up
from command import run
from uniprune.entrypoints.report import report
from uniprune.reporting.headline import sentences, verdict
from uniprune.reporting.results import read, read_all
from uniprune.reporting.summary import summarise

SAME = {"text": made_up.TEXT, "windows": 4, "length": 64}


def said(tmp_path, **facts):
    """The verdict on sources: name -> what stands in it."""
    paths = []
    for name, content in facts.items():
        kind = content.get("kind", "")
        inside = {"": "pruning.json" if "matrices" in content else "", "comparison": "comparison.json"}.get(kind, "")
        paths.append(made_up.write(tmp_path / name / inside if inside else tmp_path / f"{name}.json", content))
    return verdict(summarise(read_all(paths)))


def test_all_that_is_known_of_one_model(tmp_path):
    pruned = made_up.pruning()
    table = made_up.comparison()
    rows = [row | {"sparsity": pruned["sparsity"] if row["method"] == "wanda" else row["sparsity"]} for row in table["rows"]]
    sentence = said(
        tmp_path,
        pruned=pruned,
        result=made_up.evaluation("pruned", pruned["sparsity"], 18.25, tasks=made_up.tasks(), against=made_up.BASE),
        dense=made_up.dense(),
        table=table | {"rows": rows},
        sweep=made_up.sweep(),
        bench=made_up.speeds(),
    )
    assert sentence == (
        "Toy-1M without 51.2% of its prunable weights (one budget for the whole model) has perplexity 18.25, 1.46 times the "
        "dense model's 12.50, where the best baseline, wanda, has 40.00, on toy.txt, 4 samples of 64 tokens "
        "and \N{MINUS SIGN}5.5 ± 2.5 points of accuracy on tasks against it; its archive takes 2.7 MB (0.5 by model), not "
        "4.9 MB; on CPU, 2 threads, matrix products can be faster: unstructured 1.50 times as fast (CSR, float32, batch 1)."
    )


def test_what_is_not_known_is_said(tmp_path):
    assert said(tmp_path, pruned=made_up.pruning(uniform=0.5)) == (
        "Toy-1M without 50.0% of its prunable weights (2:4, that is 2 of every 4 consecutive weights kept): its quality was "
        "not measured; its files are as large as the dense model's until they are packed; whether it is faster was not "
        "measured."
    )


@pytest.mark.parametrize("changes", [{}, {"results": [], "missing": []}])
def test_two_of_four_is_not_faster_where_there_is_no_kernel(tmp_path, changes):
    sentence = said(tmp_path, pruned=made_up.pruning(uniform=0.5), bench=made_up.speeds(**changes))
    assert sentence.endswith("; on CPU, 2 threads, nothing is faster.")


def test_a_gain_that_too_many_rounds_do_not_have_is_none(tmp_path):
    row = made_up.speeds()["results"][0] | {"low": 1.04}
    sentence = said(tmp_path, pruned=made_up.pruning(), bench=made_up.speeds(results=[row]))
    assert sentence.endswith("nothing is faster.")


def test_the_speed_of_another_model_is_nobodys(tmp_path):
    sentence = said(tmp_path, pruned=made_up.pruning(), bench=made_up.speeds(model="another"))
    assert sentence.endswith("whether it is faster was not measured.")


def test_a_kernel_for_any_mask_is_for_every_kind(tmp_path):
    row = made_up.speeds()["results"][0] | {"kind": "any mask", "kernel": "uniprune.accelerate"}
    sentence = said(tmp_path, pruned=made_up.pruning(uniform=0.5), bench=made_up.speeds(results=[row]))
    assert sentence.endswith("can be faster: 2:4 1.50 times as fast (uniprune.accelerate, float32, batch 1).")


def test_what_pruning_measured_is_said_where_bench_did_not_run(tmp_path):
    pruned = made_up.pruning(speed="On a CPU with 2 threads it is no faster than the dense model.")
    assert said(tmp_path, pruned=pruned).endswith("packed; on a CPU with 2 threads it is no faster than the dense model.")
    assert "no faster" not in said(tmp_path, pruned=pruned, bench=made_up.speeds())


def test_a_packed_folder_says_what_it_saves(tmp_path):
    assert "packed to run it takes 2.6 MB, 55.0% of the checkpoint" in said(
        tmp_path, pruned=made_up.pruning(), packed=made_up.packing()
    )


@pytest.mark.parametrize(
    ("source", "said_of"),
    [
        ({"masks_sha256": "a" * 64}, True),
        ({"masks_sha256": "b" * 64}, False),
        ({"model": {"name": "/somewhere/else/Toy-1M.gguf"}}, True),
        ({"model": {"name": "another"}}, False),
    ],
)
def test_what_another_model_saves_is_not_said_of_this_one(tmp_path, source, said_of):
    packed = made_up.packing(source={"fingerprint": "f" * 64} | source)
    pruned = made_up.pruning(model={"name": "/somewhere/else/Toy-1M.gguf"}, masks_sha256="a" * 64)
    assert ("packed to run it takes" in said(tmp_path, pruned=pruned, packed=packed)) == said_of


def test_a_table_of_methods(tmp_path):
    assert said(tmp_path, table=made_up.comparison(), bench=made_up.speeds()) == (
        "Toy-1M pruned by 4 methods, perplexity on toy.txt, 4 samples of 64 tokens: at 0.5 feedback has 30.00 (1.50 times the "
        "dense 20.00; next best wanda 40.00), at 2:4 sparsegpt has 60.00 (3.00 times the dense 20.00; next best ria:a=0.5 "
        "90.00); its files are as large as the dense model's until they are packed; on CPU, 2 threads, matrix products can "
        "be faster: unstructured 1.50 times as fast (CSR, float32, batch 1)."
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, 1e308, 1e-308])
def test_odd_numbers_are_said(tmp_path, value):
    rows = [row | {"perplexity": value} for row in made_up.comparison()["rows"]]
    assert said(tmp_path, table=made_up.comparison(rows=rows)).startswith("Toy-1M pruned by 4 methods")


def test_a_table_without_a_row_yet(tmp_path):
    assert "pruned by nothing yet" in said(tmp_path, table=made_up.comparison(rows=[]))


def test_a_sweep(tmp_path):
    assert said(tmp_path, sweep=made_up.sweep()) == (
        "Toy-1M pruned in 7 ways: perplexity on toy.txt, 4 samples of 64 tokens goes from 13.00 at 0.4 by model to 19.00 at "
        "0.6 by model, dense 12.50."
    )
    rows = made_up.sweep()["rows"]
    assert "pruned in one way: perplexity on toy.txt, 4 samples of 64 tokens is 13.00 at 0.4 by model, dense 12.50." in said(
        tmp_path, sweep=made_up.sweep(rows=rows[:1])
    )


def test_of_two_that_are_as_sparse_the_better_is_named(tmp_path):
    one, other = (
        {"pattern": spec, "scope": None, "sparsity": 0.5, "perplexity": value} for spec, value in (("a", 13), ("b", 12.6))
    )
    found = made_up.sweep(rows=[made_up.sweep()["rows"][0] | one, made_up.sweep()["rows"][0] | other])
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    (best,) = [line for line in sentences(summarise([read(tmp_path / "sweep.json")])) if line.startswith("The sparsest")]
    assert "is b: 12.60 at 50.0%" in best


# ------------------------------------------------------------------------------------------------------------ formats


def test_markdown_has_the_tables_of_the_page(tmp_path):
    report(made_up.everything(tmp_path), tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[0] == "# Toy-1M, 51.2% pruned"
    assert "has perplexity 18.25, 1.46 times the dense model's 12.50" in lines[2]
    heads = [line for line in lines if line.startswith("## ")]
    assert heads[:3] == ["## The models", "## Perplexity against sparsity", "## Where the zeros are"]
    tables = [line for line in lines if line.startswith("| ")]
    assert (
        "| pruned | 0.5 by model | 51.2% | 18.25 | toy.txt, 4 samples of 64 tokens | 0.312 | \N{MINUS SIGN}5.5 ± 2.5 |"
        in tables
    )
    for above, below in pairwise(lines):  # all rows of a table are as wide as its head
        if above.startswith("| ") and below.startswith("| "):
            assert above.count("|") == below.count("|")


def test_markdown_of_hostile_names_is_no_markup(tmp_path):
    name = "<b>x</b> | [a](http://b) *c* `d` _e_ #f\n# g"
    report([made_up.write(tmp_path / "e.json", made_up.evaluation(name, 0.5))], tmp_path / "report.md", format="md")
    text = (tmp_path / "report.md").read_text()
    assert r"\<b\>x\</b\> \| \[a\](http://b) \*c\* \`d\` \_e\_ \#f \# g" in text


def test_json_is_what_is_returned(tmp_path):
    made = report(made_up.everything(tmp_path), tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(made.record()))
    assert made.verdict == verdict(summarise(read_all([Path(source.path) for source in made.sources])))


def test_the_command_takes_a_format(capsys, monkeypatch, tmp_path):
    paths = made_up.everything(tmp_path)
    code, printed, errors = run(capsys, monkeypatch, "report", *paths, "-o", tmp_path / "r.md")
    assert (code, errors) == (0, "")
    assert "1.46 times the dense" in " ".join(printed.split())
    code, _, errors = run(capsys, monkeypatch, "report", *paths, "-o", tmp_path / "r.html", "--format", "json")
    assert code == 2
    assert "let its name end in .json" in errors


def test_zeros_that_were_there_before_are_counted_apart(tmp_path):
    """A model that is pruned twice has more of them than the last masks remove."""
    pruned = made_up.pruning(uniform=0.2, masks_sha256="a" * 64)
    measured = made_up.evaluation("pruned", 0.5, protocol={"masks_sha256": "a" * 64})
    paths = [made_up.write(tmp_path / "pruned" / "pruning.json", pruned), made_up.write(tmp_path / "result.json", measured)]
    lines = list(sentences(summarise(read_all(paths))))
    assert any(line.startswith("20.0% of the") and "were set to zero" in line for line in lines)
    assert "With those that were zero before, 50.0% of the prunable weights are zero." in lines
