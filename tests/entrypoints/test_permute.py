"""The command permute, end to end: the same dense model, in an order that N:M keeps more of."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import uniprune
from conftest import tiny_model
from uniprune import Loaded, Recipe
from uniprune.errors import InputError

RECIPE = Recipe(sparsity="1:4", windows=8, length=32)
TOKENS = torch.arange(40).reshape(2, 20)


@torch.no_grad()
def logits(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=TOKENS).logits


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_the_dense_model_is_the_same_and_the_pattern_keeps_more(folder, tmp_path, streamed):
    out = tmp_path / "out"
    local = RECIPE.model_copy(update={"controller": "none"})
    memory = uniprune.plan(str(folder), local).executions["streamed"].memory if streamed else None
    report = uniprune.permute(str(folder), RECIPE, out, max_memory=memory)
    assert json.loads((out / "pruning.json").read_text()) == json.loads(json.dumps(report.record()))
    assert set(report.permuted) == {f"model.layers.{index}.mlp.down_proj" for index in range(3)}
    for gain in report.permuted.values():
        assert gain.kept_after > gain.kept_before
    before = logits(folder)
    torch.testing.assert_close(logits(out), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert {file.name for file in folder.iterdir()} | {"pruning.json", "README.md"} == {file.name for file in out.iterdir()}


def test_its_output_is_pruned_like_any_model_and_has_masks_of_its_own(folder, tmp_path):
    uniprune.permute(str(folder), RECIPE, tmp_path / "permuted")
    scores, masks = tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    uniprune.calibrate(str(tmp_path / "permuted"), Recipe(controller="none", windows=8, length=32), scores)
    uniprune.mask(scores, "2:4", masks)
    assert uniprune.apply(tmp_path / "permuted", masks, tmp_path / "pruned").sparsity == 0.5
    with pytest.raises(uniprune.MismatchError, match="another model"):
        uniprune.apply(folder, masks, tmp_path / "refused")


def test_its_output_is_no_finished_run_of_prune(folder, tmp_path):
    recipe = Recipe(sparsity="1:4", windows=8, length=32, controller="none")
    uniprune.permute(str(folder), recipe, tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        uniprune.prune(str(folder), recipe, tmp_path / "out", resume=True)


def test_a_model_in_memory_is_reordered_and_saved(tokenizer, tmp_path):
    model = tiny_model()
    expected = tiny_model()(input_ids=TOKENS).logits.detach()
    uniprune.permute(Loaded(model, tokenizer), RECIPE, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    weight = model.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(weight, tiny_model().model.layers[0].mlp.down_proj.weight)


def test_same_seed_same_bytes_and_an_output_is_not_overwritten(folder, tmp_path):
    for name in ("first", "again"):
        uniprune.permute(str(folder), RECIPE, tmp_path / name)
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        uniprune.permute(str(folder), RECIPE, tmp_path / "first")
    uniprune.permute(str(folder), RECIPE, tmp_path / "first", overwrite=True)


def test_what_cannot_be_reordered_is_refused_before_anything_is_written(folder, tmp_path):
    with pytest.raises(InputError, match="N:M patterns only"):
        uniprune.permute(str(folder), Recipe(sparsity="0.5"), tmp_path / "out")
    with pytest.raises(InputError, match="could be proved"):
        uniprune.permute(str(folder), RECIPE.model_copy(update={"exclude": ("down_proj",)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
