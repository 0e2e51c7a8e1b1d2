"""Errors: one line that says what, where and what to do."""

import pickle

import pytest

from uniprune import Recipe
from uniprune.errors import LONGEST, InputError, MismatchError, UniPruneError
from uniprune.saliency import metrics


@pytest.mark.parametrize("kind", [UniPruneError, InputError, MismatchError])
def test_a_message_keeps_its_beginning_and_the_remedy_whatever_values_it_shows(kind):
    assert str(kind("x" * LONGEST)) == "x" * LONGEST
    message = str(kind(f"metric ria: a = {'9' * 4000} is not finite; use a number"))
    assert len(message) < LONGEST
    assert message.startswith("metric ria: a = 999")
    assert message.endswith("999 is not finite; use a number")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(InputError("y" * 3000 + "; do this")))
    assert type(error) is InputError
    assert str(error).endswith("; do this")


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1 << 64])
def test_seeds_that_no_generator_takes_are_refused_at_once(seed):
    with pytest.raises(InputError, match="seed"):
        Recipe(sparsity="0.5", seed=seed)
    with pytest.raises(InputError, match="seed"):
        metrics.parse(f"stochria:seed={seed}")
