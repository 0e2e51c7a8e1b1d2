"""What is recorded of objects that have no spelling."""

from dataclasses import dataclass

import pytest

from uniprune import InputError
from uniprune.common import fields


@dataclass(frozen=True)
class Own:
    beta: float = 0.5


OLDER = "it is in no table of uniprune, so JSON alone cannot replay it: give the object itself"


def test_a_record_says_that_it_does_not_replay_whatever_its_note_is(monkeypatch):
    monkeypatch.setattr(fields, "ALONE", "another sentence")
    record = fields.record(Own())
    assert record == {
        "class": f"{__name__}.Own",
        "settings": {"beta": 0.5},
        "replays": False,
        "note": "another sentence",
    }
    monkeypatch.undo()
    assert not fields.replays(record)
    with pytest.raises(InputError, match="Own: it is in no table"):
        fields.check_object(record, "metric", ())


def test_records_of_files_that_have_the_note_alone():
    assert not fields.replays({"class": "own.Metric", "settings": {}, "note": OLDER})


@pytest.mark.parametrize("recorded", ["wanda", 0.5, None, ["2:4"], {}, {"step_size": 0.1}, {"note": 1, "replays": False}])
def test_what_is_spelled_replays(recorded):
    assert fields.replays(recorded)
