"""The search for the largest harmless strength, against what a scan of the whole range would find."""
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradiend.core import InputError
from gradiend.evaluator.search import bisect

STRENGTH = st.floats(1e-6, 1e6)


@given(st.tuples(STRENGTH, STRENGTH).map(sorted), STRENGTH, st.floats(1e-4, 2.0))
def test_the_border_lies_in_the_bracket(bounds, border, precision):
    low, high = bounds
    asked = []
    found = bisect(lambda x: asked.append(x) or x <= border, low, high, precision=precision)
    assert len(asked) <= 12 and [x for x, _ in found.tried] == asked and all(kept == (x <= border) for x, kept in found.tried)
    if border >= high: assert (found.keeps, found.fails) == (high, math.inf) and len(asked) == 1
    elif border < low: assert (found.keeps, found.fails) == (0.0, low)
    else:
        assert found.keeps <= border < found.fails
        if found.keeps > low: assert found.keeps in asked
        assert found.precision <= precision * (1 + 1e-9) or len(asked) >= 11


@given(st.sets(st.integers(0, 200)))
def test_what_is_returned_was_measured(harmful):
    "Also where harmless and harmful strengths alternate, the answer is harmless and something close above it is not."
    def harmless(x): return int(round(100 * math.log10(x / 0.1))) not in harmful
    found = bisect(harmless, 0.1, 10.0, precision=0.02)
    if found.keeps: assert harmless(found.keeps)
    if math.isfinite(found.fails): assert not harmless(found.fails)
    if found.keeps and math.isfinite(found.fails): assert found.fails / found.keeps - 1 <= 0.02


def test_the_default_range_takes_nine_measurements():
    for border in (0.0015, 0.3, 7.7, 99.0):
        found = bisect(lambda x: x <= border, 0.001, 100.0)  # noqa: B023
        assert len(found.tried) <= 10 and found.precision <= 0.05
    assert len(bisect(lambda x: x <= 3.0, 0.001, 100.0).tried) == 9


def test_one_strength_only():
    assert bisect(lambda x: True, 1.0, 1.0).keeps == 1.0
    assert bisect(lambda x: False, 1.0, 1.0).tried == ((1.0, False),)


@pytest.mark.parametrize("wrong", [{"low": 0.0}, {"low": -1.0}, {"low": 3.0}, {"high": math.inf}, {"high": math.nan}, {"precision": 0.0}, {"precision": math.nan}, {"limit": 1}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(InputError):
        bisect(lambda x: True, **{"low": 1.0, "high": 2.0, **wrong})
