"""Numbers keep their exact value under what a reader sees."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.report.html import show_number


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (52.28299987995339, "dB", "52.3 dB"),
        (math.inf, "dB", "∞"),
        (-math.inf, "dB", "-∞"),
        (math.nan, "dB", "NaN"),
        (1234.56, "s", "1,234.6 s"),
        (12 << 20, "bytes", "12.0 MiB"),
        (0.6155938485378764, "ssim", "0.616"),
        (2901, "", "2,901"),
        (0.1234567, "", "0.123457"),
        (1.0, "", "1"),
    ],
)
def test_numbers_read_well(value: float, unit: str, text: str) -> None:
    assert re.sub("<.*?>", "", show_number(value, unit)) == text


def test_where_there_is_no_number_stands_a_dash() -> None:
    assert show_number(None, "dB") == "–"


@given(st.floats(), st.sampled_from(["dB", "s", "ssim", ""]))
def test_exact_value_survives(value: float, unit: str) -> None:
    found = re.match(r'<data value="([^"]+)">', show_number(value, unit))
    assert found
    assert float(found[1]) == value or (math.isnan(value) and math.isnan(float(found[1])))
