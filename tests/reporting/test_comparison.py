"""The table of ``compare`` in the forms that people read."""

import re

import pytest

import made_up
from uniprune.common.formatting import NONE
from uniprune.comparison.results import Comparison
from uniprune.entrypoints.report import report
from uniprune.reporting import comparison


@pytest.fixture
def found():
    return Comparison(**made_up.comparison())


def test_rows_go_by_sparsity(found):
    assert [row.method for row in comparison.ordered(found)] == ["dense", "wanda", "feedback", "ria:a=0.5", "sparsegpt"]
    assert comparison.best(found) == {2, 4}


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


def test_flips_by_hand(found):
    rows = [found.rows[0].model_copy(update={"right": {"t": {"acc": bits}}}) for bits in ("b", "6", "0")]  # 1011, 0110, 0000
    assert rows[1].flips(rows[0], "t", "acc") == (1, 2)
    assert rows[0].flips(rows[1], "t", "acc") == (2, 1)
    assert rows[2].flips(rows[0], "t", "acc") == (0, 3)
    assert rows[0].flips(rows[1], "t", "acc_norm") is rows[0].flips(rows[1], "u", "acc") is None


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
