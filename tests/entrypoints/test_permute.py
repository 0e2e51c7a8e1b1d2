"""The command permute, end to end: the same dense model, in an order that N:M keeps more of."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import uniprune
from conftest import tiny_model
from small_models import tiny
from uniprune import Loaded, Recipe
from uniprune.entrypoints import permute as permute_module
from uniprune.errors import InputError
from uniprune.models.channels.folding import Channels
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.views import View

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
    assert report.permuted.keys() == find_matrices(tiny_model()).keys()
    gains = {name: gain.kept_after - gain.kept_before for name, gain in report.permuted.items()}
    assert all(gain > 0 for name, gain in gains.items() if name.endswith(("down_proj", "o_proj")))
    assert sum(gains.values()) > 0
    before = logits(folder)
    torch.testing.assert_close(logits(out), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert {file.name for file in folder.iterdir()} | {"pruning.json", "README.md"} == {file.name for file in out.iterdir()}


def test_no_disk_is_asked_for_masks(folder, tmp_path, monkeypatch):
    """None are written."""
    asked = []
    monkeypatch.setattr("uniprune.storage.files.check_disk_space", lambda path, size, held=0: asked.append(size))
    uniprune.permute(str(folder), RECIPE, tmp_path / "out")
    assert set(asked) == {sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))}


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
    with pytest.raises(InputError, match="has channels in another order and no zeros; prune it"):
        uniprune.report([tmp_path / "out"], tmp_path / "page.html")


def test_same_seed_same_bytes_and_an_output_is_not_overwritten(folder, tmp_path):
    for name in ("first", "again"):
        uniprune.permute(str(folder), RECIPE, tmp_path / name)
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        uniprune.permute(str(folder), RECIPE, tmp_path / "first")
    uniprune.permute(str(folder), RECIPE, tmp_path / "first", overwrite=True)


def test_what_cannot_be_reordered_is_refused_before_anything_is_written(folder, tokenizer, tmp_path):
    with pytest.raises(InputError, match="N:M patterns only"):
        uniprune.permute(str(folder), Recipe(sparsity="0.5"), tmp_path / "out")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")  # its values lie beside queries and keys
    tokenizer.save_pretrained(tmp_path / "gpt2")
    values = RECIPE.model_copy(update={"include": (r"attn\.c_proj",)})
    with pytest.raises(InputError, match="could be proved"):
        uniprune.permute(str(tmp_path / "gpt2"), values, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_has_more_than_the_model_loads_keeps_its_residual_stream(folder, tmp_path):
    """Say, a head that predicts a second token: other programs would run it on a stream in another order."""
    shutil.copytree(folder, tmp_path / "more")
    save_file({"mtp.weight": torch.ones(8, 32)}, tmp_path / "more" / "model-mtp.safetensors", {"format": "pt"})
    index = tmp_path / "more" / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    facts["weight_map"]["mtp.weight"] = "model-mtp.safetensors"
    index.write_text(json.dumps(facts))
    report = uniprune.permute(str(tmp_path / "more"), RECIPE, tmp_path / "out")
    assert {name.rpartition(".")[2] for name in report.permuted} == {"down_proj", "o_proj"}


def test_tied_embeddings_that_are_stored_twice_stay_tied(tokenizer, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    uniprune.permute(str(tmp_path / "tied"), RECIPE, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    before = logits(tmp_path / "tied")
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_a_model_whose_blocks_cannot_be_run_one_by_one_has_its_mlps_reordered(tokenizer, tmp_path):
    shared = {"num_kv_shared_layers": 1, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    model = tiny("gemma3n_text", **shared, vocab_size=len(tokenizer), vocab_size_per_layer_input=len(tokenizer)).eval()
    report = uniprune.permute(Loaded(model, tokenizer), RECIPE, tmp_path / "out")
    assert {name.rpartition(".")[2] for name in report.permuted} == {"down_proj", "linear_right"}


def test_the_order_of_the_stream_is_searched_for_on_a_sample(monkeypatch):
    scores = {name: torch.rand(rows, 8) * scale for name, rows, scale in (("a", 40, 1), ("b", 20, 100))}
    saliency = View(scores)
    channels = Channels(("a", "b"), 8, ())
    every = permute_module.rows(channels, saliency, seed=0)
    assert every.shape == (60, 8)
    assert every[:40].mean() == pytest.approx(1) == every[40:].mean()
    monkeypatch.setattr(permute_module, "SAMPLE", 240)
    some = permute_module.rows(channels, saliency, seed=0)
    assert some.shape == (30, 8)
    assert {tuple(row) for row in some[:20].tolist()} < {tuple(row) for row in every[:40].tolist()}
