"""Which answers count as right: the sheet's table, and its edges."""

import pytest

from luthier.evaluation.text import last_number, matches, normalised, token_f1


@pytest.mark.parametrize(
    ("answer", "wanted", "form", "right"),
    [
        ("rafael nadal", "Rafael Nadal", "caseless", True),
        ("rafael nadal", "Rafael Nadal", "text", False),
        ("20 feet.", "20 feet", "normalised", True),
        ("twenty feet", "20 feet", "normalised", True),
        ("The answer is 20 feet, I think.", "20 feet", "caseless", False),
        ("The answer is 20 feet, I think.", "20 feet", "contains", True),
        ("180", "18", "contains", False),
        ("anything", "the", "contains", False),  # nothing is left to be contained
        ("So she pays $1,234.50.", "1234.5", "number", True),
        ("10 - 3 = 7", "-7", "number", False),
        ("no number", "7", "number", False),
        ('{"b": 1, "a": [2.0]}', '{"a": [2], "b": 1}', "json", True),
        ('{"a": 1', '{"a": 1}', "json", False),
        ("[1, true]", "[1, 1]", "json", False),
        ('" x"', '"x"', "json", False),
        (" x ", "x", "text", True),
    ],
)
def test_the_scorers_table(answer, wanted, form, right):
    assert matches(answer, wanted, form) is right


def test_numbers_as_people_write_them():
    assert last_number("from 3 to 1,000,000") == 1e6 and last_number("is -0.5") == -0.5 and last_number(".75") == 0.75
    assert last_number("v1.2.3") == 0.3 and last_number("") is None


def test_token_f1_by_hand():
    assert token_f1("the red fox", "red fox") == 1 and token_f1("x b c", "b c d") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1 and token_f1("", "x") == 0


def test_normalised_drops_articles_case_and_punctuation():
    assert normalised("The  Quick, brown (fox)!") == "quick brown fox"


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="no form 'fuzzy'"):
        matches("a", "a", "fuzzy")
