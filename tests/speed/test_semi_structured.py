"""Swapping a model's matrices to 2:4 tensors. A CPU has none: here the kernel is a stand-in, and real where there is a GPU."""

import pytest
import torch
from torch import nn

from conftest import tiny_model
from uniprune import to_semi_structured
from uniprune.errors import InputError
from uniprune.models.masking import apply
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.nm import NM
from uniprune.speed.kernels import SEMI_STRUCTURED, SemiStructured
from uniprune.speed.semi_structured import is_two_of_four


def two_of_four(family="llama", names="", **changes):
    """A tiny model whose matrices, or those with a name, are 2:4."""
    model = tiny_model(family, **changes)
    matrices = {name: matrix for name, matrix in find_matrices(model).items() if names in name}
    apply(matrices, NM(2, 4)({name: matrix.weight.abs() for name, matrix in matrices.items()}))
    return model


class Swapped(torch.Tensor):
    """Stands in for a semi-structured tensor."""


@pytest.fixture
def kernel(monkeypatch):
    """Lets the kernel take any matrix."""
    monkeypatch.setattr(SemiStructured, "unsupported", lambda self, shape, dtype, device: None)
    monkeypatch.setattr(SemiStructured, "compress", lambda self, weight: weight.clone().as_subclass(Swapped))


def swapped(model):
    return [name for name, matrix in find_matrices(model).items() if isinstance(matrix.parameter, Swapped)]


@pytest.mark.parametrize(
    ("weights", "holds"),
    [
        ([[1, 2, 0, 0], [0, 0, 0, 0]], True),
        ([[0, 0, 1, 0, 5, 0, 0, 6]], True),
        ([[0, 1, 2, 3]], False),
        ([[0, 0, 1, 2, 3, 0, 4, 5]], False),
    ],
)
def test_two_of_four_by_hand(weights, holds):
    assert is_two_of_four(torch.tensor(weights, dtype=torch.float32)) is holds


def test_a_cpu_is_refused_in_one_line():
    model = two_of_four()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=r"none of 21 matrices .*e\.g\. model\.layers\.0\..*: 2:4 products need a CUDA GPU"):
        to_semi_structured(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_dense_model_is_refused(kernel):
    with pytest.raises(InputError, match="its weights are not 2:4; prune with --sparsity 2:4"):
        to_semi_structured(tiny_model())


def test_what_is_2_4_is_swapped_and_the_rest_is_named(kernel):
    model, tokens = two_of_four(names="mlp"), torch.arange(8)[None]
    before = model(tokens).logits
    left = to_semi_structured(model)
    assert set(swapped(model)) == {name for name in find_matrices(model) if "mlp" in name}
    assert left.keys() == {name for name in find_matrices(model) if "mlp" not in name}
    assert set(left.values()) == {"its weights are not 2:4; prune with --sparsity 2:4"}
    assert torch.equal(model(tokens).logits, before)


def test_transposed_matrices_are_left(kernel):
    with pytest.raises(InputError, match="it is stored transposed"):
        to_semi_structured(two_of_four("gpt2"))


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_kernel_that_does_not_work_leaves_the_model_as_it_is(kernel, monkeypatch, fault):
    def compress(self, weight):
        if fault == "raises":
            raise RuntimeError("no kernel image\nis available")
        return weight * 2

    monkeypatch.setattr(SemiStructured, "compress", compress)
    model = two_of_four()
    with pytest.raises(InputError, match=r"2:4 products do not work on this GPU: (no kernel image$|the product is wrong)"):
        to_semi_structured(model)
    assert swapped(model) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu():
    device = torch.device("cuda")
    if SEMI_STRUCTURED.unsupported((64, 128), torch.bfloat16, device):
        pytest.skip("this GPU has no sparse tensor cores")
    model = two_of_four(hidden_size=256, intermediate_size=512, num_key_value_heads=4).to(device, torch.bfloat16)
    tokens = torch.arange(16, device=device)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        assert to_semi_structured(model) == {}
        torch.testing.assert_close(model(tokens).logits, before, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match="semi-structured already"):
        to_semi_structured(model)


def test_swapped_weights_ask_for_no_gradient(kernel):
    model = two_of_four()
    to_semi_structured(model)
    weights = [matrix.parameter for matrix in find_matrices(model).values()]
    assert all(isinstance(weight, nn.Parameter) and not weight.requires_grad for weight in weights)
