"""Ours beside the reference package 0.2.3, on the same model, the same rows and with the same number of threads; run with

    GRADIEND_REFERENCE_PYTHON=/its/venv/bin/python pytest tests/benchmarks/test_reference.py -m benchmark -s

The reference runs in its own Python, as a subprocess (`reference_side.py`). Both sides measure one batched forward pass without
gradients over the same rows first (`unit.py`), and every time is also given as a multiple of that. Only the agreement of what was
computed is asserted; the times are printed, to be read on a quiet machine.
"""
import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from gradiend import zoo
from gradiend.gradients.engine import encode, pair_gradients
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace

from .common import ROWS, RUNS, THREADS, median_seconds, one_token_rows, threads
from .unit import forward_pass

PYTHON = os.environ.get("GRADIEND_REFERENCE_PYTHON")
pytestmark = [pytest.mark.benchmark, pytest.mark.skipif(PYTHON is None, reason="GRADIEND_REFERENCE_PYTHON does not name the reference's Python")]
BATCH = 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    "What both sides read: the embedded model as an ordinary folder, and rows in the reference's column names."
    folder = tmp_path_factory.mktemp("shared")
    tokenizer, model = zoo.load("gradiend/mini-mlm")
    for part in (model, tokenizer): part.save_pretrained(folder / "model")
    rows = one_token_rows(max(ROWS, 4 * BATCH)).rename(columns={"factual": "label", "factual_class": "label_class"})
    rows[["masked", "label", "label_class", "alternative", "alternative_class"]].assign(split="train").to_csv(folder / "rows.csv", index=False)
    return folder


def reference(folder: Path, *arguments: object) -> str:
    "Run its side; returns what it printed last."
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # it would put our package in front of theirs
    command = [PYTHON, Path(__file__).with_name("reference_side.py"), folder, *arguments]
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return (done.stdout.strip().splitlines() or [""])[-1]


def ours(folder: Path, theirs: dict) -> dict:
    "The same on our side: texts to encodings, texts to the two training gradients."
    tokenizer, model = zoo.load(folder / "model")
    rows = pd.read_csv(folder / "rows.csv").rename(columns={"label": "factual", "label_class": "factual_class"})
    few = rows.groupby("factual_class", sort=False).head(ROWS // 2)
    batch = rows[rows["factual_class"] == rows["factual_class"].iloc[0]].head(BATCH)  # as theirs: rows of one class
    objective, space = masked_lm(tokenizer), ParameterSpace.from_model(model)
    assert (space.n, sum(p.numel() for p in model.parameters())) == (theirs["entries"], theirs["parameters"])
    direction = torch.randn(space.n, generator=torch.Generator().manual_seed(0))
    with threads(THREADS):
        unit_encode, unit_train = (median_seconds(forward_pass(tokenizer, model, list(part["masked"])), 5) for part in (few, batch))
        encoding = median_seconds(lambda: encode(model, objective, few, direction, space=space, kind="alternative", batch_size=len(few)), RUNS)
        training = median_seconds(lambda: pair_gradients(model, objective, objective.prepare(batch), source="alternative", target="diff", space=space), RUNS)
    return {"encode_seconds": encoding, "encode_unit_seconds": unit_encode, "encode": encoding / unit_encode, "train_seconds": training, "train_unit_seconds": unit_train, "train": training / unit_train}


def test_beside_the_reference(shared, capsys):
    theirs = json.loads(reference(shared, ROWS, THREADS, RUNS))
    mine = ours(shared, theirs)
    lines = [{"what": what, "reference [s]": theirs[f"{key}_seconds"], "ours [s]": mine[f"{key}_seconds"], "reference [forward passes]": theirs[key], "ours [forward passes]": mine[key],
              "times as fast": theirs[f"{key}_seconds"] / mine[f"{key}_seconds"], "fewer forward passes": theirs[key] / mine[key], "wanted": wanted}
             for what, key, wanted in ((f"encode {theirs['encoded']} rows", "encode", 8), (f"both gradients of {BATCH} rows", "train", 4))]
    with capsys.disabled():
        print(f"\nreference {theirs['version']}, {theirs['parameters']:,} parameters, {THREADS} thread(s), forward passes of {theirs['encode_unit_seconds']:.3f} / {mine['encode_unit_seconds']:.3f} s and "
              f"{theirs['train_unit_seconds']:.3f} / {mine['train_unit_seconds']:.3f} s\n" + pd.DataFrame(lines).round(2).to_string(index=False))
    assert theirs["encoded"] == ROWS and theirs["threads"] == THREADS


def test_both_sides_compute_the_same(shared):
    "The two gradients of one batch, ours and theirs: what is compared above is the same thing."
    reference(shared, "gradients", THREADS)
    theirs = torch.load(shared / "gradients.pt", weights_only=True)
    tokenizer, model = zoo.load(shared / "model")
    objective, space = masked_lm(tokenizer), ParameterSpace.from_model(model)
    batch = objective.prepare(pd.DataFrame({name: theirs[name] for name in ("masked", "factual", "alternative")}))
    found = pair_gradients(model, objective, batch, source="alternative", target="diff", space=space)
    for mine, other in zip(found, (theirs["source"], theirs["target"]), strict=True):
        assert (mine - other).norm() < 1e-3 * other.norm()
