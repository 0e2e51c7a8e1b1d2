"""Rules and mixed patterns: exact totals, bounds that hold, N:M in every group, clear refusals."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uniprune.errors import InputError
from uniprune.sparsity.patterns.budget import removed_count
from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE, NM
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.spelling import parse
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured

SHAPES = {
    "layers.0.q_proj": (8, 16),
    "layers.0.down_proj": (4, 32),
    "layers.1.q_proj": (8, 16),
    "layers.1.down_proj": (4, 32),
    "layers.2.q_proj": (16, 16),
}


def random_saliency(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) * (1 + index) for index, (name, shape) in enumerate(shapes.items())}


def gone(masks):
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def total(shapes=SHAPES):
    return sum(map(math.prod, shapes.values()))


def ruled(base, *rules):
    return Ruled(base, tuple(map(Rule.parse, rules)))


@given(st.integers(0, 10), st.floats(0.3, 0.6), st.sampled_from(["model", "block"]), st.floats(0, 0.3), st.floats(0.6, 1))
def test_floors_and_ceilings_hold_and_the_total_is_exact(seed, sparsity, scope, floor, ceiling):
    sparsity, span = round(sparsity, 3), f"{floor:.3f}..{ceiling:.3f}"
    pattern = ruled(Unstructured(sparsity, scope), f"down_proj={span}")
    pattern.check(SHAPES)
    masks = dict(pattern(random_saliency(seed)))
    for name, count in gone(masks).items():
        if "down_proj" in name:
            assert math.ceil(float(f"{floor:.3f}") * 128 - 1e-9) <= count <= math.floor(float(f"{ceiling:.3f}") * 128 + 1e-9)
    groups = [list(SHAPES)] if scope == "model" else [[n for n in SHAPES if f".{index}." in n] for index in range(3)]
    for names in groups:
        assert sum(gone(masks)[name] for name in names) == math.floor(sparsity * total({n: SHAPES[n] for n in names}) + 1e-9)


@given(st.integers(0, 10), st.floats(0.2, 0.8), st.floats(0.2, 0.8))
def test_masks_are_nested_under_the_same_rules(seed, one, other):
    few, many = sorted((round(one, 3), round(other, 3)))
    saliency, rules = random_saliency(seed), ("layers.0=0.1..0.9", "1.q_proj=2:4")
    less, more = (dict(ruled(Unstructured(sparsity, "model"), *rules)(saliency)) for sparsity in (few, many))
    assert not any(bool((more[name] & ~less[name]).any()) for name in saliency)


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_a_fraction_of_a_rule_has_the_budget_of_the_base(scope):
    """Of tiles, too, whose rows are rows of tiles."""
    for base in (Unstructured(0.5, scope), Tiled(Unstructured(0.5, scope), 2, 2)):
        assert ruled(base, "mlp=0.25").pattern_of("mlp").scope == scope


def test_others_make_up_for_what_rules_spare():
    pattern = ruled(Unstructured(0.5, "model"), r"layers\.0\.=dense", "1.down_proj=1:4", "1.q_proj=0.25")
    pattern.check(SHAPES)
    masks = dict(pattern(random_saliency()))
    count = gone(masks)
    assert sum(count.values()) == total() // 2
    assert count["layers.0.q_proj"] == count["layers.0.down_proj"] == 0
    assert count["layers.1.q_proj"] == 32
    assert bool((masks["layers.1.down_proj"].reshape(-1, 4).sum(1) == 1).all())
    assert [str(pattern.pattern_of(name)) for name in SHAPES][2:] == ["0.25 by matrix", "1:4", "0.5 by model"]


@pytest.mark.parametrize("what", ["0.5@4x4", "0.3@4x4", "0.3333", "2:4", "dense"])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_the_total_is_exact_whatever_a_fixed_part_can_lose(what, scope):
    """A quarter of 36 x 36 weights in tiles is not a quarter: whole tiles go, and the others make up for the rest."""
    scores = {f"{block}.{kind}": torch.rand(36, 36) for block in range(2) for kind in ("q", "k")}
    masks = dict(Ruled(Unstructured(0.5, scope), (Rule("q", what),))(scores))
    parts = [sum(int((~masks[f"{block}.{kind}"]).sum()) for kind in ("q", "k")) for block in range(2)]
    assert parts == [36 * 36] * 2 if scope == "block" else sum(parts) == 2 * 36 * 36


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.33), Unstructured(0.33, "matrix"), parse("0.3@4x4")], ids=str)
def test_what_is_lost_is_what_masks_remove(pattern):
    (mask,) = dict(pattern({"a": torch.rand(12, 20)})).values()
    assert pattern.removes(12, 20) == int((~mask).sum())


def test_local_patterns_have_exceptions_only():
    masks = dict(ruled(NM(2, 4), "down_proj=dense", "layers.2=0.5")(random_saliency()))
    assert gone(masks) == dict(zip(SHAPES, (64, 0, 64, 0, 128), strict=True))
    assert bool((masks["layers.0.q_proj"].reshape(-1, 4).sum(1) == 2).all())
    by_row = dict(ruled(Unstructured(0.5, "row"), "layers.2=0.25")(random_saliency()))
    assert by_row["layers.2.q_proj"].sum(1).tolist() == [12] * 16


def test_the_first_rule_counts():
    pattern = ruled(NM(2, 4), r"0\.q=dense", "q_proj=1:4")
    assert [pattern.pattern_of(name) for name in SHAPES] == [DENSE, NM(2, 4), NM(1, 4), NM(2, 4), NM(1, 4)]


@pytest.mark.parametrize(
    ("base", "rules", "complaint"),
    [
        (Unstructured(0.5, "model"), ["o_proj=dense"], "matches none of the 5 matrices, e.g. layers.0.q_proj"),
        (Unstructured(0.5, "model"), ["proj=0.5", "down=2:4"], "rule down=2:4 has no effect: proj=0.5 before it"),
        (Unstructured(0.5, "model"), ["layers=0.6..0.7"], "between 0.6016 and 0.6966"),
        (Unstructured(0.9, "block"), ["layers.1=0..0.5"], "out of reach"),
        (Unstructured(0.1, "model"), ["layers.[01]=1:4"], "out of reach"),
        (Mixed(0.4, (NM(2, 4), DENSE)), ["layers.[01]=dense"], "between 0.0000 and 0.1667"),
    ],
)
def test_rules_that_cannot_hold_are_refused(base, rules, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        ruled(base, *rules).check(SHAPES)


@pytest.mark.parametrize("text", ["", "down_proj", "=dense", "(=dense", "x=2:1", "x=1.5", "x=0.7..0.3", "x=0.1..2", "x=sparse"])
def test_rules_that_mean_nothing_are_refused(text):
    with pytest.raises(InputError):
        Rule.parse(text)


def test_a_range_that_no_number_of_weights_is_in_has_its_ceiling():
    """0.3 of 5 x 5 weights are 7.5 of them."""
    shapes = {"a": (5, 5), "b": (8, 16)}
    masks = dict(Ruled(Unstructured(0.5, "model"), (Rule("a", "0.3..0.3"),))(random_saliency(shapes=shapes)))
    assert gone(masks) == {"a": 7, "b": removed_count(0.5, total(shapes)) - 7}


@pytest.mark.parametrize("limits", ["0.3..0.4", "0.6..0.7"])
def test_a_range_that_no_number_of_tiles_is_in_is_refused(limits):
    """Of two tiles: a whole layer could go."""
    shapes = {"a": (16, 32), "b": (64, 64)}
    pattern = Ruled(Tiled(Unstructured(0.5, "model"), 16, 16), (Rule("a", limits),))
    with pytest.raises(InputError, match=rf"rule a={limits}: a \[16, 32\] loses whole tiles"):
        pattern.check(shapes)
    Ruled(Tiled(Unstructured(0.5, "model"), 16, 16), (Rule("a", "0.4..0.6"),)).check(shapes)
    pattern.check(shapes | {"a": (8, 32)})  # cannot be tiled at all, and is left to --unsupported


def test_ranges_need_a_shared_budget():
    with pytest.raises(InputError, match=r"a range needs a budget shared by matrices, and 2:4 has none"):
        ruled(NM(2, 4), "q_proj=0.1..0.2")


# ------------------------------------------------------------------------------------------------------------- mixed

ALLOWED = {
    "2:4, dense": (NM(2, 4), DENSE),
    "1:4 to dense": (NM(1, 4), NM(2, 4), NM(3, 4), DENSE),
    "6:8, 1:4": (NM(6, 8), NM(1, 4)),
}


@given(st.integers(0, 20), st.sampled_from(list(ALLOWED)), st.floats(0.26, 0.49))
def test_mixed_totals_are_met_within_one_group(seed, allowed, sparsity):
    pattern = Mixed(round(sparsity, 3), ALLOWED[allowed])
    masks = dict(pattern(random_saliency(seed)))
    short = math.floor(pattern.sparsity * total() + 1e-9) - sum(gone(masks).values())
    assert 0 <= short < pattern.sample_group
    partial = 0
    for mask in masks.values():
        kept = [mask.reshape(-1, nm.m).sum(1) for nm in pattern.allow]
        partial += not any(bool((count == nm.n).all()) for count, nm in zip(kept, pattern.allow, strict=True))
    assert partial <= 1


def test_mixed_is_the_best_choice_of_whole_matrices():
    """Against all choices, at totals that whole matrices reach on the convex hull."""
    saliency, allow = random_saliency(3), (NM(2, 4), DENSE)
    losses = {name: float((s.masked_fill(dict(NM(2, 4)({name: s}))[name], 0) ** 2).sum()) for name, s in saliency.items()}
    order = sorted(saliency, key=lambda name: losses[name] / saliency[name].numel())
    for count in range(1, len(order)):
        chosen = order[:count]
        sparsity = sum(saliency[name].numel() // 2 for name in chosen) / total()
        masks = dict(Mixed(sparsity, allow)(saliency))
        assert {name for name, mask in masks.items() if not bool(mask.all())} == set(chosen)


def test_rules_and_ranges_go_with_mixed_patterns():
    pattern = ruled(Mixed(0.4, (NM(1, 4), NM(2, 4), DENSE)), r"layers\.0=dense", "1.down_proj=0.5..0.8")
    pattern.check(SHAPES)
    count = gone(dict(pattern(random_saliency())))
    assert count["layers.0.q_proj"] == 0
    assert 64 <= count["layers.1.down_proj"] <= 96
    assert 0 <= math.floor(0.4 * total() + 1e-9) - sum(count.values()) < 4


def test_a_sample_settles_mixed_patterns_nearly_as_all_scores_do():
    shapes = {f"layers.{index}.x": (256, 64) for index in range(8)}
    saliency = random_saliency(1, shapes)
    pattern = Mixed(0.3, (NM(2, 4), DENSE))
    sample = {name: scores.reshape(-1, 4)[::7] for name, scores in saliency.items()}
    cut = pattern.prepare_from_sample(sample)
    exact = dict(pattern(saliency))
    differ = sum(int((cut(name, scores) != exact[name]).sum()) for name, scores in saliency.items())
    assert differ < 0.02 * total(shapes)


@pytest.mark.parametrize(("sparsity", "allow"), [(0.6, (NM(2, 4), DENSE)), (0.2, (NM(2, 4), NM(1, 4))), (0.5, (NM(2, 4),))])
def test_mixed_patterns_that_cannot_reach_the_total_are_refused(sparsity, allow):
    with pytest.raises(InputError):
        Mixed(sparsity, allow)


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("scope", ["matrix", "block", "model"])
@pytest.mark.parametrize("tile", [(1, 16), (4, 1), (4, 8)])
def test_tiles_go_as_a_whole_the_cheapest_first(scope, tile):
    height, width = tile
    saliency = random_saliency(2)
    masks = dict(Tiled(Unstructured(0.5, scope), height, width)(saliency))
    for name, mask in masks.items():
        rows, columns = mask.shape
        tiles = mask.reshape(rows // height, height, columns // width, width)
        assert torch.equal(tiles.all(3).all(1), tiles.any(3).any(1))
        if scope == "matrix":
            sums = saliency[name].reshape(tiles.shape).sum((1, 3))
            assert float(sums[tiles.all(3).all(1)].min()) >= float(sums[~tiles.all(3).all(1)].max())
    assert abs(sum(gone(masks).values()) - total() // 2) <= (height * width * len(SHAPES) if scope != "model" else 0)


def test_tiles_take_rules():
    pattern = ruled(Tiled(Unstructured(0.5, "model"), 4, 4), r"layers\.0\.=0..0.25", r"layers\.1\.q=dense")
    pattern.check(SHAPES)
    count = gone(dict(pattern(random_saliency())))
    assert sum(count.values()) == total() // 2
    assert count["layers.0.q_proj"] <= 32
    assert count["layers.1.q_proj"] == 0


@pytest.mark.parametrize(("sparsity", "nm"), [(0.2, NM(4, 5)), (0.3, NM(7, 10)), (0.1, NM(9, 10))])
def test_the_sparsity_of_a_pattern_is_the_number_that_people_write(sparsity, nm):
    """1 - 4 / 5 is a little less than 0.2 in floats."""
    assert nm.sparsity == sparsity
    Mixed(sparsity, (nm, DENSE))
