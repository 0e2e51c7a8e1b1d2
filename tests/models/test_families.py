"""Every family of docs/models.md through every step; the committed table must be what was found."""

import pytest

from families import row, rows, walk
from small_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_happens(family, tmp_path):
    found = row(family, walk(family, tmp_path))
    assert rows().get(family) == found, "docs/models.md is not up to date; run `make models`"


def test_the_table_has_no_other_families():
    assert rows().keys() == FAMILIES.keys()
