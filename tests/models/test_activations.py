"""What autograd is said to keep of a pass, against what it keeps."""

import pytest
import torch

import catalogue
from conftest import kept_bytes
from small_models import Looped, kind_of, tiny
from uniprune.models import activations
from uniprune.models.matrices import find_blocks, find_matrices

BF16 = torch.bfloat16
KINDS = ["llama", "gpt_oss", "mamba2", "qwen3_next", "deepseek_v3", "hy_v4", "gemma3n_text", "recurrent_gemma"]
WIDE = {"hidden_size": 128, "intermediate_size": 256}
AS_WIDE = ("mamba2", "gemma3n_text")  # whose other sizes go with the width


def small(kind):
    config = catalogue.small(kind, **({} if kind in AS_WIDE else WIDE))
    torch.manual_seed(0)
    return kind_of(config).from_config(config, dtype=BF16).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_what_is_kept(kind):
    """Attention without a kernel, several residual streams, states of linear attention, experts: within a quarter."""
    model = small(kind)
    counted = activations.count(model, find_matrices(model), BF16, 256)
    ids = torch.randint(0, catalogue.VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(0))
    assert sum(counted.kept) == pytest.approx(kept_bytes(model, ids), rel=0.25)
    assert len(counted.kept) == len(find_blocks(model)[1])


def test_a_model_without_weights_is_counted_as_one_with_them():
    model = small("gpt_oss")
    expected = activations.count(model, find_matrices(model), BF16, 64)
    model.to("meta")
    assert activations.count(model, find_matrices(model), BF16, 64) == expected
    assert all(parameter.is_meta for parameter in model.parameters())


def test_dropout_is_not_counted():
    """Runs have none; and PyTorch's attention with dropout keeps all its weights."""
    model = tiny("gpt2")
    expected = activations.count(model.eval(), find_matrices(model), BF16, 64)
    assert model.config.attn_pdrop > 0
    assert activations.count(model.train(), find_matrices(model), BF16, 64) == expected
    assert model.training


def test_attention_that_is_kept_grows_with_the_square_of_the_length():
    model = small("gpt_oss")
    matrices = find_matrices(model)
    found = {length: sum(activations.count(model, matrices, BF16, length).kept) for length in (128, 256, 512, 2048)}
    linear = found[256] - (square := 2 * (found[512] - 2 * found[256]) / 4)  # in units of 256 tokens
    assert found[2048] == pytest.approx(8 * linear + 64 * square, rel=0.01)
    assert found[2048] > 5 * found[512]


def test_a_block_that_is_passed_twice_is_counted_twice():
    model = tiny("llama")
    once = activations.count(model, find_matrices(model), BF16, 32)
    model.model.layers = Looped(model.model.layers)
    assert activations.count(model, find_matrices(model), BF16, 32).kept == once.kept * 2


def test_of_passes_that_ask_what_tokens_are_nothing_is_known():
    model = small("dbrx")
    assert activations.count(model, find_matrices(model), BF16, 32) is None
