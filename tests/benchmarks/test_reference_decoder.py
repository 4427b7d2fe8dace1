"""Decoder candidates, ours beside the reference package 0.2.3, on the same model, rows, texts and with the same number of threads; run with

    GRADIEND_REFERENCE_PYTHON=/its/venv/bin/python pytest tests/benchmarks/test_reference_decoder.py -m benchmark -s

The reference runs in its own Python, as a subprocess (`reference_decoder_side.py`). Times are CPU time per candidate; they are printed, to be read on a quiet machine.
"""
import json
import os
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from gradiend import corpora, zoo
from gradiend.data.examples import Examples
from gradiend.evaluator.candidates import Bench
from gradiend.evaluator.decoder import evaluation_rows, measurement
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel

from .common import ROWS, THREADS, one_token_rows, threads
from .test_decoder_cost import cpu_seconds
from .unit import forward_pass

PYTHON = os.environ.get("GRADIEND_REFERENCE_PYTHON")
pytestmark = [pytest.mark.benchmark, pytest.mark.skipif(PYTHON is None, reason="GRADIEND_REFERENCE_PYTHON does not name the reference's Python")]
CANDIDATES, TEXTS = 8, 200


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    "What both sides read: the embedded model as an ordinary folder, rows in the reference's column names, neutral texts."
    folder = tmp_path_factory.mktemp("shared")
    tokenizer, model = zoo.load("gradiend/mini-mlm")
    for part in (model, tokenizer): part.save_pretrained(folder / "model")
    rows = one_token_rows(max(2 * ROWS, 40)).rename(columns={"factual": "label", "factual_class": "label_class"})
    rows[["masked", "label", "label_class", "alternative", "alternative_class"]].assign(split="test").to_csv(folder / "rows.csv", index=False)
    pd.DataFrame({"text": corpora.load("neutral", n=TEXTS, seed=3)}).to_csv(folder / "neutral.csv", index=False)
    return folder


def theirs(folder: Path) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # it would put our package in front of theirs
    command = [str(PYTHON), str(Path(__file__).with_name("reference_decoder_side.py")), str(folder), str(CANDIDATES), str(THREADS)]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(folder: Path) -> dict:
    "The same candidates: an untrained GRADIEND over all weights, one learning rate after the other."
    tokenizer, model = zoo.load(folder / "model")
    frame = pd.read_csv(folder / "rows.csv").rename(columns={"label": "factual", "label_class": "factual_class"})
    frame["text"] = [m.replace("[MASK]", w) for m, w in zip(frame["masked"], frame["factual"], strict=True)]
    frame["transition"] = frame["factual_class"] + "→" + frame["alternative_class"]
    examples = Examples(frame, pair=tuple(frame["factual_class"].unique()))
    gradiend = GradiendModel.create(ParameterSpace.from_model(model), GradiendConfig(pair=examples.pair), seed=0)
    with threads(THREADS):
        unit = cpu_seconds(forward_pass(tokenizer, model, list(frame["masked"])), 5)
        measure = measurement(masked_lm(tokenizer), examples, evaluation_rows(examples), list(pd.read_csv(folder / "neutral.csv")["text"]), batch_size=32)
        base, measure = measure.take_base(model)
        bench = Bench(gradiend, model, measure)
        bench.candidate(1.0, 0.5)
        start = time.process_time()
        for i in range(CANDIDATES): bench.candidate(1.0, 10.0 ** (i / 4 - 3))
        each = (time.process_time() - start) / CANDIDATES
    return {"candidate_seconds": each, "unit_seconds": unit, "base_lms": base.lms}


def test_candidates_beside_the_reference(shared, capsys):
    other, mine = theirs(shared), ours(shared)
    lines = [{"package": name, "one candidate [s]": r["candidate_seconds"], "forward passes of its rows": r["candidate_seconds"] / r["unit_seconds"], "LMS of the base model": r["base_lms"]}
             for name, r in ((f"reference {other['version']}", other), ("this one", mine))]
    with capsys.disabled():
        print(f"\n{other['parameters']:,} parameters, {max(2 * ROWS, 40)} rows, {TEXTS} texts, {THREADS} thread(s)\n" + pd.DataFrame(lines).round(3).to_string(index=False)
              + f"\n{other['candidate_seconds'] / mine['candidate_seconds']:.2f} times as fast (wanted: at least 1); its resident memory grew by {other['grew'] / 1e6:.0f} MB, the model has {4 * other['parameters'] / 1e6:.0f} MB")
    assert other["grid"] == CANDIDATES + 1 and 0 < mine["base_lms"] < 1
