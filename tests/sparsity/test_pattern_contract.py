"""What all patterns keep to, combined ones and those of a user's own included."""

import json
import math

import pytest
import torch

from own import FirstInputs
from uniprune import Recipe
from uniprune.errors import InputError
from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE, NM
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.spelling import PATTERNS, parse
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.structure import settings
from uniprune.sparsity.views import Comparable, ScaledToMeanOne, View, comparable_for

ONE_OF_EACH = [
    NM(2, 4),
    NM(3, 4),
    NM(4, 8),
    DENSE,
    *(Unstructured(0.3, scope) for scope in ("row", "matrix", "block", "model")),
    Unstructured(0.123456789, "model"),
    Unstructured(0.0),
    Unstructured(1.0, "matrix"),
    Tiled(Unstructured(0.5, "row"), 1, 4),
    Tiled(Unstructured(0.5, "model"), 4, 4),
]
COMBINED = [
    Mixed(0.4, (NM(2, 4), NM(1, 4), DENSE)),
    Ruled(Unstructured(0.3, "model"), (Rule("1.q_proj", "dense"), Rule("down", "0.4..0.5"))),
    Ruled(NM(2, 4), (Rule("down", "1:4"),)),
]
ALL_PATTERNS = [*ONE_OF_EACH, *COMBINED, FirstInputs()]
SHAPES = {f"layers.{block}.{kind}": shape for block in (0, 1) for kind, shape in {"q_proj": (16, 32), "down": (8, 64)}.items()}


def saliency(ties=False):
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (4 * scores).round() / 4 for name, scores in found.items()} if ties else found


def budget(pattern):
    """How many weights go, counted as it is promised: by row, matrix, block or model."""
    total = 0
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    if not pattern.local:
        groups = [list(SHAPES)] if getattr(pattern, "scope", "") != "block" else [list(SHAPES)[:2], list(SHAPES)[2:]]
        return sum(math.floor(pattern.sparsity * sum(sizes[name] for name in group) + 1e-6) for group in groups)
    for name, (rows, columns) in SHAPES.items():
        part = pattern.pattern_of(name)
        by_row = getattr(part, "scope", "") == "row"
        total += rows * math.floor(part.sparsity * columns + 1e-6) if by_row else math.floor(part.sparsity * sizes[name] + 1e-6)
    return total


def test_the_list_has_one_of_each():
    assert {type(pattern) for pattern in ONE_OF_EACH} == set(PATTERNS)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
def test_masks(pattern, ties):
    """Of the right shape, as many weights as promised, the same again; by hand in two steps, and on another scale."""
    scores = saliency(ties)
    masks = dict(pattern(scores))
    assert list(masks) == list(SHAPES)
    assert all((mask.dtype, mask.shape) == (torch.bool, scores[name].shape) for name, mask in masks.items())
    gone = sum(int((~mask).sum()) for mask in masks.values())
    assert budget(pattern) - getattr(pattern, "sample_group", 0) * isinstance(pattern, Mixed) <= gone <= budget(pattern)
    create = pattern.prepare(scores)
    louder = dict(pattern({name: 4 * one for name, one in scores.items()}))
    for name, mask in masks.items():
        assert torch.equal(create(name, scores[name]), mask)
        assert torch.equal(louder[name], mask)


@pytest.mark.parametrize("pattern", [pattern for pattern in ALL_PATTERNS if pattern.local], ids=str)
def test_they_know_what_a_matrix_loses_and_whether_its_rows_lose_alike(pattern):
    for name, mask in pattern(saliency()):
        part = pattern.pattern_of(name)
        assert part.removes(*SHAPES[name]) == int((~mask).sum())
        assert part.by_row == (isinstance(part, NM) or (isinstance(part, Unstructured) and part.scope == "row"))
        assert not part.by_row or len({*mask.sum(1).tolist()}) == 1


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
def test_a_sample_gives_nearly_the_same(pattern):
    """All scores are a sample, too: without ties there, no mask differs."""
    scores = saliency()
    create, masks = pattern.prepare_from_sample(scores), dict(pattern(scores))
    assert all(torch.equal(create(name, scores[name]), mask) for name, mask in masks.items())


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
def test_parts_say_what_a_matrix_gets_and_what_does_not_fit(pattern):
    alone = {name: pattern.pattern_of(name) for name in SHAPES}
    assert all(part.unsupported(*SHAPES[name]) is None for name, part in alone.items())
    if pattern.local:
        masks = dict(pattern(saliency()))
        for name, part in alone.items():
            assert torch.equal(dict(part({name: saliency()[name]}))[name], masks[name])
    for part in alone.values():
        reason = part.unsupported(7, 13)
        assert reason is None or "divisible" in reason
        assert (reason is None) == (part == DENSE or isinstance(part, (Unstructured, Mixed)))  # Mixed: one of them is dense


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
def test_a_recipe_takes_it_and_its_record_says_it(pattern):
    recipe = Recipe(sparsity=pattern, controller="none")
    assert recipe.pattern() == pattern
    record = json.loads(json.dumps(recipe.record()))
    if isinstance(pattern, FirstInputs):
        assert record["sparsity"]["class"] == "own.FirstInputs"
        assert record["sparsity"]["settings"] == {"keep": 3, "of": 4}
        with pytest.raises(InputError, match=r"own\.FirstInputs: it is in no table"):
            Recipe(**record)
    else:
        assert Recipe(**record).pattern() == pattern
        assert Recipe(**record).record() == recipe.record()


@pytest.mark.parametrize("pattern", ONE_OF_EACH, ids=str)
def test_spellings_come_back(pattern):
    assert parse(*pattern.spelling) == pattern
    assert settings(pattern)["sparsity"] == pattern.spelling[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sparsity": NM(2, 4), "scope": "row"}, "scope = 'row' does not go with 2:4"),
        ({"sparsity": Unstructured(0.5, "matrix"), "scope": "row"}, "scope = 'row' does not go with 0.5 by matrix"),
        ({"sparsity": FirstInputs(), "scope": "row"}, "scope = 'row' does not go with the first 3 of 4 inputs"),
        ({"sparsity": COMBINED[2], "rules": "q_proj=dense"}, "rules = 'q_proj=dense' does not go with 2:4; down=1:4"),
        ({"sparsity": FirstInputs(), "allow": "2:4,dense"}, "--allow goes with a fraction"),
        ({"sparsity": FirstInputs(), "size": "1MB"}, "a fixed pattern has one size"),
        ({"sparsity": FirstInputs}, "FirstInputs is a class"),
        ({"sparsity": True}, "True is neither a spelling nor a sparsity"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        Recipe(**settings)


def test_rules_go_with_patterns_of_ones_own():
    pattern = Recipe(sparsity=FirstInputs(), rules="down=dense").pattern()
    assert (pattern.pattern_of("layers.0.down"), pattern.pattern_of("layers.0.q_proj")) == (DENSE, FirstInputs())


def test_scores_are_put_on_one_scale_only_where_they_are_compared():
    local, corrected = View(saliency()), Comparable(saliency())
    shared, by_row = Unstructured(0.5, "model"), Unstructured(0.5, "row")
    assert isinstance(comparable_for(local, shared), ScaledToMeanOne)
    assert comparable_for(local, by_row) is local
    assert comparable_for(corrected, shared) is corrected
