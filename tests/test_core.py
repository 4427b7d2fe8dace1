"Edge cases of gradiend.core, on the exported package."
import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend.core import (InputError, MissingExtraError, Readable, atomic_folder, check_choice, fingerprint, optional_import,
                           progress, read_json, write_json)


def test_core_is_cheap():
    "Importing the module loads neither torch nor pandas."
    code = "import sys, gradiend.core; sys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_fingerprint_is_the_same_in_another_process():
    code = "from gradiend.core import fingerprint; print(fingerprint({'b': [1, 2.5, None], 'a': ('x', True)}, {3: 'y'}))"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout.strip() for seed in ("0", "1")}
    assert runs == {fingerprint({"a": ("x", True), "b": [1, 2.5, None]}, {3: "y"})}


@pytest.mark.parametrize("a, b", [
    (1, True), (1, "1"), (0, None), ("", None), ([], ()[:0] + (0,)), ([1, [2]], [[1], 2]), ({"a": 1}, [("a", 1)]),
    (float("nan"), float("inf")), (b"a", "a"), (np.float32([1]), np.float64([1])), (np.zeros(2), np.zeros((2, 1))),
    (torch.zeros(2), torch.zeros(1, 2)), (torch.zeros(2), torch.zeros(2, dtype=torch.float16)), (["a", ""], ["", "a"]),
    (pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [2, 1]})), (pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1.0]})),
    (pd.DataFrame({"a": ["", "x"]}), pd.DataFrame({"a": [None, "x"]})),
])
def test_fingerprint_tells_apart(a, b):
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize("a, b", [
    ([1, 2], (1, 2)), (np.float64(2.5), 2.5), (np.bool_(True), True), (np.arange(3), np.arange(9)[:3]),
    (torch.arange(6.).reshape(2, 3).T, torch.arange(6.).reshape(2, 3).T.contiguous()), (np.array(["a"], dtype=object), ["a"]),
    (torch.ones(2, requires_grad=True), torch.ones(2)), (torch.tensor(3), torch.tensor(3)), (float("nan"), float("nan")),
    (pd.DataFrame({"a": ["x", "y"]}), pd.DataFrame({"a": np.array(["x", "y"], dtype=object)})),
    (np.arange(3, dtype=">i4"), np.arange(3, dtype="<i4")),
])
def test_fingerprint_agrees(a, b):
    assert fingerprint(a) == fingerprint(b)


@pytest.mark.parametrize("bad", [object(), {1, 2}, lambda: 0, int, [{"deep": object()}]])
def test_fingerprint_refuses(bad):
    with pytest.raises(TypeError, match="fingerprint"): fingerprint(bad)


def test_json_keeps_order_and_text(tmp_path):
    path = write_json(tmp_path / "a.json", {"z": "é→", "a": [np.int32(1), np.float32("inf"), np.array([1, 2])]})
    assert path.read_text(encoding="utf-8").index('"z"') < path.read_text(encoding="utf-8").index('"a"')
    assert "é→" in path.read_text(encoding="utf-8")
    assert read_json(path) == {"z": "é→", "a": [1, None, [1, 2]]}
    (tmp_path / "latin.json").write_bytes(b'"\xe4"')
    with pytest.raises(InputError, match="not a JSON file"): read_json(tmp_path / "latin.json")


def test_atomic_folder_through_a_link_and_interrupt(tmp_path):
    real = tmp_path / "real"
    with atomic_folder(real) as folder: (folder / "a").touch()
    (tmp_path / "link").symlink_to(real)
    with atomic_folder(tmp_path / "link") as folder: (folder / "b").touch()
    assert (tmp_path / "link").is_symlink() and (real / "b").exists() and not (real / "a").exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(real) as folder:
        (folder / "c").touch()
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"] and (real / "b").exists()


def test_atomic_folder_checks_before_and_after_the_work(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep me")
    with pytest.raises(InputError, match="note.txt"), atomic_folder(tmp_path / "mine"): raise AssertionError("too late")
    with pytest.raises(InputError, match="late.txt"), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "late.txt").touch()     # somebody else was faster
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["late.txt"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder: (folder / "sub").mkdir()
    assert (tmp_path / "empty" / "sub").is_dir()


def test_atomic_folder_nests(tmp_path):
    with atomic_folder(tmp_path / "run") as run, atomic_folder(run / "model") as model: (model / "w").touch()
    assert (tmp_path / "run" / "model" / "w").exists()
    with atomic_folder(tmp_path / "run") as run: (run / "x").touch()
    assert not (tmp_path / "run" / "model").exists()


def test_optional_import_passes_on_a_broken_package(tmp_path, monkeypatch):
    (tmp_path / "broken_package_x.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"): optional_import("broken_package_x", "plot")
    with pytest.raises(MissingExtraError, match=r'pip install "gradiend\[widgets\]"'): optional_import("absent_package_x", "widgets")


def test_check_choice_without_a_near_word():
    with pytest.raises(InputError, match="choose one of 'a', 'b'") as e: check_choice("x", "zzzz", ["a", "b"])
    assert "did you mean" not in str(e.value)
    with pytest.raises(InputError, match="x=None"): check_choice("x", None, ["a"])


def test_readable_inherits_and_hides():
    calls = []

    @dataclass(frozen=True, eq=False)
    class Base(Readable):
        table: pd.DataFrame
        _secret: int = 0

        @property
        def size(self) -> int: return len(self.table)

        @cached_property
        def slow(self) -> int:
            calls.append(1)
            return 1

    @dataclass(frozen=True, eq=False)
    class Child(Base):
        name: str = "c"

    r = Child(pd.DataFrame({"a": [1, 2]}))
    assert list(r) == ["table", "name", "size", "slow"] and len(r) == 4 and "slow" in r and calls == []
    assert r["size"] == 2 and r == r and r != Child(r.table)
    with pytest.raises(KeyError, match="it has table, name"): r["_secret"]
    with pytest.raises(dataclasses.FrozenInstanceError): r.name = "d"


def test_progress_is_silent_without_a_terminal(capsys):
    assert list(progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress(range(3), disable=False, desc="work")) == [0, 1, 2]
    assert "work" in capsys.readouterr().err
