"Edge cases of gradiend.data.text, on the exported package."
import os
import pickle
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiend.core import InputError
from gradiend.data.text import TextPreprocessConfig, content_hash, near_key, normalise, preprocess, split_sentences

TEXT = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" .!?\n\t\"'“”’aA1ée\u0301\u200d\u00ad\u2003。「」")))


def plainly(text):
    "What `normalise` promises, character by character."
    quotes = {**dict.fromkeys("‘’‚‛′", "'"), **dict.fromkeys("“”„‟″", '"')}
    kept = "".join(quotes.get(c, c) for c in text if c not in "\u00ad\u200b\u200c\u200d\u2060\ufeff")
    return " ".join(unicodedata.normalize("NFC", kept).split())


@given(TEXT)
def test_normalise(text):
    once = normalise(text)
    assert once == plainly(text) and normalise(once) == once


def test_normalise_keeps_words():
    assert normalise("  ‘a’\u2003“b” \r\n c\u00add ") == "'a' \"b\" cd"
    assert normalise("") == ""
    assert normalise("e\u200b\u0301") == "é"


@given(TEXT)
def test_sentences_hold_the_whole_text(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(s and s == s.strip() for s in sentences)


@pytest.mark.parametrize("text, expected", [
    ("He met Mrs. Green. She smiled.", ["He met Mrs. Green.", "She smiled."]),
    ("It cost 3.5 euros. 20 came.", ["It cost 3.5 euros.", "20 came."]),
    ('"Stop!" he cried. "Why?" They ran.', ['"Stop!" he cried.', '"Why?"', "They ran."]),
    ("J. R. R. Tolkien wrote it. So did I. Really.", ["J. R. R. Tolkien wrote it.", "So did I.", "Really."]),
    ("One\n\ntwo\n \nThree", ["One", "two", "Three"]), ("See fig. 3 and e.g. Rome.", ["See fig. 3 and e.g. Rome."]),
    ("   ", []), ("A.", ["A."]), ("...", ["..."]), ("Well... Yes.", ["Well...", "Yes."]),
    ("He said no. Then he left. See no. 7.", ["He said no.", "Then he left.", "See no. 7."]),
    ("Read Vol. II today. He studied art. She sang.", ["Read Vol. II today.", "He studied art.", "She sang."]),
    ("Am 12. Mai kam er. Der 2. Zug fuhr ab.", ["Am 12. Mai kam er.", "Der 2. Zug fuhr ab."]),
    ("Um 500 v. Chr. lebte er z. B. in Rom.", ["Um 500 v. Chr. lebte er z. B. in Rom."]),
    ("I am 25. She is 30. Good.", ["I am 25.", "She is 30.", "Good."]),
    ("Hamdan v. Rumsfeld ended. \"Yes,\" he said.", ["Hamdan v. Rumsfeld ended.", '"Yes," he said.']),
    ("他来了。她走了！\n", ["他来了。", "她走了！"]), ("क्या? हाँ। ठीक।", ["क्या?", "हाँ।", "ठीक।"]),
])
def test_sentences(text, expected):
    assert split_sentences(text) == expected


def test_a_long_text_without_ends_is_quick():
    assert len(split_sentences("a." * 200_000)) == 1
    for run in (".", '."', "。）", "?!"): assert "".join(split_sentences(run * 100_000 + "a")) == run * 100_000 + "a"
    assert split_sentences("Then" + "." * 1000 + " Now.") == ["Then" + "." * 1000, "Now."]


def treebank(files):
    "Passages of up to ten sentences of a treebank, each a list."
    for file in files:
        passage = []
        for block in file.read_text(encoding="utf-8").split("\n\n"):
            if not (text := re.search(r"^# text = (.*)$", block, re.M)): continue
            if "# newdoc" in block or "# newpar" in block or len(passage) == 10:
                if passage: yield passage
                passage = []
            passage.append(text[1].strip())
        if passage: yield passage


@pytest.mark.parametrize("names, precision, recall", [(("ud_english_ewt",), 0.98, 0.79), (("ud_german_gsd", "ud_german_pud"), 0.99, 0.88)])
def test_sentence_ends_of_treebanks(names, precision, recall):
    folder = os.environ.get("GRADIEND_DATA")
    files = [f for n in names if folder for f in sorted((Path(folder) / n).glob("*.conllu"))]
    if not files: pytest.skip(f"GRADIEND_DATA does not name a folder with {', '.join(names)}")
    right = found = true = 0
    for passage in treebank(files):
        text, ends, gold, at = " ".join(passage), set(), set(), 0
        for s in passage[:-1]: gold.add(at := at + len(s) + bool(at))
        at = 0
        for s in split_sentences(text)[:-1]: ends.add(at := text.index(s, at) + len(s))
        right, found, true = right + len(ends & gold), found + len(ends), true + len(gold)
    print(names, f"precision {right / found:.3f} recall {right / true:.3f} of {true}")
    assert right / found > precision and right / true > recall


def test_limits_count_what_leaves():
    texts = ["a  b", "“ab”", "abc d", ""]
    for config, kept in [(dict(min_chars=4), ["\"ab\"", "abc d"]), (dict(max_chars=3), ["a b"]), (dict(min_words=2), ["a b", "abc d"]),
                         (dict(max_words=1), ['"ab"']), (dict(exclude_chars="“"), ["a b", "abc d"]), (dict(exclude_chars=""), ["a b", '"ab"', "abc d"]),
                         (dict(custom_filter=str.isalpha), []), (dict(custom_filter=lambda t: "d" in t), ["abc d"]), ({}, ["a b", '"ab"', "abc d"])]:
        report = {}
        assert list(preprocess(texts, TextPreprocessConfig(**config), report=report)) == kept
        assert report["texts_read"] == 4 and report["sentences"] == len(kept)
        assert sum(report.values()) - report["texts_read"] == 4          # every piece is counted once


@given(st.lists(TEXT, max_size=5), st.integers(1, 4))
def test_windows(texts, k):
    pieces = list(preprocess(texts, TextPreprocessConfig(k)))
    expected = [w for t in texts for s in [split_sentences(t)] for i in range(0, len(s), k) if (w := normalise(" ".join(s[i:i + k])))]
    assert pieces == expected


def test_the_report_is_true_when_reading_stops():
    report = {"matches": 3}
    stream = preprocess(iter(["One. Two.", "Three."]), TextPreprocessConfig(True), report=report)
    assert report["texts_read"] == 0 and next(stream) == "One."
    assert (report["texts_read"], report["sentences"], report["matches"]) == (1, 1, 3)


def test_a_stream_is_read_as_it_is_needed():
    def endless():
        while True: yield "One. Two."
    stream = preprocess(endless(), TextPreprocessConfig(True))
    assert [next(stream) for _ in range(3)] == ["One.", "Two.", "One."]


def test_spacy_runs_only_what_finds_sentences():
    spacy = pytest.importorskip("spacy")
    from spacy.language import Language

    @Language.component("gradiend_test_forbidden")
    def forbidden(doc): raise AssertionError("this component must not run")
    nlp = spacy.blank("en")
    nlp.add_pipe("gradiend_test_forbidden")
    config = TextPreprocessConfig(2, splitter="spacy")
    with pytest.raises(InputError, match="sentencizer.*gradiend_test_forbidden"): preprocess(["a"], config, nlp=nlp)
    with pytest.raises(InputError, match="nlp=None"): preprocess(["a"], config)
    nlp.add_pipe("sentencizer")
    texts = ["It rained. They ran. She too.", "", "No end\n\nOne. Two"] * 100
    assert list(preprocess(texts, config, nlp=nlp)) == ["It rained. They ran.", "She too.", "No end One.", "Two"] * 100
    assert nlp.pipe_names == ["gradiend_test_forbidden", "sentencizer"]
    assert list(preprocess(["a. B"], TextPreprocessConfig(splitter="spacy"))) == ["a. B"]    # nothing to cut: no pipeline


def test_a_pipeline_that_cuts_with_a_model():
    folder = os.environ.get("GRADIEND_DATA")
    if not folder or not (Path(folder) / "spacy_en_ewt").is_dir(): pytest.skip("GRADIEND_DATA names no folder with spacy_en_ewt")
    nlp = pytest.importorskip("spacy").load(Path(folder) / "spacy_en_ewt")
    config = TextPreprocessConfig(True, splitter="spacy")
    if not any("token.is_sent_start" in nlp.get_pipe_meta(n).assigns for n in nlp.pipe_names):
        with pytest.raises(InputError, match="finds no sentences"): preprocess(["a"], config, nlp=nlp)
        nlp.add_pipe("sentencizer")
    assert list(preprocess(["It rained. They ran."], config, nlp=nlp)) == ["It rained.", "They ran."]


def test_settings_are_values():
    config = TextPreprocessConfig(True, exclude_chars=["[", "]"], min_words=3)
    assert config == TextPreprocessConfig(1, exclude_chars="[]", min_words=3) and hash(config) == hash(pickle.loads(pickle.dumps(config)))
    assert config.describe()["exclude_chars"] == "[]" and config.describe()["custom_filter"] is None
    assert TextPreprocessConfig(custom_filter=str.isalpha).describe()["custom_filter"].endswith("str.isalpha")
    with pytest.raises(AttributeError): config.min_words = 4


@pytest.mark.parametrize("bad", [dict(split_to_sentences=-1), dict(split_to_sentences=2.0), dict(split_to_sentences=None), dict(min_chars=-1),
                                 dict(max_words=1.5), dict(min_words=True), dict(min_words=3, max_words=2), dict(min_chars=3, max_chars=2),
                                 dict(exclude_chars=["ab"]), dict(exclude_chars=[1]), dict(exclude_chars=1), dict(custom_filter="x"),
                                 dict(splitter="nltk")])
def test_bad_settings(bad):
    with pytest.raises(InputError, match=next(iter(bad))): TextPreprocessConfig(**bad)


@given(TEXT)
def test_near_key(text):
    key = near_key(text)
    assert near_key(normalise(text)) == key
    letters = [c for c in key if c.isalpha()]
    if letters:
        assert near_key(key) == key and near_key(f" {text}!") == key and near_key(text + " 7") == key
        assert not any(c.isdigit() or c in ".,!?'\"" for c in key)


@pytest.mark.parametrize("a, b, same", [
    ("Well, it's 5.", "well it s 7", True), ("STRASSE", "Straße", True), ("E\u0301te\u0301", "été", True), ("schon", "schön", False),
    ("I saw her", "I saw him", False), ("हिन्दी", "हन्द", False), ("1984", "1985", False), ("naïve", "naive", False),
    ("in to", "into", False), ("snake_case", "snake case", True),
])
def test_near_pairs(a, b, same):
    assert (near_key(a) == near_key(b)) is same


@settings(max_examples=200)
@given(st.lists(st.text(), unique=True, min_size=2, max_size=20))
def test_content_hash(texts):
    assert len({content_hash(t) for t in texts}) == len(texts)
    assert all(0 <= content_hash(t) < 2 ** 64 for t in texts)
