"Edge cases of gradiend.data.output: what is shown is escaped, what is read back is what was written."
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiend.core import InputError, read_json
from gradiend.data.output import TrainingData, differences, load_created, read_part, read_record, write_part
from gradiend.data.tables import read_table

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12).map(
    lambda s: " ".join(s.split())).filter(bool)


def data(rows=(("[MASK] ran.", "He", "sg", "train"), ("[MASK] sat.", "They", "pl", "test")), **kw) -> TrainingData:
    frame = pd.DataFrame(rows, columns=["masked", "label", "label_class", "split"], dtype=str)
    frame["text"] = [m.replace("[MASK]", w) for m, w in zip(frame.masked, frame.label)]
    return TrainingData(frame, tuple(frame.label_class.drop_duplicates()), **kw)


def test_is_a_mapping_that_other_code_takes_for_a_dict():
    both = data()
    assert dict(both).keys() == {"sg", "pl"} and both.get("other") is None and "sg" in both and len(both) == 2
    assert both["sg"].index.tolist() == [0] and {**both}.keys() == both.per_class.keys()
    assert repr(both) == "TrainingData(2 rows: 1 sg, 1 pl; 1 train, 1 test)"
    with pytest.raises(KeyError, match="there are sg, pl"): both["plural"]
    with pytest.raises(AttributeError): both.mask = "x"


@pytest.mark.parametrize("bad", ["<script>alert(1)</script>", "&amp;", '"><img src=x>', "</td><b>"])
def test_html_escapes_everything_that_comes_from_data(bad):
    rows = [(f"{bad} [MASK] {bad}", bad, bad, "train")]
    page = data(rows, report={"matches": {bad: 1}})._repr_html_()
    assert bad not in page.replace("&amp;amp;", "") and page.count("<mark>[MASK]</mark>") == 1
    strange = TrainingData(data().unified.assign(masked="a <b> c"), ("sg",), mask="<b>")
    assert "<b>" not in strange._repr_html_() and "<mark>&lt;b&gt;</mark>" in strange._repr_html_()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["sg", "pl|x", "ß"])), min_size=1, max_size=5),
       st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_saving_and_loading_is_the_identity(tmp_path_factory, rows, kind):
    folder = tmp_path_factory.mktemp("data")
    one = data([(f"{t} [MASK]", w, c, "train") for t, w, c in rows], report={"texts_read": 3}, configuration={"seed": 1})
    back = load_created(one.save(folder, format=kind))
    assert back.unified.equals(one.unified) and back.fingerprint == one.fingerprint
    assert (back.classes, back.mask, back.report, back.configuration) == (one.classes, one.mask, one.report, one.configuration)


def test_hf_folder_and_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = data()
    assert load_created(one.save(tmp_path, format="hf")).unified.equals(one.unified)
    assert datasets.load_from_disk(str(tmp_path / "training")).column_names == one.unified.columns.tolist()
    assert one.to_dataset().to_pandas().equals(one.unified.astype(object)) or one.to_dataset().num_rows == 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_fingerprints_agree_if_and_only_if_the_rows_do(one, two):
    a, b = (data([(f"{t} [MASK]", w, "c", "train") for t, w in rows]) for rows in (one, two))
    assert (a.fingerprint == b.fingerprint) == a.unified.equals(b.unified)
    assert a.fingerprint == data([(f"{t} [MASK]", w, "c", "train") for t, w in one]).fingerprint


def test_a_table_that_was_changed_is_refused(tmp_path):
    data().save(tmp_path)
    table = read_table(tmp_path / "training.csv")
    table.loc[0, "label"] = "She"
    table.to_csv(tmp_path / "training.csv", index=False)
    with pytest.raises(InputError, match="was changed or half-written"): load_created(tmp_path)
    (tmp_path / "training.csv").unlink()
    with pytest.raises(InputError, match="no file"): load_created(tmp_path)


def test_two_parts_share_a_folder_and_a_foreign_readme_survives(tmp_path):
    (tmp_path / "README.md").write_text("# Somebody's work\n")
    data().save(tmp_path, format="parquet")
    write_part(tmp_path, "neutral", pd.DataFrame({"text": ["The rain fell."]}), report={}, configuration={"limit": 3})
    data(report={"texts_read": 5}).save(tmp_path, format="csv", name="rows")
    assert (tmp_path / "README.md").read_text() == "# Somebody's work\n"
    assert list(read_record(tmp_path)) == ["training", "neutral"] and read_record(tmp_path)["training"]["file"] == "rows.csv"
    assert read_part(tmp_path, "neutral")[1]["configuration"] == {"limit": 3}
    card = (tmp_path / "dataset_card.md").read_text()
    assert "5 texts read" in card and "## neutral" in card
    assert read_json(tmp_path / "dataset.json")["parts"]["neutral"]["gradiend"]


def test_the_card_keeps_the_examples_of_both_parts(tmp_path):
    data().save(tmp_path)
    write_part(tmp_path, "neutral", pd.DataFrame({"text": ["The rain fell."]}), report={"texts_read": 1}, configuration={})
    card = (tmp_path / "README.md").read_text()
    assert "| [MASK] ran. | He | sg | train |" in card and "| The rain fell. |" in card and "duplicates dropped" not in card


def test_errors(tmp_path):
    with pytest.raises(InputError, match="holds no training data: there is no dataset.json"): load_created(tmp_path)
    with pytest.raises(InputError, match="format='xls'"): data().save(tmp_path / "x", format="xls")
    with pytest.raises(InputError, match="contradicts the ending"): data().save(tmp_path / "x.csv", format="jsonl")
    (tmp_path / "dataset.json").write_text('{"somebody": "else"}')
    with pytest.raises(InputError, match="not written by gradiend"): data().save(tmp_path)


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.text("ab", max_size=2)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3)),
                    max_leaves=8),
       st.dictionaries(st.text("xyz", min_size=1, max_size=2), st.integers(0, 2), max_size=3))
def test_differences(one, extra):
    assert differences({"a": one}, {"a": one}) == []
    if isinstance(one, dict) and {**one, **extra} != one and None not in extra.values():
        found = differences(one, {**one, **extra})
        assert found or all(one.get(k) == v for k, v in extra.items())
    assert differences({"a": 1}, {"a": "1"}) == ['a was 1 and is "1"'] and differences({"a": (1, 2)}, {"a": [1, 2]}) == []
