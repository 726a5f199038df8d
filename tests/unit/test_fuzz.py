"""Some of the cases of tests/fuzz.py: what comes from elsewhere is refused in words, or possible."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_what_is_changed_at_random_is_refused_or_possible(kind):
    found = fuzz.run(kind, first=0, count=80)
    assert sum(found.values()) == 80 and min(found.values()) > 0


def test_the_slow_rules_know_what_is_impossible():
    rows, meta = fuzz._rows(fuzz.random.Random(3))
    assert fuzz.impossible(rows[0], meta) == ""
    rows[0].response_ids = rows[0].response_ids.copy()
    rows[0].response_ids[0] = fuzz.VOCABULARY
    assert fuzz.impossible(rows[0], meta) == "an id is no token"
