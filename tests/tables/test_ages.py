"""What one age cell says."""

import pytest

from brainage_nb.tables.ages import bare_number, parse_age


@pytest.mark.parametrize(
    ("cell", "years"),
    [
        ("35", 35),
        (" 35.5 ", 35.5),
        ("35,5", 35.5),
        ("3.5e1", 35),
        ("023Y", 23),
        ("011M", 11 / 12),
        ("006W", 42 / 365.25),
        ("120D", 120 / 365.25),
        ("23 years", 23),
        ("23yo", 23),
        ("18 months", 1.5),
        ("23y 6m", 23.5),
        ("23 years 6 months", 23.5),
        ("'41'", 41),
        ("３５", 35),
    ],
)
def test_an_age_is_read_in_years(cell, years):
    assert parse_age(cell).years == pytest.approx(years)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("89+", "bound"),
        (">89", "bound"),
        ("≥ 90", "bound"),
        ("90 or older", "bound"),
        ("20-25", "range"),
        ("20–25", "range"),
        ("20 to 25", "range"),
        ("[20, 25)", "range"),
        ("1956-03-12", "date"),
        ("12/03/1956", "date"),
        ("20-May", "date"),
        ("-9", "negative"),
        ("999", "code for missing"),
        ("150", "impossible"),
        ("1956", "impossible"),
        ("0", "newborn"),
        ("~35", "cannot be read"),
        ("35?", "cannot be read"),
        ("35/36", "cannot be read"),
        ("35M", "cannot be read"),  # a man of 35, or 35 months
        ("8²", "cannot be read"),  # an 8 with a footnote, not 82
        ("inf", "cannot be read"),
    ],
)
def test_what_is_not_one_age_gives_none_and_says_why(cell, reason):
    age = parse_age(cell)
    assert age.years is None
    assert reason in age.reason


@pytest.mark.parametrize("cell", ["", " ", "n/a", "N/A", "NaN", "na", "none", ".", "-", "unknown", "#N/A"])
def test_a_blank_cell_is_blank(cell):
    assert parse_age(cell).blank
    assert parse_age(cell).years is None


def test_a_unit_in_the_cell_goes_before_that_of_the_column():
    assert parse_age("023Y", "months").years == 23
    assert parse_age("84", "months").years == 7
    assert parse_age("84", "months").rule == "84 months / 12"


def test_a_comma_before_three_digits_of_days_is_refused():
    assert "thousands" in parse_age("12,345", "days").reason
    assert parse_age("12345", "days").years == pytest.approx(12345 / 365.25)


def test_999_days_are_an_age_and_999_years_a_code():
    assert parse_age("999", "days").years == pytest.approx(999 / 365.25)
    assert parse_age("999", "years").years is None


def test_codes_for_missing_do_not_count_as_numbers():
    assert bare_number("130") == 130
    assert bare_number("35,5") == 35.5
    assert bare_number("999") is bare_number("0") is bare_number("89+") is None
