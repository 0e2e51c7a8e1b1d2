"""What transformers leaves out of a GGUF file: put back, or refused; never another model without a word."""

import json

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import uniprune
from conftest import tiny_model, write_gguf
from uniprune import Recipe
from uniprune.errors import InputError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
RECIPE = Recipe(sparsity="2:4", metric="magnitude", controller="none", windows=2, length=16)


def scaled(rope):
    return tiny_model(rope_parameters={"rope_theta": 500_000.0, **rope}, max_position_embeddings=1 << 17)


def factors(model):
    """As llama.cpp's converter writes them: what each frequency is divided by."""
    theta = model.config.rope_parameters["rope_theta"]
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0].double().numpy()
    usual = theta ** -(np.arange(len(frequencies)) / len(frequencies))
    return (usual / frequencies).astype(np.float32)


def as_llama3(writer, model):
    writer.add_rope_freq_base(500_000.0)
    writer.add_tensor("rope_freqs.weight", factors(model))


def as_linear(writer, model):
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_scaling_type(_types().LINEAR)
    writer.add_rope_scaling_factor(8.0)


def as_older_linear(writer, model):
    writer.add_rope_freq_base(500_000.0)
    writer.add_float32("llama.rope.scale_linear", 8.0)


def as_yarn(writer, model):
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_scaling_type(_types().YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)
    writer.add_rope_scaling_attn_factors(1.0)


def _types():
    return pytest.importorskip("gguf").RopeScalingType


@pytest.mark.parametrize(
    ("rope", "more"), [(LLAMA3, as_llama3), (LINEAR, as_linear), (LINEAR, as_older_linear), (YARN, as_yarn)]
)
def test_positions_are_scaled_as_the_file_says(tokenizer, tmp_path, rope, more):
    model = scaled(rope)
    file = write_gguf(model, tokenizer, tmp_path / "m.gguf", more=lambda writer: more(writer, model))
    loaded = uniprune.load(str(file))
    ids = torch.randint(0, model.config.vocab_size, (1, 250), generator=torch.Generator().manual_seed(0))
    places = 100 * torch.arange(250)[None]
    with torch.no_grad():
        expected, found = (one(input_ids=ids, position_ids=places).logits.log_softmax(-1) for one in (model, loaded.model))
        plain = tiny_model(rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"}, max_position_embeddings=1 << 17)
        unscaled = plain(input_ids=ids, position_ids=places).logits.log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert (unscaled - expected).abs().max() > 1e-3  # as it was read before
    uniprune.prune(str(file), RECIPE, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert written == {"rope_theta": 500_000.0, **rope}


def odd_factors(writer):
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 7, 8, dtype=np.float32))


def long_factors(writer):
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        writer.add_tensor(name, np.ones(8, dtype=np.float32))


def tempered_yarn(writer):
    as_yarn(writer, None)
    writer.add_rope_scaling_attn_factors(0.7)


def biased(writer):
    for name in "qkv":
        writer.add_tensor(f"blk.0.attn_{name}.bias", np.ones(64, dtype=np.float32))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (odd_factors, "scales its positions in a way that is lost when it is read .factors of its own."),
        (long_factors, "scales its positions in a way that is lost"),
        (tempered_yarn, "scales its positions in a way that is lost when it is read .yarn."),
        (biased, "has 3 biases, and what transformers makes of it 0: it would be another model"),
    ],
)
def test_what_cannot_be_put_back_is_refused(tokenizer, tmp_path, more, message):
    file = write_gguf(tiny_model(), tokenizer, tmp_path / "m.gguf", more=more)
    for refused in (
        lambda: uniprune.load(str(file)),
        lambda: uniprune.plan(str(file), RECIPE),
        lambda: uniprune.prune(str(file), RECIPE, tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    assert not (tmp_path / "out").exists()
