"""Patterns against brute force, and counts written out by hand where off-by-one lives."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uniprune.errors import InputError
from uniprune.sparsity.patterns.budget import sizes_of
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.spelling import parse
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.top import top
from uniprune.sparsity.views import Comparable, ScaledToMeanOne, Scores, View


def cut(pattern, **scores):
    return dict(pattern({name: torch.as_tensor(value, dtype=torch.float32) for name, value in scores.items()}))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (1, 2), (5, 5), (2, 3)])
def test_nm_keeps_the_best_of_all_choices(n, m):
    scores = torch.randn(6, 2 * m, generator=torch.Generator().manual_seed(n * m))
    mask = cut(NM(n, m), w=scores)["w"]
    for group, kept in zip(scores.view(-1, m), mask.view(-1, m), strict=True):
        best = max(combinations(range(m), n), key=lambda choice: float(group[list(choice)].sum()))
        assert kept.nonzero().flatten().tolist() == list(best)


def test_nm_counts_what_is_kept():
    scores = [[1.0, 2.0, 3.0, 4.0]]
    assert cut(NM(1, 4), w=scores)["w"].tolist() == [[False, False, False, True]]
    assert cut(NM(3, 4), w=scores)["w"].tolist() == [[False, True, True, True]]
    assert NM(1, 4).sparsity == 0.75


@pytest.mark.parametrize(
    ("sparsity", "size", "kept"),
    [(0.0, 5, 5), (1.0, 5, 0), (0.5, 5, 3), (0.29, 100, 71), (0.7, 10, 3), (0.1, 3, 3), (0.999, 1, 1), (0.57, 100, 43)],
)
def test_keep_is_size_minus_floor(sparsity, size, kept):
    assert Unstructured(sparsity).keep(size) == kept
    assert int(cut(Unstructured(sparsity), w=torch.rand(1, size))["w"].sum()) == kept


@pytest.mark.parametrize("size", [4, 40])  # both selection routines
def test_ties_go_to_the_lower_index(size):
    half = size // 2
    assert top(torch.ones(2, size), half).int().argmin(1).tolist() == [half, half]
    mixed = torch.ones(1, size)
    mixed[0, -1] = 2  # above the ties, so one of them fewer is kept
    assert top(mixed, half)[0].nonzero().flatten().tolist() == [*range(half - 1), size - 1]


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.77, 1.0]),
    st.booleans(),
)
def test_model_wide_equals_one_sort_of_everything(values, sparsity, tiny_steps):
    """Ties abound; with tiny steps neighbours differ only in the low bits of their float."""
    scores = torch.tensor(values, dtype=torch.float32) * (1e-38 if tiny_steps else 1.0)
    parts = {str(index): row.reshape(2, 3) for index, row in enumerate(scores)}
    pattern = Unstructured(sparsity, "model")
    mask = torch.stack([kept.flatten() for _, kept in pattern(parts)]).flatten()
    order = scores.flatten().sort(descending=True, stable=True).indices
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[order[: pattern.keep(scores.numel())]] = True
    assert torch.equal(mask, expected)


def test_model_wide_sees_random_scores_as_a_sort_does():
    parts = {name: torch.randn(40, 30, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    mask = torch.cat([kept.flatten() for _, kept in Unstructured(0.6, "model")(parts)])
    flat = torch.cat([scores.flatten() for scores in parts.values()])
    assert int(mask.sum()) == 3600 - 2160
    assert flat[mask].min() > flat[~mask].max()


def test_scopes_differ_in_their_group():
    scores = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    assert cut(Unstructured(0.5, "row"), w=scores)["w"].sum(1).tolist() == [2, 2]
    assert cut(Unstructured(0.5, "matrix"), w=scores)["w"].sum(1).tolist() == [0, 4]


@pytest.mark.parametrize("spec", ["1.2", "-0.1", "nan", "4:2", "0:4", "half", "2:", ""])
def test_impossible_patterns_are_refused(spec):
    with pytest.raises(InputError):
        parse(spec)


def test_parse():
    assert parse("0.6") == Unstructured(0.6, "row")
    assert parse(0.6, "model") == Unstructured(0.6, "model")
    assert parse(" 2:4 ") == NM(2, 4)
    assert parse(NM(2, 4)) == NM(2, 4)
    with pytest.raises(InputError, match="scope"):
        parse("2:4", "row")
    with pytest.raises(InputError, match="scope"):
        parse("0.5", "layer")


def test_nan_scores_are_refused_by_name():
    for pattern in (NM(2, 4), Unstructured(0.5), Unstructured(0.5, "model")):
        with pytest.raises(InputError, match=r"layer\.3"):
            dict(pattern({"layer.3": torch.tensor([[1.0, float("nan"), 2.0, 3.0]])}))


def test_nm_misfit_names_the_matrix():
    with pytest.raises(InputError, match=r"layer\.3: 6 inputs are not divisible by 4"):
        dict(NM(2, 4)({"layer.3": torch.ones(2, 6)}))


def test_sizes_that_a_saliency_knows_cost_no_look():
    class Known(Scores):
        def __getitem__(self, name):
            raise AssertionError("nobody looks")

        def __iter__(self):
            return iter("ab")

        def __len__(self):
            return 2

        def size(self, name):
            return {"a": 6, "b": 8}[name]

    sizes = {"a": 6, "b": 8}
    assert (
        sizes_of(Known())
        == sizes_of(View(Known()))
        == sizes_of(ScaledToMeanOne(Known()))
        == sizes_of(Comparable(Known()))
        == sizes
    )
    assert sizes_of({name: torch.ones(2, size // 2) for name, size in sizes.items()}) == sizes
    halves = View({"a": torch.ones(2, 4)}, lambda name, scores: scores[:1])
    assert sizes_of(halves) == {"a": 4}
