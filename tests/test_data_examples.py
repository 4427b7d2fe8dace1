"Edge cases of gradiend.data.examples, on the exported package."
import numpy as np
import pandas as pd
import pytest

from gradiend.core import InputError
from gradiend.data.examples import COLUMNS, Examples, gradient_labels, make_examples, neutral_examples
from gradiend.data.sources import write_table


def table(rows, **columns):
    return pd.DataFrame(rows, columns=["masked", "label", "label_class"]).assign(**columns)


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
    ("He", "[MASK] ran.", "They"), ("he", "[MASK] ran.", "they"), ("He", "A God that [MASK] is.", "They"), ("HE", "[MASK] RAN.", "They"),
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


def test_splits():
    ex = make_examples(AB.assign(split=["Dev", "training", "test", "val"]))
    assert ex.frame.split.tolist() == ["validation", "train", "test", "validation"]
    assert len(ex.select("validation")) == 2 and len(ex.select(["train", "test"])) == 2 and ex.select("all") is ex
    with pytest.raises(InputError, match="split='unseen'"): ex.select("unseen")
    with pytest.warns(UserWarning, match="1 texts are in more than one split"):
        make_examples(table([("[MASK] saw it.", "He", "s"), ("He saw [MASK].", "it", "s"), ("[MASK] go.", "They", "p")], split=["train", "test", "train"]))
    many = table([(f"[MASK] saw {i}.", w, c) for i in range(50) for w, c in (("He", "s"), ("They", "p"))])
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
    assert make_examples(tmp_path / "per_class").pair == ("p", "s")     # by file name
    assert make_examples(tmp_path / "per_class", pair=("s", "p")).pair == ("s", "p")
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
