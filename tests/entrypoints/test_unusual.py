"""Valid checkpoints that few people have: they are pruned as others are, or refused with the reason."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GitConfig, GitForCausalLM

import uniprune
from conftest import tiny_model
from small_models import SMALL, VOCABULARY, save, tiny
from uniprune import Recipe
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError
from uniprune.models import output_head
from uniprune.models.blocks import last_hidden
from uniprune.models.matrices import find_blocks
from uniprune.models.output_head import Head

WAYS = ["resident", "streamed"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(0))
    save_windows(Windows(ids, "random", 16, "none"), file)
    return str(file)


def pruned(model, tokens, folder, way="resident", **settings):
    recipe = Recipe(**{"sparsity": "2:4", "steps": 2, "text": tokens} | settings)
    return uniprune.prune(model, recipe, folder, execution=way, overwrite=True)


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


@pytest.mark.parametrize(("family", "settings"), [("rembert", REMBERT), ("bert", {"is_decoder": True}), ("mpt", {})])
def test_heads_with_layers_before_the_product(family, settings, tokens, tmp_path):
    """RemBERT's has another width, too; MPT's is a product alone."""
    config = AutoConfig.for_model(family, **SMALL, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for way in WAYS:
        report = pruned(tmp_path / "model", tokens, tmp_path / way, way)
        assert report.controller.held_out_loss[0] > 0
    assert same(masks(tmp_path / "streamed"), masks(tmp_path / "resident"))
    near = uniprune.evaluate(tmp_path / "resident", text_source=tokens, windows=2, against=tmp_path / "model", new_tokens=0)
    ids = load_file(tokens)["tokens"].long()[:2]
    dense, sparse = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(ids).logits[:, :-1].double().log_softmax(-1)
        for name in ("model", "resident")
    )
    expected = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert near.closeness.kl == pytest.approx(expected, rel=1e-3, abs=torch.finfo(torch.float32).eps)


def test_the_loss_is_that_of_the_models_own_logits_whatever_its_head_is(tokens, monkeypatch):
    config = AutoConfig.for_model("bert", **SMALL, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = load_file(tokens)["tokens"].long()[:2]
    hidden = last_hidden(model, ids)
    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        logits = model.cls(leaf)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (expected,) = torch.autograd.grad(loss, leaf)
    head = Head(model).fit(model, lambda: model(input_ids=ids), hidden)
    torch.testing.assert_close(head(hidden), logits.detach())
    torch.testing.assert_close(head.next_token(hidden, ids), expected)
    whole = head.next_token(hidden, ids)
    monkeypatch.setattr(output_head, "LOGITS", 3 * VOCABULARY)  # a large vocabulary: few tokens at a time
    assert [piece.stop for piece in head.pieces(7)] == [3, 6, 9]
    torch.testing.assert_close(head.next_token(hidden, ids), whole)
    few = Head(model, ids, 8).fit(model, lambda: model(input_ids=ids), hidden)
    torch.testing.assert_close(few(hidden), logits.detach()[..., few._common])


def test_logits_that_depend_on_more_than_the_last_hidden_states_are_refused_where_they_are_needed(loaded, tokens):
    model = tiny_model(vocab_size=VOCABULARY)

    def shifted(module, args, given, output):
        output.logits.add_(given["input_ids"][..., None])

    model.register_forward_hook(shifted, with_kwargs=True)
    recipe = Recipe(sparsity="2:4", text=tokens, steps=1)
    with pytest.raises(InputError, match=r"are not its output head's for its last hidden states.*--controller none"):
        uniprune.prune_in_place(uniprune.Loaded(model), recipe)
    with pytest.raises(InputError, match=r"are not its output head's.*--tasks alone"):
        uniprune.evaluate(uniprune.Loaded(model), text_source=tokens, windows=2, against=uniprune.Loaded(model), new_tokens=0)
    assert uniprune.prune_in_place(uniprune.Loaded(model), recipe.model_copy(update={"controller": "none", "steps": None}))


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
