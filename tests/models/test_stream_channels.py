"""Values within their heads and the residual stream: the dense function stays, and what is not clear is left alone."""

import pytest
import torch
from torch import nn

from small_models import random_model
from uniprune.errors import InputError
from uniprune.models.channels.folding import Axis, Channels, fold, folding
from uniprune.models.channels.heads import find_heads
from uniprune.models.channels.hidden import find_hidden
from uniprune.models.channels.stream import find_stream
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.models.replay.replay import Replay

TOKENS = torch.arange(40).reshape(2, 20)
PROBE = TOKENS[:1, :16]
READERS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
FAMILIES = {  # family: heads of values and queries for each, if values may move; what reads the residual stream, if that may
    "llama": ((2, 2), READERS),
    "qwen2": ((2, 2), READERS),  # biases at q, k, v
    "gemma2": ((2, 2), READERS),  # norms before what is added to the stream
    "olmo2": ((2, 2), READERS),  # norms of queries as wide as the stream
    "opt": ((4, 1), {"q_proj", "k_proj", "v_proj", "fc1"}),  # learned positions, biases, LayerNorms
    "gpt2": (None, {"c_attn", "c_fc"}),  # weights stored as [in, out]; values beside queries and keys
    "gpt_neox": (None, {"query_key_value", "dense_h_to_4h"}),  # attention and MLP side by side
    "phi3": (None, {"qkv_proj", "gate_up_proj"}),
    "bloom": (None, {"query_key_value", "dense_h_to_4h"}),  # a norm after the embeddings
    "bamba": ((2, 2), {"in_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),  # blocks of two kinds
    "deepseek_v3": (None, None),  # experts
    "mixtral": ((2, 2), None),
    "lfm2": ((2, 2), None),  # a convolution as wide as the stream
}


def found_in(model, exclude=()):
    consumers = find_matrices(model, exclude=exclude).keys()
    replay = Replay.probed(model, find_blocks(model)[1], PROBE)
    hidden = {name for channels in find_hidden(model, find_matrices(model)) for name in channels.consumers}
    heads = find_heads(model, consumers - hidden, replay, PROBE)
    return heads, find_stream(model, consumers - hidden, replay, PROBE)


def shuffled(channels):
    generator = torch.Generator().manual_seed(1)
    size = channels.size // channels.groups
    return torch.cat([torch.randperm(size, generator=generator) + group * size for group in range(channels.groups)])


def unchanged(model, *found):
    before = model(input_ids=TOKENS).logits.detach()
    fold(model, [(channels, shuffled(channels)) for channels in found])
    return torch.allclose(model(input_ids=TOKENS).logits, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_function_stays(family):
    model = random_model(family)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    heads, residual = found_in(model)
    layout, readers = FAMILIES[family]
    assert {(channels.groups, channels.repeats) for channels in heads} == ({layout} if layout else set())
    assert (residual and {name.rpartition(".")[2] for name in residual.consumers}) == readers
    assert {name for name, weight in weights.items() if not torch.equal(weight, model.get_parameter(name))} == set()
    assert unchanged(model, *heads, *([residual] if residual else []))
    moved = {name for name, weight in weights.items() if not torch.equal(weight, model.get_parameter(name))}
    assert moved == {axis.parameter for channels in (*heads, *([residual] if residual else [])) for axis in channels.axes}


def test_both_axes_of_one_weight_may_move():
    heads, residual = found_in(random_model("llama"))
    names = [axis.parameter for channels in (*heads, residual) for axis in channels.axes]
    both = {name.split(".", 3)[3] for name in names if names.count(name) == 2}
    assert both == {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


def test_excluded_matrices_go_along_and_are_not_grouped():
    heads, residual = found_in(random_model("llama"), exclude=["o_proj", r"layers\.0\."])
    assert heads == []
    assert {name.split(".")[2] for name in residual.consumers} == {"1"}
    assert "model.layers.0.self_attn.q_proj.weight" in {axis.parameter for axis in residual.axes}
    assert found_in(random_model("llama"), exclude=sorted(READERS))[1] is None


def test_a_square_model_with_tied_embeddings():
    """By shape alone, rows and columns of q, k, v and o could be either."""
    model = random_model("llama", intermediate_size=32, num_key_value_heads=4, tie_word_embeddings=True)
    heads, residual = found_in(model)
    assert len(heads) == 2
    assert len([axis for axis in residual.axes if axis.parameter == "model.embed_tokens.weight"]) == 1
    assert not any("lm_head" in axis.parameter for axis in residual.axes)
    assert {name.rpartition(".")[2] for name in residual.consumers} == READERS
    assert unchanged(model, *heads, residual)


class Twisted(nn.Module):
    """Adds to each channel of the stream what depends on its place."""

    def forward(self, hidden):
        return hidden * torch.linspace(0.5, 1.5, hidden.shape[-1], dtype=hidden.dtype)


def test_what_depends_on_a_channels_place_is_left():
    model = random_model("llama")
    model.model.layers[1].post_attention_layernorm = Twisted()
    assert found_in(model)[1] is None
    model = random_model("llama")
    model.model.norm = Twisted()
    assert found_in(model)[1] is None


def test_a_part_of_the_model_that_text_does_not_go_through_is_not_left_behind():
    model = random_model("llama")
    model.model.projector = nn.Linear(16, 32)
    assert found_in(model)[1] is None
    model.model.projector = nn.Linear(16, 24)
    assert found_in(model)[1] is not None


def test_blocks_alike_but_for_their_shapes_are_tried_each():
    model = random_model("llama")
    model.model.layers[1].self_attn.v_proj = nn.Linear(32, 16, bias=True).requires_grad_(False)
    heads, residual = found_in(model)
    assert [len(channels.axes) for channels in heads] == [2, 3]
    assert unchanged(model, *heads, residual)


def test_weights_that_several_modules_share_keep_their_heads():
    model = random_model("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.weight = first.v_proj.weight
    heads, residual = found_in(model)
    assert heads == []
    assert unchanged(model, residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_proved_within_its_rounding(dtype):
    model = random_model("llama").to(dtype)
    assert found_in(model)[1] is not None
    model.model.norm = Twisted()
    assert found_in(model)[1] is None


def test_an_order_keeps_channels_in_their_group():
    channels = Channels(("o",), 8, (Axis("v", 0, 2), Axis("o", 1, 2, 2)), 2, 2)
    order = torch.tensor([1, 0, 2, 3, 7, 6, 5, 4])
    moves = dict(folding(channels, order))
    assert moves["v"].order.tolist() == order.tolist()
    assert moves["o"].order.tolist() == [1, 0, 2, 3, 5, 4, 6, 7, 11, 10, 9, 8, 15, 14, 13, 12]
    assert channels.inputs(order).tolist() == moves["o"].order.tolist()
    scores = torch.arange(32.0).reshape(2, 16)
    assert torch.equal(channels.rows(scores)[:, order], channels.rows(scores[:, channels.inputs(order)]))
    with pytest.raises(InputError, match="each in its group of 4"):
        folding(channels, torch.tensor([4, 0, 2, 3, 1, 5, 6, 7]))
