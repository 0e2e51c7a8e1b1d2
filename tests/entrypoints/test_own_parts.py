"""A run all of whose parts are a user's own, from calibration to the report's page."""

import json

import pytest
import torch

import uniprune
from own import FirstInputs, Loud, Lowest, Signs
from uniprune import NM, Recipe, Unstructured
from uniprune.artefacts import mask_tools
from uniprune.artefacts.scores import ScoresFile
from uniprune.errors import InputError

SMALL = {"windows": 16, "length": 32, "dtype": "float32"}
OWN = {"metric": Loud(power=0.5), "controller": Signs(batch_tokens=64), "steps": 2}


def test_from_calibration_to_the_page(folder, tmp_path):
    recipe = Recipe(sparsity=FirstInputs(), **OWN, **SMALL)
    out = tmp_path / "out"
    report = uniprune.prune(str(folder), recipe, out)
    assert report.pattern == "the first 3 of 4 inputs"
    assert report.sparsity == 0.25
    written = json.loads((out / "pruning.json").read_text())
    recorded = {name: written["recipe"][name]["class"] for name in ("metric", "sparsity", "controller")}
    assert recorded == {"metric": "own.Loud", "sparsity": "own.FirstInputs", "controller": "own.Signs"}
    assert written["recipe"]["metric"]["settings"] == {"power": 0.5}
    with pytest.raises(InputError, match=r"own\.\w+: it is in no table of uniprune, so JSON alone cannot replay it"):
        Recipe(**written["recipe"])
    card = (out / "README.md").read_text()
    assert "--config recipe.yaml" not in card
    assert "of code that is not uniprune's" in card
    checked = mask_tools.verify(out / "pruning" / "masks.safetensors", str(folder))
    assert "pattern" not in checked["checked"]
    assert "model" in checked["checked"]
    uniprune.report([out], tmp_path / "page.html")
    assert "the first 3 of 4 inputs" in (tmp_path / "page.html").read_text()
    assert uniprune.prune(str(folder), recipe, out, resume=True).masks_sha256 == report.masks_sha256


def test_scores_of_ones_own_and_masks_by_objects(folder, tmp_path):
    scores = tmp_path / "scores.safetensors"
    facts = uniprune.calibrate(str(folder), Recipe(sparsity=NM(2, 4), **OWN, **SMALL), scores)
    assert facts.controller.targets == ["2:4"]
    for pattern, spelled in ((NM(2, 4), "2:4"), (Unstructured(0.5, "model"), "0.5"), (FirstInputs(), None)):
        made = uniprune.mask(scores, pattern, tmp_path / "a.safetensors", overwrite=True)
        assert made.sparsity == pytest.approx(pattern.sparsity, abs=1e-4)
        if spelled:
            again = uniprune.mask(scores, spelled, tmp_path / "b.safetensors")
            assert again == made
            assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
            (tmp_path / "b.safetensors").unlink()


@pytest.mark.parametrize("settings", [{"controller": "none"}, {"sequential": True}], ids=["one pass", "block by block"])
def test_patterns_of_ones_own_go_where_others_go(folder, tmp_path, settings):
    report = uniprune.prune(
        str(folder), Recipe(sparsity=FirstInputs(1, 2), metric=Loud(), **settings, **SMALL), tmp_path / "out"
    )
    assert report.sparsity == 0.5
    planned = uniprune.plan(str(folder), Recipe(sparsity=FirstInputs(1, 3), unsupported="dense", **settings))
    assert planned.groups[0].unsupported == "32 inputs are not divisible by 3"


def test_nothing_is_guessed_of_patterns_of_ones_own(folder, tmp_path):
    """A field called scope once meant rows to plan, whatever the pattern made of it."""
    recipe = Recipe(sparsity=Lowest(0.3), metric=Loud(), controller="none", **SMALL)
    assert not recipe.pattern().by_row
    report, planned = uniprune.prune(str(folder), recipe, tmp_path / "out"), uniprune.plan(str(folder), recipe)
    assert report.sparsity == pytest.approx(planned.sparsity, abs=1e-9)
    assert report.sparsity > 0.299  # 9 of 32 inputs of each row would be 0.28
    ruled = uniprune.plan(str(folder), Recipe(**dict(recipe) | {"rules": ("q_proj=0.3",)}))
    assert {group.pattern for group in ruled.groups} == {"the lowest 0.3", "0.3 by matrix"}
    with pytest.raises(InputError, match=r"the lowest 0\.3 has no budget by row"):
        Recipe(sparsity=Lowest(0.3), refine=True)


def test_scores_in_float64_are_scores(folder, tmp_path):
    """The statistics are float64, and what is computed with them is, too."""

    class Long(Loud):
        def __call__(self, weight, statistic):
            return super().__call__(weight, statistic).double()

    recipe = Recipe(metric=Long(power=0.5), controller="none", **SMALL)
    uniprune.calibrate(str(folder), recipe, tmp_path / "long.safetensors")
    uniprune.calibrate(str(folder), recipe.model_copy(update={"metric": Loud(power=0.5)}), tmp_path / "loud.safetensors")
    long, loud = (ScoresFile(tmp_path / f"{name}.safetensors") for name in ("long", "loud"))
    assert all(torch.equal(long[name], loud[name]) for name in loud)
