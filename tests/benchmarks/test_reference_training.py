"""Training beside the reference package 0.2.3: the same model, rows, steps, seeds and number of threads; run with

    GRADIEND_REFERENCE_PYTHON=/its/venv/bin/python pytest tests/benchmarks/test_reference_training.py -m benchmark -s

Both sides are processes of their own (`training_side.py`), so that their memory can be compared. Only what was learnt is asserted;
times and memory are printed. Comparisons are of processor time, which other work on the machine hardly changes; the clock stands beside it.
Number of steps: GRADIEND_BENCHMARK_STEPS (default 10).
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gradiend import zoo

from .common import THREADS, one_token_rows

PYTHON = os.environ.get("GRADIEND_REFERENCE_PYTHON")
STEPS = int(os.environ.get("GRADIEND_BENCHMARK_STEPS", 10))
pytestmark = [pytest.mark.benchmark, pytest.mark.skipif(PYTHON is None, reason="GRADIEND_REFERENCE_PYTHON does not name the reference's Python")]


def side(python: str, what: str, folder: Path, *options: object) -> dict:
    "Run one side; its JSON line."
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    if python != sys.executable: environment.pop("PYTHONPATH", None)  # it would put our package in front of theirs
    command = [python, Path(__file__).with_name("training_side.py"), what, folder, "--threads", THREADS, *options]
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def alone(folder: Path, steps: int, seeds: tuple[int, ...] = (1, 5)) -> pd.DataFrame:
    "This package by itself, one line per number of seeds: steps, test correlation, class means, processor seconds and forward passes per step."
    unit, lines = side(sys.executable, "bare", folder)["forward_seconds"], []
    for n in seeds:
        done = side(sys.executable, "train", folder, "--steps", steps, "--seeds", n)
        lines.append({"seeds": n, "steps": steps, "test correlation": done["correlation"], **{f"mean {name}": mean for name, mean in done["means"].items()},
                      "seconds per step": done["cpu_seconds"] / steps, "forward passes per step": done["cpu_seconds"] / steps / unit})
    return pd.DataFrame(lines)


def compare(folder: Path, steps: int, seeds: tuple[int, ...] = (1, 5)) -> pd.DataFrame:
    "One line per number of seeds and side: seconds by the clock and of the processor, forward passes per step, correlation, memory beyond the bare model."
    lines = []
    for name, python in (("reference 0.2.3", str(PYTHON)), ("this package", sys.executable)):
        bare = side(python, "bare", folder)
        for n in seeds:
            done = side(python, "train", folder, "--steps", steps, "--seeds", n)
            lines.append({"seeds": n, "package": name, "steps": steps, "clock": done["seconds"], "processor": done["cpu_seconds"],
                          "forward passes per step": done["cpu_seconds"] / steps / bare["forward_seconds"],
                          "test correlation": done["correlation"], "MiB beyond the bare model": done["peak_mib"] - bare["peak_mib"]})
    table = pd.DataFrame(lines).sort_values(["seeds", "package"], ignore_index=True)
    table["times as fast"] = [group["processor"].max() / s for _, group in table.groupby("seeds") for s in group["processor"]]
    return table


def test_training_beside_the_reference(tmp_path, capsys):
    for part in zoo.load("gradiend/mini-mlm"): part.save_pretrained(tmp_path / "model")
    rows = one_token_rows(600).rename(columns={"factual": "label", "factual_class": "label_class"})
    rows[["masked", "label", "label_class", "alternative", "alternative_class", "split"]].to_csv(tmp_path / "rows.csv", index=False)
    table = compare(tmp_path, STEPS)
    with capsys.disabled(): print("\n" + table.round(2).to_string(index=False))
    assert (table["test correlation"] > 0.5).all()
