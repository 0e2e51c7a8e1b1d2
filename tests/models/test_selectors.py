"""Parts of sparse attention that choose tokens stay dense, and what no gradient reaches is reported, whatever its name."""

import json
import re

import pytest
import torch
from torch import nn

import uniprune
from conftest import tiny_model
from families import same_files
from small_models import VOCABULARY, save, tiny
from uniprune import Recipe
from uniprune.controller.descent.loop import Descent
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.models import matrices
from uniprune.models.matrices import find_matrices, left_dense
from uniprune.storage import runs

FAMILIES = ["deepseek_v32", "glm_moe_dsa", "deepseek_v4"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(0))
    save_windows(Windows(ids, "random", 16, "none"), file)
    return str(file)


def prune(model, tokens, folder, way="resident", **settings):
    recipe = Recipe(**{"sparsity": 0.5, "steps": 2, "text": tokens} | settings)
    return uniprune.prune(model, recipe, folder, execution=way, overwrite=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_selectors_stay_dense_and_are_listed(family):
    model = tiny(family)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    selectors = {name for name in layers if re.search("index|compressor", name)}
    assert selectors
    left = left_dense(model)
    reasons = {name: why for name, (_, why) in left.items() if "selector" in why}
    assert len(reasons) == len(selectors)  # names are those of the checkpoint
    assert not any(re.search("index|compressor", name) for name in find_matrices(model))
    assert all(
        re.search(r"in a selector of sparse attention \(\w+(Indexer|IndexerScorer|Compressor)\)", w) for w in reasons.values()
    )


def test_grouped_products_stay_dense_with_the_reason():
    reasons = [why for _, why in left_dense(tiny("deepseek_v4")).values() if "Grouped" in why]
    assert reasons == ["DeepseekV4GroupedLinear does not compute x @ W.T + b"] * 2


def test_who_includes_one_by_name_is_told_why_it_stays_dense_and_who_excludes_it_is_not_refused():
    model = tiny("deepseek_v32")
    with pytest.raises(
        InputError,
    ):
        find_matrices(model, include=["indexer"])
    assert find_matrices(model, exclude=["indexer"]).keys() == find_matrices(model).keys()
    reason = r"--include 'indexer' matches only what stays dense, e\.g\. .*indexer\.wq_b \(in a selector of sparse attention"
    with pytest.raises(InputError, match=reason):
        find_matrices(model, include=["indexer"])
    assert find_matrices(model, exclude=["indexer"]).keys() == find_matrices(model).keys()
    with pytest.raises(InputError, match=r"--exclude 'indxer' matches none"):
        find_matrices(model, exclude=["indxer"])


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_selectors_by_another_name_are_reported_and_not_cut_first(sparsity, monkeypatch, tokens, tmp_path, caplog):
    """Resident and streamed alike."""
    monkeypatch.setattr(matrices, "SELECTORS", re.compile("(?!)"))
    save("deepseek_v32", tmp_path / "model")
    still = [name for name in find_matrices(tiny("deepseek_v32")) if "indexer" in name]
    assert len(still) == 6
    settings = {"sparsity": sparsity, "unsupported": "dense"}
    for way in ("resident", "streamed"):
        caplog.clear()
        report = prune(tmp_path / "model", tokens, tmp_path / way, way, **settings)
        assert report.controller.without_gradient == still
        assert f"no gradient reached 6 matrices, e.g. {still[0]}" in caplog.text
        assert all(0.1 < report.matrices[name].sparsity < 0.9 for name in still if name in report.matrices)
    assert same_files(tmp_path / "resident", tmp_path / "streamed")
    assert json.loads((tmp_path / "resident" / "pruning.json").read_text())["controller"]["without_gradient"] == still


class Sign(nn.Module):
    def forward(self, x):
        return x.sign()


@pytest.mark.parametrize("controller", ["feedback", "unipruning"])
def test_what_no_gradient_reaches_is_reported_whatever_its_name(controller, loaded, caplog):
    """Through a sign comes none."""
    model = tiny_model()
    model.model.layers[1].mlp.act_fn = Sign()
    recipe = Recipe(sparsity=0.5, steps=2, text="builtin", windows=8, length=32, controller=controller)
    report = uniprune.prune_in_place(uniprune.Loaded(model, loaded.tokenizer), recipe)
    assert report.controller.without_gradient == ["model.layers.1.mlp.gate_proj"]
    assert "no gradient reached 1 matrices, e.g. model.layers.1.mlp.gate_proj" in caplog.text
    assert 0.1 < report.matrices["model.layers.1.mlp.gate_proj"].sparsity < 0.9
    caplog.clear()
    report = uniprune.prune_in_place(uniprune.Loaded(tiny_model(), loaded.tokenizer), recipe)
    assert report.controller.without_gradient == []
    assert "no gradient" not in caplog.text


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_a_resumed_descent_reports_the_same(way, monkeypatch, tokens, tmp_path):
    monkeypatch.setattr(matrices, "SELECTORS", re.compile("(?!)"))
    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    save("deepseek_v32", tmp_path / "model")
    expected = prune(tmp_path / "model", tokens, tmp_path / "whole", way, steps=3)
    step = Descent.step

    def interrupted(self, *args):
        if len(self.history.loss) == 2:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Descent, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "model", tokens, tmp_path / "out", way, steps=3)
    monkeypatch.setattr(Descent, "step", step)
    recipe = Recipe(sparsity=0.5, steps=3, text=tokens)
    report = uniprune.prune(tmp_path / "model", recipe, tmp_path / "out", execution=way, resume=True)
    assert report.controller == expected.controller
    assert same_files(tmp_path / "out", tmp_path / "whole")
