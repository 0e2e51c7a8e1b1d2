"""The threshold search equals a full sort, keeps to every bound, and nests."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uniprune.errors import InputError
from uniprune.sparsity.threshold import ordered, sampled_thresholds, thresholds

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, 0.1, 0.5, 0.5, 2.0]
scores_lists = st.lists(
    st.lists(st.sampled_from(SPECIAL) | st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    min_size=1,
    max_size=5,
)


def masks_of(saliency, keep, bounds=None):
    found = thresholds(saliency, keep, bounds)
    return {name: found[name].mask(scores) for name, scores in saliency.items()}


def by_sorting(saliency, keep, bounds):
    """The same by brute force: every score in turn, best first, earlier ones first among equals, as long as bounds allow it."""
    entries = [(float(v) + 0.0, m, i) for m, s in enumerate(saliency.values()) for i, v in enumerate(s.flatten())]
    entries.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    limits = list(bounds.values())
    chosen = [set() for _ in saliency]
    owed = [low for low, _ in limits]  # of each matrix, places that are its own whatever the others have
    free = keep - sum(owed)
    for _, matrix, index in entries:
        if len(chosen[matrix]) == limits[matrix][1]:
            continue
        if owed[matrix]:
            owed[matrix] -= 1
        elif free:
            free -= 1
        else:
            continue
        chosen[matrix].add(index)
    return chosen


@given(scores_lists, st.data())
def test_equals_a_full_sort_within_bounds(lists, data):
    saliency = {f"m{i}": torch.tensor(values)[None] for i, values in enumerate(lists)}
    bounds = {}
    for name, scores in saliency.items():
        low = data.draw(st.integers(0, scores.numel()))
        bounds[name] = (low, data.draw(st.integers(low, scores.numel())))
    least, most = (sum(bound[side] for bound in bounds.values()) for side in (0, 1))
    keep = data.draw(st.integers(least, most))
    found = masks_of(saliency, keep, bounds)
    kept = [set(mask.flatten().nonzero().flatten().tolist()) for mask in found.values()]
    assert kept == by_sorting(saliency, keep, bounds)


@given(scores_lists, st.data())
def test_smaller_budgets_are_nested_in_larger_ones(lists, data):
    saliency = {f"m{i}": torch.tensor(values)[None] for i, values in enumerate(lists)}
    total = sum(scores.numel() for scores in saliency.values())
    few, many = sorted((data.draw(st.integers(0, total)), data.draw(st.integers(0, total))))
    smaller, larger = masks_of(saliency, few), masks_of(saliency, many)
    assert sum(int(mask.sum()) for mask in smaller.values()) == few
    assert not any(bool((smaller[name] & ~larger[name]).any()) for name in saliency)


def test_many_scores_in_several_pieces():
    generator = torch.Generator().manual_seed(0)
    saliency = {f"m{i}": torch.rand(700, 900, generator=generator) ** (1 + i) for i in range(3)}
    keep = 800_000
    found = masks_of(saliency, keep)
    joined = torch.cat([scores.flatten() for scores in saliency.values()])
    lowest = joined.topk(keep).values[-1]
    assert sum(int(mask.sum()) for mask in found.values()) == keep
    assert all(torch.equal(mask, saliency[name] >= lowest) for name, mask in found.items())


def test_order_is_that_of_floats():
    values = torch.tensor([-3.4e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3.4e38])
    assert torch.equal(ordered(values).sort().values, ordered(values))
    assert ordered(torch.tensor([-0.0])) == ordered(torch.tensor([0.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_named(bad):
    with pytest.raises(InputError, match="second: the scores contain NaN or infinity"):
        thresholds({"first": torch.ones(2, 2), "second": torch.tensor([[1.0, bad]])}, 3)


def test_budgets_outside_the_bounds_are_refused():
    with pytest.raises(InputError, match="between 1 and 2"):
        thresholds({"a": torch.ones(2, 2)}, 3, {"a": (1, 2)})


def test_a_sample_comes_as_near_to_bounds_as_it_can():
    """Half to 0.7 of 13 scores is no whole number of them: what all matrices can keep, their samples cannot."""
    sample = {name: torch.rand(13, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("ab")}
    bounds = dict.fromkeys(sample, (4, 6))
    found = sampled_thresholds(sample, 13, bounds, dict.fromkeys(sample, 13))
    assert [int(found[name].mask(scores).sum()) for name, scores in sample.items()] == [6, 6]
    found = sampled_thresholds(sample, 13, dict.fromkeys(sample, (7, 6)), dict.fromkeys(sample, 13))
    assert all(6 <= int(found[name].mask(scores).sum()) <= 7 for name, scores in sample.items())
