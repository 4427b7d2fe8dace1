"""Gradients on disk: the same numbers as fresh ones, whatever happened while they were written."""
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gradiend.core import InputError, read_json, write_json
from gradiend.gradients import store as module
from gradiend.gradients.rows import row_gradients
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.gradients.store import GradientStore, estimate_store_size, first_disagreement, objective_identity, pack, shard_rows, store_identity, unpack, write_store
from gradiend.locks import LOCK, FolderInUseError, run_lock
from gradiend.zoo import load

from .tiny import masked_model

ROOT = Path(__file__).resolve().parents[1]
ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "[MASK] was tired.", "Anna said that [MASK] was late.", "The dogs barked because [MASK] were cold.",
               "The baker was late because [MASK] missed the bus.", "The kettle whistled until [MASK] was empty.", "The twins said [MASK] were hungry."],
    "factual": ["they", "She", "she", "they", "he", "it", "they"],
    "alternative": ["he", "They", "unhappiness", "it", "they", "they", "it"],
    "split": "train",
})


@pytest.fixture
def setting(monkeypatch):
    "A tiny model, its objective, a pruned space, and shards of three rows."
    tokenizer, model = masked_model("bert", dtype=torch.float32)
    full = ParameterSpace.from_model(model)
    monkeypatch.setattr(module, "shard_rows", lambda entries: 3)
    return model, masked_lm(tokenizer), full.keep(torch.arange(5, full.n, 11))


def fresh(setting, kind):
    model, objective, space = setting
    return row_gradients(model, objective, ROWS, space=space, kind=kind)


def assert_near(actual, expected, factual, alternative):
    "Within one part in 2,048 of the gradients it was made from."
    limit = (factual.abs() + alternative.abs()) / 2000 + 1e-7 * (factual.abs().amax(1, keepdim=True) + alternative.abs().amax(1, keepdim=True))
    assert ((actual - expected).abs() <= limit).all()


@pytest.mark.parametrize("kind", ["factual", "alternative", "diff"])
def test_stored_gradients_are_the_fresh_ones(setting, tmp_path, kind):
    model, objective, space = setting
    store = write_store(tmp_path / "s", model, objective, ROWS, space=space)
    factual, alternative, expected = fresh(setting, "factual"), fresh(setting, "alternative"), fresh(setting, kind)
    assert len(store) == 7 and store.n == space.n and len(list((tmp_path / "s").glob("shard-*"))) == 3
    assert_near(store.rows(kind=kind), expected, factual * (kind != "alternative"), alternative * (kind != "factual"))
    assert store.rows().dtype == torch.float32
    mean = store.mean([6, 0, 6, 2], kind)
    torch.testing.assert_close(mean, store.rows([6, 0, 6, 2], kind).mean(0), rtol=1e-5, atol=1e-7)
    assert (mean - expected[[6, 0, 6, 2]].mean(0)).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("positions", [[3], [6, 5, 4, 3, 2, 1, 0], [2, 2, 2], [0, 6], [], [5, 1, 3]])
@pytest.mark.parametrize("wrap", [list, np.array, torch.tensor])
def test_rows_come_in_the_order_asked_for(setting, tmp_path, positions, wrap):
    store = write_store(tmp_path, *setting[:2], ROWS, space=setting[2])
    given = wrap(positions) if positions or wrap is list else wrap(positions).astype(int) if wrap is np.array else wrap(positions, dtype=torch.int64)
    assert torch.equal(store.rows(given, "diff"), store.rows(kind="diff")[positions])


def test_an_opened_store_is_the_written_one(setting, tmp_path):
    store, again = write_store(tmp_path, *setting[:2], ROWS, space=setting[2]), GradientStore.open(tmp_path)
    assert torch.equal(store.rows(), again.rows()) and again.space.fingerprint == setting[2].fingerprint
    assert torch.equal(again.space.global_index, setting[2].global_index) and repr(again) == repr(store)
    again.check_fits(*setting[:2], ROWS, setting[2])
    unpruned = write_store(tmp_path / "whole", setting[0], setting[1], ROWS.head(2), space=ParameterSpace.from_model(setting[0], "*layer.1.output*"))
    assert unpruned.space.pruned_index is None


def test_the_size_is_known_before(setting, tmp_path, monkeypatch):
    monkeypatch.undo()
    model, objective, space = setting
    store = write_store(tmp_path, model, objective, ROWS, space=space)
    assert store.nbytes == pytest.approx(estimate_store_size(7, space), rel=0.15)
    assert shard_rows(10**9) == 1 and shard_rows(1) == 4096 and 60e6 < 4 * 60_000 * shard_rows(60_000) < 2**26
    huge = ParameterSpace.from_global(["w"], [(2**17, 2**17)], None)
    assert estimate_store_size(10, huge) == pytest.approx(10 * 2 * 2 * 2**34, rel=1e-6)


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from tests.test_store import *
tokenizer, model = load({model!r})
full = ParameterSpace.from_model(model)
module.shard_rows = lambda entries: 3
class Slow(type(masked_lm(tokenizer))):
    settings = {{k: v for k, v in objective_identity(masked_lm(tokenizer)).items() if k != "name"}}
    def prepare(self, frame):
        if "late because" in " ".join(frame.masked): time.sleep(60)  # a row of the second shard
        return super().prepare(frame)
write_store({folder!r}, model, Slow(tokenizer), ROWS, space=full.keep(torch.arange(5, full.n, 11)))
"""


def test_a_killed_run_is_continued(setting, tmp_path):
    folder, saved = tmp_path / "s", tmp_path / "model"
    for thing in (*setting[:1], setting[1].tokenizer): thing.save_pretrained(saved)
    program = KILLED.format(root=str(ROOT), folder=str(folder), model=str(saved))
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    try:
        deadline = time.monotonic() + 60
        while not (folder / "shard-00000.safetensors").exists() and time.monotonic() < deadline and child.poll() is None: time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        errors = child.communicate()[1].decode()
    assert child.returncode == -signal.SIGKILL, errors
    assert [p.name for p in folder.glob("shard-*")] == ["shard-00000.safetensors"] and (folder / LOCK).exists()
    with pytest.raises(InputError, match="4 of 7 rows are missing"):
        GradientStore.open(folder)
    (folder / ".shard-00001.safetensors.tmp").write_bytes(b"half a file")
    (folder / ".space.tmp").mkdir()
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    tokenizer, model = load(saved)
    objective, space = masked_lm(tokenizer), setting[2]
    continued = write_store(folder, model, objective, ROWS, space=space)
    whole = write_store(tmp_path / "undisturbed", model, objective, ROWS, space=space)
    for kind in ("factual", "alternative"):
        assert torch.equal(continued.rows(kind=kind), whole.rows(kind=kind))
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert not list(folder.glob(".*")) and not (folder / LOCK).exists()


def test_two_processes_write_one_store_once(setting, tmp_path, monkeypatch):
    "The second one waits for the first, takes nothing away from it, and computes nothing again."
    model, objective, space = setting
    folder, seen = tmp_path / "s", tmp_path / "seen"
    before = module.both_row_gradients, module.save_file

    def counted(model, objective, frame, **options):
        with open(seen, "a") as file: file.write(f"{os.getpid()} {len(frame)}\n")
        return before[0](model, objective, frame, **options)

    def slow(tensors, path):
        before[1](tensors, path)
        time.sleep(0.3)  # the file is there, and has not got its name yet

    monkeypatch.setattr(module, "both_row_gradients", counted)
    monkeypatch.setattr(module, "save_file", slow)
    child = os.fork()
    if child == 0:
        try: write_store(folder, model, objective, ROWS, space=space)
        except BaseException: os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not list(folder.glob(".shard*")) and time.monotonic() < deadline: time.sleep(0.01)
    second = write_store(folder, model, objective, ROWS, space=space)
    assert os.waitpid(child, 0)[1] == 0  # nobody removed its unfinished files
    assert seen.read_text() == f"{child} 3\n{child} 3\n{child} 1\n"
    monkeypatch.undo()
    monkeypatch.setattr(module, "shard_rows", lambda entries: 3)
    alone = write_store(tmp_path / "alone", model, objective, ROWS, space=space)
    assert torch.equal(second.rows(), alone.rows()) and sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in alone.folder.iterdir())


def test_who_waits_for_a_killed_writer_completes_its_store(setting, tmp_path, monkeypatch):
    model, objective, space = setting
    before = module.save_file

    def stuck(tensors, path):
        before(tensors, path)
        if "00001" in str(path): time.sleep(60)

    child = os.fork()
    if child == 0:
        try:
            module.save_file = stuck
            write_store(tmp_path / "s", model, objective, ROWS, space=space)
        finally: os._exit(1)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("s/.shard-00001*/*")) and time.monotonic() < deadline: time.sleep(0.01)
    threading.Timer(0.3, os.kill, (child, signal.SIGKILL)).start()
    store = write_store(tmp_path / "s", model, objective, ROWS, space=space)
    os.waitpid(child, 0)
    assert torch.equal(store.rows(), write_store(tmp_path / "alone", model, objective, ROWS, space=space).rows())
    assert not list(store.folder.glob(".*")) and not (store.folder / LOCK).exists()


def test_a_complete_store_is_read_whoever_holds_it(setting, tmp_path):
    model, objective, space = setting
    write_store(tmp_path, model, objective, ROWS, space=space)
    with run_lock(tmp_path): assert len(write_store(tmp_path, model, objective, ROWS, space=space, patience=0)) == 7
    (tmp_path / "shard-00001.safetensors").unlink()
    with run_lock(tmp_path), pytest.raises(FolderInUseError, match="is at work in"): write_store(tmp_path, model, objective, ROWS, space=space, patience=0)


def test_a_finished_store_is_not_computed_again(setting, tmp_path, monkeypatch):
    model, objective, space = setting
    write_store(tmp_path, model, objective, ROWS, space=space)
    monkeypatch.setattr(module, "both_row_gradients", lambda *a, **k: pytest.fail("computed again"))
    assert len(write_store(tmp_path, model, objective, ROWS.assign(split="test"), space=space)) == 7


def test_a_damaged_shard_is_written_again(setting, tmp_path):
    model, objective, space = setting
    before = write_store(tmp_path, model, objective, ROWS, space=space).rows()
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(InputError, match="3 of 7 rows are missing"):
        GradientStore.open(tmp_path)
    assert torch.equal(write_store(tmp_path, model, objective, ROWS, space=space).rows(), before)


def test_a_store_of_something_else_is_refused(setting, tmp_path):
    model, objective, space = setting
    store = write_store(tmp_path, model, objective, ROWS, space=space)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

    def refused(match, model=model, objective=objective, rows=ROWS, space=space):
        with pytest.raises(InputError, match=match):
            write_store(tmp_path, model, objective, rows, space=space)
        with pytest.raises(InputError, match=match):
            store.check_fits(model, objective, rows, space)

    refused("space: ", space=space.keep(space.global_index[:-1]))
    refused("objective.max_length: 64 in the store, 32 asked for", objective=masked_lm(objective.tokenizer, max_length=32))
    refused("objective.tokenizer: ", objective=masked_lm(masked_model("roberta")[0]))
    refused("data: ", rows=ROWS.iloc[::-1])
    refused("data: ", rows=ROWS.assign(alternative="it"))
    other = masked_model("bert", dtype=torch.float32)[1]
    with torch.no_grad(): other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    refused("model: ", model=other)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == files


def test_how_a_tokenizer_pads_does_not_count(setting):
    model, objective, space = setting
    before = store_identity(model, objective, ROWS, space)
    objective.tokenizer.padding_side = "left" if objective.tokenizer.padding_side == "right" else "right"
    try:
        objective.tokenizer(["he", "she it they"], padding=True)
        assert first_disagreement(before, store_identity(model, objective, ROWS, space)) is None
    finally:
        objective.tokenizer.padding_side = "right"


def test_folders_that_are_not_stores_are_left_alone(setting, tmp_path):
    model, objective, space = setting

    def refused(folder, match):
        with pytest.raises(InputError, match=match):
            write_store(folder, model, objective, ROWS, space=space)

    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path, r"files that are no gradient store \(notes.txt\)")
    refused(tmp_path / "notes.txt", "is a file")
    write_json(tmp_path / "other" / "manifest.json", {"format": "another"})
    refused(tmp_path / "other", "not that of a gradient store")
    with pytest.raises(InputError, match="no manifest.json"):
        GradientStore.open(tmp_path / "nowhere")
    assert (tmp_path / "notes.txt").read_text() == "mine" and read_json(tmp_path / "other" / "manifest.json") == {"format": "another"}


def test_a_space_that_was_exchanged_is_noticed(setting, tmp_path):
    model, objective, space = setting
    write_store(tmp_path / "a", model, objective, ROWS, space=space)
    write_store(tmp_path / "b", model, objective, ROWS, space=ParameterSpace.from_model(model).keep(space.global_index + 1))
    shutil.rmtree(tmp_path / "a" / "space")
    (tmp_path / "b" / "space").rename(tmp_path / "a" / "space")
    with pytest.raises(InputError, match="damaged or mixed"):
        GradientStore.open(tmp_path / "a")


def test_a_full_disk_is_noticed_before_the_work(setting, tmp_path, monkeypatch):
    model, objective, space = setting
    need = estimate_store_size(7, space)
    monkeypatch.setattr(module, "free_bytes", lambda folder: need - 1)
    with pytest.raises(InputError, match="GB more and the disk has"):
        write_store(tmp_path / "s", model, objective, ROWS, space=space)
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(module, "free_bytes", lambda folder: need)
    assert len(write_store(tmp_path / "s", model, objective, ROWS, space=space)) == 7
    (tmp_path / "s" / "shard-00002.safetensors").unlink()  # what is there already needs no room
    monkeypatch.setattr(module, "free_bytes", lambda folder: need - 2 * 3 * 4 * space.n)
    assert len(write_store(tmp_path / "s", model, objective, ROWS, space=space)) == 7


@pytest.mark.parametrize("positions, match", [([7], "7 is outside a store of 7 rows"), ([-1], "-1 is outside"), ([0.5], "type float64"), ([True], "type bool")])
def test_positions_must_exist(setting, tmp_path, positions, match):
    store = write_store(tmp_path, *setting[:2], ROWS, space=setting[2])
    with pytest.raises(InputError, match=match):
        store.rows(positions)
    with pytest.raises(InputError, match="nothing has no mean"):
        store.mean([])
    with pytest.raises(InputError, match="did you mean 'factual'"):
        store.mean(kind="factua")


def test_nothing_to_store_is_an_error(setting, tmp_path):
    model, objective, space = setting
    with pytest.raises(InputError, match="0 rows"):
        write_store(tmp_path / "s", model, objective, ROWS.head(0), space=space)


def test_packing_covers_the_whole_range_of_float32():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 50, generator=generator) * torch.logspace(-37, 37, 200)[:, None]
    error = (unpack(*pack(rows)) - rows).abs()
    assert (error <= rows.abs() / 2048 + rows.abs().amax(1, keepdim=True) * 2.0**-39).all()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="gradient 1 holds NaN or infinite"):
            pack(torch.tensor([[1.0, 2.0], [bad, 0.0]]))


class Square:
    "An objective without a tokenizer: the square of an output, as a regression would have it."
    name = "square"

    def __init__(self, **own): self.__dict__.update(own)


def test_objectives_describe_themselves():
    tokenizer, _ = masked_model("bert")
    assert objective_identity(Square(power=2, _cache=object())) == {"name": "square", "power": 2}
    assert objective_identity(Square(words=["a"])) != objective_identity(Square(words=["b"]))
    assert objective_identity(Square(head=nn.Linear(2, 2, bias=False).requires_grad_(False)))["head"]
    with pytest.raises(InputError, match="attribute 'choose' is a builtin_function_or_method.*settings"):
        objective_identity(Square(choose=len))
    assert objective_identity(Square(choose=len, settings={"choose": "length"})) == {"name": "square", "choose": "length"}
    assert objective_identity(masked_lm(tokenizer))["mask"] == "[MASK]"


def test_the_engine_is_the_one_asked_for(setting, tmp_path, monkeypatch):
    model, objective, space = setting
    stores = {engine: write_store(tmp_path / engine, model, objective, ROWS, space=space, engine=engine, batch_size=2) for engine in ("ghost", "loop")}
    difference = stores["ghost"].rows() - stores["loop"].rows()
    assert difference.norm() < 1e-3 * stores["loop"].rows().norm()
    with pytest.raises(InputError, match="did you mean 'ghost'"):
        write_store(tmp_path / "s", model, objective, ROWS, space=space, engine="gost")


def test_a_row_without_a_finite_loss_is_named(setting, tmp_path):
    model, objective, space = setting
    with torch.no_grad(): model.cls.predictions.bias[objective.tokenizer.convert_tokens_to_ids("he")] = -torch.inf
    rows = ROWS.set_axis(list("abcdefg"))
    with pytest.raises(InputError, match=r"^rows \[0\] \(1 in all\): their loss is not finite"):  # its alternative word is "he"
        write_store(tmp_path / "first", model, objective, rows, space=space)
    late = rows[~rows.alternative.eq("he")].assign(factual=["she", "she", "they", "he", "it", "he"])  # a shard has three rows
    with pytest.raises(InputError, match=r"^rows \[3, 5\] \(2 in all\): their loss is not finite"):
        write_store(tmp_path / "later", model, objective, late, space=space)
    assert (tmp_path / "later" / "shard-00000.safetensors").is_file()


def test_a_gradient_that_cannot_be_stored_is_named(setting, tmp_path, monkeypatch):
    model, objective, space = setting
    computed = module.both_row_gradients

    def broken(model, objective, frame, **options):
        rows = computed(model, objective, frame, **options)
        rows[0][frame.index.tolist().index(4) if 4 in frame.index else []] = torch.nan
        return rows

    monkeypatch.setattr(module, "both_row_gradients", broken)
    with pytest.raises(InputError, match="^rows: gradient 4 holds NaN"):
        write_store(tmp_path, model, objective, ROWS, space=space)


class Settled:
    "An objective that says itself what decides it."
    name = "settled"

    def __init__(self, inner, settings): self.inner, self.settings = inner, settings

    def prepare(self, frame): return self.inner.prepare(frame)

    def losses(self, model, batch): return self.inner.losses(model, batch)


@pytest.mark.parametrize("settings", [{"layers": (1, 2)}, {"cut": float("nan")}, {"cut": float("inf")}, {"names": {1: "one", 2: ("a", "b")}},
                                      {"rate": np.float32(0.1), "n": np.int64(3)}, {"file": Path("a") / "b"}, {"nothing": None, "on": True}])
def test_an_identity_survives_the_file(setting, tmp_path, settings):
    model, objective, space = setting
    settled = Settled(objective, settings)
    identity = store_identity(model, settled, ROWS, space)
    assert read_json(write_json(tmp_path / "identity.json", identity)) == identity
    before = write_store(tmp_path / "s", model, settled, ROWS, space=space)
    (tmp_path / "s" / "shard-00001.safetensors").unlink()
    again = write_store(tmp_path / "s", model, settled, ROWS, space=space)
    again.check_fits(model, settled, ROWS, space)
    assert torch.equal(again.rows(), before.rows())
    other = Settled(objective, {**settings, next(iter(settings)): "else"})
    with pytest.raises(InputError, match=r"objective\."):
        write_store(tmp_path / "s", model, other, ROWS, space=space)


def test_infinities_are_told_apart(setting):
    model, objective, space = setting
    found = [store_identity(model, Settled(objective, {"cut": cut}), ROWS, space)["objective"]["cut"] for cut in (float("nan"), float("inf"), -float("inf"), None)]
    assert len(set(found)) == 4


@pytest.mark.parametrize("settings, match", [({"w": torch.ones(2)}, "objective.w: a Tensor cannot"), ({"a": {"b": [len]}}, "objective.a.b: a builtin_function"), ({"s": {1, 2}}, "objective.s: a set")])
def test_settings_without_a_written_form_are_refused_before_anything_is_made(setting, tmp_path, settings, match):
    model, objective, space = setting
    with pytest.raises(InputError, match=match):
        write_store(tmp_path / "s", model, Settled(objective, settings), ROWS, space=space)
    assert not (tmp_path / "s").exists()


class Vectors:
    "Two classes of vectors; the loss of a class is its negative log-probability."
    name = "vectors"

    def prepare(self, frame): return torch.tensor(frame["x"].tolist())

    def losses(self, model, batch):
        scores = model(batch).log_softmax(-1)
        return -scores[:, 0], -scores[:, 1]


def test_any_module_and_any_objective(tmp_path):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    points = pd.DataFrame({"x": [[1.0, 0.0], [0.5, 2.0], [1.0, 1.0]]})
    space = ParameterSpace.from_model(model)
    store = write_store(tmp_path, model, Vectors(), points, space=space)
    torch.testing.assert_close(store.rows(kind="diff"), row_gradients(model, Vectors(), points, space=space, kind="diff", engine="loop"), rtol=1e-3, atol=1e-6)
    with pytest.raises(InputError, match="data: "):
        store.check_fits(model, Vectors(), points.iloc[[0, 2, 1]], space)
