"""Packed matrices: every product is the dense one's, summed in float64; every bit comes back; nothing is read beyond them."""

import numpy as np
import pytest
import torch

from uniprune.runtime.native import PADDING, library
from uniprune.runtime.packed import Packed, bits_of, count, pack, pack_into, unpack
from uniprune.sparsity import bits as bits_module

pytestmark = pytest.mark.usefixtures("compiled")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (5, 64), (4, 65), (17, 127), (40, 192)]
BATCHES = range(1, 9)


def sparse(rows, columns, dtype, kept=0.5):
    """A matrix with an empty row and a full one, where there is room."""
    torch.manual_seed(rows * columns)
    weight = torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) >= kept, 0.0)
    if rows > 3:
        weight[1], weight[2] = 0, torch.randn(columns)
    return weight.to(dtype)


def check(found, weight, tokens, bias=None):
    """As near to the product in float64 as a sum in float32, rounded once, can be."""
    exact, size = tokens.double() @ weight.double().T, tokens.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    rounding = 0.0 if weight.dtype is torch.float32 else torch.finfo(weight.dtype).eps / 2
    assert bool(((found.double() - exact).abs() <= rounding * exact.abs() + 1e-6 * size + 1e-30).all())


@pytest.mark.parametrize("path", ["plain", "avx2", "avx512", "avx512_bf16", "neon"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_and_bits_on_every_path(path, dtype):
    if path not in library().paths:
        pytest.skip(f"this machine has no {path}")
    for shape in SHAPES:
        weight = sparse(*shape, dtype)
        packed, bias = pack(weight, path), torch.randn(shape[0]).to(dtype)
        assert packed.kept == int((weight != 0).sum())
        assert torch.equal(packed.dense(path).view(torch.uint8), weight.view(torch.uint8))
        for batch in BATCHES:
            tokens = torch.randn(batch, shape[1]).to(dtype)
            check(packed.handle(path=path).multiply(tokens), weight, tokens)
            check(packed.handle(bias, path).multiply(tokens), weight, tokens, bias)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.05, 1.0])
def test_empty_and_full_matrices(dtype, kept):
    weight = sparse(1, 130, dtype, kept)
    tokens = torch.randn(2, 130).to(dtype)
    check(pack(weight).handle().multiply(tokens), weight, tokens)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_bits_are_those_of_masks_where_rows_are_whole_bytes(dtype):
    weight = sparse(9, 72, dtype)
    packed = pack(weight)
    kept = weight.view(torch.int32 if dtype is torch.float32 else torch.int16) != 0
    assert torch.equal(packed.bits.flatten(), bits_module.pack(kept))
    assert torch.equal(packed.values[: packed.kept], weight[kept])
    assert packed.kept == count(bits_of(weight), dtype)[0] == int(kept.sum())
    assert packed.offsets.tolist() == [0, *np.cumsum(kept.sum(1).numpy())]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows_whatever_lies_in_them(threads):
    before = torch.get_num_threads()
    weight = sparse(2000, 640, torch.float32)
    weight[:1900].masked_fill_(torch.rand(1900, 640) > 0.01, 0.0)  # nearly all values in the last rows
    weight[1950:] = 0
    tokens, packed = torch.randn(3, 640), pack(weight)
    torch.set_num_threads(threads)
    try:
        check(packed.handle().multiply(tokens), weight, tokens)
        assert torch.equal(packed.rows(3, 1999), weight[3:1999])
    finally:
        torch.set_num_threads(before)


def test_the_result_does_not_depend_on_threads_or_on_the_tokens_beside():
    weight, tokens = sparse(3000, 320, torch.bfloat16), torch.randn(8, 320).bfloat16()
    packed, before = pack(weight), torch.get_num_threads()
    whole = packed.handle().multiply(tokens)
    torch.set_num_threads(2)
    try:
        assert torch.equal(packed.handle().multiply(tokens), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed.handle().multiply(tokens[:7]), whole[:7])


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_not_finite_among_the_tokens_shows_as_in_the_dense_product(dtype, odd):
    weight, tokens = sparse(6, 70, dtype), torch.randn(1, 70).to(dtype)
    tokens[0, 5] = odd  # infinity times a pruned weight is NaN, too
    expected = torch.nn.functional.linear(tokens.float(), weight.float())
    assert torch.equal(pack(weight).handle().multiply(tokens).isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_sums_round_and_overflow_as_in_pytorch(dtype):
    weight = torch.tensor([[1.0, 2.0], [60000.0, 60000.0], [-60000.0, 0.0]]).to(dtype)
    tokens = torch.tensor([[1 / 3, 1.0]]).to(dtype)
    assert torch.equal(pack(weight).handle().multiply(tokens * 2), torch.nn.functional.linear(tokens * 2, weight))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_negative_zeros_are_zeros(dtype):
    weight = -torch.ones(3, 20, dtype=dtype)
    weight[:, ::2] *= 0
    assert bool(weight.signbit().all())
    assert count(bits_of(weight), dtype) == (pack(weight).kept, True) == (30, True)
    assert torch.equal(pack(weight).dense().signbit(), weight != 0)


@pytest.mark.parametrize("path", ["plain", "avx2", "avx512", "neon"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_counting_sees_what_is_not_finite(path, dtype):
    if path not in library().paths:
        pytest.skip(f"this machine has no {path}")
    largest = torch.finfo(dtype).max
    odd = {largest: True, -largest: True, float("inf"): False, -float("inf"): False, float("nan"): False}
    for value, finite in odd.items():
        weight = torch.zeros(1000, dtype=dtype)
        weight[777] = value
        assert count(bits_of(weight), dtype, path) == (1, finite)


def test_some_rows_into_room_that_is_there():
    weight = sparse(20, 33, torch.float32)
    room = torch.full((5, 33), 7.0)
    assert pack(weight).rows(4, 9, room).data_ptr() == room.data_ptr()
    assert torch.equal(room, weight[4:9])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v, b: (v[:-1], b), "128 values, 64 of padding"),
        (lambda v, b: (v.double(), b), "values are torch.float64"),
        (lambda v, b: (v[None], b), "values are"),
        (lambda v, b: (v, b[:-1]), "bits are"),
        (lambda v, b: (v, b.int()), "bits are torch.int32"),
        (lambda v, b: (v, b.T.contiguous().T), "bits are"),
        (lambda v, b: (v, b | 255), "past the last column"),
        (lambda v, b: (v, b | 1), "values, 64 of padding among them, but"),
    ],
)
def test_what_does_not_go_together_is_refused(change, reason):
    weight = torch.zeros(13, 10)
    weight[:, 3:8] = 1.0
    packed = pack(weight)
    with pytest.raises(ValueError, match=reason):
        Packed(*change(packed.values, packed.bits), (13, 10))
    assert len(packed.values) == 65 + PADDING


def test_pytorch_alone_unpacks_the_same():
    for shape in SHAPES:
        weight = sparse(*shape, torch.float32)
        packed = pack(weight)
        assert torch.equal(unpack(packed.values, packed.bits, shape), weight)
        assert torch.equal(unpack(packed.values[: packed.kept], packed.bits, shape), weight)
        if packed.kept:
            with pytest.raises(ValueError, match=f"{packed.kept - 1} values, but {packed.kept} bits"):
                unpack(packed.values[: packed.kept - 1], packed.bits, shape)


@pytest.mark.parametrize("path", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nothing_is_written_beyond_the_room_for_what_was_counted(path, dtype):
    if path not in library().paths:
        pytest.skip(f"this machine has no {path}")
    weight = sparse(9, 200, dtype, 1.0)
    for kept in (0, 1, 64, 700, int(weight.count_nonzero()) - 1):
        room = torch.full((kept + 2 * PADDING,), 7, dtype=dtype)
        with pytest.raises(ValueError, match="changed while they were packed"):
            pack_into(bits_of(weight), room[: kept + PADDING], kept, path)
        assert bool((room[kept + PADDING :] == 7).all())


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float64"):
        pack(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="a bias of"):
        pack(torch.ones(2, 2)).handle(torch.ones(3))
