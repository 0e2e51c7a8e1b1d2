"""SparseGPT against one that is written out with direct solves."""

import pytest
import torch

from conftest import VOCABULARY, tiny_model
from uniprune.comparison.sparsegpt import chooser, eliminate, inverse_factor, sparsegpt
from uniprune.errors import InputError, UniPruneError
from uniprune.models.matrices import find_matrices
from uniprune.saliency.metrics import Wanda
from uniprune.saliency.observation import observing
from uniprune.saliency.statistics import Gram, SquaredNorm
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured


def tokens(count=5, length=16):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def layer(rows=6, columns=24, count=60):
    """A weight and the correlated inputs of a layer, float64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(count, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def given(mask):
    """A choice that was made before, for blocks of any size."""
    return lambda start, scores: mask[:, start : start + scores.shape[1]]


def by_direct_solves(weight, hessian, choose, width):
    """SparseGPT the slow way: an inverse for every score, and for every pruned weight one solve that fits those right of it."""
    weight, original = weight.clone(), weight
    rows, columns = weight.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if j % width == 0:
            group = range(j, min(j + width, columns))
            inverses = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0] for c in group])
            mask[:, j : j + width] = choose(j, weight[:, j : j + width] ** 2 / inverses)
        settled, rest = slice(0, j + 1), slice(j + 1, columns)
        for i in range(rows):
            if not mask[i, j]:
                weight[i, j] = 0
                change = weight[i, settled] - original[i, settled]
                weight[i, rest] = original[i, rest] - torch.linalg.solve(hessian[rest, rest], hessian[rest, settled] @ change)
    return weight, mask


def test_the_factor_holds_the_inverses_of_all_trailing_blocks():
    _, x = layer()
    hessian = x.T @ x
    factor = inverse_factor("q", hessian, damp=0.1)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))
    for j in range(24):
        torch.testing.assert_close(factor[j, j:] * factor[j, j], torch.linalg.inv(damped[j:, j:])[0])


def test_the_last_update_by_hand():
    """H = [[2, 1], [1, 1]]: dropping the first weight, 3, is best made up for by 3 * 1 / 1 more of the second."""
    weight = torch.tensor([[3.0, 5.0]])
    factor = inverse_factor("q", torch.tensor([[2.0, 1.0], [1.0, 1.0]]), damp=0).float()
    eliminate(weight, factor, given(torch.tensor([[False, True]])), 1, 1)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 8.0]]))


@pytest.mark.parametrize("seed", range(3))
def test_updates_for_a_given_mask_are_the_exact_solution(seed):
    weight, x = layer(rows=1)
    hessian = x.T @ x
    mask = torch.rand(1, 24, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected, _ = by_direct_solves(weight, hessian, given(mask), 24)
    assert torch.equal(eliminate(weight, inverse_factor("q", hessian, 0), given(mask), 1, 8), mask)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("block_size", [1, 5, 8, 23, 1000])
def test_lazy_updates_change_nothing_for_a_given_mask(block_size):
    weight, x = layer()
    factor = inverse_factor("q", x.T @ x, 0.01)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = weight.clone()
    eliminate(expected, factor, given(mask), 1, 24)
    eliminate(weight, factor, given(mask), 1, block_size)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("block_size", [4, 10, 24])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(2, 8), Unstructured(0.6), Unstructured(0.6, "matrix")])
def test_chosen_masks_and_updates_are_those_of_direct_solves(pattern, block_size):
    weight, x = layer()
    hessian = x.T @ x
    choose, width, lazy = chooser(pattern, block_size)
    expected, expected_mask = by_direct_solves(weight, hessian, choose, width)
    mask = eliminate(weight, inverse_factor("q", hessian, 0), choose, width, lazy)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight, expected)
    assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_n_of_every_m_are_kept(n):
    weight, x = layer()
    mask = eliminate(weight, inverse_factor("q", x.T @ x, 0.01), *chooser(NM(n, 4), 10))
    assert bool((mask.reshape(-1, 4).sum(1) == n).all())


@pytest.mark.parametrize("sparsity", [0, 0.29, 0.5, 0.77, 1])
@pytest.mark.parametrize("block_size", [1, 7, 24, 128])
def test_counts_of_the_blocks_add_up(sparsity, block_size):
    weight, x = layer(rows=5)
    factor = inverse_factor("q", x.T @ x, 0.01)
    by_row, whole = Unstructured(sparsity), Unstructured(sparsity, "matrix")
    mask = eliminate(weight.clone(), factor, *chooser(by_row, block_size))
    assert mask.sum(1).tolist() == [by_row.keep(24)] * 5
    mask = eliminate(weight.clone(), factor, *chooser(whole, block_size))
    assert int(mask.sum()) == whole.keep(5 * 24)
    for start in range(0, 24, block_size):  # and no block is off by a whole weight
        block = mask[:, start : start + block_size]
        assert abs(float((~block).sum()) - sparsity * block.numel()) < 1


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), Unstructured(0.5), Unstructured(0.5, "matrix")])
def test_less_error_than_wanda_without_update(pattern):
    dense, x = layer(rows=32, columns=96, count=400)
    norm = SquaredNorm(96, torch.device("cpu"))
    norm.update(x)
    (_, mask), *_ = pattern({"q": Wanda()(dense, norm)})
    weight = dense.clone()
    eliminate(weight, inverse_factor("q", x.T @ x, 0.01), *chooser(pattern, 32))
    ours, wanda = (x @ (weight - dense).T).norm(), (x @ (dense * mask - dense).T).norm()
    assert ours < 0.9 * wanda


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_each_block_is_fitted_to_pruned_inputs(family, pattern):
    """Against the slow way: whole forward passes of the model as changed so far, one block's Hessians after the other."""
    model, reference = tiny_model(family), tiny_model(family)
    matrices, everything = find_matrices(model), find_matrices(reference)
    windows = tokens(count=20)
    masks = sparsegpt(model, matrices, windows, pattern, block_size=16)
    assert masks.keys() == matrices.keys()
    for index in range(3):
        here = {name: matrix for name, matrix in everything.items() if matrix.block == index}
        with torch.no_grad(), observing(here, Gram) as found:
            reference(input_ids=windows)
        for name, matrix in here.items():
            weight = matrix.weight.clone()
            mask = eliminate(weight, inverse_factor(name, found[name].total, 0.01).float(), *chooser(pattern, 16))
            assert float((masks[name] != mask).float().mean()) < 0.01, name  # float32 sums in another order: near ties
            torch.testing.assert_close(matrices[name].weight, weight, rtol=1e-2, atol=1e-3)
            assert torch.equal(matrices[name].weight != 0, masks[name])
            matrix.weight.copy_(matrices[name].weight)
    for name, parameter in tiny_model(family).named_parameters():
        if name.removesuffix(".weight") not in matrices:
            assert torch.equal(model.get_parameter(name), parameter), name


def test_dead_inputs_go_first_and_do_no_harm():
    model = tiny_model(num_hidden_layers=1)
    model.model.layers[0].input_layernorm.weight[[3, 8]] = 0  # the attention's inputs are zero there
    matrices = find_matrices(model)
    masks = sparsegpt(model, matrices, tokens(count=20), Unstructured(2 / 32), damp=0)
    name = "model.layers.0.self_attn.q_proj"
    assert (~masks[name]).nonzero()[:, 1].tolist() == [3, 8] * 32
    assert all(bool(torch.isfinite(matrix.weight).all()) for matrix in matrices.values())


def test_a_half_precision_model_keeps_its_dtype():
    model = tiny_model().bfloat16()
    matrices = find_matrices(model)
    masks = sparsegpt(model, matrices, tokens(), NM(2, 4))
    for name, matrix in matrices.items():
        assert matrix.parameter.dtype == torch.bfloat16
        assert not bool(matrix.weight[~masks[name]].any())


def test_sparsegpt_says_what_is_wrong():
    model = tiny_model()
    matrices = find_matrices(model)
    with pytest.raises(InputError, match="needs all scores"):
        sparsegpt(model, matrices, tokens(), Unstructured(0.5, "model"))
    with pytest.raises(InputError, match="32 inputs are not divisible by 5"):
        sparsegpt(model, matrices, tokens(), NM(2, 5))
    with pytest.raises(
        UniPruneError, match=r"^model\.layers\.0\.self_attn\.q_proj: its Hessian is not positive definite at damp"
    ):
        sparsegpt(model, matrices, tokens(count=1), NM(2, 4), damp=0)  # 16 tokens, 32 inputs
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(UniPruneError, match=r"^model\.layers\.0\.mlp\.gate_proj saw no calibration token"):
        sparsegpt(model, matrices, tokens(), NM(2, 4))
