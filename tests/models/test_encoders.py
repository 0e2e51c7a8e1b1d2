"""Encoders, whose tokens see those that follow, are said to be some: they predict no next token."""

import json

import pytest
import torch
from test_selectors import prune, tokens  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

import catalogue
import uniprune
from conftest import VOCABULARY, tiny_model
from small_models import FAMILIES, SMALL, save
from uniprune import Recipe
from uniprune.errors import InputError
from uniprune.models.blocks import forked, last_hidden

LOCAL = {"controller": "none", "steps": None}


def encoder(kind, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | settings))
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm-roberta"])
def test_an_encoder_is_refused_where_a_next_token_is_needed(kind, tokens, tmp_path):  # noqa: F811
    encoder(kind).save_pretrained(tmp_path / "model")
    reason = r"LM\w* is an encoder: without a causal mask \(is_decoder in config\.json is false\) each token sees"
    with pytest.raises(InputError, match=rf"{reason} .*--controller none"):
        uniprune.plan(tmp_path / "model", Recipe(sparsity="2:4"))
    for way in ("resident", "streamed"):
        with pytest.raises(InputError, match=rf"{reason} .*--controller none"):
            prune(tmp_path / "model", tokens, tmp_path / "out", way)
        assert prune(tmp_path / "model", tokens, tmp_path / "out", way, **LOCAL).sparsity == 0.5
    with pytest.raises(InputError, match=reason):
        uniprune.evaluate(tmp_path / "out", text_source=tokens, windows=2)
    encoder(kind, is_decoder=True).save_pretrained(tmp_path / "model")  # a remedy that works
    prune(tmp_path / "model", tokens, tmp_path / "out")
    assert uniprune.evaluate(tmp_path / "out", text_source=tokens, windows=2).perplexity


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, whose head predicts no"),
        ({"architectures": ["LlamaForRewardModel"]}, "is a LlamaForRewardModel, whose head predicts no tokens"),
        ({"is_causal": False}, "LlamaForCausalLM is an encoder: its configuration lets each token see those that follow"),
    ],
)
def test_tied_embeddings_do_not_make_it_a_language_model(settings, reason, tokens, tmp_path):  # noqa: F811
    """Of classifiers and embedding models without them, the head's weights are missing, which is refused elsewhere."""
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(InputError, match=rf"{reason}.*--controller none"):
        prune(tmp_path / "model", tokens, tmp_path / "out")
    with pytest.raises(InputError, match=reason):
        uniprune.evaluate(tmp_path / "model", text_source=tokens, windows=2)
    assert prune(tmp_path / "model", tokens, tmp_path / "out", **LOCAL).sparsity == 0.5


def test_an_embedding_model_of_gemma_is_an_encoder(tokens, tmp_path):  # noqa: F811
    save("gemma3_text", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_bidirectional_attention": True}))
    with pytest.raises(InputError, match="is an encoder: its configuration lets each token see those that follow"):
        prune(tmp_path / "model", tokens, tmp_path / "out")


@pytest.mark.parametrize(
    "settings", [{"architectures": ["RewardModelingLlamaForCausalLM"]}, {"use_bidirectional_attention": True}]
)
def test_what_only_sounds_like_it_is_a_language_model(settings, tokens, tmp_path):  # noqa: F811
    """No class of transformers but Gemma's heeds the latter."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert prune(tmp_path / "model", tokens, tmp_path / "out").sparsity == 0.5
    model.config.architectures = ["LlamaForSequenceClassification"]  # what it was made from, perhaps
    uniprune.prune_in_place(uniprune.Loaded(model, None), Recipe(sparsity="2:4", text=str(tokens), steps=1))


def test_a_decoder_that_does_not_say_so_of_its_blocks_is_none():
    assert AutoConfig.for_model("gpt_neox").is_decoder is False
    assert FAMILIES["gpt_neox"] == {}  # and tests of all families prune it


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_tokens_that_see_those_that_follow_are_noticed_whatever_the_configuration_says(way, tokens, tmp_path, caplog):  # noqa: F811
    """XLNet says nothing of the kind."""
    catalogue.saved("xlnet", tmp_path)
    prune(tmp_path / "model", tokens, tmp_path / "out", way)
    assert "tokens of XLNetLMHeadModel see those that follow" in caplog.text


@pytest.mark.parametrize("way", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mamba2", "gpt2"])
def test_nothing_is_said_of_causal_models(family, dtype, way, tokens, tmp_path, caplog):  # noqa: F811
    save(family, tmp_path / "model")
    prune(tmp_path / "model", tokens, tmp_path / "out", way, dtype=dtype, steps=1)
    assert "see those that follow" not in caplog.text


def test_forked_tokens_differ_in_the_last_one_alone():
    model = tiny_model()
    rows = forked(torch.tensor([3, 4, 4, 4]))
    assert rows.tolist() == [[3, 4, 4, 4], [3, 4, 4, 3]]
    hidden = last_hidden(model, rows)
    assert torch.equal(hidden[0, :-1], hidden[1, :-1])
    assert not torch.equal(hidden[0, -1], hidden[1, -1])
    assert int(rows.max()) < VOCABULARY
    assert forked(torch.tensor([3, 3])).tolist() == [[3, 3], [3, 3]]
