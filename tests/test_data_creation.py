"Edge cases of gradiend.data.creation and the modules it is made of, on the exported package."
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiend.core import InputError, read_json
from gradiend.data import collection, creation, stream
from gradiend.data.collection import Pool, Row, Sample, collect, hide, sample_frame
from gradiend.data.creation import TextPredictionDataCreator
from gradiend.data.filters import Matcher
from gradiend.data.output import TrainingData, load_created
from gradiend.data.tables import read_table
from gradiend.data.targets import PairedTextFilterConfig, TextFilterConfig, check_filters
from gradiend.data.text import TextPreprocessConfig, near_key

SG, PL = TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")
TEXTS = [f"{w} saw number {i} there." for i in range(30) for w in ("He", "They", "Some")]
TRAIN = (1, 0, 0)  # for tests with too few rows to divide


def make(texts=TEXTS, filters=(SG, PL), **kw):
    return TextPredictionDataCreator(texts, list(filters), **kw)


# --- rows --------------------------------------------------------------------------------------------------------

def test_one_row_per_match_and_no_leak():
    mixed = [f"It said they had {i} of it." for i in range(40)]
    frame = make(mixed).generate_training_data(format="unified", balance=False)
    assert len(frame) == 120 and frame.groupby("text").split.nunique().max() == 1
    assert frame.groupby("text").size().tolist() == [3] * 40
    assert set(frame.split) == {"train", "validation", "test"}


def test_no_leak_across_classes_after_capping():
    mixed = [f"It said they had {i}." for i in range(50)] + [f"It is {i} there." for i in range(50)]
    tables = make(mixed, seed=3).generate_training_data(20)
    joined = pd.concat([t.assign() for t in tables.values()])
    assert joined.groupby("text").split.nunique().max() == 1 and joined.label_class.value_counts().tolist() == [20, 20]


WORDS = st.lists(st.sampled_from(["he", "He", "HE", "she", "it", "it's", "they", "They", "we", "x-it", "été", "“they”", "rain,", "  ",
                                  "he.", "naïve", "and", "[", "]", "it?", "THEY"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=8), st.booleans())
def test_unmasking_gives_the_sentence_back(texts, mask_all):
    "Every row holds its text exactly, and the placeholders stand where the words were."
    filters = check_filters([SG, PL])
    sample = Sample(filters, mask_all=mask_all)
    collect(texts, Matcher(filters), sample)
    frame = sample_frame(sample, filters)
    assert set(frame.text) <= set(texts)
    rows = sorted(r for p in sample.pools.values() for r in p.rows.values())
    for row, stored in zip(frame.itertuples(), (Row(*r) for r in rows), strict=True):
        words = [row.text[a:b] for a, b in zip(stored.spans[::2], stored.spans[1::2], strict=True)]
        pieces = row.masked.split("[MASK]")
        assert "".join(p + w for p, w in zip(pieces, [*words, ""])) == row.text
        assert {w.casefold() for w in words} == {row.label.casefold()} and words[0] == row.label
        if not mask_all: assert row.masked.replace("[MASK]", row.label) == row.text


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 3), st.sampled_from(["exact", "near"]))
def test_a_bounded_sample_is_the_smallest_keys_of_all(texts, keep, seed, same):
    "Against the obvious way: find all rows, drop duplicates, sort by key."
    filters = check_filters([SG, PL])
    small, everything, all_kept = (Sample(filters, keep=k, seed=seed, deduplicate=same) for k in (keep, 10**6, None))
    for sample in (small, everything, all_kept): collect(texts, Matcher(filters), sample)
    assert small.matches == everything.matches
    # without a draw the keys are others, and the rows the same
    assert sample_frame(all_kept, filters).equals(sample_frame(everything, filters)) and all_kept.duplicates == everything.duplicates
    for slot, pool in small.pools.items():
        assert sorted(pool.rows) == sorted(everything.pools[slot].rows)[:keep]
    backwards = Sample(filters, keep=keep, seed=seed, deduplicate=same)
    collect(texts[::-1], Matcher(filters), backwards)
    assert {s: set(p.rows) for s, p in backwards.pools.items()} == {s: set(p.rows) for s, p in small.pools.items()}


def test_pool_refuses_what_is_there_and_what_is_too_large():
    pool = Pool(2)
    assert pool.offer(5, "a") and not pool.offer(5, "b") and pool.offer(3, "c")
    assert not pool.wants(7) and pool.wants(1) and not pool.wants(3)
    assert pool.offer(1, "d") and pool.rows == {3: "c", 1: "d"} and len(pool) == 2
    assert pool.offer(9, "e") and len(pool) == 2


def test_duplicates_after_normalisation():
    creator = make(["She saw “it” there.", 'She saw "it"  there.', "They ran off today."], split_ratios=TRAIN)
    creator.generate_training_data(balance=False)
    assert creator.report["duplicates_dropped"] == 2 and creator.report["matches"] == {"3SG": 4, "3PL": 1}
    assert creator.report["rows"] == {"3SG": 2, "3PL": 1}


def test_near_duplicates():
    texts = ["They ran in 1990.", "they ran in 1991!", "They ran in 1990.", "He ran off.", "He ran, off?"]
    kw = dict(format="unified", balance=False)
    exact, near, no = (make(texts, split_ratios=TRAIN, deduplicate=d) for d in ("exact", "near", "no"))
    assert [len(c.generate_training_data(**kw)) for c in (exact, near, no)] == [4, 2, 5]
    assert [c.report["duplicates_dropped"] for c in (exact, near, no)] == [1, 3, 0]
    assert [c.report["near_duplicates_kept"] for c in (exact, near, no)] == [2, 0, 3]


def test_mask_all_hides_every_occurrence_of_one_word():
    frame = make(["He said he knew she knew it.", "They said they ran."], mask_all=True, split_ratios=TRAIN).generate_training_data(
        format="unified", balance=False)
    assert frame.masked.tolist() == ["[MASK] said [MASK] knew she knew it.", "He said he knew [MASK] knew it.",
                                     "He said he knew she knew [MASK].", "[MASK] said [MASK] ran."]
    assert frame.label.tolist() == ["He", "she", "it", "They"]


def test_lengths_placeholder_and_sentences():
    creator = make(["They ran off. It was. " + "He " * 9 + ".", "They [MASK] it now.", "He saw it here."],
                   sentences=True, max_words=5, split_ratios=TRAIN)
    frame = creator.generate_training_data(format="unified", balance=False)
    assert sorted(frame.label) == ["He", "They", "it"]
    assert (creator.report["too_short"], creator.report["too_long"], creator.report["with_placeholder"]) == (1, 1, 1)


def test_preprocess_config_and_windows():
    text = "It rained. They ran. He fell. She sat."
    creator = make([text], preprocess=TextPreprocessConfig(2), split_ratios=TRAIN)
    frame = creator.generate_training_data(format="unified", balance=False)
    assert set(frame.text) == {"It rained. They ran.", "He fell. She sat."}
    creator = make([text, "He lost $5. They won."], sentences=True, min_words=2, split_ratios=TRAIN)
    assert creator.generate_training_data(balance=False) and creator.report["sentences"] == 6


def test_min_left_context_words_of_creator_and_class():
    texts = ["He said that she knew.", "They said that they knew."]
    own = TextFilterConfig(["they"], id="3PL", min_left_context_words=0)
    frame = make(texts, filters=(SG, own), min_left_context_words=2, split_ratios=TRAIN).generate_training_data(
        format="unified", balance=False)
    assert frame.label.tolist() == ["she", "They", "they"]


def test_pairs_carry_their_partner():
    pairs = PairedTextFilterConfig([("king", "queen"), ("uncle", "aunt")], ids=["male", "female"])
    data = TextPredictionDataCreator(["Uncle Bob saw the king.", "A queen sat."], pairs, split_ratios=TRAIN).generate_training_data(
        balance=False)
    assert data["male"][["male", "female"]].values.tolist() == [["Uncle", "Aunt"], ["king", "queen"]]
    assert data["female"][["male", "female"]].values.tolist() == [["king", "queen"]]
    many = PairedTextFilterConfig([("king", "queen"), ("uncle", "aunt"), ("son", "daughter"), ("monk", "nun")], ids=["male", "female"])
    texts = [f"The {w} saw {i} of them." for i in range(5) for pair in many.pairs for w in pair]
    rows = TextPredictionDataCreator(texts, many, split_by="target").generate_training_data(format="unified")
    assert rows.groupby(["male", "female"]).split.nunique().max() == 1 and len(rows) == 40


# --- bad input ---------------------------------------------------------------------------------------------------

def test_an_absent_class_is_named():
    with pytest.raises(InputError, match="some classes were not found.*no match for 1PL: we"):
        make(filters=[SG, PL, TextFilterConfig("we", id="1PL")]).generate_training_data()
    with pytest.raises(InputError, match="no match in the base data .3 texts read.*searched for 3SG: he, she, it; 3PL: they"):
        make(["Nothing to see here."] * 3).generate_training_data()


def test_no_match_names_what_was_seen_and_the_nearest_words():
    with pytest.raises(InputError, match=r"90 texts read, 90 usable.*no match for X: nomber, thiere \(words that look alike: number, there\)"):
        make(filters=[SG, PL, TextFilterConfig(["nomber", "thiere"], id="X")]).generate_training_data()


def test_all_texts_too_short_says_so():
    with pytest.raises(InputError, match="2 texts read, 0 usable, 2 too short"): make(["It.", "They."]).generate_training_data()


@pytest.mark.parametrize("kw, message", [
    (dict(split_ratios=(0.5, 0.5)), "split_ratios"), (dict(min_words=0), "min_words=0"), (dict(mask=" "), "mask="),
    (dict(base_max_size=0), "base_max_size=0"), (dict(use_cache=True), "output_dir"), (dict(output_format="xls"), "output_format"),
    (dict(filters=[TextFilterConfig("it", spacy_tags={"pos": "PRON"})]), "give spacy_model"),
    (dict(filters=[SG, TextFilterConfig("it", id="same")]), "in the classes"),
    (dict(preprocess=TextPreprocessConfig(True), sentences=True), "sentences= and preprocess="),
])
def test_settings_are_checked_at_once(kw, message):
    with pytest.raises(InputError, match=message): make(**kw)


def test_bad_cells_columns_and_empty_sources(tmp_path):
    with pytest.raises(InputError, match="holds 3 .int."): make(["They ran off.", 3]).generate_training_data()
    with pytest.raises(InputError, match="no column text_column='body'"):
        make(pd.DataFrame({"text": TEXTS}), text_column="body").generate_training_data()
    with pytest.raises(InputError, match="holds no text"): make([]).generate_training_data()
    (tmp_path / "latin.txt").write_bytes("They ran.\nKäse".encode("latin1"))
    with pytest.raises(InputError, match="11"): make(str(tmp_path / "latin.txt")).generate_training_data()


def test_unknown_argument_and_sizes():
    with pytest.raises(TypeError): make(max_size=3)
    for call in (lambda c: c.generate_training_data(0), lambda c: c.generate_neutral_data(-1), lambda c: c.generate_training_data(2.5),
                 lambda c: c.generate_training_data("10"), lambda c: c.generate_training_data(True)):
        with pytest.raises(InputError, match="must be 1 or more"): call(make())


def test_small_classes_are_an_error_or_dropped_and_named():
    rare = TextFilterConfig("we", id="1PL")
    texts = TEXTS + ["Then we left.", "Now we left."]
    with pytest.raises(InputError, match="only 2 rows of '1PL' from different texts, and 3 of each"):
        make(texts, [SG, PL, rare]).generate_training_data(balance=False)
    with pytest.raises(InputError, match="only 30 rows of '3SG'.*only 30 rows of '3PL'.*only 2 rows of '1PL'"):
        make(texts, [SG, PL, rare]).generate_training_data(min_rows_per_class_for_split=31, on_small_class="drop")
    data = make(texts, [SG, PL, rare]).generate_training_data(on_small_class="drop")
    assert list(data) == ["3SG", "3PL"] and data.report["dropped_classes"] == {"1PL": 2} and len(data["3SG"]) == 30
    assert len(make(texts, [SG, PL, rare]).generate_training_data(min_rows_per_class_for_split=1)["1PL"]) == 2


# --- reading -----------------------------------------------------------------------------------------------------

def test_a_generator_serves_both_products():
    creator = make(iter(TEXTS), base_max_size=60)
    creator.generate_training_data()
    assert creator.report["sentences"] == 60
    neutral = creator.generate_neutral_data()
    assert neutral.text.str.startswith("Some").all() and len(neutral) == 60 - sum(creator.report["matches"].values())


def test_base_max_size_counts_sentences_and_takes_them_from_everywhere(tmp_path):
    texts = [f"{'They' if i % 2 else 'He'} saw number {i} there. Then it rained {i}." for i in range(500)]
    (tmp_path / "book.txt").write_text("\n".join(texts))
    for source in (texts, str(tmp_path / "book.txt"), pd.DataFrame({"text": texts}), (t for t in texts)):
        creator = make(source, sentences=True, base_max_size=100)
        frame = creator.generate_training_data(format="unified", balance=False)
        numbers = frame.text.str.extract(r"(\d+)")[0].astype(int)
        assert creator.report["sentences"] == 100 and numbers.min() < 100 and numbers.max() > 400


def endless(source=None, **kw):
    i = 0
    while True:
        yield from (f"They saw {i} there.", f"It saw {i} there.", f"Some saw {i} there.")
        i += 1


def test_a_stream_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(stream, "read_texts", lambda source, report, **kw: endless())
    monkeypatch.setattr(stream.SentenceStream, "describe", lambda self, source, look_up=False: {"kind": "hub", "name": source})
    creator = make("org/endless")
    assert {c: len(t) for c, t in creator.generate_training_data(25).items()} == {"3SG": 25, "3PL": 25}
    assert creator.report["texts_read"] < 100 and len(creator.generate_neutral_data(7)) == 7
    assert creator.report["stopped_when_full"] and creator.report["source"] == {"kind": "hub", "name": "org/endless"}


def test_lists_are_read_to_their_end_unless_told_otherwise():
    texts = [t for _, t in zip(range(6000), endless())]
    readers = [make(texts, stop_when_full=s) for s in (None, False, True)]
    tables = [c.generate_training_data(25, format="unified") for c in readers]
    assert [c.report["texts_read"] for c in readers[:2]] == [6000, 6000] and readers[2].report["texts_read"] < 200
    assert tables[0].equals(tables[1]) and tables[2].label_class.value_counts().tolist() == [25, 25]


def test_ctrl_c_keeps_a_complete_table(tmp_path):
    def impatient():
        yield from TEXTS[:60]
        raise KeyboardInterrupt
    creator = make(impatient(), shuffle_buffer=None, output_dir=tmp_path)
    data = creator.generate_training_data()
    assert data.report["interrupted"] and {c: len(t) for c, t in data.items()} == {"3SG": 20, "3PL": 20}
    assert data.unified.split.isin(["train", "validation", "test"]).all() and load_created(tmp_path).report["interrupted"]
    with pytest.warns(UserWarning, match="interrupted"):  # a part is no answer to the whole question
        again = make(TEXTS, shuffle_buffer=None, output_dir=tmp_path, use_cache=True).generate_training_data()
    assert not again.report["interrupted"] and len(again["3SG"]) == 30
    def at_once():
        raise KeyboardInterrupt
        yield
    with pytest.raises(KeyboardInterrupt): make(at_once()).generate_training_data()


def test_ctrl_c_before_the_second_class_still_gives_the_first():
    def impatient():
        yield from ["He saw it there."] * 3 + ["He sat there."]
        raise KeyboardInterrupt
    data = make(impatient(), shuffle_buffer=None).generate_training_data()
    assert list(data) == ["3SG"] and len(data["3SG"]) == 3


def test_ctrl_c_does_not_balance_and_divides_by_text_if_it_must(tmp_path):
    def impatient():
        yield from [f"He saw {i} there." for i in range(20)] + [f"They saw {i} there." for i in range(3)]
        raise KeyboardInterrupt
    data = make(impatient(), shuffle_buffer=None, split_by="target", output_dir=tmp_path).generate_training_data()
    assert {c: len(t) for c, t in data.items()} == {"3SG": 20, "3PL": 3} and set(data.unified.split) == {"train", "validation", "test"}
    assert data.report["note"].startswith("Divided by text and not by target") and data.report["note"] in (tmp_path / "README.md").read_text()


# --- grammar -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def nlp():
    "A pipeline whose tagger knows one thing: a word with a capital is a PROPN, another one a NOUN."
    spacy = pytest.importorskip("spacy")

    @spacy.Language.component("capital_tagger", assigns=["token.pos", "token.morph"])
    def capital_tagger(doc):
        for token in doc:
            token.pos_ = "PROPN" if token.text[0].isupper() else "NOUN"
            token.set_morph("Case=Nom" if token.i == 0 else "Case=Acc")
        return doc
    pipeline = spacy.blank("en")
    pipeline.add_pipe("capital_tagger")
    return pipeline


def test_tags_tell_two_classes_apart(nlp):
    name = TextFilterConfig("mark", id="name", spacy_tags={"pos": "PROPN"})
    thing = TextFilterConfig("mark", id="thing", spacy_tags={"pos": "NOUN"})
    texts = [f"{w} saw mark {i} there." if w == "We" else f"Then Mark saw {i} of them." for i in range(20) for w in ("We", "Mark")]
    data = make(texts, [name, thing], spacy_model=nlp).generate_training_data(balance=False)
    assert set(data["name"].label) == {"Mark"} and set(data["thing"].label) == {"mark"}
    assert data.report["analysed"] == 40 and len(data["name"]) == len(data["thing"]) == 20


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_and_order_do_not_change_the_rows(nlp, batch_size):
    tagged = [TextFilterConfig("mark", id="name", spacy_tags={"pos": "PROPN"}), TextFilterConfig("they", id="3PL")]
    texts = [t for i in range(60) for t in (f"Mark saw {i} there.", f"They saw {i}.", f"No mark on {i}.", f"Rain on {i}.")]
    want = make(texts, tagged, spacy_model=nlp).generate_training_data(format="unified", balance=False)
    got = make(texts, tagged, spacy_model=nlp, batch_size=batch_size).generate_training_data(format="unified", balance=False)
    assert got.equals(want) and set(want.label) == {"Mark", "They"}
    capped = make(texts, tagged, spacy_model=nlp, batch_size=batch_size, shuffle_buffer=10)
    assert {c: len(t) for c, t in capped.generate_training_data(5).items()} == {"name": 5, "3PL": 5}
    assert capped.report["searched"] < 240


def test_ctrl_c_analyses_what_waits(nlp):
    def impatient():
        yield from (f"Mark saw {i} there." for i in range(20))
        raise KeyboardInterrupt
    tagged = [TextFilterConfig("mark", id="name", spacy_tags={"pos": "PROPN"}), TextFilterConfig("they", id="3PL")]
    data = make(impatient(), tagged, spacy_model=nlp, shuffle_buffer=None, batch_size=64).generate_training_data()
    assert data.report["interrupted"] and len(data["name"]) == data.report["analysed"] == 20


def test_a_spelled_but_refused_target_is_told(nlp):
    tagged = [TextFilterConfig("mark", id="name", spacy_tags={"pos": "PROPN", "Case": "Dat"}), TextFilterConfig("they", id="3PL")]
    with pytest.raises(InputError, match="'mark' was spelled 4 times, never with Case=Dat and pos=PROPN") as told:
        make(["Mark saw it.", "Mark saw them.", "They saw Mark.", "Marks for mark."], tagged, spacy_model=nlp).generate_training_data()
    assert "alike: Marks)" in str(told.value)
    with pytest.raises(InputError, match="'he' was spelled 3 times, never with 9 words before it"):
        make(["They said he ran."] * 3, filters=[TextFilterConfig("he", min_left_context_words=9), PL]).generate_training_data()


def test_numbers_that_are_not_known_are_none(nlp, tmp_path):
    tagged = [TextFilterConfig("mark", id="name", spacy_tags={"pos": "PROPN"}), TextFilterConfig("they", id="3PL")]
    texts = [t for i in range(40) for t in (f"Mark saw {i} there.", f"They saw {i}.")]
    creator = make(iter(texts * 2), tagged, spacy_model=nlp, shuffle_buffer=None, batch_size=2, output_dir=tmp_path, stop_when_full=False)
    creation_size, creation._DRAWN_FROM = creation._DRAWN_FROM, 5
    try: creator.generate_training_data(5)
    finally: creation._DRAWN_FROM = creation_size
    assert creator.report["passed_over"] and creator.report["match_rates"] == {"name": None, "3PL": 0.5}
    assert creator.report["duplicates_dropped"] is None and "duplicates" not in (tmp_path / "README.md").read_text()


def tagger():
    "A pipeline that says which values it writes."
    pipeline = pytest.importorskip("spacy").blank("en")
    pipeline.add_pipe("tagger").add_label("NN")
    return pipeline


def test_neutral_by_tags(nlp):
    texts = ["the rain fell", "the rain fell on Mark", "they ran off", "He ran off"]
    creator = make(texts, spacy_model=nlp)
    assert creator.generate_neutral_data().text.tolist() == texts[:2]
    for tags in ({"pos": "PROPN"}, [{"pos": "PROPN"}, {"Case": "Dat"}]):
        assert creator.generate_neutral_data(excluded_spacy_tags=tags).text.tolist() == texts[:1]
    with pytest.raises(InputError, match="spacy_model"): make(texts).generate_neutral_data(excluded_spacy_tags={"pos": "NOUN"})
    with pytest.raises(InputError, match="is never written by"): TextPredictionDataCreator(
        texts, [SG, PL], spacy_model=tagger()).generate_neutral_data(excluded_spacy_tags=[{"tag": "NX"}])
    with pytest.raises(InputError, match="valid are"): creator.generate_neutral_data(excluded_spacy_tags={"poss": "NOUN"})


# --- neutral -----------------------------------------------------------------------------------------------------

def test_neutral_texts():
    creator = make(TEXTS + ["THEY stood there alone.", "It's late for now."])
    creator.generate_training_data()
    neutral = creator.generate_neutral_data()
    assert len(neutral) == 30 and neutral.text.str.startswith("Some").all()
    assert len(creator.generate_neutral_data(additional_excluded_words=["NUMBER 3"])) == 29
    assert creator.generate_neutral_data(5).text.tolist() == creator.generate_neutral_data(5).text.tolist()
    with pytest.raises(InputError, match="no neutral text"): creator.generate_neutral_data(additional_excluded_words="some")
    assert creator.generate_neutral_data(base_data=["Rain fell on us."] * 2).text.tolist() == ["Rain fell on us."]


def test_neutral_is_never_from_training():
    "Case decides what is a match, so a training text may hold no excluded word; it, and near copies, are still left out."
    creator = make(["US ships sank.", "The rain fell on us."], [TextFilterConfig("us", id="1PL"), TextFilterConfig("US", id="US")],
                   split_ratios=TRAIN)
    training = creator.generate_training_data()
    other = ["Rain fell down.", "The rain fell on all."]
    assert creator.generate_neutral_data(base_data=other).text.tolist() == other
    used = training.unified.assign(text=["The Rain fell on ALL!", "x"])
    for data in (used, {"a": used}, TrainingData(used, ("1PL", "US"))):
        assert creator.generate_neutral_data(base_data=other, training_data=data, max_size=9).text.tolist() == other[:1]


def test_neutral_without_words_that_begin_or_end_in_a_sign():
    texts = ["The dog's tail fell.", "The dogs ran off.", "Add -ly here now.", "It is C++11 now.", "Use C++110 here now."]
    words = ["'s", "-ly", "C++11"]
    assert make(texts).generate_neutral_data(additional_excluded_words=words).text.tolist() == [texts[1], texts[4]]


def test_neutral_from_rows_without_text_and_from_paragraphs():
    creator = make(["He saw 3 ships near town.", "They ran from the rain today."], split_ratios=TRAIN)
    creator.generate_training_data(balance=False)
    other = [TextFilterConfig("xx", id="a"), TextFilterConfig("yy", id="b")]
    texts = ["Rain fell. He saw 4 ships near town!", "They ran from the rain today.", "Rain fell on us."]
    for rows in (creator.training_data, creator.training_data.minimal):
        assert make(texts, other).generate_neutral_data(training_data=rows).text.tolist() == texts[2:]
    for bad in (creator.training_data.minimal[["label"]], "rows.csv"):
        with pytest.raises(InputError, match="training_data"): make(texts, other).generate_neutral_data(training_data=bad)


def test_neutral_near_duplicates():
    texts = ["It rained on 3 May.", "Rain fell on 3 May.", "rain fell on 4 May!"]
    assert len(make(texts).generate_neutral_data()) == 2
    assert len(make(texts, deduplicate="near").generate_neutral_data()) == 1


# --- division, output, cache -------------------------------------------------------------------------------------

def test_ratios_and_split_name_of_a_call():
    frame = make().generate_training_data(format="unified", train_ratio=0.5, val_ratio=0.5, test_ratio=0)
    assert frame.groupby(["label_class", "split"]).size().tolist() == [15, 15, 15, 15]
    assert make().generate_training_data(format="unified", split_name="probe").split.unique().tolist() == ["probe"]
    with pytest.raises(InputError, match="split_ratios"): make().generate_training_data(train_ratio=0.5)


def test_split_by_a_column_of_the_source_or_the_rows(tmp_path):
    books = pd.DataFrame({"text": TEXTS, "book": [f"b{i // 9}" for i in range(len(TEXTS))]})
    books.to_csv(tmp_path / "books.csv", index=False)
    rows = books.to_dict("records")
    tables = [make(s, split_group_col="book").generate_training_data(format="unified", balance=False)
              for s in (books, str(tmp_path / "books.csv"), rows, iter(rows))]
    assert all(t.groupby("group").split.nunique().max() == 1 for t in tables)
    assert all(dict(zip(t.text, t.group)).items() <= dict(zip(books.text, books.book)).items() for t in tables)
    keyed = make(books, split_group_col="book", split_group_key=lambda b: str(int(b[1:]) % 5)).generate_training_data(
        format="unified", balance=False)
    assert keyed.groupby(keyed.group.str[1:].astype(int) % 5).split.nunique().max() == 1
    words = TextFilterConfig(["he", "she", "it"], id="sg"), TextFilterConfig(["we", "they", "you"], id="pl")
    texts = [f"{w} saw number {i} there." for i in range(9) for w in ("He", "She", "It", "We", "They", "You")]
    for kw in (dict(split_by="target"), dict(split_by_target=True), dict(split_group_col="label", split_group_key=str.lower)):
        frame = make(texts, words, **kw).generate_training_data(format="unified")
        assert frame.groupby("label").split.nunique().max() == 1 and frame.split.nunique() == 3


def test_balance_over_a_whole_corpus():
    texts = [f"{w} saw {i}." for i in range(60) for w in ("He", "They")] + [f"It is {i} now." for i in range(6)] + ["She saw it."]
    tries = make(texts).generate_training_data(30, balance="try", format="unified")
    assert tries.label.str.lower().value_counts().to_dict() == {"they": 30, "he": 22, "it": 7, "she": 1}
    strict = make(texts).generate_training_data(30, balance="strict", format="unified", min_rows_per_target_for_balance=5)
    assert strict.label.str.lower().value_counts().to_dict() == {"they": 15, "he": 5, "it": 5, "she": 5}
    assert strict.groupby("text").split.nunique().max() == 1


def test_formats():
    creator = make()
    data = creator.generate_training_data()
    assert isinstance(data, TrainingData) and list(data) == ["3SG", "3PL"]
    minimal = creator.generate_training_data(format="minimal")
    assert list(minimal.columns) == ["masked", "label", "label_class", "split"] and len(minimal) == len(data.unified)
    assert creator.training_data.fingerprint == data.fingerprint == creator.report["fingerprint"]


def test_files_on_disk(tmp_path):
    creator = make(output_dir=tmp_path / "out", mask="<m>")
    frame = creator.generate_training_data(format="unified", output=tmp_path / "one.parquet")
    creator.generate_neutral_data(3, output=tmp_path / "n.jsonl")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "dataset.json", "neutral.csv", "training.csv"]
    for path in (tmp_path / "one.parquet", tmp_path / "out" / "training.csv"):
        assert read_table(path).to_dict("list") == frame.to_dict("list")
    record = read_json(tmp_path / "out" / "dataset.json")["parts"]["training"]
    assert record["report"] == json.loads(json.dumps(creator.report)) and record["configuration"]["seed"] == 0
    assert record["report"]["source"]["texts"] == 90 and record["report"]["match_rates"] == {"3SG": 1 / 3, "3PL": 1 / 3}
    assert frame.masked.str.count("<m>").eq(1).all() and len(read_table(tmp_path / "n.jsonl")) == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "hf"])
def test_cache_is_used_only_for_the_same_question(tmp_path, kind):
    kw = dict(output_dir=tmp_path, use_cache=True, output_format=kind)
    calls = {"same": ({}, {}, TEXTS), "seed": (dict(seed=1), {}, TEXTS), "limit": ({}, dict(max_size_per_class=9), TEXTS),
             "source.fingerprint": ({}, {}, TEXTS[:-1]), "balance": ({}, dict(balance=False), TEXTS), "filters": (
                 dict(filters=(SG, TextFilterConfig(["they", "some"], id="3PL"))), {}, TEXTS)}
    for field, (own, asked, texts) in calls.items() if kind == "csv" else [("same", calls["same"])]:
        first = make(**kw).generate_training_data()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            second = make(texts, **kw, **own).generate_training_data(**asked)
        if field == "same":
            assert not told and second.fingerprint == first.fingerprint and second.report == json.loads(json.dumps(first.report))
        else: assert re.search(rf"made again: .*{re.escape(field)}\S* was", str(told[0].message))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(**kw).generate_training_data()


def test_a_cache_hit_is_written_as_asked(tmp_path):
    kw = dict(output_dir=tmp_path, use_cache=True)
    first = make(**kw)
    first.generate_training_data()
    first.generate_neutral_data(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = make(output_format="parquet", training_basename="rows", neutral_basename="rest", **kw)
        again.generate_training_data()
        neutral = again.generate_neutral_data(9)
    assert read_table(tmp_path / "rows.parquet").equals(first.training_data.unified.astype(str)) and read_table(tmp_path / "rest.parquet").equals(neutral)
    assert load_created(tmp_path).fingerprint == first.training_data.fingerprint


def test_costly_entries_wait_until_somebody_asks(tmp_path, monkeypatch):
    calls = []
    describe, repeats = stream.SentenceStream.describe, creation.near_repeats
    monkeypatch.setattr(stream.SentenceStream, "describe", lambda *a, **kw: calls.append("source") or describe(*a, **kw))
    monkeypatch.setattr(creation, "near_repeats", lambda *a: calls.append("near") or repeats(*a))
    creator = make()
    frame = creator.generate_training_data(format="unified")
    assert not calls and len(frame[frame.split == "train"].copy()) and creator.report["searched"] == 90 and not calls
    assert creator.report["source"]["texts"] == 90 and creator.report["source"]["fingerprint"] and calls == ["source"]
    creator.training_data.save(tmp_path)
    assert sorted(calls) == ["near", "source"]
    assert load_created(tmp_path).report == json.loads(json.dumps(creator.report))
    assert load_created(tmp_path).configuration == json.loads(json.dumps(creator.training_data.configuration))


def test_cache_of_neutral_texts_and_sources_without_fingerprint(tmp_path):
    kw = dict(output_dir=tmp_path, use_cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = make(**kw).generate_neutral_data(9)
        assert make(**kw).generate_neutral_data(9).equals(first)
    with pytest.warns(UserWarning, match="limit was 9 and is 8"): make(**kw).generate_neutral_data(8)
    creator = make(iter(TEXTS), **kw)
    creator.generate_training_data()
    with pytest.warns(UserWarning, match="no fingerprint"): creator.generate_training_data()
    custom = make(preprocess=TextPreprocessConfig(custom_filter=lambda t: True), **{**kw, "output_dir": tmp_path / "b"})
    custom.generate_training_data()
    with pytest.warns(UserWarning, match="custom_filter is a function"): custom.generate_training_data()


def test_seeds_change_draw_and_division():
    a, b = (make(seed=s).generate_training_data(10, format="unified") for s in (0, 1))
    assert a.masked.tolist() != b.masked.tolist()
    assert make(seed=0).generate_training_data(10, format="unified").equals(a)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=12, max_size=30, unique=True), st.data())
def test_the_fingerprint_changes_if_and_only_if_the_content_does(texts, data):
    other = data.draw(st.one_of(st.just(texts), st.permutations(texts), st.lists(st.sampled_from(TEXTS), min_size=12, max_size=30, unique=True)))
    one, two = (Sample(check_filters([SG, PL])) for _ in range(2))
    for sample, source in ((one, texts), (two, other)): collect(source, Matcher([SG, PL]), sample)
    frames = [sample_frame(s, check_filters([SG, PL])) for s in (one, two)]
    same = frames[0].reset_index(drop=True).equals(frames[1].reset_index(drop=True))
    assert (TrainingData(frames[0], ("3SG",)).fingerprint == TrainingData(frames[1], ("3SG",)).fingerprint) == same


def test_hide_many_spans():
    assert hide("a b c", (0, 1, 4, 5), "_") == "_ b _" and hide("abc", (), "_") == "abc"
    assert near_key("A-b 3") and collection.nearest_words(["xyzzy"], {"rain"}) == [] and creation.SPLITS[0] == "train"


def test_a_repeated_sentence_is_analysed_once():
    "The rows of a text given three times are those of the text, three times, for one analysis each."
    import spacy

    nlp = spacy.blank("en")
    nlp.add_pipe("attribute_ruler").add([[{"LOWER": "her"}]], {"MORPH": "Case=Acc"})
    her = TextFilterConfig(["her"], id="object", spacy_tags={"Case": "Acc"}), TextFilterConfig(["they"], id="3PL")
    texts = [f"We saw her in room {i}." for i in range(6)] + [f"They left room {i}." for i in range(6)]
    once, thrice = (make(texts * n, her, spacy_model=nlp, deduplicate="no", batch_size=2) for n in (1, 3))
    a, b = (c.generate_training_data(balance=False, format="unified") for c in (once, thrice))
    assert sorted([*a.masked] * 3) == sorted(b.masked) and once.report["analysed"] == thrice.report["analysed"] == 6
    assert thrice.report["matches"] == {k: 3 * v for k, v in once.report["matches"].items()}


# --- memory ------------------------------------------------------------------------------------------------------

MEMORY = """
import re
from pathlib import Path
from gradiend import corpora
from gradiend.data.creation import TextPredictionDataCreator
from gradiend.data.targets import TextFilterConfig
import datasets, pyarrow, ahocorasick
base_sentences = corpora.load("pronoun", n=5000, seed=0)
def million():
    for i in range(1_000_000):
        yield f"{base_sentences[i % 5000]} That was number {i}."
both = [TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")]
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # ru_maxrss is inherited from the parent
before = peak()
creator = TextPredictionDataCreator(million(), both, stop_when_full=False)
data = creator.generate_training_data(2500)
neutral = creator.generate_neutral_data(1000)
assert creator.report["searched"] == 1_000_000 and len(data["3PL"]) == 2500 and len(neutral) == 1000
print(round(peak() - before, 1))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_of_a_million_sentences():
    "Reading everything from a generator, rows and neutral texts, stays within 200 MB over the base."
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    print(f"{done.stdout.strip()} MB over the base")
    assert float(done.stdout.split()[-1]) <= 200


SEVERAL = """
import sys
from gradiend import TextFilterConfig, TextPredictionDataCreator

def main():
    texts = [f"She took her hat number {i}." for i in range(60)] + [f"We saw her in room {i}." for i in range(60)]
    tags = {"possessive": {"Poss": "Yes"}, "object": {"Case": "Acc"}}
    both = [TextFilterConfig(["her"], id=name, spacy_tags=t) for name, t in tags.items()]
    made = [TextPredictionDataCreator(texts, both, spacy_model=sys.argv[1], n_process=n, batch_size=20).generate_training_data(balance=False) for n in (1, 2)]
    assert made[0].fingerprint == made[1].fingerprint and min(map(len, made[0].values())) > 40

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_several_processes_give_the_same_rows(tmp_path):
    "`n_process` needs a script with a main guard, as every program that starts processes."
    folder = Path(os.environ.get("GRADIEND_DATA", "")) / "spacy_en_ewt"
    if not os.environ.get("GRADIEND_DATA") or not folder.is_dir(): pytest.skip("GRADIEND_DATA names no folder with spacy_en_ewt")
    script = tmp_path / "several.py"
    script.write_text(SEVERAL, encoding="utf-8")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_training_data_can_be_sent_to_another_process():
    import pickle
    data = make().generate_training_data()
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint == data.fingerprint and again.report == dict(data.report) and again.classes == data.classes
