"""Discovery by structure, on tiny random models of many real families."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from conftest import tiny_model
from uniprune.errors import InputError
from uniprune.matrices import check_finite, find_blocks, find_matrices

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {  # family: matrices per block
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3_text": 7,
    "phi3": 4,
    "olmo2": 7,
    "stablelm": 7,
    "cohere": 7,
    "granite": 7,
    "opt": 6,
    "gpt_neox": 4,
    "bloom": 4,
    "gpt2": 4,
}
SPECIAL = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def family_model(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | SPECIAL.get(family, {})))
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_by_structure(family):
    matrices = find_matrices(family_model(family))
    assert len(matrices) == 2 * FAMILIES[family]
    assert {matrix.block for matrix in matrices.values()} == {0, 1}


def test_conv1d_is_seen_as_out_by_in():
    matrices = find_matrices(family_model("gpt2"))
    fc = matrices["transformer.h.0.mlp.c_fc"]
    assert fc.transposed
    assert fc.shape == tuple(fc.weight.shape) == (128, 32)
    assert tuple(fc.parameter.shape) == (32, 128)


def test_include_and_exclude():
    model = tiny_model()
    assert len(find_matrices(model)) == 21
    assert len(find_matrices(model, include=["mlp"])) == 9
    assert len(find_matrices(model, include=["mlp"], exclude=["down_proj"])) == 6
    assert len(find_matrices(model, exclude=[r"layers\.0\."])) == 14
    for wrong in ({"include": ["mpl"]}, {"exclude": ["mpl"]}):
        with pytest.raises(InputError, match=r"'mpl' matches none of the 21 matrices, e\.g\. model\.layers\.0"):
            find_matrices(model, **wrong)
    with pytest.raises(InputError, match="not a regular expression"):
        find_matrices(model, include=["("])
    with pytest.raises(InputError, match="leave no matrix"):
        find_matrices(model, include=["mlp"], exclude=["mlp"])


def test_a_tied_weight_is_listed_once():
    model = tiny_model()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    matrices = find_matrices(model)
    assert len(matrices) == 20
    assert "model.layers.1.mlp.up_proj" not in matrices


def test_encoder_decoder_is_ambiguous():
    config = AutoConfig.for_model("t5", d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=64)
    with pytest.raises(InputError, match=r"several lists of blocks.*encoder\.block"):
        find_blocks(AutoModelForSeq2SeqLM.from_config(config))


def test_no_blocks_lists_what_there_is():
    with pytest.raises(InputError, match=r"no list of decoder blocks.*0 \(Linear\)"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_unknown_weights_in_the_blocks_are_an_error():
    """Weights that are no matrices of a known kind: leaving them dense in silence would be a lie about the sparsity."""
    model = tiny_model()
    model.model.layers[1].mlp.experts = nn.ParameterList([nn.Parameter(torch.zeros(4, 64, 32))])
    with pytest.raises(InputError, match=r"under 90%.*layers\.1\.mlp\.experts\.0 \(4, 64, 32\)"):
        find_matrices(model)


def test_nan_weights_are_refused_by_name():
    model = tiny_model()
    matrices = find_matrices(model)
    check_finite(matrices)
    matrices["model.layers.1.mlp.up_proj"].parameter[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: the weights contain NaN"):
        check_finite(matrices)
