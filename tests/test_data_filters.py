"Edge cases of gradiend.data.filters, on the exported package."
import random
import re

import pytest

from gradiend.core import InputError
from gradiend.data.filters import Match, TextFilterConfig, check_filters, find_matches

SG, PL = TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")


def words(text, *configs):
    return [m.word for m in find_matches(text, configs or (SG, PL))]


@pytest.mark.parametrize("text, expected", [
    ("He's here and it'll rain", []), ("it’s, they’ve, she’d", []), ("'it' is \"it\"", ["it", "it"]), ("the boys' it", ["it"]),
    ("IT and HE and THEY", []), ("she-wolf, it-girl, do-it-yourself", []), ("so it - they said - is", ["it", "they"]),
    ("they…it/he", ["they", "it", "he"]), ("there, then, other, iterate", []), ("it_ 2it it2", []), ("ité, étit", []),
])
def test_whole_words(text, expected):
    assert words(text) == expected


def test_capitals_of_the_description():
    us, pronoun = TextFilterConfig("US", id="country"), TextFilterConfig("us", id="1PL")
    assert [(m.word, m.class_id) for m in find_matches("The US told us. Us too.", [us, pronoun])] == \
        [("US", "country"), ("us", "1PL"), ("Us", "1PL")]
    assert words("He he", TextFilterConfig("He", case_sensitive=True)) == ["He"]
    assert words("er Er ER", TextFilterConfig("er")) == ["er", "Er"]
    assert words("Äpfel äpfel", TextFilterConfig("äpfel")) == ["Äpfel", "äpfel"]


def test_targets_that_are_no_plain_words():
    c = TextFilterConfig(["C++", ".NET", "a.b", "New York"], id="x")
    assert words("C++, C++x .NET x.NET a.b acb New York New Yorker", c) == ["C++", ".NET", "a.b", "New York"]


def test_the_order_of_classes_does_not_matter():
    york, new = TextFilterConfig("York", id="Y"), TextFilterConfig("New York", id="N")
    for order in ([york, new], [new, york]):
        assert [(m.word, m.class_id) for m in find_matches("York and New York", order)] == [("York", "Y"), ("New York", "N")]


def test_decomposed_target_and_single_config():
    assert words("été", TextFilterConfig("e\u0301te\u0301")) == ["été"]
    assert find_matches("it", SG) == [Match(0, 2, "it", "it", "3SG")]


def test_left_context():
    c = TextFilterConfig("it", min_left_context_words=2)
    assert words("it is it, it", c) == ["it", "it"]


@pytest.mark.parametrize("configs, message", [
    ([], "no class is described"), ([SG, SG], "two classes are named"), ([SG, "they"], "must be a TextFilterConfig"),
    ([SG, TextFilterConfig(["they", "It"], id="x")], "the word 'It'"),
    ([SG, TextFilterConfig("him", id="3SG")], "two classes are named id='3SG'"),
])
def test_contradictions(configs, message):
    with pytest.raises(InputError, match=message): check_filters(configs)
    with pytest.raises(InputError, match=message): find_matches("it", configs)


def test_against_a_word_by_word_search():
    rng = random.Random(1)
    pieces = ["it", "It", "they", "She", "x", "it's", "-", ".", ",", "IT", "he-goat", "\u00a0", "’", "the", "they're", "é"]
    for _ in range(500):
        text = "".join(rng.choice(pieces) + rng.choice(["", " ", " "]) for _ in range(15))
        runs = [m.group() for m in re.finditer(r"\w+(?:['’-]\w+)*", text)]
        assert words(text) == [r for r in runs if r in {**SG.forms(), **PL.forms()}]
