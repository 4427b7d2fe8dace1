"Edge cases of gradiend.data.splits: nothing is shared between splits, whatever the rows."
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiend.core import InputError
from gradiend.data.splits import assign_splits, balance_rows, check_ratios, drop_duplicate_rows, split_rows
from gradiend.data.text import near_key

ROWS = st.lists(st.tuples(st.sampled_from(["t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8"]),
                          st.sampled_from(["he", "He", "she", "it", "they", "we", "you", "one"]),
                          st.sampled_from(["a", "b"])), min_size=1, max_size=60)


def table(rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["text", "label", "label_class"]).assign(masked=lambda f: f.text + " [MASK]")


def test_split_sizes():
    texts = [str(i) for i in range(1000)]
    counts = pd.Series(assign_splits(texts, ["x"] * 1000, ratios=(0.7, 0.2, 0.1))).value_counts()
    assert counts.to_dict() == {"train": 700, "validation": 200, "test": 100}
    for n in range(1, 12):
        split = assign_splits(texts[:n], ["x"] * n)
        assert "train" in split and len(set(split)) == (3 if n >= 3 else 1)


def test_the_division_of_earlier_versions_is_kept():
    "Numbers in the documentation depend on who is in which split."
    split = assign_splits([f"text {i}" for i in range(20)], ["a"] * 12 + ["b"] * 8, seed=1)
    assert "".join("T" if s == "test" else s[0] for s in split) == "tvttttttttTtvtttttTt"


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(0, 5), st.permutations(range(3)))
def test_no_text_is_in_two_splits_and_order_plays_no_part(rows, seed, order):
    frame = table(rows)
    done, dropped = split_rows(frame, seed=seed)
    assert dropped == 0 and len(done) == len(frame) and done.groupby("text").split.nunique().max() == 1
    first = {}  # a text's class is that of its first row, so only rows of different texts may change places
    for row in rows:
        first.setdefault(row[0], []).append(row)
    moved = [r for t in sorted(first, key=lambda t: (order[int(t[1]) % 3], t)) for r in first[t]]
    again, _ = split_rows(table(moved), seed=seed)
    assert dict(zip(again.text, again.split)) == dict(zip(done.text, done.split))


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(0, 5), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0), (0.4, 0.3, 0.3), (1, 0, 0)]))
def test_no_target_and_no_text_is_in_two_splits(rows, seed, ratios):
    frame = table(rows)
    try:
        done, dropped = split_rows(frame, split_by="target", ratios=ratios, seed=seed)
    except InputError as e:
        assert "split_by='target'" in str(e)
        return
    assert len(done) + dropped == len(frame)
    assert done.groupby("text").split.nunique().max() == 1
    assert done.groupby(done.label.str.casefold()).split.nunique().max() == 1
    wanted = {s for s, r in zip(("train", "validation", "test"), ratios) if r}
    assert all(set(part.split) == wanted for _, part in done.groupby("label_class"))


def test_group_split_keeps_the_shares():
    frame = pd.DataFrame({"text": [str(i) for i in range(2000)], "label_class": ["a", "b"] * 1000, "label": "x",
                          "book": [f"b{i % 40}" for i in range(2000)]})
    done, _ = split_rows(frame, split_by="group", group_column="book")
    assert done.groupby("book").split.nunique().max() == 1
    assert done.split.value_counts(normalize=True).round(2).to_dict() == {"train": 0.8, "validation": 0.1, "test": 0.1}


def test_one_word_in_two_classes_is_one_target():
    "Der as nominative and as genitive is still one word."
    words = ["der", "die", "das", "dem", "den", "des"]
    frame = pd.DataFrame([(w, c, f"{w} {c} {i}") for w in words for c in ("Nom", "Gen") for i in range(20)],
                         columns=["label", "label_class", "text"])
    done, dropped = split_rows(frame, split_by="target")
    assert dropped == 0 and done.groupby("label").split.nunique().max() == 1


@pytest.mark.parametrize("kw, message", [
    (dict(split_by="word"), "split_by='word'"), (dict(split_by="group"), "give group_column"),
    (dict(split_by="group", group_column="book"), "needs the column 'book'"), (dict(ratios=(0.5, 0.2, 0.2)), "split_ratios="),
    (dict(split_by="target"), "class 'a' has 1 \\(he\\)"),
])
def test_errors(kw, message):
    with pytest.raises(InputError, match=message):
        split_rows(table([("t1", "he", "a"), ("t2", "they", "b")]), **kw)


def test_ratios():
    assert check_ratios((1, 0, 0)) == (1.0, 0.0, 0.0)
    for bad in ((0.8, 0.2), (0, 0.5, 0.5), (1.2, -0.1, -0.1)):
        with pytest.raises(InputError, match="split_ratios"): check_ratios(bad)


def test_duplicates_exact_and_near():
    frame = pd.DataFrame({"masked": ["[MASK] ran.", "[MASK] ran.", "[MASK]  ran!", "[MASK] sat."], "label": ["He", "He", "he", "He"]})
    assert drop_duplicate_rows(frame)[1] == 1
    kept, dropped = drop_duplicate_rows(frame, key=near_key)
    assert dropped == 2 and kept.masked.tolist() == ["[MASK] ran.", "[MASK] sat."]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("uvwxyz")), min_size=1, max_size=80),
       st.one_of(st.none(), st.integers(1, 30)), st.sampled_from([False, True, "try", "strict"]), st.integers(1, 4))
def test_balance(rows, limit, balance, floor):
    frame = pd.DataFrame(rows, columns=["label_class", "label"]).assign(row=range(len(rows)))
    sizes = frame.label_class.value_counts()
    done = balance_rows(frame, limit=limit, balance=balance, floor=floor)
    got = done.label_class.value_counts()
    cap = limit if limit is not None else len(frame)
    if balance is False:
        assert got.to_dict() == {c: min(n, cap) for c, n in sizes.items()}
    elif balance in (True, "try"):
        assert got.to_dict() == dict.fromkeys(sizes.index, min(sizes.min(), cap))
    if balance != "strict":
        assert done.row.is_unique and done.row.is_monotonic_increasing
    if balance == "try":  # no word has a row less than another of its class unless it has no more
        for c, part in done.groupby("label_class"):
            have = Counter(part.label)
            all_of = Counter(frame[frame.label_class == c].label)
            most = max(have.values())
            assert all(have[w] >= most - 1 or have[w] == n for w, n in all_of.items())
    if balance == "strict":
        assert got.nunique() <= 1
        for c, part in done.groupby("label_class"):
            have = [Counter(part.label)[w] for w in set(frame[frame.label_class == c].label)]
            assert max(have) - min(have) <= 1
