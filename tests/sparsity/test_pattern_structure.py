"""Patterns as data: nobody who reads of one has to parse its spelling."""

from dataclasses import dataclass

import pytest

from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE, NM
from uniprune.sparsity.patterns.protocol import BasePattern
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.structure import Structure, claimed, structure

LEVEL = Unstructured(0.5, "model")
CASES = [
    (LEVEL, {"kind": "unstructured", "sparsity": 0.5, "scope": "model"}, "one budget for the whole model"),
    (
        Unstructured(0.3, "block"),
        {"kind": "unstructured", "sparsity": 0.3, "scope": "block"},
        "the same share of every decoder block",
    ),
    (NM(2, 4), {"kind": "N:M", "sparsity": 0.5, "n": 2, "m": 4}, "2:4, that is 2 of every 4 consecutive weights kept"),
    (
        Tiled(Unstructured(0.75, "row"), 16, 8),
        {"kind": "tiles", "sparsity": 0.75, "scope": "row", "height": 16, "width": 8},
        "0.75 by row of 16x8 tiles",
    ),
    (Mixed(0.45, (NM(2, 4), DENSE)), {"kind": "mixed", "sparsity": 0.45, "allow": ["dense", "2:4"]}, "0.45 in dense, 2:4"),
]


@pytest.mark.parametrize(("pattern", "data", "words"), CASES, ids=lambda case: str(case)[:20])
def test_what_a_pattern_is(pattern, data, words):
    found = structure(pattern)
    assert found.model_dump(exclude_unset=True) == data | {"spelling": str(pattern)}
    assert found.words == words
    assert found.nm == (":" in str(pattern))
    assert claimed(str(pattern)) == found
    assert Structure.model_validate(found.model_dump()) == found


def test_rules_stand_beside_what_they_rule():
    ruled = Ruled(NM(2, 4), (Rule("o_proj", "dense"), Rule("q=k", "0.5")))
    found = structure(ruled)
    assert found.spelling == "2:4"
    assert [(rule.match, rule.what) for rule in found.rules] == [("o_proj", "dense"), ("q=k", "0.5")]
    assert found.words == "2:4, that is 2 of every 4 consecutive weights kept; o_proj=dense; q=k=0.5"
    assert claimed(str(ruled)) == found


def test_a_pattern_of_somebody_elses_has_its_name():
    @dataclass(frozen=True)
    class Halves(BasePattern):
        sparsity: float = 0.5

        def __str__(self):
            return "halves"

    assert structure(Halves()).model_dump(exclude_unset=True) == {"kind": "Halves", "spelling": "halves", "sparsity": 0.5}
    assert structure(Halves()).words == "halves"


@pytest.mark.parametrize("text", ["zeros of x", "union of (2:4) and (4:8)", "5:4", "0.50 by row", "0.123456 by row", ""])
def test_other_claims_are_no_pattern(text):
    assert claimed(text) is None
