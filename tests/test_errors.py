"""Errors: one line that says what, where and what to do."""

import pickle

import pytest

from uniprune.errors import LONGEST, InputError, MismatchError, UniPruneError


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
