"""The SoC table and how names are understood."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.errors import UsageError
from sdconvert.soc import find_soc, soc_table

HTP_NAMES = sorted(name for name, soc in soc_table().items() if soc.arch >= 68)


@pytest.mark.parametrize(
    ("name", "soc_model", "arch", "vtcm_mb", "hvx_threads"),
    [
        ("SM8650", 57, 75, 8, 4),
        ("SM8550", 43, 73, 8, 4),
        ("SM8750", 69, 79, 8, 6),
        ("SM8635", 68, 73, 4, 4),
        ("SM8735", 85, 73, 8, 4),
        ("SM8850", 87, 81, 8, 8),
        ("QCM6490", 93, 68, 2, 4),
    ],
)
def test_the_socs_that_matter(name: str, soc_model: int, arch: int, vtcm_mb: int, hvx_threads: int) -> None:
    soc = find_soc(name)
    assert (soc.soc_model, soc.arch, soc.vtcm_mb, soc.hvx_threads) == (soc_model, arch, vtcm_mb, hvx_threads)


@given(st.sampled_from(HTP_NAMES), st.sampled_from(["", "-AB", "-ac", " "]), st.booleans())
def test_case_and_variant_suffix_do_not_matter(name: str, suffix: str, lower: bool) -> None:
    written = name + suffix
    assert find_soc(written.lower() if lower else written) is find_soc(name)


def test_a_trailing_p_is_dropped_only_where_the_name_does_not_own_it() -> None:
    assert find_soc("SM8750P").name == "SM8750"
    assert find_soc("SC8380XP").name == "SC8380XP"


@pytest.mark.parametrize("wrong", ["SM8651", "8 Gen 3", "snapdragon 8 gen 3", "S M8650"])
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str) -> None:
    with pytest.raises(UsageError, match=f"unknown SoC `{wrong}`") as caught:
        find_soc(wrong)
    assert "SM8650 (Snapdragon 8 Gen 3)" in caught.value.hint
    assert caught.value.exit_code == 2


def test_nothing_near_shows_what_a_name_looks_like() -> None:
    with pytest.raises(UsageError) as caught:
        find_soc("!!")
    assert "SM8650" in caught.value.hint


def test_a_hexagon_without_htp_is_refused() -> None:
    with pytest.raises(UsageError, match="V66; the HTP begins with V68"):
        find_soc("SM8250")


def test_notes_say_what_differs_from_the_name() -> None:
    assert find_soc("SM8650").note == ""
    assert find_soc("SM8475").soc_model == find_soc("SM8450").soc_model
    assert "compiled as SM8450" in find_soc("SM8475").note
    assert "no tuning of its own" in find_soc("SM7475").note
    assert "default V68" in find_soc("SM4450").note
    assert "V85" in find_soc("SM8975").note


def test_one_name_per_compiled_soc_is_its_own() -> None:
    """An alias points to a SoC of the table, and agrees with it in every figure."""
    table = soc_table()
    for soc in table.values():
        target = table[soc.soc_type.upper()]
        assert (target.soc_model, target.arch, target.vtcm_mb) == (soc.soc_model, soc.arch, soc.vtcm_mb)
