"""Many sparsities of one calibration: each row is what pruning at that sparsity gives."""

import json
import math
import shutil

import pytest

import uniprune
from command import run
from conftest import Stopped, Stops
from uniprune import NM, InputError, MismatchError, Recipe
from uniprune.artefacts import archive
from uniprune.entrypoints.sweep import sweep
from uniprune.evaluation.results import Row, marked
from uniprune.reporting.summary import alike, measure

TEXT = {"windows": 2, "length": 32}


@pytest.fixture(scope="module")
def scores(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    uniprune.calibrate(str(folder), Recipe(controller="none", **TEXT), path)
    return path


def test_rows_are_what_pruning_gives(folder, scores, tmp_path):
    found = sweep(str(folder), scores, tmp_path / "sweep.json", ["0.5", "2:4"], **TEXT)
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(found.record()))
    assert found.dense.perplexity == uniprune.evaluate(str(folder), text_source="builtin", **TEXT).perplexity
    for row in found.rows:
        uniprune.mask(scores, row.pattern, tmp_path / "masks.safetensors", overwrite=True)
        uniprune.apply(str(folder), tmp_path / "masks.safetensors", tmp_path / "pruned", overwrite=True)
        pruned = uniprune.evaluate(str(tmp_path / "pruned"), text_source="builtin", **TEXT)
        assert row.perplexity == pruned.perplexity
        assert row.sparsity == pytest.approx(pruned.sparsity, abs=1e-3)
        packed = archive.pack(tmp_path / "pruned", tmp_path / "a.upz", overwrite=True)["archive_bytes"]
        assert row.bytes == pytest.approx(packed, rel=0.1)
    assert found.rows[0].bytes < found.dense.bytes


def test_matrices_without_scores_stay_dense(folder, tmp_path):
    """Of a model that was calibrated without some."""
    scores, out = tmp_path / "scores.safetensors", tmp_path / "pruned"
    recipe = Recipe(controller="none", exclude=["down_proj", r"layers\.0\."], **TEXT)
    uniprune.calibrate(str(folder), recipe, scores)
    (row,) = sweep(str(folder), scores, tmp_path / "sweep.json", ["2:4"], **TEXT).rows
    uniprune.prune(str(folder), recipe.model_copy(update={"sparsity": "2:4"}), out)
    assert row.perplexity == uniprune.evaluate(str(out), text_source="builtin", **TEXT).perplexity
    assert row.bytes == pytest.approx(archive.pack(out, tmp_path / "a.upz")["archive_bytes"], rel=0.1)


def test_a_sparsity_of_none_is_not_the_dense_model(folder, scores, tmp_path):
    """Both have rows, however often it is resumed."""
    found = sweep(str(folder), scores, tmp_path / "s.json", ["0", "0.5"], **TEXT)
    assert [row.pattern for row in found.rows] == ["0", "0.5"]
    assert found.dense.perplexity == found.rows[0].perplexity
    again = sweep(str(folder), scores, tmp_path / "s.json", ["0", "0.5"], resume=True, **TEXT)
    assert again.record() == found.record()


def test_the_stride_is_recorded_and_tells_perplexities_apart(folder, scores, tmp_path):
    """Evenly spaced samples may be the same tokens at any stride; fewer of them are predicted."""
    apart, over = (
        sweep(str(folder), scores, tmp_path / f"{stride}.json", ["0.5"], stride=stride, **TEXT) for stride in (None, 16)
    )
    assert apart.protocol.text.sha256 == over.protocol.text.sha256
    assert apart.dense.perplexity != over.dense.perplexity
    assert (apart.protocol.stride, over.protocol.stride) == (32, 16)
    assert not alike(apart.protocol, over.protocol)
    assert (measure(over.protocol), measure(apart.protocol)) == (
        "builtin, 2 samples of 32 tokens, stride 16",
        "builtin, 2 samples of 32 tokens",
    )


def test_the_stride_is_for_one_text(folder, scores, tmp_path):
    (tmp_path / "b.txt").write_text("words and others " * 200)
    asked = {**TEXT, "text_source": ("builtin", str(tmp_path / "b.txt"))}
    with pytest.raises(InputError, match="--stride is for one text; give one --text at a time"):
        sweep(str(folder), scores, tmp_path / "s.json", ["0.5"], stride=16, **asked)


def test_the_model_is_not_replaced(folder, scores, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    with pytest.raises(InputError, match="is a file of the input"):
        sweep(str(tmp_path / "model"), scores, tmp_path / "model" / "config.json", ["0.5"], overwrite=True, **TEXT)


def test_an_interrupted_sweep_goes_on(folder, scores, tmp_path):
    out, asked = tmp_path / "sweep.json", ["0.3", "0.5", "0.7"]
    whole = sweep(str(folder), scores, tmp_path / "whole.json", asked, **TEXT)

    class StopsAtRows(Stops):
        def __call__(self, items, label, total):
            return super().__call__(items, label, total) if label == "sweeping" else iter(items)

    with pytest.raises(Stopped):
        sweep(str(folder), scores, out, asked, progress=StopsAtRows(2), **TEXT)
    assert [row["pattern"] for row in json.loads(out.read_text())["rows"]] == ["0.3"]
    with pytest.raises(InputError, match="exists"):
        sweep(str(folder), scores, out, asked, **TEXT)
    with pytest.raises(InputError, match="exists; --resume keeps its rows and adds those that are missing"):
        sweep(str(folder), scores, out, asked, **TEXT)
    assert sweep(str(folder), scores, out, asked, resume=True, **TEXT) == whole
    more = sweep(str(folder), scores, out, ["2:4"], resume=True, **TEXT)
    assert [row.pattern for row in more.rows] == [*asked, "2:4"]
    with pytest.raises(InputError, match=r"made with other settings: .* was .*, is "):
        sweep(str(folder), scores, out, asked, resume=True, windows=3, length=32)
    out.write_text('{"rows": 3}')
    with pytest.raises(InputError, match="cannot be resumed as a sweep"):
        sweep(str(folder), scores, out, asked, resume=True, **TEXT)


@pytest.mark.parametrize("asked", [[0.5, NM(2, 4)], "0.5, 2:4"])
def test_sparsities_are_numbers_patterns_or_one_text(folder, scores, tmp_path, asked):
    """Numbers were refused when the first row was measured, which may take an hour."""
    assert [row.pattern for row in sweep(str(folder), scores, tmp_path / "sweep.json", asked, **TEXT).rows] == ["0.5", "2:4"]


def test_another_models_scores_are_refused(loaded, scores, tmp_path):
    loaded.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="another model"):
        sweep(loaded, scores, tmp_path / "sweep.json", ["0.5"], **TEXT)
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize("asked", ["", "0.5,1.5", "5:4", "3:7", "picqa"])
def test_bad_sparsities(capsys, monkeypatch, folder, scores, tmp_path, asked):
    code, _, errors = run(capsys, monkeypatch, "sweep", folder, scores, "-s", asked, "-o", tmp_path / "sweep.json")
    assert code == 2
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_line_marks_the_front(capsys, monkeypatch, folder, scores, tmp_path):
    command = ["sweep", folder, scores, "-s", "0.4,2:4", "--windows", 2, "--length", 32, "-o", tmp_path / "sweep.json"]
    code, printed, errors = run(capsys, monkeypatch, *command)
    assert (code, errors) == (0, "")
    assert "packed" in printed
    assert "yes" in printed


def test_the_front_is_what_no_other_beats():
    rows = [
        Row(pattern="a", perplexity=2.0, bytes=10, sparsity=0.5),
        Row(pattern="b", perplexity=3.0, bytes=10, sparsity=0.5),  # same size, worse
        Row(pattern="c", perplexity=3.0, bytes=5, sparsity=0.7),
        Row(pattern="d", perplexity=4.0, bytes=6, sparsity=0.7),  # larger and worse
    ]
    assert [row.pareto for row in marked(rows)] == [True, False, True, False]
    unpacked = [row.model_copy(update={"bytes": None}) for row in rows]
    assert [row.pareto for row in marked(unpacked)] == [True, False, True, False]
    assert [row.pareto for row in marked([*rows, Row(pattern="e", perplexity=math.inf, bytes=1, sparsity=0.9)])][-1] is False


def test_one_sparsity_in_several_spellings_has_one_row(folder, scores, tmp_path):
    sweep(str(folder), scores, tmp_path / "sweep.json", "0.5,2:4", **TEXT)
    found = sweep(str(folder), scores, tmp_path / "sweep.json", "0.50,.5,2:4", resume=True, **TEXT)
    assert [row.pattern for row in found.rows] == ["0.5", "2:4"]
