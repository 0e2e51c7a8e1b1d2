"""Valid checkpoints that few people have: they are pruned as others are, or refused with the reason."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GitConfig, GitForCausalLM

import uniprune
from conftest import tiny_model
from small_models import SMALL, VOCABULARY, save, tiny
from uniprune import Recipe
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import UniPruneError
from uniprune.models.matrices import find_blocks

WAYS = ["resident", "streamed"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(0))
    save_windows(Windows(ids, "random", 16, "none"), file)
    return str(file)


def pruned(model, tokens, folder, way="resident", **settings):
    with mock.patch("uniprune.job.prepare.choose", return_value=way):
        return uniprune.prune(
            model, Recipe(**{"sparsity": "2:4", "steps": 2, "text": tokens} | settings), folder, overwrite=True
        )


def masks(folder):
    return load_file(folder / "pruning" / "masks.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


FLAGS = {
    "output_router_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_cache": False,
}


@pytest.mark.parametrize("flags", [{"output_router_logits": True}, FLAGS], ids=["one", "all"])
def test_flags_that_change_what_a_forward_pass_returns_change_nothing_else(flags, tokens, tmp_path):
    save("mixtral", tmp_path / "model")
    pruned(tmp_path / "model", tokens, tmp_path / "expected", steps=1)
    config = tmp_path / "model" / "config.json"
    facts = json.loads(config.read_text()) | flags
    config.write_text(json.dumps(facts))
    for way in WAYS:
        pruned(tmp_path / "model", tokens, tmp_path / "out", way, steps=1)
        assert same(masks(tmp_path / "out"), masks(tmp_path / "expected"))
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == facts
    assert uniprune.evaluate(tmp_path / "model", text_source=tokens, windows=2).perplexity


def test_flags_of_the_text_part_of_a_configuration_are_set_aside_too(tokens, tmp_path):
    save("qwen3_5_moe", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    facts = json.loads(config.read_text())
    facts["text_config"]["output_router_logits"] = True
    config.write_text(json.dumps(facts))
    for way in WAYS:
        pruned(tmp_path / "model", tokens, tmp_path / way, way)
    assert same(masks(tmp_path / "streamed"), masks(tmp_path / "resident"))


@pytest.mark.parametrize("settings", [{}, {"controller": "none", "refine": True}], ids=str)
def test_a_checkpoint_in_float64_has_the_masks_of_its_float32_twin(settings, tokens, tmp_path):
    tiny_model(vocab_size=VOCABULARY).save_pretrained(tmp_path / "float32")
    tiny_model(vocab_size=VOCABULARY).double().save_pretrained(tmp_path / "float64")
    pruned(tmp_path / "float32", tokens, tmp_path / "expected", **settings)
    dense = load_file(tmp_path / "float64" / "model.safetensors")
    for way in WAYS:
        pruned(tmp_path / "float64", tokens, tmp_path / "out", way, **settings)
        assert same(masks(tmp_path / "out"), masks(tmp_path / "expected"))
        for key, weight in load_file(tmp_path / "out" / "model.safetensors").items():
            assert weight.dtype == torch.float64
            assert torch.equal(weight, torch.where(weight == 0, 0, dense[key]))


REMBERT = {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 48}


def test_logits_that_are_no_product_of_the_last_hidden_states_are_refused_where_they_are_needed(tokens, tmp_path):
    """RemBERT's head has another width, and layers before it."""
    config = AutoConfig.for_model("rembert", **SMALL, **REMBERT)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for way in WAYS:
        with pytest.raises(UniPruneError, match=r"not its output head times its last hidden states.*--controller none"):
            pruned(tmp_path / "model", tokens, tmp_path / "out", way)
        pruned(tmp_path / "model", tokens, tmp_path / way, way, controller="none")
    assert same(masks(tmp_path / "streamed"), masks(tmp_path / "resident"))
    with pytest.raises(UniPruneError, match=r"not its output head.*--tasks alone"):
        uniprune.evaluate(tmp_path / "model", text_source=tokens, windows=2, against=tmp_path / "resident", new_tokens=0)
    assert uniprune.evaluate(tmp_path / "resident", text_source=tokens, windows=2).perplexity


def test_blocks_that_return_lists(tokens, tmp_path):
    """GPT-1's."""
    save("openai-gpt", tmp_path / "model")
    for way in WAYS:
        pruned(tmp_path / "model", tokens, tmp_path / way, way)
    assert same(masks(tmp_path / "streamed"), masks(tmp_path / "resident"))


def test_the_blocks_are_those_of_the_text_decoder_however_large_an_encoder_of_images_is():
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    git = GitForCausalLM(GitConfig(**SMALL, vision_config=vision | {"image_size": 28, "patch_size": 14}))
    assert find_blocks(git)[0] == "git.encoder.layer"
    for family in ("qwen3_5", "llama4"):  # of which the text model is loaded
        assert find_blocks(tiny(family))[0] == "model.layers"
