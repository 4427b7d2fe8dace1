"Every input form ends in the same long table: edge cases of gradiend.data.forms, on the exported package."
import datasets
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradiend.core import InputError, fingerprint
from gradiend.data.forms import Columns, long_table, placeholder_of, split_name
from gradiend.data.tables import write_table

MERGED = pd.DataFrame([
    ("[MASK] ran, \"fast\".", "He", "3SG", "train"), ("So [MASK] ran.", "she", "3SG", "test"), ("NA [MASK]\tfell.", "they", "3PL", "train"),
    ("Ärger: [MASK] fell.", "They", "3PL", "validation")], columns=["masked", "label", "label_class", "split"])
CLASSES = ["3SG", "3PL"]


@pytest.fixture(autouse=True)
def quiet_datasets():
    before = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield
    if before: datasets.enable_progress_bars()


def part(cls, frame=MERGED): return frame[frame.label_class == cls].drop(columns="label_class").reset_index(drop=True)


def name(data, **options):
    "Fingerprint of the needed columns of the long table."
    table = long_table(data, **options)
    return fingerprint(table[[c for c in ("masked", "factual", "factual_class", "split") if c in table.columns]])


EXPECTED = name(MERGED)


@pytest.mark.parametrize("word", ["label", "token", "own", "factual"])
def test_dictionary_of_frames(word):
    data = {c: part(c).rename(columns={"label": c if word == "own" else word}) for c in CLASSES}
    if word == "factual": data = {c: t.assign(factual_class=c) for c, t in data.items()}
    assert name(data) == EXPECTED


def test_one_column_for_each_class():
    wide = MERGED.drop(columns="label").assign(**{"3SG": MERGED.label.where(MERGED.label_class == "3SG"), "3PL": MERGED.label.where(MERGED.label_class == "3PL", "")})
    assert name(wide) == EXPECTED
    assert {"3SG", "3PL"} <= set(long_table(wide).columns)      # they may hold alternatives, so they stay


def test_values_of_a_dictionary(tmp_path):
    data = {"3SG": part("3SG").to_dict("records"), "3PL": write_table(part("3PL"), tmp_path / "p.csv")}
    assert name(data) == EXPECTED
    hub = datasets.DatasetDict({c: datasets.Dataset.from_pandas(part(c)) for c in CLASSES})
    assert name(hub) == EXPECTED
    alone = datasets.DatasetDict(train=datasets.Dataset.from_pandas(MERGED))      # what load_dataset makes of one file
    assert name(alone) == EXPECTED and "split" not in long_table({"train": MERGED.drop(columns="split")}).columns
    assert set(long_table({"test": MERGED}).split) == {"test"}
    by_split = {c: {s: g.drop(columns="split") for s, g in part(c).groupby("split", sort=False)} for c in CLASSES}
    assert name(by_split) == EXPECTED


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_and_folders(tmp_path, ending):
    assert name(write_table(MERGED, tmp_path / f"all.{ending}")) == EXPECTED
    if ending == "json": return                                   # in a folder, .json files are records and not tables
    for c in CLASSES: write_table(part(c), tmp_path / "classes" / f"{c}.{ending}")
    table = long_table(tmp_path / "classes")
    assert table.factual_class.unique().tolist() == ["3PL", "3SG"] and len(table) == 4
    for s, g in MERGED.groupby("split"): write_table(g, tmp_path / "splits" / f"{s}.{ending}")
    assert sorted(long_table(str(tmp_path / "splits")).split) == ["test", "train", "train", "validation"]


def test_folder_of_a_creator(tmp_path):
    write_table(MERGED, tmp_path / "training.csv")
    write_table(pd.DataFrame({"text": ["It rains."]}), tmp_path / "neutral.csv")
    assert name(tmp_path) == EXPECTED
    (tmp_path / "training.csv").rename(tmp_path / "pronouns.csv")
    (tmp_path / "dataset.json").write_text('{"parts": {"training": {"file": "pronouns.csv", "format": "csv"}}}')
    write_table(MERGED[:1], tmp_path / "training.csv")            # the record decides, not the name
    assert name(tmp_path) == EXPECTED
    saved = tmp_path / "hf"
    datasets.Dataset.from_pandas(MERGED).save_to_disk(str(saved / "training"))
    (saved / "README.md").write_text("a card")
    assert name(saved) == EXPECTED


def test_folders_with_one_table(tmp_path):
    write_table(MERGED, tmp_path / "json" / "training.json")
    assert name(tmp_path / "json") == EXPECTED
    write_table(MERGED, tmp_path / "other" / "pronouns.tsv")
    write_table(pd.DataFrame({"text": ["It rains."]}), tmp_path / "other" / "neutral.tsv")
    assert name(tmp_path / "other") == EXPECTED and not long_table(tmp_path / "other").attrs
    write_table(MERGED.drop(columns="split"), tmp_path / "split" / "test.csv")
    assert set(long_table(tmp_path / "split").split) == {"test"}            # the name of a split still says the split
    for c in CLASSES: write_table(part(c), tmp_path / "classes" / f"{c}.csv")
    assert long_table(tmp_path / "classes").attrs == {"classes_by_name": True}
    (tmp_path / "classes" / "dataset.json").write_text("[]")                # somebody else's record
    assert placeholder_of(tmp_path / "classes") == ("[MASK]", False) and len(long_table(tmp_path / "classes")) == 4


def test_rows_without_a_split_are_named():
    with pytest.raises(InputError, match="row 2 of data .3PL: 'NA .* has no split .1 such rows.: give all rows one"): long_table(MERGED.assign(split=["train", "test", float("nan"), "dev"]))
    with pytest.raises(InputError, match="row 2 of data .* .2 such rows"): long_table({"3SG": part("3SG"), "3PL": part("3PL").drop(columns="split")})


def test_saved_data_sets(tmp_path):
    datasets.Dataset.from_pandas(MERGED).save_to_disk(str(tmp_path / "one"))
    assert name(tmp_path / "one") == EXPECTED
    parts = {s: datasets.Dataset.from_pandas(g.drop(columns="split"), preserve_index=True) for s, g in MERGED.groupby("split", sort=False)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "splits"))
    table = long_table(tmp_path / "splits")
    assert sorted(table.masked) == sorted(MERGED.masked) and list(table.columns) == ["masked", "factual", "factual_class", "split"]
    assert dict(zip(table.masked, table.split, strict=True)) == dict(zip(MERGED.masked, MERGED.split, strict=True))


def test_data_sets_in_memory():
    data = datasets.Dataset.from_pandas(MERGED)
    assert name(data) == name(data.to_iterable_dataset()) == EXPECTED
    coded = data.cast_column("label_class", datasets.ClassLabel(names=["3PL", "unused", "3SG"]))
    assert name(coded) == name(coded.to_iterable_dataset()) == EXPECTED


class Hub:
    "Stands in for the hub: configurations with splits."

    def __init__(self, monkeypatch, configs):
        self.configs, self.asked = configs, []
        monkeypatch.setattr(datasets, "get_dataset_config_names", self.names)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def names(self, path, revision=None):
        if path != "org/pronouns": raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return list(self.configs)

    def load(self, path, config, revision=None):
        self.asked.append((config, revision))
        frame = self.configs[config]
        return datasets.DatasetDict({s: datasets.Dataset.from_pandas(g.drop(columns="split"), preserve_index=False)
                                     for s, g in frame.groupby("split", sort=False)})


def test_hub_configurations_are_classes(monkeypatch):
    hub = Hub(monkeypatch, {c: part(c) for c in CLASSES} | {"1SG": MERGED[:0]})
    assert name("org/pronouns", hf_config=CLASSES, revision="abc") == EXPECTED
    assert hub.asked == [("3SG", "abc"), ("3PL", "abc")]


def test_hub_with_one_configuration(monkeypatch):
    hub = Hub(monkeypatch, {"default": MERGED})
    table = long_table("org/pronouns")
    assert sorted(table.factual) == sorted(MERGED.label) and hub.asked == [("default", None)]
    assert not table.attrs
    hub.configs = {c: part(c) for c in CLASSES}
    assert long_table("org/pronouns").attrs == {"classes_by_name": True} and not long_table("org/pronouns", hf_config=CLASSES).attrs
    hub.configs = {"big": MERGED, "small": MERGED[:2]}
    assert len(long_table("org/pronouns", hf_config="small")) == 2


def test_hub_that_cannot_be_reached(monkeypatch):
    Hub(monkeypatch, {})
    with pytest.raises(InputError, match="'org/absent' is neither a file nor a hub data set we can reach: Dataset 'org/absent' doesn't"):
        long_table("org/absent")
    for path in ("no/such/place.csv", "absent.parquet", "two words", ""):
        with pytest.raises(InputError, match="there is no file"): long_table(path)


def test_custom_columns():
    mine = MERGED.set_axis(["sentence", "word", "cls", "part"], axis=1).assign(masked="something else", split="nonsense", label=3)
    columns = {"masked": "sentence", "label": "word", "label_class": "cls", "split": "part"}
    assert name(mine, columns=columns) == name(mine, columns=Columns(**columns)) == EXPECTED
    assert "split" not in long_table(mine, columns=columns | {"split": None}).columns
    for wrong, message in [({"label": "wrod"}, "no column 'wrod' .label in columns=."), ({"word": "label"}, "columns='word' is not known"),
                           ({"masked": ""}, "masked=''"), ({"masked": "label", "label": "label"}, "named twice")]:
        with pytest.raises(InputError, match=message): long_table(MERGED, columns=wrong)
    with pytest.raises(InputError, match="columns='masked' is not known"): long_table(MERGED, columns="masked")


PAIRS = pd.DataFrame({"masked": MERGED.masked, "source": MERGED.label, "target": ["They", "they", "he", "She"],
                      "source_id": MERGED.label_class, "target_id": ["3PL", "3PL", "3SG", "3SG"], "split": MERGED.split})


def test_pairs_only_if_asked_for():
    table = long_table(PAIRS)
    assert name(PAIRS) == EXPECTED and table.alternative.tolist() == PAIRS.target.tolist() and table.alternative_class.tolist() == PAIRS.target_id.tolist()
    assert fingerprint(long_table(PAIRS, paired=True)) == fingerprint(table)
    data = {c: PAIRS[PAIRS.source_id == c].drop(columns=["source_id", "target_id"]) for c in CLASSES}
    assert long_table(data, paired=True).alternative.tolist() == PAIRS.target.tolist()
    with pytest.raises(InputError, match="must have the columns masked"): long_table(data)     # two of the four are not enough
    short = PAIRS[["masked", "source", "target"]]
    with pytest.raises(InputError, match="read with paired=True .and source_id"): long_table(short)
    with pytest.raises(InputError, match="pairs without their classes: give the columns source_id"): long_table(short, paired=True)
    noted = MERGED.assign(source="a book", target="readers")
    assert name(noted) == EXPECTED and "source" in long_table(noted).columns
    both = PAIRS.assign(label="x")
    with pytest.raises(InputError, match="say paired=True or paired=False"): long_table(both)
    assert name(both, paired=True) == EXPECTED
    assert long_table(both.assign(label_class="x"), paired=False).factual.unique().tolist() == ["x"]
    with pytest.raises(InputError, match="no column 'source'"): long_table(MERGED, paired=True)


@pytest.mark.parametrize("change, message", [
    ({"masked": None}, "row 0 of data has no text in column 'masked' .4 such rows"), ({"label": ["a", "b", float("nan"), "c"]}, "row 2 .* 'factual'"),
    ({"label_class": 1}, r"row 0 of data has 1 \(int\) in column 'factual_class'"), ({"text": ["a", 2.5, "b", None]}, r"row 1 of data has 2.5 \(float\) in column 'text'"),
    ({"alternative": ["x", None, "", ["y"]]}, r"row 3 of data has \['y'\] \(list\) in column 'alternative'"), ({"split": "held out"}, "split='held out'"),
    ({"weight": ["1", "heavy", "2", "3"]}, "weight must hold numbers"),
])
def test_flawed_cells(change, message):
    with pytest.raises(InputError, match=message): long_table(MERGED.assign(**change))


def test_flawed_parts_are_named():
    with pytest.raises(InputError, match=r"row 1 of data\['3PL'\] has no text in column 'factual'"):
        long_table({"3SG": part("3SG"), "3PL": part("3PL").assign(label=["they", None])})
    with pytest.raises(InputError, match=r"data\['3SG'\] holds rows of other classes: \['3PL'\]"): long_table({"3SG": MERGED})
    with pytest.raises(InputError, match=r"data\['3SG'\] is list"): long_table({"3SG": ["He ran."], "3PL": part("3PL")})
    with pytest.raises(InputError, match="names of classes"): long_table({3: part("3SG")})
    with pytest.raises(InputError, match="type set is not understood"): long_table({"He ran."})


def test_unreadable_file(tmp_path):
    (tmp_path / "latin.csv").write_bytes("masked,label,label_class\n[MASK] käme,Er,s\n".encode("latin1"))
    with pytest.raises(InputError, match="not UTF-8"): long_table(tmp_path / "latin.csv")
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="holds no .csv"): long_table(tmp_path / "void")


def test_weights_of_a_file_are_numbers(tmp_path):
    weighted = MERGED.assign(weight=[1.0, 2.5, 3.0, 0.5])
    assert long_table(write_table(weighted, tmp_path / "w.csv")).weight.tolist() == weighted.weight.tolist()
    assert fingerprint(long_table(tmp_path / "w.csv")) == fingerprint(long_table(weighted))


def test_split_names():
    assert {split_name(s) for s in ("Train", "TRAINING ", "dev", "val", "valid", "Validation", "eval", "test", "Testing")} == {"train", "validation", "test"}
    with pytest.raises(InputError, match="split=None"): split_name(None)


def test_input_is_left_alone():
    before = MERGED.copy()
    table = long_table(MERGED)
    table["masked"] = "changed"
    assert MERGED.equals(before)


TEXT = st.text("aÄß.,;:!?'\"\t\n “”()0", max_size=8)
ROW = st.tuples(TEXT, TEXT, st.sampled_from(["he", "She", "IT", "sie", "l'une", "NA"]), st.sampled_from(["train", "validation", "test"]))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROW, min_size=1, max_size=6), st.lists(ROW, min_size=1, max_size=6))
def test_same_data_same_table(tmp_path, first, second):
    rows = [(f"{a}[MASK]{b}", w, c, s) for c, part_ in (("A", first), ("B", second)) for a, b, w, s in part_]
    merged = pd.DataFrame(rows, columns=MERGED.columns)
    expected = fingerprint(long_table(merged)[["masked", "factual", "factual_class", "split"]])
    per_class = {c: part(c, merged) for c in "AB"}
    forms = [per_class, {c: t.rename(columns={"label": c}) for c, t in per_class.items()}, merged.to_dict("records"),
             merged.rename(columns={"label": "factual", "label_class": "factual_class"}), datasets.Dataset.from_pandas(merged)]
    forms += [write_table(merged, tmp_path / f"t{e}") for e in (".csv", ".tsv", ".jsonl", ".parquet")]
    for c, t in per_class.items(): write_table(t, tmp_path / "f" / f"{c}.csv")
    forms.append(tmp_path / "f")
    assert {name(form) for form in forms} == {expected}
