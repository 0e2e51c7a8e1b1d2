"""What is handed to the Python API in another type than it takes: an error of one line before any work, or what was meant."""

import subprocess
import sys
from pathlib import Path

import pytest

import uniprune
from conftest import tiny_model
from uniprune import InputError, Loaded, Recipe
from uniprune.artefacts.mask_tools import CheckedMasks
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.saliency.metrics import StochRIA
from uniprune.sparsity.patterns.budget import removed_count
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured

PLAIN = {"metric": "magnitude", "controller": "none", "windows": 2, "length": 16}


@pytest.fixture(scope="module")
def scores(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    uniprune.calibrate(folder, Recipe(**PLAIN), path)
    return path


@pytest.mark.parametrize("entry", [uniprune.prune, uniprune.calibrate, uniprune.permute])
@pytest.mark.parametrize("recipe", [{"sparsity": "2:4"}, "2:4", None])
def test_what_is_no_recipe(folder, tmp_path, entry, recipe):
    with pytest.raises(InputError, match=r"the recipe is a \w+; give a Recipe"):
        entry(folder, recipe, tmp_path / "out")
    with pytest.raises(InputError, match=r"the recipe is a \w+; give a Recipe"):
        uniprune.plan(folder, recipe)


@pytest.mark.parametrize("model", [None, "", 3, tiny_model()])
def test_what_is_no_model(tmp_path, model):
    with pytest.raises(InputError, match=r"(no model was given|model is a \w+); give a folder, .*Loaded\(model, tokenizer\)"):
        uniprune.prune(model, Recipe(sparsity=0.5, **PLAIN), tmp_path / "out")


def test_a_model_in_memory_is_asked_for(folder):
    with pytest.raises(InputError, match=r"prune_in_place takes a model in memory: Loaded\(model, tokenizer\)"):
        uniprune.prune_in_place(str(folder), Recipe(sparsity=0.5, **PLAIN))
    with pytest.raises(InputError, match="is no model; give one in memory"):
        Loaded(str(folder))


OTHERS = {"exclude": "down_proj", "refine": True, "metric": "ria", "controller": "none", "seed": 1}


@pytest.mark.parametrize("name", OTHERS)
def test_masks_have_no_settings_of_scores(scores, tmp_path, name):
    with pytest.raises(InputError, match=rf"mask: {name} is no setting of masks; it has: scope, "):
        uniprune.mask(scores, 0.5, tmp_path / "m.safetensors", **{name: OTHERS[name]})
    assert uniprune.mask(scores, 0.5, tmp_path / "m.safetensors", rule="down_proj=dense").sparsity < 0.5


@pytest.mark.parametrize("sparsity", [1 - 0.8, 0.20000001, 0.2])
def test_a_fraction_is_what_it_is_spelled_as(folder, tmp_path, sparsity):
    """In floats 1 - 0.8 is less than 0.2, and of 40 weights 7 would go instead of 8."""
    report = uniprune.prune(folder, Recipe(sparsity=sparsity, **PLAIN), tmp_path / "out")
    assert report.pattern == ("0.200000 by row" if sparsity == 0.20000001 else "0.2 by row")
    dict(CheckedMasks(tmp_path / "out" / "pruning" / "masks.safetensors"))  # are of that pattern
    assert removed_count(sparsity, 40) == 8


def test_settings_of_another_type_are_refused_before_the_work():
    with pytest.raises(InputError, match=r"metric StochRIA: seed = 1\.5"):
        Recipe(sparsity=0.5, metric=StochRIA(seed=1.5))
    with pytest.raises(InputError, match=r"controller MirrorDescent: batch_tokens = 64\.5"):
        Recipe(sparsity=0.5, controller=MirrorDescent(batch_tokens=64.5))
    for wrong in (lambda: NM(2.5, 4), lambda: NM(2, "4"), lambda: Unstructured("0.5")):
        with pytest.raises(InputError):
            wrong()
    for wrong in (lambda: Tiled(NM(2, 4), 4, 4), lambda: Tiled(0.5, 16, 16), lambda: Tiled(Unstructured(0.5), 1.5, 2)):
        with pytest.raises(InputError):
            wrong()


def test_files_by_their_names(folder, tmp_path):
    report = uniprune.prune(folder, Recipe(sparsity=0.5, text=Path("builtin"), **PLAIN), tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text("sparsity: 0.5\n")
    assert Recipe.load(str(tmp_path / "recipe.yaml")).sparsity == Recipe(sparsity=0.5).sparsity
    report.write(str(tmp_path / "again.json"))
    assert type(report).read(str(tmp_path / "again.json")) == report


def test_patterns_in_a_sweep(folder, scores, tmp_path):
    asked = [Unstructured(0.5, "model"), NM(2, 4), 0.25]
    found = uniprune.sweep(folder, scores, tmp_path / "s.json", asked, windows=2, length=16)
    assert [row.pattern for row in found.rows] == ["0.5 by model", "2:4", "0.25"]
    assert len(uniprune.sweep(folder, scores, tmp_path / "t.json", 0.5, windows=2, length=16).rows) == 1


def test_one_source_of_a_report_and_its_formats(folder, tmp_path):
    uniprune.prune(folder, Recipe(sparsity=0.5, **PLAIN), tmp_path / "out")
    uniprune.report(str(tmp_path / "out"), tmp_path / "r.md", format="md")
    assert (tmp_path / "r.md").read_text()
    with pytest.raises(InputError, match="format 'pdf' is unknown; use one of html, md, json"):
        uniprune.report([tmp_path / "out"], tmp_path / "r.pdf", format="pdf")


@pytest.mark.parametrize("asked", [{"batches": [1.5]}, {"batches": ["x"]}, {"sparsities": ["x"]}, {"dtypes": [3]}])
def test_what_cannot_be_timed(folder, asked):
    with pytest.raises(InputError):
        uniprune.bench(folder, **asked)


def test_closed_streams(scores):
    """As ``uniprune ... >&-`` has them."""
    code = "import sys; sys.stdout = None; sys.argv = ['uniprune', 'masks', 'stats', 'none', '--json']\n"
    code += "from uniprune.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
