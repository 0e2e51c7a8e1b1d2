"""Sparse products: each is the dense product, of the masks it says it takes, where it says it does."""

import warnings

import pytest
import torch

from uniprune.errors import InputError
from uniprune.speed.kernels import BITMASK, BSR, CSR, DENSE, SEMI_STRUCTURED, SPARSE, check_product

CUDA = torch.device("cuda")


@pytest.mark.parametrize("kernel", [DENSE, CSR(), BSR(), BITMASK], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_products_are_sums_over_inputs(kernel, batch, request):
    if kernel is BITMASK:
        request.getfixturevalue("compiled")
    torch.manual_seed(0)
    pattern = kernel.patterns([0.5])[-1]
    weight, tokens = torch.randn(32, 64), torch.randn(batch, 64)
    weight *= dict(pattern({"w": torch.rand(32, 64)}))["w"]
    assert float((weight == 0).float().mean()) == pattern.sparsity
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that sparse tensors are in beta is no news to users
        found = kernel.multiply(kernel.compress(weight), tokens)
    expected = torch.stack([(weight.double() * token.double()).sum(1) for token in tokens])
    torch.testing.assert_close(found, expected.float())


def test_each_kernel_has_a_kind_of_mask_and_takes_the_levels_that_it_can():
    kinds = ["any mask", "2:4", "unstructured", "1x16 tiles", "16x1 tiles", "16x16 tiles"]
    assert [kernel.kind for kernel in SPARSE] == kinds
    sparsities = [[pattern.sparsity for pattern in kernel.patterns([0.6, 0.9])] for kernel in SPARSE]
    assert sparsities == [[0.6, 0.9], [0.5], *[[0.6, 0.9]] * 4]


def test_tiles_are_those_of_the_kind():
    for kernel in SPARSE[3:]:
        (pattern,) = kernel.patterns([0.5])
        assert kernel.kind == f"{pattern.height}x{pattern.width} tiles"


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "reason"),
    [
        ((8, 0), torch.float16, (64, 128), None),
        ((9, 0), torch.bfloat16, (32, 64), None),
        ((7, 5), torch.float16, (64, 128), "compute capability 8.0, and this GPU has 7.5"),
        ((8, 0), torch.float32, (64, 128), "weights of type float32"),
        ((8, 0), torch.float16, (48, 128), "48 x 128 weights are not multiples of 32 x 64"),
    ],
)
def test_what_2_4_products_need(monkeypatch, capability, dtype, shape, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = SEMI_STRUCTURED.unsupported(shape, dtype, CUDA)
    assert found is None if reason is None else reason in found


def test_2_4_products_need_a_gpu():
    assert "need a CUDA GPU, and this is a CPU" in SEMI_STRUCTURED.unsupported((64, 128), torch.float16, torch.device("cpu"))


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_wrong_products_are_refused_and_rounding_is_not(wrong):
    product = torch.randn(4, 8)
    check_product(product, product * (1 + 1e-6))
    check_product(product, (product * 1.01).bfloat16())
    check_product((product * 1.01).bfloat16(), product)
    with pytest.raises(InputError, match="the product is wrong"):
        check_product(product, product * wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 33])
def test_2_4_products_on_a_gpu(batch):
    if SEMI_STRUCTURED.unsupported((64, 128), torch.float16, CUDA):
        pytest.skip("this GPU has no sparse tensor cores")
    weight, tokens = torch.randn(64, 128, device=CUDA), torch.randn(batch, 128, device=CUDA).half()
    weight *= dict(SEMI_STRUCTURED.patterns([])[0]({"w": torch.rand(64, 128, device=CUDA)}))["w"]
    check_product(
        DENSE.multiply(weight.half(), tokens), SEMI_STRUCTURED.multiply(SEMI_STRUCTURED.compress(weight.half()), tokens)
    )
