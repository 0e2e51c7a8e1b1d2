"""The table of ``compare`` in the forms that people read."""

import csv
import io
import re
from pathlib import Path

import pytest

import made_up
from uniprune.common.formatting import NONE
from uniprune.comparison.results import Comparison
from uniprune.entrypoints.report import report
from uniprune.reporting import comparison, plots, tables
from uniprune.reporting.headline import verdict
from uniprune.reporting.results import ResultFile
from uniprune.reporting.summary import summarise
from uniprune.reporting.tables import Grid


@pytest.fixture
def found():
    return Comparison(**made_up.comparison())


def test_rows_go_by_sparsity(found):
    assert [row.method for row in comparison.ordered(found)] == ["dense", "wanda", "feedback", "ria:a=0.5", "sparsegpt"]
    assert comparison.best(found) == {2, 4}


def test_files_of_one_name_are_told_apart(found):
    """Wherever methods are named: the table, the best of a sparsity, continuations."""
    files = "/runs/one/scores.safetensors", "/runs/two/scores.safetensors"
    names = dict(zip(("wanda", "feedback"), files, strict=True))
    rows = [row.model_copy(update={"method": names.get(row.method, row.method)}) for row in found.rows]
    found = found.model_copy(update={"rows": rows, "methods": list(files)})
    labels = ["one/scores.safetensors", "two/scores.safetensors"]
    for grid in (comparison.grid(found), comparison.readings(found), *comparison.written(found)):
        assert [row[0] for row in grid.rows[1:3]] == labels
    assert "at 0.5 two/scores.safetensors has 30.00 (" in verdict(summarise([ResultFile(Path(), {}, found)]))


def test_a_report_has_the_table(found, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "table").mkdir()
    found.write(tmp_path / "table" / "comparison.json")
    written = report([tmp_path / "table", tmp_path / "table" / "comparison.json"], tmp_path / "report.html")
    assert written.title == "Toy-1M: methods compared"
    assert [source.kind for source in written.sources] == ["comparison"]
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<section id="([\w-]+)"', page) == [
        *("summary", "comparison", "sparsity", "perplexity", "zero-shot", "generations", "protocol")
    ]
    assert "sparsegpt (updates weights)" in page
    assert "at 0.5 feedback has 30.00 (1.50 times the dense 20.00; next best wanda 40.00)" in page
    assert "feedback goes on" in page
    assert "it differs between methods" in page


def test_the_page_of_ten_rows_is_small(found, tmp_path):
    """Five methods at two sparsities, 30 blocks of seven matrices, four tasks; every row with sparsities of its own."""
    kinds = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    matrices = {f"model.layers.{i}.{kind}": (i * 7 + at) / 217 for i in range(30) for at, kind in enumerate(kinds)}
    (task,) = found.rows[0].tasks.values()
    names = [f"{name}.jsonl" for name in ("piqa", "arc_easy", "winogrande", "openbookqa")]
    facts = {"matrices": matrices, "tasks": dict.fromkeys(names, task), "right": {name: {"acc": "f" * 250} for name in names}}
    rows = [found.rows[0].model_copy(update=facts | {"matrices": {}})]
    for pattern in ("0.5", "0.6"):
        for method in ("magnitude", "wanda", "ria", "sparsegpt", "feedback"):
            rows.append(
                found.rows[1].model_copy(update=facts | {"method": method, "pattern": pattern, "sparsity": float(pattern)})
            )
    (tmp_path / "table").mkdir()
    found.model_copy(update={"rows": rows}).write(tmp_path / "table" / "comparison.json")
    report([tmp_path / "table"], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_flips_by_hand(found):
    rows = [found.rows[0].model_copy(update={"right": {"t": {"acc": bits}}}) for bits in ("b", "6", "0")]  # 1011, 0110, 0000
    assert rows[1].flips(rows[0], "t", "acc") == (1, 2)
    assert rows[0].flips(rows[1], "t", "acc") == (2, 1)
    assert rows[2].flips(rows[0], "t", "acc") == (0, 3)
    assert rows[0].flips(rows[1], "t", "acc_norm") is rows[0].flips(rows[1], "u", "acc") is None


def test_flips_are_a_table(found):
    grid = comparison.flips(found)
    assert grid.rows[0][:4] == ["wanda", "0.5", "arc_easy", "acc"]
    assert grid.rows[0][4:8] == [("40.0%", 0.4), ("40.0%", 0.4), "0", "3"]  # ff and f1
    assert len(grid.rows) == 4
    assert comparison.flips(found.model_copy(update={"rows": found.rows[1:]})) is None  # no dense model


def test_perplexities_in_other_units_and_by_position(found):
    grid = comparison.readings(found)
    assert [name for name, _ in grid.heads] == ["method", "sparsity", "per token", "per word", "per byte", "after 1-512 tokens"]
    assert grid.rows[2] == ["feedback", "0.5", ("30.00", 30.0), ("90.00", 90.0), ("1.50", 1.5), ("30.00", 30.0)]


def test_continuations_by_prompt(found):
    (grid,) = comparison.written(found)
    assert (grid.caption, grid.rows[0]) == ("To be", ["dense", NONE, "dense goes on"])
    assert comparison.written(found.model_copy(update={"rows": []})) == []


def test_calibration_texts_beside_evaluation_texts(found):
    def table(calibration, text, factor):
        facts = [made_up.TEXT | {"text": name} for name in (calibration, text)]
        rows = [row | {"perplexity": factor * row["perplexity"]} for row in made_up.comparison()["rows"]]
        protocol = made_up.comparison()["protocol"] | {"calibration": facts[0], "text": facts[1]}
        return Comparison(**made_up.comparison(rows=rows, protocol=protocol))

    grids = comparison.sources([table("c4", "wiki", 1.0), table("code", "wiki", 1.5), table("code", "c4", 2.0)])
    assert len(grids) == 4
    assert grids[0].caption == "Toy-1M, wanda at 0.5: perplexity on each text, by the text it was calibrated on"
    assert grids[0].columns == ["calibrated on:", "wiki", "c4"]
    assert grids[0].rows == [["c4", ("40.00", 40.0), NONE], ["code", ("60.00", 60.0), ("80.00", 80.0)]]
    assert comparison.sources([found]) == []


def test_tables_of_other_models_texts_seeds_and_settings_are_kept_apart():
    def rows(*tables):
        """Of the first method the caption and what is said to be calibrated on; a table is model, text, seed, tokens."""
        found = []
        for model, text, seed, tokens in tables:
            protocol = made_up.comparison()["protocol"] | {"calibration": made_up.TEXT | {"text": text}}
            protocol["settings"] = {"seed": seed, "budget_tokens": tokens}
            found.append(Comparison(**made_up.comparison(protocol=protocol, model=model)))
        grids = [grid for grid in comparison.sources(found) if ", wanda at" in grid.caption]
        return [(grid.caption.partition(",")[0], [row[0] for row in grid.rows]) for grid in grids]

    assert rows(("/a/model", "c4", 0, None), ("/b/model", "code", 0, None)) == []
    assert rows(("/a/model", "c4", 0, None), ("/a/model", "code", 0, 4096)) == []
    assert rows(("m", "/x/train.jsonl", 0, None), ("m", "/y/train.jsonl", 0, None)) == [("m", ["x/train", "y/train"])]
    assert rows(("m", "c4", 0, None), ("m", "c4", 1, None), ("m", "code", 0, None)) == [
        ("m", [f"{name}, 4 samples of 64, seed {seed}" for name, seed in (("c4", 0), ("c4", 1), ("code", 0))])
    ]
    assert rows(*((f"/{one}/model", text, 0, None) for one in "ab" for text in ("c4", "code"))) == [
        (f"{one}/model", ["c4", "code"]) for one in "ab"
    ]


def test_plots_of_methods(found):
    dots = plots.methods("m", found)
    assert dots.says == (
        "Perplexity by method: wanda at 0.5 40.00, ria:a=0.5 at 2:4 90.00, sparsegpt at 2:4 60.00, feedback at 0.5 30.00; "
        "dense 20.00."
    )
    assert dots.data.rows[0] == ["dense", "", ("0", 0.0), ("20.00", 20.0)]
    assert plots.curves("c", found) is None  # no method at two fractions
    more = [row.model_copy(update={"pattern": "0.6", "sparsity": 0.6, "perplexity": 70.0}) for row in found.rows[1:2]]
    curve = plots.curves("c", found.model_copy(update={"rows": [*found.rows, *more]}))
    assert curve.says == "Perplexity against sparsity by method: wanda 50.0% 40.00, wanda 60.0% 70.00."
    assert plots.methods("m", found.model_copy(update={"rows": found.rows[:1]})) is None


def test_saved_tables_are_read_back_by_a_csv_reader():
    grid = Grid("c", ["a:", "b"], [['x, "y"\nz', ("1.50", 1.5)], ["=1+1", NONE], ["-", ("∞", float("inf"))]])
    rows = list(csv.reader(io.StringIO(tables.as_csv(grid), newline="")))
    assert rows == [["a", "b"], ['x, "y"\nz', "1.5"], ["'=1+1", NONE], ["'-", "inf"]]


def test_markdown(found):
    lines = comparison.markdown(found).splitlines()
    assert [line.replace(NONE, "-") for line in lines[:9]] == [
        "Toy-1M: toy.txt, 4 samples of 64 tokens",
        "",
        "| method | sparsity | scope | zeros | perplexity | ± | arc_easy | seconds |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| dense | - | - | 0.0% | 20.00 | 0.4 | 40.0 ± 10.0 | - |",
        "| wanda | 0.5 | row | 50.0% | 40.00 | 0.8 | 40.0 ± 10.0 | 12.3 |",
        "| feedback | 0.5 | model | 50.0% | **30.00** | 0.6 | 40.0 ± 10.0 | 12.3 |",
        "| ria:a=0.5 | 2:4 | - | 50.0% | 90.00 | 1.80 | 40.0 ± 10.0 | 12.3 |",
        "| sparsegpt (updates weights) | 2:4 | - | 50.0% | **60.00** | 1.20 | 40.0 ± 10.0 | 12.3 |",
    ]
    text = "\n".join(lines)
    assert "it differs between methods, see the column scope" in text
    assert "sparsegpt updates the weights that remain" in text
    assert "Compares with no published protocol" in text


def test_latex(found):
    lines = comparison.latex(found).splitlines()
    assert lines[1:8] == [
        r"\begin{tabular}{lllrrrrr}",
        r"\toprule",
        r"method & sparsity & scope & zeros & perplexity & $\pm$ & arc\_easy & seconds \\",
        r"\midrule",
        r"dense & -- & -- & 0.0\% & 20.00 & 0.4 & 40.0 $\pm$ 10.0 & -- \\",
        r"\midrule",
        r"wanda & 0.5 & row & 50.0\% & 40.00 & 0.8 & 40.0 $\pm$ 10.0 & 12.3 \\",
    ]
    assert r"feedback & 0.5 & model & 50.0\% & \textbf{30.00} & 0.6 & 40.0 $\pm$ 10.0 & 12.3 \\" in lines
    assert lines.count(r"\midrule") == 3
    body = [line for line in lines if not line.startswith("%")]
    assert not any(re.search(r"(?<!\\)[%_#]", line) for line in body)


def test_scopes_that_are_the_same_are_said_once(found):
    same = [row.model_copy(update={"scope": "row" if row.scope else None}) for row in found.rows]
    text = comparison.markdown(found.model_copy(update={"rows": same}))
    assert "scope" not in text
    assert "A fraction is the same share of every row." in text


def test_of_scopes_that_are_equally_common_the_first_comes_first(found):
    for scopes in (["row", "model", "block"], ["block", "model", "row"]):
        rows = [found.rows[1].model_copy(update={"scope": scope}) for scope in scopes]
        assert found.model_copy(update={"rows": rows}).scopes == scopes


def test_names_that_would_be_markup(found):
    row = found.rows[1].model_copy(
        update={"method": r"a|b_{c}\d~^<&%$#.safetensors", "perplexity": float("inf"), "resumed": True}
    )
    odd = found.model_copy(update={"rows": [found.rows[0], row]})
    assert r"| a\|b_{c}\d~^<&%$#.safetensors | 0.5 |" in comparison.markdown(odd)
    assert "interrupted" in comparison.markdown(odd)
    line = next(line for line in comparison.latex(odd).splitlines() if "safetensors" in line)
    assert line.startswith(
        r"a|b\_\{c\}\textbackslash{}d\textasciitilde{}\textasciicircum{}$<$\&\%\$\#.safetensors & 0.5 & 50.0\% & "
    )
    assert r" & $\infty$ & " in line
    assert line.endswith(r"$>$ 12.3 \\")


def test_shots_are_said(found):
    """Accuracies after solved examples are not called zero-shot."""
    few = [
        row.model_copy(update={"tasks": {name: task.model_copy(update={"num_fewshot": 5}) for name, task in row.tasks.items()}})
        for row in found.rows
    ]
    assert "Tasks: zero-shot accuracy ± standard error." in comparison.notes(found)
    assert "Tasks: 5-shot accuracy ± standard error." in comparison.notes(found.model_copy(update={"rows": few}))
    mixed = found.model_copy(update={"rows": [found.rows[0], *few[1:]]})
    assert "Tasks: 0- and 5-shot accuracy ± standard error." in comparison.notes(mixed)


def test_tables_of_other_samples_are_no_row_of_one(found):
    """Perplexities on few short samples do not stand beside those of many long ones."""

    def table(text, count, length):
        calibration = found.protocol.calibration.model_copy(update={"text": text})
        protocol = found.protocol.model_copy(update={"calibration": calibration, "windows": count, "length": length})
        return found.model_copy(update={"protocol": protocol})

    assert comparison.sources([table("a.txt", 4, 64), table("b.txt", 2, 128)]) == []
    assert comparison.sources([table("a.txt", 4, 64), table("b.txt", 4, 64)])
