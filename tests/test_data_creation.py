"Edge cases of gradiend.data.creation, on the exported package."
import pandas as pd
import pytest

from gradiend.core import InputError, read_json
from gradiend.data import creation
from gradiend.data.creation import TextPredictionDataCreator, assign_splits
from gradiend.data.filters import TextFilterConfig
from gradiend.data.sources import read_table

SG, PL = TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")
TEXTS = [f"{w} saw number {i} there." for i in range(30) for w in ("He", "They", "Some")]


def make(texts=TEXTS, filters=(SG, PL), **kw):
    return TextPredictionDataCreator(texts, list(filters), **kw)


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


def test_duplicates_after_normalisation():
    creator = make(["She saw “it” there.", 'She saw "it"  there.', "They ran off today."])
    creator.generate_training_data(balance=False)
    assert creator.report["duplicates_dropped"] == 2 and creator.report["matches"] == {"3SG": 4, "3PL": 1}
    assert creator.report["rows"] == {"3SG": 2, "3PL": 1}


def test_lengths_placeholder_and_sentences():
    creator = make(["They ran off. It was. " + "He " * 9 + ".", "They [MASK] it now.", "He saw it here."],
                   sentences=True, max_words=5)
    frame = creator.generate_training_data(format="unified", balance=False)
    assert sorted(frame.label) == ["He", "They", "it"]
    assert (creator.report["too_short"], creator.report["too_long"], creator.report["with_placeholder"]) == (1, 1, 1)


def test_an_absent_class_is_named():
    with pytest.raises(InputError, match="some classes were not found.*no match for 1PL: we"):
        make(filters=[SG, PL, TextFilterConfig("we", id="1PL")]).generate_training_data()
    with pytest.raises(InputError, match="no match in the base data .3 texts read.*searched for 3SG: he, she, it; 3PL: they"):
        make(["Nothing to see here."] * 3).generate_training_data()


def test_all_texts_too_short_says_so():
    with pytest.raises(InputError, match="2 texts read, 0 usable, 2 too short"): make(["It.", "They."]).generate_training_data()


@pytest.mark.parametrize("kw, message", [
    (dict(split_ratios=(0.5, 0.5)), "split_ratios"), (dict(min_words=0), "min_words=0"), (dict(mask=" "), "mask="),
    (dict(base_max_size=0), "base_max_size=0"),
])
def test_settings_are_checked_at_once(kw, message):
    with pytest.raises(InputError, match=message): make(**kw)


def test_unknown_argument_and_sizes():
    with pytest.raises(TypeError): make(max_size=3)
    for call in (lambda c: c.generate_training_data(0), lambda c: c.generate_neutral_data(-1)):
        with pytest.raises(InputError, match="must be 1 or more"): call(make())


def test_neutral_texts():
    creator = make(TEXTS + ["THEY stood there alone.", "It's late for now."])
    creator.generate_training_data()
    neutral = creator.generate_neutral_data()
    assert len(neutral) == 30 and neutral.text.str.startswith("Some").all()
    assert len(creator.generate_neutral_data(additional_excluded_words=["NUMBER 3"])) == 29
    assert creator.generate_neutral_data(5).text.tolist() == creator.generate_neutral_data(5).text.tolist()
    with pytest.raises(InputError, match="no neutral text"): creator.generate_neutral_data(additional_excluded_words="some")
    assert creator.generate_neutral_data(base_data=["Rain fell on us."] * 2).text.tolist() == ["Rain fell on us."]


def test_a_generator_serves_both_products():
    creator = make(iter(TEXTS), base_max_size=60)
    creator.generate_training_data()
    assert creator.report["texts_read"] == 60 and len(creator.generate_neutral_data()) == 20


def test_files_on_disk(tmp_path):
    creator = make(output_dir=tmp_path / "out", mask="<m>")
    frame = creator.generate_training_data(format="unified", output=tmp_path / "one.parquet")
    creator.generate_neutral_data(3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == \
        ["neutral.csv", "neutral_report.json", "training.csv", "training_report.json"]
    for path in (tmp_path / "one.parquet", tmp_path / "out" / "training.csv"):
        assert read_table(path).to_dict("list") == frame.to_dict("list")
    assert read_json(tmp_path / "out" / "training_report.json") == creator.report
    assert frame.masked.str.count("<m>").eq(1).all()


def test_a_stream_from_the_hub_is_not_read_to_its_end(monkeypatch):
    def endless(source, **kw):
        i = 0
        while True:
            yield from (f"They saw {i} there.", f"It saw {i} there.", f"Some saw {i} there.")
            i += 1
    monkeypatch.setattr(creation, "read_texts", endless)
    creator = make("org/endless")
    assert {c: len(t) for c, t in creator.generate_training_data(25).items()} == {"3SG": 25, "3PL": 25}
    assert creator.report["texts_read"] < 100 and len(creator.generate_neutral_data(7)) == 7


def test_seeds_change_draw_and_division():
    a, b = (make(seed=s).generate_training_data(10, format="unified") for s in (0, 1))
    assert a.masked.tolist() != b.masked.tolist()
    assert make(seed=0).generate_training_data(10, format="unified").equals(a)


def test_split_sizes():
    texts = [str(i) for i in range(1000)]
    counts = pd.Series(assign_splits(texts, ["x"] * 1000, ratios=(0.7, 0.2, 0.1))).value_counts()
    assert counts.to_dict() == {"train": 700, "validation": 200, "test": 100}
    for n in range(1, 12):
        split = assign_splits(texts[:n], ["x"] * n)
        assert "train" in split and len(set(split)) == (3 if n >= 3 else 1)
