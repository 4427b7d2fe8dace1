"Edge cases of gradiend.data.examples, on the exported package."
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiend.core import InputError
from gradiend.data.alternatives import dictionary_forms, draw_words, in_place, starts_sentence
from gradiend.data.creation import TextPredictionDataCreator
from gradiend.data.examples import COLUMNS, Examples, gradient_labels, make_examples, neutral_examples
from gradiend.data.filters import TextFilterConfig
from gradiend.data.tables import write_table


def table(rows, **columns):
    "Rows for training, as most tables here are too small to be divided; `split=None` leaves the column out."
    frame = pd.DataFrame(rows, columns=["masked", "label", "label_class"]).assign(**{"split": "train", **columns})
    return frame.drop(columns="split") if columns.get("split", "") is None else frame


AB = table([("[MASK] ran.", "He", "s"), ("So [MASK] ran.", "he", "s"), ("[MASK] fell.", "They", "p"), ("So [MASK] fell.", "they", "p")])


def test_order_of_first_appearance_is_the_pair():
    assert make_examples(AB).pair == ("s", "p") and make_examples(AB[::-1]).pair == ("p", "s")
    assert make_examples({"z": AB[2:].drop(columns="label_class"), "a": AB[:2].drop(columns="label_class")}).pair == ("z", "a")
    assert make_examples(AB, pair=["p", "s"]).labels("factual").tolist() == [-1, -1, 1, 1]


def test_signs_for_all_sources():
    ex = make_examples(AB)
    assert ex.labels().tolist() == [-1, -1, 1, 1] and ex.labels("diff").tolist() == ex.labels("factual").tolist() == [1, 1, -1, -1]
    other = pd.DataFrame({"factual_class": ["x"], "alternative_class": ["s"]})
    assert gradient_labels(other, ("s", "p"), "factual").tolist() == [0] and gradient_labels(other, ("s", "p"), "alternative").tolist() == [1]
    assert ex.labels().dtype == np.float64


@pytest.mark.parametrize("word, masked, expected", [
    ("He", "[MASK] ran.", "They"), ("he", "[MASK] ran.", "they"), ("He", "A God that [MASK] is.", "They"), ("HE", "[MASK] RAN.", "THEY"),
    ("he", '"Go!" [MASK] said.', "they"), ("He", '"[MASK] ran," I said.', "They"),
])
def test_capital_follows_the_factual_word(word, masked, expected):
    rows = [(masked, word, "s"), ("So now [MASK] came.", "he", "s"), ("And so [MASK] came.", "he", "s"), ("Now [MASK] go.", "they", "p")]
    assert make_examples(table(rows)).frame.alternative[0] == expected


def test_words_with_a_capital_of_their_own():
    rows = [("So [MASK] ran.", "I", "1"), ("[MASK] ran.", "I", "1"), ("[MASK] ran off.", "We", "2"), ("now [MASK] ran", "we", "2")]
    ex = make_examples(table(rows))
    assert ex.frame.alternative.tolist() == ["we", "We", "I", "I"]
    assert (ex.words("1"), ex.words("2")) == (("I",), ("we",))
    names = [("So [MASK] ran.", "Asian", "a"), ("[MASK] ran.", "Asian", "a"), ("The [MASK] ran.", "white", "w"), ("[MASK] men.", "White", "w")]
    ex = make_examples(table(names))
    assert ex.frame.alternative.tolist() == ["white", "White", "Asian", "Asian"] and ex.words("w") == ("white",)


@pytest.mark.filterwarnings("ignore:in the splits of the data")
def test_alternatives_come_from_train_by_frequency():
    rows = [(f"So {i} [MASK] ran.", "it" if i % 4 else "he", "s") for i in range(400)] + \
        [(f"So {i} [MASK] fell.", "they", "p") for i in range(400)] + [("In test [MASK] ran.", "xe", "s")]
    frame = table(rows, split=["train"] * 800 + ["test"])
    drawn = make_examples(frame).frame.query("factual_class == 'p'").alternative.value_counts(normalize=True)
    assert set(drawn.index) == {"it", "he"} and abs(drawn["it"] - 0.75) < 0.06
    one, two = (make_examples(frame, seed=s).frame.alternative.tolist() for s in (0, 0))
    assert one == two != make_examples(frame, seed=1).frame.alternative.tolist()


def test_classes_outside_the_pair_are_left_out():
    three = pd.concat([AB, table([("And [MASK] ran.", "we", "w")])])
    with pytest.raises(InputError, match="3 classes .s, p, w.: choose two"): make_examples(three)
    ex = make_examples(three, pair=("w", "s"))
    assert ex.frame.factual_class.tolist() == ["s", "s", "w"] and set(ex.frame.alternative.str.lower()) <= {"we", "he"}


def test_full_frames_are_kept_as_they_are():
    full = make_examples(AB.assign(weight=[1, 2, 3, 4])).frame
    again = make_examples(full.drop(columns=["transition", "text"]))
    assert again.frame[list(COLUMNS)].equals(full[list(COLUMNS)]) and again.frame.weight.tolist() == [1, 2, 3, 4]
    assert make_examples({"s": full[:2], "p": full[2:]}).frame.equals(full)


@pytest.mark.filterwarnings("ignore:in the splits of the data")
def test_splits():
    ex = make_examples(AB.assign(split=["Dev", "training", "test", "val"]))
    assert ex.frame.split.tolist() == ["validation", "train", "test", "validation"]
    assert len(ex.select("validation")) == 2 and len(ex.select(["train", "test"])) == 2 and ex.select("all") is ex
    with pytest.raises(InputError, match="split='unseen'"): ex.select("unseen")
    with pytest.warns(UserWarning, match="1 texts are in more than one split"):
        make_examples(table([("[MASK] saw it.", "He", "s"), ("He saw [MASK].", "it", "s"), ("[MASK] go.", "They", "p")], split=["train", "test", "train"]))
    many = table([(f"[MASK] saw {i}.", w, c) for i in range(50) for w, c in (("He", "s"), ("They", "p"))], split=None)
    assert make_examples(many).frame.split.value_counts().to_dict() == {"train": 80, "validation": 10, "test": 10}


def test_duplicates_are_counted():
    ex = make_examples(pd.concat([AB, AB]))
    assert len(ex) == 4 and ex.frame.attrs["duplicates_dropped"] == 4


def test_take_and_fingerprint():
    ex = make_examples(AB)
    part = ex.take(np.array([3, 0]))
    assert part.frame.index.tolist() == [0, 1] and part.frame.factual.tolist() == ["they", "He"]
    assert ex.fingerprint == make_examples(AB.set_axis([9, 8, 7, 6])).fingerprint != part.fingerprint
    assert ex.fingerprint != Examples(ex.frame, ("p", "s")).fingerprint
    assert len(ex.take([])) == 0 and "0 rows" in repr(ex.take([]))


@pytest.mark.parametrize("change, message", [
    (dict(masked="no placeholder"), r"row 0 of data has the placeholder '\[MASK\]' 0 times"), (dict(label=None), "'factual'"),
    (dict(label_class=" "), "'factual_class'"), (dict(split="somewhere"), "split='somewhere'"), (dict(label_class="s"), "only one class"),
])
def test_flawed_tables(change, message):
    with pytest.raises(InputError, match=message): make_examples(AB.assign(**change))


def test_the_row_with_two_placeholders_is_named():
    bad = AB.copy()
    bad.loc[2, "masked"] = "[MASK] and [MASK]."
    with pytest.raises(InputError, match="row 2 .* 2 times instead of once .1 such rows."): make_examples(bad)


def test_folders(tmp_path):
    for cls, part in AB.groupby("label_class"): write_table(part.drop(columns="label_class"), tmp_path / "per_class" / f"{cls}.csv")
    with pytest.raises(InputError, match="the alphabet must not decide which is .1: say pair="): make_examples(tmp_path / "per_class")
    own = {c: AB[AB.label_class == c].drop(columns="label_class") for c in "sp"}
    for pair in (("s", "p"), ("p", "s")):                              # the rows follow the pair, as in a dictionary in that order
        assert make_examples(tmp_path / "per_class", pair=pair).fingerprint == make_examples({c: own[c] for c in pair}).fingerprint
    assert make_examples(tmp_path / "per_class", class_merge_map={"S": "s", "P": "p"}).pair == ("S", "P")
    assert make_examples(tmp_path / "per_class", all_classes=["s", "p"]).pair == ("s", "p")
    write_table(AB, tmp_path / "alone" / "pronouns.csv")
    assert make_examples(tmp_path / "alone").fingerprint == make_examples(AB).fingerprint
    write_table(AB, tmp_path / "made" / "training.csv")
    write_table(pd.DataFrame({"text": ["x"]}), tmp_path / "made" / "neutral.csv")
    assert make_examples(str(tmp_path / "made")).pair == ("s", "p")


def test_columns_called_source_and_target_mean_nothing():
    ex = make_examples({"s": AB[:2].assign(source="x", target="y"), "p": AB[2:].assign(source="x", target="y")})
    assert ex.frame.factual.tolist() == AB.label.tolist()


def test_neutral_rows():
    frame = neutral_examples(["The big cat slept.", "12 34", "A [MASK] here."], excluded_words=["BIG"], per_text=2, seed=1)
    assert len(frame) == 2 and frame.attrs["skipped"] == 2 and list(frame.columns) == list(COLUMNS)
    assert set(frame.factual) <= {"The", "cat", "slept"} and frame.split.eq("test").all()
    assert (frame.factual == frame.alternative).all() and frame.masked.str.count(r"\[MASK\]").eq(1).all()
    assert neutral_examples(pd.DataFrame({"text": ["big cat"]}), mask="<m>").masked.str.contains("<m>").all()


# --- the same data in two forms ---

SINGULAR, PLURAL = ["He", "he", "she", "It", "it", "I"], ["they", "They", "we", "We"]
ROW = st.tuples(st.sampled_from(["", "So ", "He left. ", "\"Go!\" ", "Äh, "]), st.sampled_from([" ran", " fell.", " saw it, too"]), st.integers(0, 30))
ROWS = st.tuples(st.lists(st.tuples(ROW, st.sampled_from(SINGULAR)), min_size=1, max_size=12), st.lists(st.tuples(ROW, st.sampled_from(PLURAL)), min_size=1, max_size=12))


ROWS = ROWS.map(lambda rows: tuple([(("So ", " sat", 100 + i), own[0]) for i in range(3)] + r    # so that each class can be divided
                                   for own, r in zip((SINGULAR, PLURAL), rows, strict=True)))


def merged(rows):
    return table([(f"{a}[MASK]{b} {n}", w, c) for c, own in zip("sp", rows, strict=True) for (a, b, n), w in own], split=None)


@settings(max_examples=10, deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.integers(0, 3))
def test_same_data_in_two_forms_is_the_same_table(rows, random, seed):
    whole = merged(rows)
    expected = make_examples(whole, seed=seed, pair=("s", "p"))
    order = [0] * len(rows[0]) + [1] * len(rows[1])
    random.shuffle(order)
    turn = [iter(np.flatnonzero(whole.label_class == c)) for c in "sp"]
    mixed = whole.iloc[[next(turn[i]) for i in order]]            # classes mixed, each in its order
    own = {c: whole[whole.label_class == c] for c in "sp"}
    forms = [mixed, own, {c: own[c].rename(columns={"label": c}).drop(columns="label_class") for c in "ps"}, mixed.to_dict("records"),
             {c: t.drop(columns="label_class").rename(columns={"label": "token"}) for c, t in own.items()},
             expected.frame.drop(columns=["alternative", "alternative_class", "transition", "text"]), expected]
    for form in forms:
        made = make_examples(form, seed=seed, pair=("s", "p"), all_classes=["s", "p"])
        assert made.frame.equals(expected.frame) and made.fingerprint == expected.fingerprint


@settings(max_examples=25, deadline=None)
@given(ROWS, st.integers(0, 5), st.integers(1, 3))
def test_promises_of_a_row(rows, seed, k):
    whole = merged(rows)
    ex = make_examples(whole, seed=seed, max_alternatives=k, pair=("s", "p"))
    frame, words = ex.frame, {c: {w.lower() for w in whole.label[whole.label_class == c]} for c in "sp"}
    for row in frame.itertuples():
        assert row.text == row.masked.replace("[MASK]", row.factual) and row.text.replace(row.factual, "[MASK]", 1).count("[MASK]") == 1
        assert {row.factual_class, row.alternative_class} == {"s", "p"} and row.alternative.lower() in words[row.alternative_class]
        assert row.alternative == "I" or row.alternative[1:].islower()
        assert row.transition == f"{row.factual_class}→{row.alternative_class}"
    assert frame.groupby("text").split.nunique().max() == 1       # no sentence in two splits
    assert not frame.duplicated(["masked", "factual", "alternative"]).any()
    assert frame.groupby(["masked", "factual"]).size().max() <= k
    assert len(frame.drop_duplicates(["masked", "factual"])) == len(whole.drop_duplicates(["masked", "label"]))
    assert make_examples(whole, seed=seed, max_alternatives=k, pair=("s", "p")).fingerprint == ex.fingerprint


def test_lexicon_pairs_and_explicit_alternatives_agree():
    wide = pd.DataFrame({"masked": ["[MASK] ran.", "The [MASK] ran.", "So the [MASK] fell."], "label_class": ["m", "m", "f"], "m": ["Actor", "king", "waiter"],
                         "f": ["actress", "queen", "waitress"]})
    told = pd.DataFrame({"masked": wide.masked, "factual": ["Actor", "king", "waitress"], "factual_class": wide.label_class,
                         "alternative": ["Actress", "queen", "waiter"], "alternative_class": ["f", "f", "m"]})
    pairs = told.set_axis(["masked", "source", "source_id", "target", "target_id"], axis=1)
    by_class = {"m": wide[:2].drop(columns="label_class"), "f": wide[2:].drop(columns="label_class")}
    ratios = (1, 0, 0)
    made = [make_examples(d, split_ratios=ratios) for d in (wide, told, pairs, by_class, told.rename(columns={"factual": "label", "factual_class": "label_class"}))]
    assert len({m.fingerprint for m in made}) == 1 and made[0].frame.columns.tolist() == list(COLUMNS)
    gap = wide.assign(f=["", "queen", "waitress"])                # a gap in the lexicon is filled by a draw
    assert make_examples(gap, split_ratios=ratios).frame.alternative.tolist() == ["Waitress", "queen", "waiter"]


def test_a_column_that_only_has_the_name_of_a_class_is_kept():
    frame = make_examples(AB.assign(p=[0, 0, 1, 1])).frame
    assert frame.p.tolist() == [0, 0, 1, 1] and frame.equals(make_examples(AB).frame.assign(p=[0, 0, 1, 1]))


# --- casing ---

def slow_start(before):
    "Whether a word after `before` starts a sentence, letter by letter."
    rest = before
    while rest and (rest[-1].isspace() or rest[-1] in "\"'“„‘‚»«([¿¡"): rest = rest[:-1]
    gap = before[len(rest):]
    if not rest: return True
    end = rest
    while end and end[-1] in "\"'”’»)]": end = end[:-1]
    # the closing marks may also have been taken for opening ones above
    closing = gap[:len(gap) - len(gap.lstrip("\"'”’»)]"))]
    if end and end[-1] in ".!?…" and any(ch.isspace() for ch in gap[:len(closing) + 1]): return True
    if rest[-1] in ",:":
        bare = gap.lstrip()
        return gap != bare and bare[:1] in "\"“„»«" and bare[:1] != ""
    return False


@settings(max_examples=300, deadline=None)
@given(st.text("ab .!,:\"“(”", max_size=7))
def test_starts_of_sentences(before):
    assert starts_sentence(pd.Series([before + "[MASK] went."]), "[MASK]").tolist() == [slow_start(before)]


@pytest.mark.parametrize("words, starts, classes, expected", [
    (["Häuser", "Tage", "Er", "sie"], [True, False, True, False], ["n", "n", "p", "p"], {"Häuser": "Häuser", "Er": "er"}),
    (["I", "My", "my"], [False, True, True], None, {"I": "I", "My": "my"}), (["Me", "I"], [True, False], None, {"Me": "me"}),
    (["US", "US", "us"], [False, False, False], None, {"US": "US", "us": "US"}), (["der", "Der", "DER"], [False, True, False], None, {"Der": "der", "DER": "der"}),
])
def test_dictionary_forms(words, starts, classes, expected):
    forms = dictionary_forms(words, starts, classes)
    assert {w: forms[w] for w in expected} == expected


def test_german_nouns_keep_their_capital():
    rows = [("Das [MASK] steht.", "Haus", "sg"), ("[MASK] stehen.", "Häuser", "pl"), ("Viele [MASK] stehen.", "Türme", "pl"), ("[MASK] steht.", "Haus", "sg")]
    ex = make_examples(table(rows))
    assert {w[0].isupper() for w in ex.frame.alternative} == {True} and set(ex.words("pl")) == {"Häuser", "Türme"}


def test_i_stays_i_in_every_place():
    rows = [("[MASK] ran.", "We", "p"), ("so [MASK] ran.", "we", "p"), ("SO [MASK] RAN.", "WE", "p"), ("so [MASK] ran.", "I", "s"), ("[MASK] ran.", "I", "s"),
            ("She said, \"[MASK] ran.\"", "I", "s")]
    assert make_examples(table(rows)).frame.alternative.tolist() == ["I", "I", "I", "we", "We", "We"]
    assert in_place("they", "I", "I", False) == "they" and in_place("they", "I", "I", True) == "They"


def test_draws_without_replacement_follow_the_shares():
    words, counts = ["a", "b", "c", "d"], [1, 2, 3, 4]
    drawn = draw_words(words, counts, ["x"] * 20000, np.random.default_rng(0), k=2)
    first = Counter(drawn[:, 0].tolist())
    assert all(abs(first[i] / 20000 - c / 10) < 0.015 for i, c in enumerate(counts))
    expected = sum(counts[j] / 10 * counts[0] / (10 - counts[j]) for j in range(1, 4))   # a second, after b, c or d
    assert abs((drawn[:, 1] == 0).mean() - expected) < 0.015 and (drawn[:, 0] != drawn[:, 1]).all()


def test_own_word_is_not_its_alternative():
    rows = [(f"{i} [MASK] x", w, c) for i in range(40) for w, c in [("der", "nom"), ("die", "dat"), ("der", "dat")]]
    with pytest.warns(UserWarning, match="40 of 120 rows have the same word"):
        frame = make_examples(table([(m + c, w, c) for m, w, c in rows])).frame
    assert (frame.alternative[frame.factual_class == "nom"] == "die").all()
    assert set(frame.alternative[frame.factual_class == "dat"]) == {"der"}      # the other class has no other word


# --- classes ---

FIVE = table([(f"{a} {i} [MASK] {c}", w, c) for i in range(4) for a, w, c in [
    ("x", "I", "1SG"), ("x", "we", "1PL"), ("x", "you", "2"), ("x", "he", "3SG"), ("y", "she", "3SG"), ("x", "they", "3PL")]])
MERGE = {"singular": ["1SG", "3SG"], "plural": ["1PL", "3PL"]}


def test_merged_classes():
    ex = make_examples(FIVE, class_merge_map=MERGE)
    assert ex.pair == ("singular", "plural") and set(ex.frame.raw_factual_class) == {"1SG", "3SG", "1PL", "3PL"}
    assert set(zip(ex.frame.alternative, ex.frame.raw_alternative_class, strict=True)) == {("I", "1SG"), ("he", "3SG"), ("she", "3SG"), ("we", "1PL"), ("they", "3PL")}
    assert ex.labels("factual").tolist() == [1.0] * 12 + [-1.0] * 8
    assert make_examples(FIVE, class_merge_map=MERGE, pair=("plural", "singular")).pair == ("plural", "singular")
    assert make_examples(FIVE, class_merge_map={"singular": ["1SG", "3SG"]}, pair=("singular", "2")).frame.raw_factual_class.nunique() == 3
    with pytest.raises(InputError, match="choose two"): make_examples(FIVE, class_merge_map={"singular": ["1SG", "3SG"]})
    again = make_examples(ex.frame)
    assert again.fingerprint == make_examples(ex).fingerprint == ex.fingerprint


def test_transition_groups():
    groups = [["1SG", "1PL"], ["3SG", "3PL"]]
    frame = make_examples(FIVE, class_merge_map=MERGE, transition_groups=groups).frame
    assert set(zip(frame.raw_factual_class, frame.raw_alternative_class, strict=True)) == {("1SG", "1PL"), ("1PL", "1SG"), ("3SG", "3PL"), ("3PL", "3SG")}
    some = make_examples(FIVE, class_merge_map=MERGE, transition_groups=groups[1:])
    assert set(some.frame.raw_factual_class) == {"3SG", "3PL"} and some.frame.attrs["transitions_dropped"] == 8
    told = FIVE[FIVE.label_class != "2"].assign(alternative="they", alternative_class="3PL")
    kept = make_examples(pd.concat([told[told.label_class.isin(["1SG", "3SG"])], FIVE[FIVE.label_class == "3PL"]]), class_merge_map={"s": ["1SG", "3SG"], "p": ["3PL"]},
                         transition_groups=[["3SG", "3PL"], ["1SG"]])
    assert set(kept.frame.raw_factual_class) == {"3SG", "3PL"} and kept.frame.attrs["transitions_dropped"] == 4
    for bad, message in [([["1SG", "1PL"], ["1SG", "3PL"]], "in two groups"), ([["1SG", "3PLU"]], "'3PLU' is not known: did you mean '3PL'"), ([["1SG", "3SG"]], "allows no transition")]:
        with pytest.raises(InputError, match=message): make_examples(FIVE, class_merge_map=MERGE, transition_groups=bad)


def test_contradicting_merges():
    for bad, message in [({"a": ["1SG"], "b": ["1SG"]}, "puts '1SG' into 'a' and 'b'"), ({"a": ["9"]}, "class_merge_map='9' is not known"), ({"2": ["1SG"], "b": ["1PL"]}, "not merged")]:
        with pytest.raises(InputError, match=message): make_examples(FIVE, class_merge_map=bad)


def test_identity_rows():
    ex = make_examples(FIVE, pair=("3SG", "3PL"), identity_rows=True)
    without = make_examples(FIVE, pair=("3SG", "3PL"))
    others = ex.frame[~ex.frame.factual_class.isin(ex.pair)]
    assert (others.factual == others.alternative).all() and (others.factual_class == others.alternative_class).all() and len(others) == 12
    assert not ex.labels("alternative")[others.index].any() and set(others.transition) == {"1SG→1SG", "1PL→1PL", "2→2"}
    own = ex.frame.drop(index=others.index).reset_index(drop=True)
    assert own.equals(without.frame)                               # the rows of the pair do not depend on them
    assert make_examples(ex).fingerprint == ex.fingerprint


def test_all_classes_and_their_order():
    ex = make_examples(FIVE, all_classes=["3PL", "3SG"])
    assert ex.pair == ("3PL", "3SG") and ex.frame.factual_class.tolist() == ["3PL"] * 4 + ["3SG"] * 8
    assert set(make_examples(FIVE, all_classes=["3PL", "2", "3SG"], pair=("3SG", "3PL"), identity_rows=True).frame.factual_class) == {"3PL", "2", "3SG"}
    with pytest.raises(InputError, match="all_classes='3Pl' is not known: did you mean '3PL'"): make_examples(FIVE, all_classes=["3SG", "3Pl"])


def test_small_classes_are_never_dropped_in_silence():
    with pytest.raises(InputError, match="min_rows_per_class=5 rows: 1SG, 1PL, 2, 3PL .rows of each class: 1SG: 4, 1PL: 4, 2: 4, 3SG: 8, 3PL: 4"):
        make_examples(FIVE, min_rows_per_class=5)
    with pytest.raises(InputError, match="rows: 3PL .rows of each class: 3SG: 8, 3PL: 4"): make_examples(FIVE, pair=("3SG", "3PL"), min_rows_per_class=5)
    with pytest.raises(InputError, match="leaves no rows of 3PL"): make_examples(FIVE, pair=("3SG", "3PL"), min_rows_per_class=5, on_small_class="drop")
    few = pd.concat([FIVE, FIVE[FIVE.label_class == "3PL"].assign(masked=lambda t: t.masked + "!")])
    with pytest.warns(UserWarning, match="dropped classes with fewer than 5 rows: 1SG, 1PL, 2 "):
        assert make_examples(few, min_rows_per_class=5, on_small_class="drop").pair == ("3SG", "3PL")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(make_examples(few, pair=("3SG", "3PL"), min_rows_per_class=8)) == 16
    with pytest.raises(InputError, match="fewer than min_rows_per_class=5"):      # repeated rows do not help
        make_examples(pd.concat([FIVE, FIVE]), pair=("3SG", "3PL"), min_rows_per_class=5)


def test_alternatives_without_a_class():
    told = FIVE.assign(alternative="they")
    with pytest.raises(InputError, match="24 rows have an alternative without its class, first 'they': with 5 classes"): make_examples(told, pair=("3SG", "1SG"))
    two = told[told.label_class != "3PL"]
    assert set(make_examples(two.assign(alternative="we"), all_classes=["3SG", "1SG"]).frame.alternative_class) == {"3SG", "1SG"}


def test_words_of_the_test_are_not_drawn_in_training():
    words = {"s": ["he", "she", "it", "I"], "p": ["they", "we", "ye", "both"]}
    frame = table([(f"{i} [MASK] {w}", w, c) for i in range(20) for c, own in words.items() for w in own])
    made = make_examples(frame, split_by="target").frame
    seen = {s: set(g.factual.str.lower()) for s, g in made.groupby("split")}
    assert len(seen) == 3 and not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert all(a.lower() in seen[s] for a, s in zip(made.alternative, made.split, strict=True))
    assert make_examples(make_examples(frame, split_by="target").frame.drop(columns=["alternative", "alternative_class"])).frame.equals(made)


def test_rows_of_both_classes_at_once():
    torn = pd.concat([AB, AB[:1].assign(label_class="p")])
    with pytest.warns(UserWarning, match="dropped 2 rows whose text and word are in both classes"): ex = make_examples(torn)
    assert ex.frame.masked.tolist() == AB.masked.tolist()[1:] and ex.frame.attrs["contradictions_dropped"] == 2
    with pytest.raises(InputError, match="all 2 rows of class 'p' are contradictory"):
        make_examples(pd.concat([AB[:2], table([("Now [MASK] ran.", "he", "s")]), AB[:2].assign(label_class="p")]))
    both = AB.assign(label_class=["s", "t", "p", "p"], masked="[MASK] ran.", label=["He", "He", "They", "We"])
    assert make_examples(both, class_merge_map={"S": ["s", "t"], "P": ["p"]}).frame.attrs["duplicates_dropped"] == 1     # one class when merged


def test_caps():
    many = table([(f"[MASK] saw {i}.", w, c) for i in range(100) for w, c in (("He", "s"), ("They", "p"), ("We", "w"))], split=None)
    ex = make_examples(many, pair=("s", "p"), max_per_class=20, identity_rows=True)
    assert ex.frame.groupby("factual_class").split.value_counts().unstack().loc[["s", "p", "w"], ["train", "validation", "test"]].to_numpy().tolist() == [[16, 2, 2]] * 3
    full = make_examples(many, pair=("s", "p"))
    assert set(ex.frame.masked) < set(full.frame.masked) and make_examples(many, pair=("s", "p"), max_per_class=20, seed=1).fingerprint != ex.fingerprint
    assert make_examples(many, pair=("s", "p"), max_per_class=1000).fingerprint == full.fingerprint
    for name in ("max_per_class", "min_rows_per_class", "max_alternatives"):
        for bad in (0, -1, 1.5, True):
            with pytest.raises(InputError, match=f"{name}={bad!r} must be a whole number"): make_examples(many, pair=("s", "p"), **{name: bad})


@pytest.mark.parametrize("options, message", [
    ({"seed": None}, "seed=None must be a whole number"), ({"seed": 1.0}, "seed=1.0"), ({"seed": -1}, "seed=-1"), ({"seed": True}, "seed=True"), ({"mask": ""}, "mask='' must be"),
    ({"mask": " "}, "mask=' '"), ({"mask": None}, "mask=None")])
def test_seed_and_mask(options, message):
    with pytest.raises(InputError, match=message): make_examples(AB, **options)
    with pytest.raises(InputError, match=message): neutral_examples(["big cat"], **options)


# --- splits ---

def test_classes_too_small_for_the_splits():
    rows = [(f"[MASK] saw {i}.", w, c) for w, c, n in (("He", "s", 9), ("They", "p", 2), ("We", "w", 9)) for i in range(n)]
    small = table(rows, split=None)
    with pytest.raises(InputError, match="p has no rows in validation and test .different texts of each class: s: 9, p: 2.*on_small_class='drop'"):
        make_examples(small, pair=("s", "p"))
    assert set(make_examples(small, pair=("s", "p"), split_ratios=(1, 0, 0)).frame.split) == {"train"}
    assert make_examples(small, pair=("s", "w"), identity_rows=True).pair == ("s", "w")       # other classes do not matter
    with pytest.raises(InputError, match="leaves too few classes: p has no rows"): make_examples(small, pair=("s", "p"), on_small_class="drop")
    with pytest.warns(UserWarning, match="dropped classes too small for the splits: p has"):
        assert make_examples(small, on_small_class="drop").pair == ("s", "w")
    with pytest.raises(InputError, match="3 classes .s, p, w.: choose two"): make_examples(small)


def test_given_splits_are_kept_and_looked_at():
    given = table([(f"[MASK] saw {i}.", w, c) for i in range(3) for w, c in (("He", "s"), ("They", "p"))], split=["train", "train", "dev", "train", "test", "test"])
    with pytest.warns(UserWarning, match="in the splits of the data, p has no rows in validation .*s: 3, p: 3"): make_examples(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_examples(given.assign(split="train"))
    with pytest.raises(InputError, match="split_ratios=.0.5, 0.5, 0. is given, and the data brings its own splits"): make_examples(given, split_ratios=(0.5, 0.5, 0))


def test_dividing_anew():
    words = {"s": ["he", "she", "it", "I"], "p": ["they", "we", "ye", "both"]}
    frame = table([(f"{i} [MASK] {c}", w, c) for i in range(20) for c, own in words.items() for w in own], split="train", book=[f"b{i % 10}" for i in range(160)])
    assert set(make_examples(frame).frame.split) == {"train"}
    by_text = make_examples(frame, split_by="text").frame
    assert by_text.equals(make_examples(frame.drop(columns="split")).frame) and by_text.split.nunique() == 3
    by_word = make_examples(frame.assign(masked=lambda t: t.masked + t.label), split_by="target").frame
    assert by_word.groupby("factual").split.nunique().max() == 1 and by_word.split.nunique() == 3
    by_book = make_examples(frame.assign(masked=lambda t: t.masked + t.book + t.label), split_by="group", group_column="book").frame
    assert by_book.groupby("book").split.nunique().max() == 1 and by_book.split.nunique() == 3
    for options, message in [({"group_column": "book"}, "split_by='group' only"), ({"split_by": "group"}, "group_column"), ({"split_by": "book"}, "split_by='book'"),
                             ({"split_by": "group", "group_column": "page"}, "'page'"), ({"split_ratios": (0.5, 0.5)}, "split_ratios")]:
        with pytest.raises(InputError, match=message): make_examples(frame, **options)
    assert set(make_examples(frame, split_by="text", split_ratios=(0.5, 0.5, 0)).frame.split) == {"train", "validation"}


def test_merged_classes_are_what_is_divided():
    frame = table([(f"{i} [MASK] {w}", w, c) for i in range(9) for w, c in [("I", "1SG"), ("he", "3SG"), ("she", "3SG"), ("we", "1PL"), ("they", "3PL"), ("both", "3PL")]])
    made = make_examples(frame, class_merge_map=MERGE, split_by="target").frame
    assert made.groupby("factual").split.nunique().max() == 1 and made.groupby("factual_class").split.nunique().tolist() == [3, 3]


# --- placeholders ---

def test_several_placeholders_only_if_asked_for():
    rows = table([("[MASK] said that [MASK] knew.", "He", "s"), ("So [MASK] and [MASK] ran.", "they", "p"), ("[MASK] and [MASK] ran.", "They", "p")])
    with pytest.raises(InputError, match="2 times instead of once .3 such rows.*mask_all=True"): make_examples(rows)
    ex = make_examples(rows, mask_all=True)
    assert ex.frame.text.tolist() == ["He said that he knew.", "So they and they ran.", "They and they ran."]
    assert ex.frame.alternative.tolist() == ["They", "he", "He"] and make_examples(ex).fingerprint == ex.fingerprint
    with pytest.raises(InputError, match="0 times"): make_examples(rows, mask_all=True, mask="<m>")
    given_text = make_examples(rows.assign(text=["He said that he knew.", "", None]), mask_all=True).frame.text.tolist()
    assert given_text == ["He said that he knew.", "So they and they ran.", "They and they ran."]
    words = table([("[MASK] ran. [MASK] fell, and [MASK] sat.", w, c) for w, c in (("He", "s"), ("I", "i"), ("THEY", "p"), ("they", "p"))])
    assert make_examples(words, mask_all=True, pair=("s", "i"), identity_rows=True).frame.text.tolist() == [
        "He ran. He fell, and he sat.", "I ran. I fell, and I sat.", "THEY ran. THEY fell, and THEY sat.", "they ran. they fell, and they sat."]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "hf"])
def test_a_folder_of_a_creator_is_the_object_in_memory(tmp_path, form):
    lines = [f"{w} said that {w.lower()} saw {i}." for i in range(20) for w in ("He", "They")]
    filters = [TextFilterConfig("they", id="z"), TextFilterConfig("he", id="a")]
    made = TextPredictionDataCreator(lines, filters, mask="<m>", mask_all=True).generate_training_data()
    assert (made.unified.masked.str.count("<m>") == 2).all()
    ex = make_examples(made)                                           # it says itself how it was masked
    assert ex.mask == "<m>" and ex.pair == ("z", "a") and make_examples(ex).fingerprint == ex.fingerprint
    assert make_examples(made.save(tmp_path / "made", format=form, name="rows")).fingerprint == ex.fingerprint


def test_data_that_knows_its_placeholder():
    ex = make_examples(AB.assign(masked=AB.masked.str.replace("[MASK]", "<m>")), mask="<m>")
    assert make_examples(ex).mask == "<m>" and make_examples(ex).fingerprint == ex.fingerprint
    turned = Examples(ex.frame, ("p", "s"), "<m>")
    assert make_examples(turned).pair == ("p", "s")                # the pair of the object, not the order of its rows


def test_a_class_that_turns_into_itself_needs_its_alternative():
    told = AB.assign(alternative_class="p")
    with pytest.raises(InputError, match="2 rows of class 'p' have no alternative"): make_examples(told)
