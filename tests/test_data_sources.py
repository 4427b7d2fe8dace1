"Edge cases of gradiend.data.sources, on the exported package."
import json
import os
import random
import subprocess
import sys
import textwrap
import types

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradiend.core import InputError
from gradiend.data import sources
from gradiend.data.sources import describe_source, read_texts
from gradiend.data.tables import TABLES, write_table

TEXTS = [f"Sentence {i} of the corpus." for i in range(400)]
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)


# --- files ------------------------------------------------------------------------------------------------------

def test_a_book_with_windows_line_ends(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffOne line.\r\n\r\n Two — lines. \r\n".encode())
    for buffer in (None, 0): assert list(read_texts(tmp_path / "b.txt", shuffle_buffer=buffer)) == ["One line.", "Two — lines."]
    assert list(read_texts(str(tmp_path / "b.txt"), max_size=1)) == ["One line."]
    assert sorted(read_texts(tmp_path / "b.txt", shuffle_buffer=3)) == ["One line.", "Two — lines."]


def test_a_file_without_ending_is_plain_text(tmp_path):
    (tmp_path / "book").write_text("a, b\n")
    assert list(read_texts(tmp_path / "book")) == ["a, b"]


def test_csv_words_that_look_like_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text('text,n\nNA,1\nnull,2\n"",3\n007,4\n')
    assert list(read_texts(tmp_path / "x.csv", report=(report := {}))) == ["NA", "null", "007"] and report == {"blank_texts": 1}


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/.hidden.txt", ".git/c.txt", "a/empty.txt", "README.md", "notes.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    assert list(read_texts(tmp_path)) == ["a/z.txt", "b.txt"] == sorted(read_texts(str(tmp_path), shuffle_buffer=5))
    assert list(read_texts(str(tmp_path / "*.txt"))) == ["b.txt"]
    assert list(read_texts(str(tmp_path / "**" / "*.txt"))) == ["a/z.txt", "b.txt"]
    assert list(read_texts([tmp_path / "b.txt", tmp_path / "a"])) == ["b.txt", "a/z.txt"]
    write_table(pd.DataFrame({"text": ["x"]}), tmp_path / "t.csv")
    with pytest.raises(InputError, match=r"several kinds \(.csv, .txt\)"): read_texts(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no file ending in .txt"): read_texts(tmp_path / "nothing")


def test_a_list_of_names_or_of_texts(tmp_path):
    write_table(pd.DataFrame({"text": ["one"]}), tmp_path / "1.csv")
    write_table(pd.DataFrame({"text": ["two"]}), tmp_path / "2.parquet")
    names = [str(tmp_path / "1.csv"), str(tmp_path / "2.parquet")]
    assert list(read_texts(names)) == list(read_texts(tuple(names))) == ["one", "two"]
    assert list(read_texts([*names, "and a sentence"])) == [*names, "and a sentence"]
    with pytest.raises(InputError, match="there is no file 'no.txt'"): read_texts([names[0], "no.txt"])


def test_columns_arrays_and_sets_are_lists():
    texts = ["b", "a", "c"]
    for source in (pd.Series(texts), pd.Index(texts), pd.Series(texts).to_numpy()):
        assert list(read_texts(source)) == texts and describe_source(source) == describe_source(texts)
    assert list(read_texts(set(texts))) == ["a", "b", "c"]


def test_a_compressed_file_is_named_as_such(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(InputError, match="x.txt.gz' is compressed"): read_texts(tmp_path / "x.txt.gz")


def test_errors_are_reported_at_the_call(tmp_path):
    for bad in (tmp_path / "no.txt", tmp_path, "no.csv", "two words", {}, {"a": 1}, 5, None, b"a", "no*.txt", "Is it?", ["no.txt"]):
        with pytest.raises(InputError): read_texts(bad)
    (tmp_path / "e.txt").touch()
    with pytest.raises(InputError, match="is empty"): read_texts(tmp_path / "e.txt")
    with pytest.raises(InputError, match="no column text_column='body'; it has text"): read_texts(pd.DataFrame({"text": ["a"]}), text_column="body")
    for bad in (dict(max_size=0), dict(shuffle_buffer=-1)):
        with pytest.raises(InputError, match=next(iter(bad))): read_texts(["a"], **bad)


@pytest.mark.parametrize("buffer", [None, 10])
def test_what_is_not_text_is_named_with_its_place(tmp_path, buffer):
    rows = [{"text": f"text {i}"} for i in range(300)] + [{"text": 7}]
    frame = pd.DataFrame(rows)
    (tmp_path / "x.jsonl").write_text("\n\n" + "\n".join(map(json.dumps, rows)))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pd.DataFrame({"text": range(5)}).to_parquet(tmp_path / "x.parquet")
    for source, place in [(rows, "position 300 of the "), (frame, "position 300 of the "), (iter(rows), "position 300 of the "), (lambda: rows, "position 300 of the "),
                          (tmp_path / "x.jsonl", "line 303 of the file"), (tmp_path / "x.json", "row 301 of the file")]:
        with pytest.raises(InputError, match=rf"^{place}.* holds 7 \(int\): every entry must be text"): list(read_texts(source, shuffle_buffer=buffer))
    with pytest.raises(InputError, match=r"^row 1 of the file .*x.parquet' holds 0 \(int\)"): list(read_texts(tmp_path / "x.parquet", shuffle_buffer=buffer))
    with pytest.raises(InputError, match=r"\['a'\] \(list\)"): list(read_texts([["a"]]))


def test_the_place_of_a_wrong_byte_is_that_in_the_file(tmp_path):
    for name, row in (("x.txt", b"fine\n"), ("x.csv", b"text\n"), ("x.jsonl", b'"fine"\n')):
        (tmp_path / name).write_bytes(row * 20_000 + b'"K\xe4se"\n')
        for buffer in (None, 10):
            with pytest.raises(InputError, match=rf"byte 0xe4 at offset {20_000 * len(row) + 2} \(line 20001\)"):
                list(read_texts(tmp_path / name, shuffle_buffer=buffer))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "x.txt").chmod(0)
    with pytest.raises(InputError, match="cannot be read"): list(read_texts(tmp_path / "x.txt"))


# --- all wrappings ----------------------------------------------------------------------------------------------

def wrappings(texts, folder):
    "The same texts as every kind of source that can be read more than once."
    datasets = pytest.importorskip("datasets")
    frame = pd.DataFrame({"text": texts, "id": range(len(texts))})
    for ending in TABLES: write_table(frame, folder / "t" / f"t{ending}")
    (folder / "t" / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    frame.to_parquet(folder / "t" / "groups.parquet", row_group_size=7)
    hf = datasets.Dataset.from_pandas(frame)
    yield from (folder / "t" / f"t{ending}" for ending in (*TABLES, ".txt"))
    yield from (str(folder / "t" / "groups.parquet"), texts, tuple(texts), frame, frame.text, lambda: iter(texts), frame.to_dict("records"), hf)
    yield hf.to_iterable_dataset(num_shards=min(3, len(texts)))
    yield datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in texts))
    yield datasets.DatasetDict({"train": hf, "test": hf.select([0])})


@in_one_folder
@given(st.lists(st.text(alphabet=st.characters(codec="utf-8", categories=["L", "P"]), min_size=1), min_size=1, max_size=30),
       st.integers(1, 40), st.integers(0, 3))
def test_all_wrappings_give_the_same_texts(tmp_path, texts, buffer, seed):
    for source in wrappings(texts, tmp_path):
        assert list(read_texts(source)) == texts
        shuffled = list(read_texts(source, shuffle_buffer=buffer, seed=seed))
        assert sorted(shuffled) == sorted(texts)
        assert list(read_texts(source, shuffle_buffer=buffer, seed=seed)) == shuffled
        assert list(read_texts(source, shuffle_buffer=buffer, seed=seed, max_size=3)) == shuffled[:3]


def test_the_first_texts_are_a_sample_of_all(tmp_path):
    place = {t: i for i, t in enumerate(TEXTS)}
    for source in wrappings(TEXTS, tmp_path):
        orders = {tuple(read_texts(source, shuffle_buffer=len(TEXTS), seed=seed, max_size=40)) for seed in range(3)}
        assert len(orders) == 3
        for order in orders: assert 120 < sum(place[t] for t in order) / 40 < 280      # 200 +- 3.9 standard errors of 18


def test_many_files_are_mixed(tmp_path):
    for i in range(50): (tmp_path / f"{i:02}.txt").write_text("\n".join(f"{i} {j}" for j in range(200)))
    order = list(read_texts(tmp_path, shuffle_buffer=500))
    assert len(order) == len(set(order)) == 10_000 and len({t.split()[0] for t in order[:100]}) >= 3
    assert len({t.split()[0] for t in read_texts(tmp_path, max_size=100)}) == 1


@given(st.lists(st.text(min_size=1), max_size=40), st.integers(1, 50), st.integers())
def test_the_buffer(texts, size, seed):
    asked = []

    def source():
        for i, t in enumerate(texts):
            asked.append(i)
            yield t
    stream = sources._buffered(source(), size, random.Random(seed))
    out = []
    for text in stream:
        out.append(text)
        assert len(asked) <= len(out) + size        # never further ahead than the buffer
    assert sorted(out) == sorted(texts)


def test_the_buffer_is_limited_in_characters(monkeypatch):
    monkeypatch.setattr(sources, "_BUFFER_CHARS", 1000)
    asked = []

    def books():
        for i in range(30):
            asked.append(i)
            yield str(i % 10) * (400 + 3000 * (i == 7))
    stream = sources._buffered(books(), 10_000, random.Random(0))
    next(stream)
    assert len(asked) == 3
    assert sorted(map(len, [*stream]))[-1] == 3400


def test_nobody_elses_random_numbers_are_used():
    random.seed(5)
    state = random.getstate()
    list(read_texts(TEXTS, shuffle_buffer=10))
    assert random.getstate() == state


def test_texts_are_read_as_they_are_needed():
    def endless():
        i = 0
        while True: yield f"text {(i := i + 1)}"
    assert list(read_texts(endless(), max_size=2)) == ["text 1", "text 2"]
    assert len(set(read_texts(endless, max_size=50, shuffle_buffer=100))) == 50


def test_the_datasets_library_with_formats_and_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"n": [1, 2], "text": ["a", None]})
    assert list(read_texts(data.with_format("numpy"))) == ["a"]
    assert list(read_texts(data.select([0]).to_iterable_dataset())) == ["a"]
    with pytest.raises(InputError, match="no column text_column='body'; it has n, text"): read_texts(data, text_column="body")
    generated = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    with pytest.raises(InputError, match="it has text"): list(read_texts(generated, text_column="body"))
    both = datasets.DatasetDict({"train": data, "test": datasets.Dataset.from_dict({"text": ["b"]})})
    assert list(read_texts(both, split="test")) == ["b"]
    with pytest.raises(InputError, match="split='tets' is not known: did you mean 'test'"): read_texts(both, split="tets")
    both.save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    assert list(read_texts(tmp_path / "both", split="test")) == ["b"] and list(read_texts(str(tmp_path / "one"))) == ["a"]
    assert describe_source(tmp_path / "one")["fingerprint"] == describe_source(data)["fingerprint"]


# --- the hub ----------------------------------------------------------------------------------------------------

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
    with pytest.raises(InputError, match="it has text"): list(read_texts("org/name", text_column="body"))


def test_the_shards_of_a_hub_data_set_are_shuffled(monkeypatch):
    datasets = pytest.importorskip("datasets")
    shards = datasets.Dataset.from_dict({"text": TEXTS, "url": TEXTS}).to_iterable_dataset(num_shards=8)
    fake_datasets(monkeypatch, lambda *a, **k: shards)
    place = {t: i for i, t in enumerate(TEXTS)}
    assert list(read_texts("org/name", max_size=5)) == TEXTS[:5]
    first = [place[t] for t in read_texts("org/name", max_size=20, shuffle_buffer=20)]
    assert max(first) > 150 and list(read_texts("org/name")) == TEXTS
    assert first == [place[t] for t in read_texts("org/name", max_size=20, shuffle_buffer=20)]
    with pytest.raises(InputError, match="the data set 'org/name' has no column text_column='body'; it has text, url"):
        read_texts("org/name", text_column="body")


@pytest.mark.parametrize("config, taken", [("20220301.en", "20231101.en"), ("20220301.simple", "20231101.simple"), (None, "20231101.en"), ("20231101.de", "20231101.de")])
def test_the_retired_wikipedia(monkeypatch, config, taken):
    asked = []

    def load_dataset(name, config, **kw):
        asked.append((name, config))
        return iter([{"id": "1", "text": "An article."}])
    fake_datasets(monkeypatch, load_dataset)
    with pytest.warns(UserWarning, match=f"hf_config={config!r}: reading its successor 'wikimedia/wikipedia' with hf_config='{taken}'") as caught:
        assert list(read_texts("wikipedia", hf_config=config)) == ["An article."]
    assert asked == [("wikimedia/wikipedia", taken)] and caught[0].filename == __file__
    assert describe_source("wikipedia", hf_config=config)["config"] == taken


def test_a_hub_data_set_that_cannot_be_had(monkeypatch):
    def load_dataset(*a, **k): raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']" + "x" * 400)
    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(InputError, match=r"neither a file nor a hub id we can reach: Config name .*\['a', 'b'\]x") as caught: read_texts("org/name")
    assert len(str(caught.value)) < 400


def test_no_code_of_a_data_set_is_run(monkeypatch):
    fake_datasets(monkeypatch, lambda name, config, *, split, revision, streaming: iter(["a"]))
    with pytest.warns(UserWarning, match="trust_remote_code=True has no effect"): assert list(read_texts("org/name", trust_remote_code=True)) == ["a"]
    assert list(read_texts("org/name", trust_remote_code=False)) == ["a"]


# --- what was read ----------------------------------------------------------------------------------------------

SIX = ["kind", "name", "config", "split", "revision", "fingerprint"]


def test_describe_has_the_same_fields_for_all(tmp_path):
    for source in wrappings(TEXTS[:5], tmp_path):
        record = describe_source(source)
        assert list(record)[:6] == SIX and json.dumps(record)
        assert (record["fingerprint"] is None) == (record["kind"] in ("function", "iterable") or (record["kind"] == "dataset" and "rows" not in record))


def test_describe_does_not_use_up_a_generator():
    texts = iter(["a", "b"])
    assert describe_source(texts) == dict.fromkeys(SIX) | {"kind": "iterable", "name": "list_iterator"} and next(texts) == "a"


def test_every_byte_of_every_file_counts(tmp_path):
    for name in ("a", "b"): (tmp_path / f"{name}.txt").write_text("x" * 100_000)
    before = describe_source(tmp_path)
    assert (before["files"], before["bytes"]) == (2, 200_000)
    assert describe_source(str(tmp_path / "*.txt"))["fingerprint"] == before["fingerprint"]
    with (tmp_path / "a.txt").open("r+") as file:
        file.seek(50_000)
        file.write("y")
    assert describe_source(tmp_path)["fingerprint"] != before["fingerprint"]
    one = describe_source(tmp_path / "b.txt")
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert describe_source(tmp_path / "c.txt") == one | {"name": "c.txt"}


def test_only_the_text_column_counts_in_memory():
    frame = pd.DataFrame({"text": ["a"], "when": [pd.Timestamp("2026-01-01")]})
    assert describe_source(frame)["fingerprint"] == describe_source(frame[["text"]])["fingerprint"]
    assert describe_source([{"text": "a", "x": object()}])["fingerprint"] == describe_source(["a"])["fingerprint"]
    with pytest.raises(InputError, match="text_column='body'"): describe_source(frame, text_column="body")


def test_the_commit_of_a_hub_data_set(monkeypatch):
    def api(answer):
        class Api:
            def dataset_info(self, name, *, revision, timeout):
                if answer is None: raise ConnectionError
                return types.SimpleNamespace(sha=f"{answer} of {name} at {revision}")
        monkeypatch.setattr(sources, "optional_import", lambda *a, **k: types.SimpleNamespace(HfApi=Api))
    api("sha")
    found = describe_source("wikipedia", hf_config="20220301.en", revision="main", look_up=True)
    assert found["revision"] == "sha of wikimedia/wikipedia at main" and found["fingerprint"]
    api(None)
    unknown = describe_source("org/name", revision="main", look_up=True)
    assert unknown["revision"] == "main" and unknown["fingerprint"] is None
    assert describe_source("org/name", revision="0" * 40)["fingerprint"] not in (None, found["fingerprint"])


# --- memory -----------------------------------------------------------------------------------------------------

MEASURE = """
    import re, sys
    from gradiend.data.sources import read_texts
    from gradiend.data.text import TextPreprocessConfig, preprocess
    def paragraphs():
        for i in range(250_000): yield " ".join(f"Sentence {j} of text {i} says that it rained on the old town." for j in range(4))
    def memory(field): return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
    source = sys.argv[1] if len(sys.argv) > 1 else paragraphs
    next(read_texts(source))
    before = memory("VmRSS")
    stream = preprocess(read_texts(source, shuffle_buffer=10_000), TextPreprocessConfig(True, min_words=3))
    print(sum(1 for _ in stream), memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["function", "txt", "json", "parquet"])
def test_a_million_sentences_need_little_memory(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    texts = [" ".join(f"Sentence {j} of text {i} says that it rained on the old town." for j in range(4)) for i in range(250_000)]
    if kind == "txt": path.write_text("\n".join(texts))
    elif kind == "json": path.write_text(json.dumps(texts))
    elif kind == "parquet": pd.DataFrame({"text": texts}).to_parquet(path, row_group_size=20_000)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), *([] if kind == "function" else [str(path)])]
    n, megabytes = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    print(kind, n, megabytes)
    assert n == 1_000_000 and megabytes < 50
