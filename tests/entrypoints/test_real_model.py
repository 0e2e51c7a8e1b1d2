"""The real model: a few hundred tokens are enough for the commands to show on it what they promise."""

import copy
from pathlib import Path

import pytest
import torch

import uniprune
from conftest import shared
from uniprune import Loaded, Recipe
from uniprune.models.matrices import find_matrices

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense(smollm2):
    """Its file takes a quarter of a minute to load. Tests read it and leave it as it is."""
    return uniprune.load(smollm2)


def test_from_the_file_to_the_evaluation(smollm2, dense, tmp_path):
    """GGUF in, 2:4 out: sparser, worse than dense, far better than magnitude, bitwise the source; twice the same."""
    small = {"windows": 4, "length": 64, "text": "builtin"}
    evaluation = {"windows": 4, "length": 128}
    out = tmp_path / "wanda"
    report = uniprune.prune(str(smollm2), Recipe(sparsity="2:4", **small), out)
    assert report.sparsity == 0.5
    assert len(report.matrices) == 210
    assert report.controller.steps >= 1
    original = find_matrices(dense.model)
    before = uniprune.evaluate(dense, **evaluation)
    written = uniprune.load(out)
    after = uniprune.evaluate(written, **evaluation)
    assert before.perplexity < 30
    assert before.perplexity < after.perplexity < 10 * before.perplexity
    pruned = find_matrices(written.model)
    assert pruned.keys() == original.keys()
    for name, matrix in pruned.items():
        kept = matrix.weight != 0
        assert torch.equal(matrix.weight[kept], original[name].weight[kept])
    del written, pruned, matrix  # half a gigabyte
    again = uniprune.prune(dense, Recipe(sparsity="2:4", **small), tmp_path / "again")
    assert again.masks_sha256 == report.masks_sha256
    in_place = Loaded(copy.deepcopy(dense.model), dense.tokenizer)
    uniprune.prune_in_place(in_place, Recipe(sparsity="2:4", metric="magnitude", controller="none", **small))
    assert uniprune.evaluate(in_place, **evaluation).perplexity > 2 * after.perplexity


def test_the_committed_result_is_reproduced(dense, monkeypatch):
    """To the last bit on the kind of machine it was recorded on, within 1 % elsewhere."""
    shared("wikitext2/wiki.test.raw")
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)  # the text's path is relative
    found = uniprune.check(root / "benchmarks" / "results" / "check.json", dense, device="cpu")
    assert found.reproduced, found.differences
