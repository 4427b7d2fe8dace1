"Edge cases of gradiend.data.tables, on the exported package."
import io
import json
import os
import tracemalloc

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradiend.core import InputError
from gradiend.data import tables
from gradiend.data.tables import TABLES, check_columns, check_file, json_rows, line_number, read_table, table_chunks
from gradiend.data.tables import text_lines, watch_reading, write_table

CELL = st.text(alphabet=st.one_of(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), st.sampled_from(" ,\t\n\"'\\é|")), max_size=12)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


@in_one_folder
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6))
def test_what_is_written_is_read(tmp_path, rows):
    frame = pd.DataFrame(rows, columns=["text", "a b"])
    for ending in TABLES:
        back = read_table(write_table(frame, tmp_path / f"t{ending}"))
        assert back.to_dict("list") == frame.to_dict("list"), ending
        assert list(read_table(tmp_path / f"t{ending}", ["a b"]).columns) == ["a b"]


def test_long_tables_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 7)
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(50)], "n": range(50)})
    for ending in TABLES:
        path = write_table(frame, tmp_path / "sub" / f"t{ending}")
        back = read_table(path)
        assert back.text.tolist() == frame.text.tolist() and back.index.tolist() == list(range(50))
        assert {len(chunk) for chunk in table_chunks(path, ["n", "text"])} == {7, 1}
        assert list(next(table_chunks(path, ["n", "text"])).columns) == ["n", "text"]


def test_numbers_and_missing_values_of_parquet_and_json(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": [0.5, float("nan")]})
    for ending in (".parquet", ".json", ".jsonl"):
        back = read_table(write_table(frame, tmp_path / f"t{ending}"))
        assert back.a.tolist() == [1, 2] and back.c[0] == 0.5 and back.isna().values.tolist() == frame.isna().values.tolist()
    assert read_table(write_table(frame, tmp_path / "t.csv")).to_dict("list") == {"a": ["1", "2"], "b": ["x", ""], "c": ["0.5", ""]}


def test_write_table_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError): write_table(pd.DataFrame({"a": [1]}), tmp_path / "x.pickle")
    frame = pd.DataFrame({"a": [1]}, index=[5])
    frame.attrs["report"] = object()
    assert read_table(write_table(frame, tmp_path / "x.parquet")).a.tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"] and "report" in frame.attrs
    with pytest.raises(ValueError): write_table(pd.DataFrame({"a": [object()]}), tmp_path / "x.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"] and read_table(tmp_path / "x.parquet").a.tolist() == [1]


@in_one_folder
@given(st.lists(st.sampled_from(["", "a", "längere Zeile", "x" * 40]), max_size=12), st.booleans(), st.lists(st.integers(0, 200), max_size=5))
def test_stretches_give_every_line_once(tmp_path, lines, closed, cuts):
    path = tmp_path / "x.txt"
    data = ("\n".join(lines) + ("\n" if closed else "")).encode()
    path.write_bytes(data)
    whole = list(text_lines(path))
    assert whole == (data.decode().split("\n") if data and not data.endswith(b"\n") else data.decode().split("\n")[:-1])
    bounds = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    parts = [(a, list(text_lines(path, a, b))) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert [line for _, part in parts for line in part] == whole
    for a, part in parts:
        if part: assert whole[line_number(path, a) - 1] == part[0]


def test_lines_longer_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_PIECE", 16)
    text = ["ä" * 50, "b", "", "c" * 33]
    (tmp_path / "x.txt").write_text("\n".join(text), encoding="utf-8")
    assert list(text_lines(tmp_path / "x.txt")) == text
    assert [line for a in range(0, 140, 20) for line in text_lines(tmp_path / "x.txt", a, a + 20)] == text


@given(st.lists(JSON, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]))
def test_a_json_list_is_read_entry_by_entry(entries, size, indent):
    text = json.dumps(entries, indent=indent)
    assert list(tables._list_entries(io.StringIO(text[1:]), "", size)) == entries


def test_a_long_json_list_needs_no_memory(tmp_path):
    with (tmp_path / "x.json").open("w") as file:
        file.write("[" + ",".join(json.dumps({"text": "It rained on the town. " * 20}) for _ in range(20_000)) + "]")
    tracemalloc.start()
    n = sum(1 for _ in json_rows(tmp_path / "x.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000 and peak < 8e6 < (tmp_path / "x.json").stat().st_size


def test_json_shapes(tmp_path):
    path = tmp_path / "x.json"
    for content in ('["a", "b"]', '\ufeff [ "a","b" ] ', '{"text": ["a", "b"]}', '{\n"text": ["a",\n"b"]}', '\n{"text": "a"}\n\n{"text": "b"}\n'):
        path.write_text(content, encoding="utf-8")
        assert [r if isinstance(r, str) else r["text"] for r in json_rows(path)] == ["a", "b"]
        assert read_table(path).text.tolist() == ["a", "b"]
    path.write_text('"only one"')
    assert list(json_rows(path)) == ["only one"]
    for bad in ("[1, 2]", "[]", "[[1]]", "[1,", '{"a": 1}', "{", "nothing"):
        path.write_text(bad)
        with pytest.raises(InputError, match="x.json"): read_table(path)
    (tmp_path / "x.jsonl").write_text('"a"\n\n{"text": "b"}\n')
    assert list(json_rows(tmp_path / "x.jsonl")) == ["a", None, {"text": "b"}]
    (tmp_path / "x.jsonl").write_text('"a"\n\n{"text": b}\n')
    for start in (0, 2, 4):
        with pytest.raises(InputError, match="line 3 is not JSON"): list(json_rows(tmp_path / "x.jsonl", start))


@pytest.mark.parametrize("name, head", [("x.txt", b"fine\n"), ("x.csv", b"text\n"), ("x.tsv", b"text\tb\n"), ("x.jsonl", b'"fine"\n'), ("x.json", b'["fine",\n')])
@pytest.mark.parametrize("lines", [0, 40_000])
def test_another_encoding_is_named_with_its_place_in_the_file(tmp_path, name, head, lines):
    path = tmp_path / name
    row = b'"fine"\t\n' if name.endswith("tsv") else b'"fine",\n' if name.endswith("json") else b'"fine"\n'
    before = head + row * lines + b'"K'
    path.write_bytes(before + "äse".encode("latin1") + b'"\n')
    with pytest.raises(InputError, match=rf"not UTF-8 text: byte 0xe4 at offset {len(before)} \(line {lines + 2}\).*iconv"):
        list(watch_reading(path, text_lines(path))) if name == "x.txt" else read_table(path)


def test_the_whole_of_a_file_in_utf16(tmp_path):
    (tmp_path / "x.csv").write_bytes("text\na\n".encode("utf-16"))
    with pytest.raises(InputError, match="offset 0 .*iconv -f utf-16"): read_table(tmp_path / "x.csv")
    (tmp_path / "x.txt").write_bytes(b"a" * 10 + "wide".encode("utf-16-le"))
    with pytest.raises(InputError, match="zero bytes, the first at offset 11"): list(text_lines(tmp_path / "x.txt"))


def test_bad_rows_and_columns(tmp_path):
    path = tmp_path / "x.csv"
    for surplus in ("a,b\n1,2,3\n", "a,b\n1,2\n1,2,3\n"):
        path.write_text(surplus)
        for columns in (None, ["a"]):
            with pytest.raises(InputError, match="not a readable .csv file"): read_table(path, columns)
    path.write_text("a,b\n1\n2,3\n")
    assert read_table(path).a.tolist() == ["1", "2"]
    for ending in TABLES:
        write_table(pd.DataFrame({"a": ["1"]}), tmp_path / f"y{ending}")
        with pytest.raises(InputError, match="no column columns='text'; it has a"): read_table(tmp_path / f"y{ending}", ["a", "text"])
    with pytest.raises(InputError, match="it has no columns"): check_columns("it", ["x"], [])


def test_files_that_are_not_there_or_not_tables(tmp_path):
    (tmp_path / "e.csv").touch()
    (tmp_path / "x.xlsx").write_text("a")
    for bad, match in [("no.csv", "there is no file"), ("", "is a folder"), ("e.csv", "is empty"), ("x.xlsx", "ending of the file")]:
        with pytest.raises(InputError, match=match): read_table(tmp_path / bad)
        with pytest.raises(InputError, match=match): table_chunks(tmp_path / bad)       # at the call, not at the first row
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match="not a readable .parquet file"): read_table(tmp_path / "bad.parquet")
    (tmp_path / "h.csv").write_text("a,b\n")
    assert read_table(tmp_path / "h.csv").shape == (0, 2)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "x.csv").chmod(0)
    with pytest.raises(InputError, match="cannot be read"): read_table(tmp_path / "x.csv")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.csv").write_text("a\n1\n")
    assert check_file("~/x.csv") == tmp_path / "x.csv" and read_table("~/x.csv").a.tolist() == ["1"]
