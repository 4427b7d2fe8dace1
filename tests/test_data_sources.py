"Edge cases of gradiend.data.sources, on the exported package."
import json
import os
import types

import pandas as pd
import pytest

from gradiend.core import InputError
from gradiend.data import sources
from gradiend.data.sources import describe_source, normalise, read_table, read_texts, split_sentences, write_table


def test_a_book_with_windows_line_ends(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffOne line.\r\n\r\n Two — lines. \r\n".encode())
    assert list(read_texts(tmp_path / "b.txt")) == ["One line.", "Two — lines."]
    assert list(read_texts(str(tmp_path / "b.txt"), max_size=1)) == ["One line."]


def test_a_file_without_ending_is_plain_text(tmp_path):
    (tmp_path / "book").write_text("a, b\n")
    assert list(read_texts(tmp_path / "book")) == ["a, b"]


def test_json_shapes(tmp_path):
    for content in (["a", "b"], [{"text": "a"}, {"text": "b"}], {"text": ["a", "b"]}):
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert list(read_texts(tmp_path / "x.json")) == ["a", "b"]
    (tmp_path / "x.jsonl").write_text('"a"\n\n{"text": "b"}\n')
    assert list(read_texts(tmp_path / "x.jsonl")) == ["a", "b"]
    for bad in ("[1, 2]", "{}", '{"a": 1}', "[[1]]", "[1,"):
        (tmp_path / "x.json").write_text(bad)
        with pytest.raises(InputError): list(read_texts(tmp_path / "x.json"))


def test_long_tables_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", 7)
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(50)], "n": range(50)})
    for ending in ("csv", "tsv", "json", "jsonl", "parquet"):
        path = write_table(frame, tmp_path / "sub" / f"t.{ending}")
        assert list(read_texts(path)) == frame.text.tolist()
        back = read_table(path)
        assert back.text.tolist() == frame.text.tolist() and back.index.tolist() == list(range(50))


def test_csv_words_that_look_like_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text('text,n\nNA,1\nnull,2\n"",3\n007,4\n')
    assert list(read_texts(tmp_path / "x.csv")) == ["NA", "null", "007"]


def test_errors_are_reported_at_the_call(tmp_path):
    for bad in (tmp_path / "no.txt", tmp_path, "no.csv", "two words", {}, 5, None):
        with pytest.raises(InputError): read_texts(bad)
    (tmp_path / "e.txt").touch()
    with pytest.raises(InputError, match="is empty"): read_texts(tmp_path / "e.txt")


def test_latin1_in_a_later_line_of_each_kind(tmp_path):
    for name in ("x.txt", "x.csv", "x.jsonl"):
        (tmp_path / name).write_bytes(b"text\n" + b'"fine"\n' * 3 + '"Käse"\n'.encode("latin1"))
        if name == "x.jsonl": (tmp_path / name).write_bytes(b'"fine"\n' + '"Käse"\n'.encode("latin1"))
        with pytest.raises(InputError, match="not UTF-8"): list(read_texts(tmp_path / name))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "x.txt").chmod(0)
    with pytest.raises(InputError, match="cannot be read"): list(read_texts(tmp_path / "x.txt"))


def fake_datasets(monkeypatch, load_dataset):
    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setattr(sources, "optional_import", lambda *a, **k: module)


def test_a_hub_data_set_is_streamed(monkeypatch):
    asked = {}

    def load_dataset(name, config, **kw):
        asked.update(kw, name=name, config=config)
        return ({"text": f"text {i}"} for i in iter(int, 1))      # endless
    fake_datasets(monkeypatch, load_dataset)
    assert list(read_texts("org/name", hf_config="c", split="test", revision="r", max_size=2)) == ["text 0", "text 0"]
    assert asked == dict(name="org/name", config="c", split="test", revision="r", streaming=True)
    with pytest.warns(UserWarning, match="wikimedia/wikipedia"): read_texts("wikipedia", hf_config="20220301.en")
    assert (asked["name"], asked["config"]) == ("wikimedia/wikipedia", "20231101.en")
    with pytest.raises(InputError, match="it has text"): list(read_texts("org/name", text_column="body"))


def test_a_hub_data_set_that_cannot_be_had(monkeypatch):
    def load_dataset(*a, **k): raise ConnectionError("no route\nand more")
    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(InputError, match="neither a file nor a hub id we can reach: no route$"): read_texts("org/name")


@pytest.mark.parametrize("text, expected", [
    ("He met Mrs. Green. She smiled.", ["He met Mrs. Green.", "She smiled."]),
    ("It cost 3.5 euros. 20 came.", ["It cost 3.5 euros.", "20 came."]),
    ('"Stop!" he cried. "Why?" They ran.', ['"Stop!" he cried.', '"Why?"', "They ran."]),
    ("J. R. R. Tolkien wrote it. So did I. Really.", ["J. R. R. Tolkien wrote it.", "So did I.", "Really."]),
    ("One\n\ntwo\n \nThree", ["One", "two", "Three"]), ("See fig. 3 and e.g. Rome.", ["See fig. 3 and e.g. Rome."]),
    ("   ", []), ("A.", ["A."]), ("...", ["..."]), ("Well... Yes.", ["Well...", "Yes."]),
])
def test_sentences(text, expected):
    assert split_sentences(text) == expected


def test_normalise_keeps_words():
    assert normalise("  ‘a’\u2003“b” \r\n c\u00add ") == "'a' \"b\" cd"
    assert normalise("") == ""


def test_describe_does_not_use_up_a_generator():
    texts = iter(["a", "b"])
    assert describe_source(texts) == {"kind": "list_iterator"} and next(texts) == "a"


def test_write_table_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError): write_table(pd.DataFrame({"a": [1]}), tmp_path / "x.pickle")
    frame = pd.DataFrame({"a": [1]}, index=[5])
    frame.attrs["report"] = object()
    assert read_table(write_table(frame, tmp_path / "x.parquet")).a.tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"] and "report" in frame.attrs
