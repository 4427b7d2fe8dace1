"States on disk: every damaged byte is noticed and a full disk leaves the old state."
import dataclasses
import errno
import json
import math
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradiend import core
from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.model import GradiendConfig
from gradiend.trainer import checkpoints
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.checkpoints import (
    NAME,
    NO_EFFECT,
    Checkpoint,
    check_writable,
    first_difference,
    read_checkpoint,
    run_identity,
    write_checkpoint,
)
from tests.test_trainer_loop import PAIR, examples, setting

STATE = Checkpoint(7, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5], dtype=torch.bfloat16)}, {"list": [1, "x", None], "nan": math.nan})
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
PLAIN = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


def in_child(work):
    "Run `work` in a fork of this process; its wait status."
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return os.waitpid(child, 0)[1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"), st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=4),
       facts=st.dictionaries(st.text(max_size=6), PLAIN, max_size=4), step=st.integers(0, 2**40))
def test_what_is_written_is_read(tmp_path, tensors, facts, step):
    made = {name: (torch.rand(shape) * 9 - 3).to(dtype) for name, (dtype, shape) in tensors.items()}
    write_checkpoint(tmp_path, Checkpoint(step, made, facts))
    back = read_checkpoint(tmp_path)
    assert back.step == step and repr(back.facts) == repr(facts) and back.tensors.keys() == made.keys()
    for name, tensor in made.items():
        assert back.tensors[name].dtype == tensor.dtype and torch.equal(back.tensors[name], tensor)


def test_parts_and_views_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_checkpoint(tmp_path, Checkpoint(1, {"column": whole[:, 1], "turned": whole.T, "grad": torch.ones(2, requires_grad=True)}))
    back = read_checkpoint(tmp_path).tensors
    assert torch.equal(back["column"], whole[:, 1]) and torch.equal(back["turned"], whole.T) and not back["grad"].requires_grad


def test_every_changed_byte_and_every_cut_is_noticed(tmp_path):
    path = write_checkpoint(tmp_path, STATE)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(bytes(damaged))
        try: back = read_checkpoint(tmp_path)
        except InputError as error:
            assert NAME in str(error)
            continue
        # a changed byte that changes nothing, such as the order of two names, may pass
        assert back.step == 7 and json.dumps(back.facts) == json.dumps(STATE.facts) and all(torch.equal(back.tensors[k], t) for k, t in STATE.tensors.items()), place
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=NAME): read_checkpoint(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match=NAME): read_checkpoint(tmp_path)


def test_a_missing_tensor_is_noticed(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file
    path = write_checkpoint(tmp_path, STATE)
    with safe_open(path, "pt") as file: metadata = file.metadata()
    save_file({"a": STATE.tensors["a"]}, path, metadata)
    with pytest.raises(InputError, match="was changed"): read_checkpoint(tmp_path)
    save_file(STATE.tensors, path, {})
    with pytest.raises(InputError, match="format"): read_checkpoint(tmp_path)


@pytest.mark.parametrize("where", ["before the file", "half a file", "before the new name", "after the new name"])
def test_killed_while_writing(tmp_path, monkeypatch, where):
    write_checkpoint(tmp_path, STATE)

    def stop(*_, **__): os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors, path, metadata):
        path.write_bytes(b"\x10\0\0\0")
        (path.parent / ".tmpAb12Cd").write_bytes(b"the writer's own file, of a name that nobody knows")
        stop()

    def write():
        if where == "before the file": monkeypatch.setattr(checkpoints, "save_file", stop)
        if where == "half a file": monkeypatch.setattr(checkpoints, "save_file", half)
        if where == "before the new name": monkeypatch.setattr(os, "replace", stop)
        if where == "after the new name": monkeypatch.setattr(core, "synced", lambda path: stop() if path.is_dir() else None)
        write_checkpoint(tmp_path, replace(STATE, step=8))

    assert os.WTERMSIG(in_child(write)) == signal.SIGKILL
    assert read_checkpoint(tmp_path).step == (8 if where == "after the new name" else 7)
    write_checkpoint(tmp_path, replace(STATE, step=9))
    assert read_checkpoint(tmp_path).step == 9 and [p.name for p in tmp_path.iterdir()] == [NAME]


def test_a_disk_that_fills_up_leaves_the_old_state(tmp_path):
    write_checkpoint(tmp_path, STATE)
    large = Checkpoint(8, {"w": torch.zeros(50_000)})

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try: write_checkpoint(tmp_path, large)
        except OSError as error: assert "step 8 (0.2 MB) could not be written" in str(error) and "older state" in str(error) and error.errno
        else: raise AssertionError

    assert in_child(write) == 0
    assert read_checkpoint(tmp_path).step == 7 and [p.name for p in tmp_path.iterdir()] == [NAME]


def test_a_failing_rename_leaves_the_old_state(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, STATE)

    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device") as caught: write_checkpoint(tmp_path, replace(STATE, step=8))
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and read_checkpoint(tmp_path).step == 7 and [p.name for p in tmp_path.iterdir()] == [NAME]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    assert check_writable(tmp_path / "new" / "run") == tmp_path / "new" / "run" and not list((tmp_path / "new" / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="experiment_dir: .*cannot be written"): check_writable(tmp_path / "file")
    with pytest.raises(InputError, match="GB free, and this run may need 1000000000.0 GB"): check_writable(tmp_path, 10**18)

    def read_only(self, *_): raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(tmp_path), "write_bytes", read_only)
    with pytest.raises(InputError, match="cannot be written .Read-only file system"): check_writable(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written .Permission denied"): check_writable(tmp_path)


OTHER = {"source": "factual", "target": "factual", "activation_encoder": "identity", "activation_decoder": "relu", "gradient_scale": 1.0, "convergent_mean_by_class_threshold": None}


def test_every_argument_counts_unless_it_is_excused():
    model, objective, space, _ = setting()
    rows, config, args = examples(24), GradiendConfig(pair=PAIR), TrainingArguments()
    base = run_identity(model, objective, rows, space, config, args)
    assert base == json.loads(json.dumps(base)) and first_difference(base, run_identity(model, objective, rows, space, config, args)) is None
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert NO_EFFECT <= names and set(base["arguments"]) == names - NO_EFFECT
    changed = {"train_batch_size": 5, "seed": 3, "max_seeds": 2, "max_steps": 9, "weight_decay": 0.5, "params": ["*"], **OTHER}
    for name, value in changed.items():
        difference = first_difference(base, run_identity(model, objective, rows, space, config, replace(args, **{name: value})))
        assert difference is not None and difference.startswith(f"arguments.{name} was "), name
    assert run_identity(model, objective, rows, space, config, replace(args, experiment_dir="x", lms_ratio=0.5)) == base


def test_what_else_counts(monkeypatch):
    model, objective, space, _ = setting()
    rows, config, args = examples(24), GradiendConfig(pair=PAIR), TrainingArguments()
    base = run_identity(model, objective, rows, space, config, args)

    def told(**other):
        given = {"model": model, "objective": objective, "examples": rows, "space": space, "config": config, "args": args} | other
        return first_difference(base, run_identity(**given))

    shuffled = Examples(rows.frame.iloc[::-1].reset_index(drop=True), PAIR)
    assert told(examples=shuffled).startswith("data.fingerprint") and told(examples=Examples(rows.frame, PAIR[::-1])).startswith("data.")
    assert told(space=space.keep(space.global_index[:10])) == f"space.entries was {space.n} and is now 10"
    assert told(space=space.keep(space.global_index[1:])) is not None
    assert told(config=replace(config, pair=PAIR[::-1])).startswith("config.pair")
    with torch.no_grad():
        first = next(model.parameters())
        first.flatten()[0] += 1e-3
        assert told().startswith("base_model.fingerprint")
        first.flatten()[0] -= 1e-3
    versions = checkpoints.package_versions() | {"torch": "1.0"}
    monkeypatch.setattr(checkpoints, "package_versions", lambda: versions)
    assert told().startswith("versions.torch was ") and told().endswith("is now '1.0'")


def test_first_difference_names_the_place():
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b was [1, 2] and is now [1, 3]"
    assert first_difference({"a": math.nan}, {"a": math.nan}) is None
    assert first_difference({"a": 1}, {"a": 1, "new": 2}) == "new was 'nothing' and is now 2" and first_difference({"old": 1}, {}) == "old was 1 and is now 'nothing'"
