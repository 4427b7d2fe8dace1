"`import gradiend` is cheap, and every public name is where it says."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradiend


def test_import_loads_nothing_heavy():
    "What counts is which modules are loaded, not how long it takes on this machine."
    heavy = {"torch", "transformers", "numpy", "pandas", "tqdm", "safetensors", "matplotlib", "datasets"}
    check = "import sys, gradiend; gradiend.__version__; dir(gradiend); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.split()
    assert "gradiend" in loaded
    assert heavy.isdisjoint(loaded)
    assert [name for name in loaded if name.startswith("gradiend.")] == []


@pytest.mark.parametrize("name", gradiend.__all__)
def test_public_name(name):
    assert getattr(gradiend, name) is not None
    assert name in dir(gradiend)


def test_type_checkers_see_the_same_names():
    "The block for the type checkers and the table for the import at run time name the same things."
    tree = ast.parse(Path(gradiend.__file__).read_text(encoding="utf-8"))
    [block] = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typed = {alias.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    table = {name: f"gradiend.{module}" for name, module in gradiend._names.items()}
    assert typed == table | dict.fromkeys(gradiend._modules, "gradiend")


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'Gradient'"):
        _ = gradiend.Gradient
