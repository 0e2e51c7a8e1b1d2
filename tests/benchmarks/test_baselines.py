"""OWL's sparsities against their definition, Fisher scores against plain autograd."""

import pytest
import torch
from torch.nn import functional

from baselines import fisher, owl, owl_masks
from conftest import VOCABULARY, tiny_model
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.unstructured import Unstructured


def tokens(count=5, length=16):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def scored_model(outliers):
    """Matrices of three blocks, and scores of which so many in a thousand per block are far above the mean."""
    matrices = find_matrices(tiny_model())
    saliency = {name: torch.ones(matrix.shape) for name, matrix in matrices.items()}
    for index, count in enumerate(outliers):
        for name, matrix in matrices.items():
            if matrix.block == index:
                saliency[name].view(-1)[: count * matrix.size // 1000] = 100
    return matrices, saliency


def by_block(matrices, levels):
    found = [{levels[name] for name, matrix in matrices.items() if matrix.block == index} for index in range(3)]
    assert all(len(one) == 1 for one in found)
    return [one.pop() for one in found]


@pytest.mark.parametrize(("sparsity", "spread"), [(0.5, 0.08), (0.7, 0.08), (0.95, 0.08), (0.03, 0.08), (0.5, 0.0)])
def test_owl_levels(sparsity, spread):
    """More outliers, less sparse; within the bounds, one of which is met; on average what was asked for."""
    matrices, saliency = scored_model([10, 1, 4])
    levels = owl(matrices, saliency, sparsity, spread=spread)
    first, second, third = by_block(matrices, levels)
    room = min(spread, 1 - sparsity, sparsity)
    assert first < third < second or room == 0
    assert max(abs(level - sparsity) for level in (first, second, third)) == pytest.approx(room)
    total = sum(matrix.size for matrix in matrices.values())
    assert sum(levels[name] * matrix.size for name, matrix in matrices.items()) / total == pytest.approx(sparsity, abs=1e-12)
    # Linear in the number of outliers: 10, 1 and 4 lie 5, -4 and -1 from their mean.
    assert (first - sparsity, second - sparsity) == pytest.approx((-room, room * 4 / 5), rel=0.03)


def test_owl_weighs_blocks_by_their_size():
    matrices, saliency = scored_model([10, 1, 4])
    matrices = {name: matrix for name, matrix in matrices.items() if matrix.block != 1 or "mlp" in name}
    levels = owl(matrices, saliency, 0.6)
    total = sum(matrix.size for matrix in matrices.values())
    assert sum(levels[name] * matrix.size for name, matrix in matrices.items()) / total == pytest.approx(0.6, abs=1e-12)


def test_owl_without_differences_is_uniform():
    matrices, saliency = scored_model([3, 3, 3])
    assert set(owl(matrices, saliency, 0.6).values()) == {0.6}


def test_an_outlier_is_measured_by_its_blocks_mean():
    """Ones and, in a tenth of one matrix of a block, x: above M times the mean or not."""
    matrices, saliency = scored_model([0, 0, 0])
    name = "model.layers.1.mlp.up_proj"
    size = sum(matrix.size for matrix in matrices.values() if matrix.block == 1)
    count = matrices[name].size // 10
    edge = 5 * (size - count) / (size - 5 * count)  # x = 5 * mean
    for x, differs in ((edge * 0.999, False), (edge * 1.001, True)):
        saliency[name].view(-1)[:count] = x
        first, second, third = by_block(matrices, owl(matrices, saliency, 0.5))
        assert first == third
        assert (second < first) == differs


def test_owl_masks_are_cut_by_row_at_the_level():
    matrices, _ = scored_model([0, 0, 0])
    saliency = {name: torch.rand(matrix.shape).pow(8 - 2 * matrix.block) for name, matrix in matrices.items()}
    levels = owl(matrices, saliency, 0.6)
    masks = owl_masks(matrices, saliency, 0.6)
    assert len(set(levels.values())) == 3
    for name, matrix in matrices.items():
        assert set(masks[name].sum(1).tolist()) == {Unstructured(levels[name]).keep(matrix.shape[1])}
        assert torch.equal(masks[name], dict(Unstructured(levels[name])(saliency))[name])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_scores_are_those_of_plain_autograd(family):
    model, reference = tiny_model(family), tiny_model(family)
    matrices, plain = find_matrices(model), find_matrices(reference)
    windows = tokens(count=3)
    scores = fisher(model, matrices, windows)
    expected = {name: torch.zeros(matrix.shape) for name, matrix in plain.items()}
    for window in windows:
        for matrix in plain.values():
            matrix.parameter.requires_grad_(True).grad = None
        functional.cross_entropy(reference(input_ids=window[None]).logits[0, :-1], window[1:], reduction="sum").backward()
        for name, matrix in plain.items():
            gradient = matrix.parameter.grad.T if matrix.transposed else matrix.parameter.grad
            expected[name] += (matrix.weight * gradient) ** 2 / 3
    for name in matrices:
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].mean()))
