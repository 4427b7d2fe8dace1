"Edge cases of gradiend.data.filters, on the exported package."
import dataclasses
import json
import random
import re
import sys
import unicodedata

import pytest

spacy = pytest.importorskip("spacy")
pytest.importorskip("ahocorasick")
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from spacy.lookups import Lookups  # noqa: E402
from spacy.tokens import Doc  # noqa: E402

from gradiend.core import InputError, MissingExtraError, fingerprint  # noqa: E402
from gradiend.data.filters import (  # noqa: E402
    Match,
    Matcher,
    PairedTextFilterConfig,
    TextFilterConfig,
    check_filters,
    find_matches,
)

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


# ---- the two searches, the slow one, and texts in any spelling ------------------------------------------------------

TARGETS = ["he", "it", "IT", "I", "us", "US", "York", "New York", "New", "C++", "C", "C#", "'s", "-ly", "é", "été", "über", "it's", "a.b", "x y z", "y", "क"]
PIECES = [*TARGETS, "He", "Us", "It", "e\u0301", "u\u0308ber", "’s", "‐ly", " ", " ", " ", "\u00a0", "\n", "-", "'", "’", ".", "+", "#", "_", "2", "\u0301", "\u00ad",
          "\u200b", "की", "😀", "\u1112\u1161\u11ab", "the", "", "“", "—", "ß", "ǆ", "İ"]


@st.composite
def descriptions(draw):
    chosen = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=16, unique=True))
    return [TextFilterConfig(w, case_sensitive=draw(st.booleans()) or None) for w in chosen]


def plainly(text):
    "The text as it is searched, character by character, with the place each one came from."
    same = text.translate(str.maketrans({"’": "'", "‐": "-", "\u00a0": " "}))
    pieces, places, i = [], [], 0
    while i < len(same):
        j = i + 1
        while j < len(same) and (unicodedata.category(same[j])[0] == "M" or "\u1160" <= same[j] <= "\u11ff"): j += 1
        letter = unicodedata.normalize("NFC", same[i:j])
        if letter.isspace() and pieces and pieces[-1].isspace(): letter = ""
        if letter not in ("\u00ad", "\u200b"):
            for c in " " if letter.isspace() else letter:
                pieces.append(c)
                places.append((i, j))
        i = j
    return "".join(pieces), places


def slowly(text, filters):
    "All spellings at all places, one after the other: the meaning of the search, spelled out."
    spellings = {form: (target, c.class_id) for c in filters for form, target in c.forms().items()}
    plain, places = plainly(text) if any(" " in s for s in spellings) or not text.isascii() else (text, [(i, i + 1) for i in range(len(text))])
    def word(c): return c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M"
    def alone(i, j):
        before, after = plain[:i], plain[j:]
        left = plain[i] in "'-" or not (before and word(before[-1]) or len(before) > 1 and before[-1] in "'-" and word(before[-2]))
        if after and after[0] in "+#" and (word(plain[j - 1]) or plain[j - 1] in "+#"): return False
        right = plain[j - 1] in "'-" or not (after and word(after[0]) or len(after) > 1 and after[0] in "'-" and word(after[1]))
        return left and right
    found, i = [], 0
    while i < len(plain):
        here = [s for s in spellings if plain.startswith(s, i) and alone(i, i + len(s))]
        if here:
            best = max(here, key=len)
            start, end = places[i][0], places[i + len(best) - 1][1]
            found.append(Match(start, end, text[start:end], *spellings[best]))
        i += len(max(here, key=len)) if here else 1
    return found


def every_target(): return [TextFilterConfig(w) for w in TARGETS]


@settings(max_examples=250, deadline=None)
@example(every_target(), "New York2 and C++ or C, New Yorkers, it's John's x y z y")
@example(every_target(), "C+++ C++ C## C#+ C+")
@example(every_target(), "e\u0301te\u0301s th\u00adey it\u200b u\u0308ber  New\n\nYork ’s")
@given(st.one_of(descriptions(), st.builds(every_target)), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_automaton_expression_and_slow_search_agree(filters, text):
    try: fast, plain = Matcher(filters, automaton=True), Matcher(filters, automaton=False)
    except InputError:
        with pytest.raises(InputError, match="is in the classes"): check_filters(filters)
        return
    hits = fast.lexical(text)
    assert hits == plain.lexical(text)
    found = fast.resolve(text, hits)
    assert found == slowly(text, filters)
    assert fast.find(text) == plain.find(text) == found
    assert found == sorted(found, key=lambda m: m.start) and all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))


SIMPLE = ["he", "He", "it", "they", "THEY", "the", " ", "  ", ", ", ".", "'", "-", "--", "—", "…", "é", "“", "’", "\u0301", "_", "2", "\t", "\u00ad"]


@settings(max_examples=400, deadline=None)
@example("thé é-he he-é 'it' it's—they…he he")
@given(st.lists(st.sampled_from(SIMPLE), max_size=14).map("".join))
def test_one_step_finds_what_two_steps_find(text):
    fast, slow = Matcher([SG, PL]), Matcher([SG, PL], automaton=False)
    assert fast._search is not None and fast.find(text) == slow.resolve(text, slow.lexical(text)) == slowly(text, [SG, PL])


@settings(max_examples=100, deadline=None)
@given(descriptions(), st.text(max_size=30))
def test_any_text(filters, text):
    try: fast, plain = Matcher(filters, automaton=True), Matcher(filters, automaton=False)
    except InputError: return
    hits = fast.lexical(text)
    assert hits == plain.lexical(text)
    cut = [(h.start, h.end) for h in hits]
    rest = [text[a:b] for a, b in zip([0, *(e for _, e in cut)], [*(s for s, _ in cut), len(text)], strict=True)]
    words_cut = [text[s:e] for s, e in cut]
    assert "".join(r + w for r, w in zip(rest, [*words_cut, ""], strict=True)) == text   # nothing lost, nothing doubled


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["they", "They", "it’s", "été", "New York", "bit", "theys", ",", "(it)", "Zoë"]), max_size=12).map(" ".join))
def test_decomposing_a_text_changes_no_match(text):
    filters = [TextFilterConfig(["they", "été", "Zoë"], id="a"), TextFilterConfig(["it", "New York"], id="b")]
    composed, decomposed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    same = [[(unicodedata.normalize("NFC", m.word), m.target, m.class_id) for m in find_matches(t, filters)] for t in (composed, decomposed)]
    assert same[0] == same[1]
    assert all(decomposed[m.start:m.end] == m.word for m in find_matches(decomposed, filters))


def test_without_pyahocorasick(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ahocorasick", None)
    matcher = Matcher([SG, PL])
    assert [m.word for m in matcher.resolve("They saw it.", matcher.lexical("They saw it."))] == ["They", "it"]
    with pytest.raises(MissingExtraError, match=r'pip install "gradiend\[data\]"'): Matcher([SG, PL], automaton=True)


@pytest.mark.parametrize("targets, text, expected", [
    ("'s", "John's, it’s 's s", ["'s", "’s", "'s"]), ("n't", "don't isn't n't", ["n't"]), ("-ly", "quick-ly -ly ly", ["-ly", "-ly"]),
    ("C++", "(C++) C++'s C++! xC++ C++x", ["C++", "C++"]), ("C#", "C#, C#7", ["C#"]), ("C", "C C++ C# C++11 C+x (C) C, C + C", ["C"] * 5), (["C", "C++"], "C++ or C", ["C++", "C"]), (".NET", "ASP.NET .NET", [".NET"]),
    ("New York", "New York, new york, NEW YORK, New\tYork", ["New York", "new york", "New\tYork"]), ("$", "5 $, $5", ["$"]),
    ("it", "IT it It iT", ["it", "It"]), ("IT", "IT it It", ["IT"]), ("I", "I i I'm I.", ["I", "I"]), ("us", "US us Us U.S.", ["us", "Us"]),
    (["us", "US"], "US us Us", ["US", "us", "Us"]), ("ich", "Ich ich ICH dich", ["Ich", "ich"]), ("ἐγώ", "ἐγώ Ἐγώ", ["ἐγώ", "Ἐγώ"]),
    ("они", "Они они онир", ["Они", "они"]), ("クラス", "クラス クラスx", ["クラス"]), ("naïve", "nai\u0308ve naïve naive", ["nai\u0308ve", "naïve"]),
])
def test_words_of_all_kinds(targets, text, expected):
    assert words(text, TextFilterConfig(targets, id="x")) == expected


def test_a_shorter_word_is_hidden_even_if_the_longer_one_does_not_count():
    york = TextFilterConfig("York", id="Y")
    late = TextFilterConfig("New York", id="N", min_left_context_words=5)
    matcher = Matcher([york, late])
    text = "New York and York"
    assert [m.start for m in matcher.resolve(text, matcher.lexical(text))] == [13]
    assert [m.start for m in matcher.resolve(text, matcher.lexical(text), active={"Y"})] == [13]


def test_left_context_is_inherited_from_the_caller():
    text = "it is it and it"
    def starts(config, **options): return [m.start for m in Matcher(config, **options).resolve(text, Matcher(config).lexical(text))]
    assert starts(SG) == [0, 6, 13]
    asked = TextFilterConfig("it", min_left_context_words=1)
    matcher = Matcher(asked, min_left_context_words=4)
    assert [m.start for m in matcher.resolve(text, matcher.lexical(text))] == [6, 13]
    matcher = Matcher(SG, min_left_context_words=4)
    assert [m.start for m in matcher.resolve(text, matcher.lexical(text))] == [13]


# ---- analysis -------------------------------------------------------------------------------------------------------

VOCAB = spacy.blank("de").vocab
DER = [TextFilterConfig("der", id=name, spacy_tags=tags) for name, tags in {
    "Nom": {"Case": "Nom"}, "Gen.Fem": {"Case": "Gen", "Gender": "Fem"}, "Gen.Plur": {"Case": "Gen", "Number": "Plur"}}.items()]


def analysed(*tokens, lemmas=None):
    "A sentence with tags: (word, morphology) or a plain word."
    pairs = [(t, "") if isinstance(t, str) else t for t in tokens]
    return Doc(VOCAB, words=[w for w, _ in pairs], morphs=[m for _, m in pairs], pos=["X"] * len(pairs), lemmas=lemmas)


def test_tags_decide_and_two_fitting_classes_cancel():
    doc = analysed(("Der", "Case=Nom"), ("der", "Case=Gen|Gender=Fem"), ("der", "Case=Gen|Number=Plur"), ("der", "Case=Gen|Gender=Fem|Number=Plur"), ("der", "Case=Dat"))
    assert [m.class_id for m in find_matches(doc.text, DER, doc)] == ["Nom", "Gen.Fem", "Gen.Plur"]


def test_phrases_with_tags_and_lemmas():
    doc = analysed("in", ("New", "NameType=Geo"), ("York", "Number=Sing"), "and", "York")
    assert [m.word for m in find_matches(doc.text, TextFilterConfig("New York", spacy_tags={"Number": "Sing"}), doc)] == ["New York"]
    assert find_matches(doc.text, TextFilterConfig("New York", spacy_tags={"Number": "Plur"}), doc) == []
    gave = analysed("She", "gave", "up", "GAVE", "UP", lemmas=["she", "give", "up", "give", "up"])
    assert [m.word for m in find_matches(gave.text, TextFilterConfig("give up", use_lemma=True), gave)] == ["gave up"]


def test_nested_descriptions_each_have_their_tags():
    config = TextFilterConfig(["des", {"targets": "der", "spacy_tags": {"Number": "Plur"}}], id="Gen", spacy_tags={"Case": "Gen"})
    doc = analysed(("der", "Case=Gen|Number=Plur"), ("der", "Case=Gen|Number=Sing"), ("des", "Case=Gen"), ("des", "Case=Nom"))
    assert [m.start for m in find_matches(doc.text, config, doc)] == [0, 8]


def test_lemmas_and_capitals():
    doc = analysed("I", "me", "IT", "it", "Went", "US", "us", lemmas=["I", "I", "it", "it", "go", "US", "we"])
    def found(*targets): return [m.word for m in find_matches(doc.text, TextFilterConfig(list(targets), id="x", use_lemma=True), doc)]
    assert found("I") == ["I", "me"] and found("it") == ["it"] and found("US") == ["US"] and found("we") == ["us"] and found("go") == ["Went"]


def test_lemma_forms_from_tables_agree_with_analysing_every_text():
    lookups = Lookups()
    lookups.add_table("lemma_rules", {"verb": [["ies", "y"], ["es", ""], ["s", ""], ["ing", ""]]})
    lookups.add_table("lemma_exc", {"verb": {"went": ["go"], "gone": ["go"]}})
    lookups.add_table("lemma_index", {"verb": ["go", "carry", "give"]})
    nlp = spacy.blank("en")
    nlp.add_pipe("attribute_ruler").add([[{}]], {"POS": "VERB"})
    nlp.add_pipe("lemmatizer", config={"mode": "rule"}).initialize(lookups=lookups)
    config = TextFilterConfig(["go", "carry"], id="move", use_lemma=True)
    told, untold = Matcher(config, nlp=nlp), Matcher(config)
    assert not told.every_text and untold.every_text == {"move"}
    rng = random.Random(2)
    pieces = ["go", "goes", "Went", "went", "gone", "going", "carries", "Carry", "carrying", "GOES", "ego", "it's", "go-between", ".", "home", "go's"]
    for _ in range(60):
        text = " ".join(rng.choices(pieces, k=8))
        doc, hits = nlp(text), told.lexical(text)
        assert told.resolve(text, hits, doc if told.needs_doc(hits) else None) == untold.resolve(text, untold.lexical(text), doc)


def test_only_active_classes_need_an_analysis():
    matcher = Matcher([*DER, PL])
    hits = matcher.lexical("der sagt they")
    assert matcher.needs_doc(hits) and not matcher.needs_doc(hits, active={"3PL"}) and not matcher.needs_doc(matcher.lexical("they"))
    assert [m.word for m in matcher.resolve("der sagt they", hits, active={"3PL"})] == ["they"]
    with pytest.raises(InputError, match=r"must be analysed \(morph\): pass doc"): matcher.resolve("der sagt they", hits)
    with pytest.raises(InputError, match="not of 'der sagt they'"): matcher.resolve("der sagt they", hits, analysed("x"))


def test_an_analysis_that_lacks_what_is_asked_for():
    blank = spacy.blank("de")
    with pytest.raises(InputError, match="doc of 'der' has no morph: use a pipeline"): find_matches("der", DER, blank("der"))
    assert find_matches("they", [*DER, PL], blank("they"))[0].word == "they"          # not needed here
    go = TextFilterConfig("go", use_lemma=True)
    doc = analysed("I", "went")
    with pytest.raises(InputError, match="doc of 'I went ' has no lemma"): find_matches(doc.text, go, doc)
    tags = TextFilterConfig("go", id="x", spacy_tags={"tag": "VB", "Mood": "Ind", "pos": "X"})
    with pytest.raises(InputError, match="doc of 'go ' has no tag: "): find_matches("go ", tags, analysed("go"))
    with pytest.raises(InputError, match="has no morph, pos, tag: "): find_matches("go", tags, blank("go"))
    name = TextFilterConfig("rose", spacy_tags={"ent_type": "PERSON"})
    with pytest.raises(InputError, match="has no ent_type"): find_matches("rose", name, blank("rose"))
    assert find_matches("rose ", name, Doc(VOCAB, words=["rose"], ents=["O"])) == []   # analysed, and no name


def test_the_pipeline_is_checked():
    nlp = spacy.blank("de")
    with pytest.raises(InputError, match="nothing that annotates morph"): Matcher(DER, nlp=nlp)
    nlp.add_pipe("morphologizer").add_label("Case=Nom|Gender=Masc")
    with pytest.raises(InputError, match="Case='Gen' is never written"): Matcher(DER, nlp=nlp)
    assert Matcher(DER[:1], nlp=nlp).annotations == {"morph"}


def test_pairs():
    pairs = [PairedTextFilterConfig([("his", "her")], ["M", "F"], spacy_tags={"Poss": "Yes"}),
             PairedTextFilterConfig([("him", "her"), ("he", "she")], ["M", "F"], spacy_tags={"Poss": "!Yes"})]
    doc = analysed(("Her", "Poss=Yes"), "father", "saw", "her", ("his", "Poss=Yes"), "he")
    assert [(m.class_id, m.partners) for m in find_matches(doc.text, pairs, doc)] == \
        [("F", (("M", "his"),)), ("F", (("M", "him"),)), ("M", (("F", "her"),)), ("M", (("F", "she"),))]


def test_same_word_in_two_classes_without_tags_that_differ():
    a = TextFilterConfig("der", id="a", spacy_tags={"Case": "Nom"})
    for tags in (None, {"Case": "Nom"}, {"Case": ["Nom", "Gen"]}, {"Case": "Nom", "Gender": "Masc"}):
        with pytest.raises(InputError, match="the word 'der' is in the classes 'a' and 'b'.*tell them apart"):
            Matcher([a, TextFilterConfig("der", id="b", spacy_tags=tags)])
    assert Matcher([a, TextFilterConfig("der", id="b", spacy_tags={"Case": "Gen"})]).annotations == {"morph"}


def test_descriptions_survive_writing_down():
    for config in (*DER, SG, TextFilterConfig([{"targets": ["a", "b"], "use_lemma": False}, "c"], id="x", use_lemma=True, min_left_context_words=0)):
        assert TextFilterConfig(**json.loads(json.dumps(config.to_dict()))) == config
    paired = PairedTextFilterConfig({"M": ["he"], "F": ["she"]}, case_sensitive=True)
    assert PairedTextFilterConfig(**json.loads(json.dumps(paired.to_dict()))) == paired
    assert dataclasses.replace(SG, id="other").words == SG.words and fingerprint(SG) != fingerprint(PL)
