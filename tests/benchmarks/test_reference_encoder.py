"""The whole encoder evaluation beside that of the reference package 0.2.3, on the same model and the same rows; run with

    GRADIEND_REFERENCE_PYTHON=/its/venv/bin/python pytest tests/benchmarks/test_reference_encoder.py -m benchmark -s

`test_reference.py` compares the encodings alone. Here our side does everything that a user gets: rows, encodings, metrics with a
thousand bootstrap samples, 200 shufflings; and once more with all controls and neutral words, which the reference does not have.
How many rows: GRADIEND_BENCHMARK_ROWS. Wanted: eight times as fast; it is printed, to be read on a quiet machine.
"""
import json

import pandas as pd
import pytest

from gradiend import zoo
from gradiend.data.examples import make_examples
from gradiend.evaluator.encoder import evaluate_encoder
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel

from .common import ROWS, RUNS, THREADS, median_seconds, threads
from .test_reference import PYTHON, reference, shared  # noqa: F401  (shared is a fixture)
from .unit import forward_pass

pytestmark = [pytest.mark.benchmark, pytest.mark.skipif(PYTHON is None, reason="GRADIEND_REFERENCE_PYTHON does not name the reference's Python")]


def test_encoder_evaluation_beside_the_reference(shared, capsys):  # noqa: F811
    theirs = json.loads(reference(shared, ROWS, THREADS, RUNS))
    tokenizer, model = zoo.load(shared / "model")
    rows = pd.read_csv(shared / "rows.csv").rename(columns={"label": "factual", "label_class": "factual_class"})
    few = rows.groupby("factual_class", sort=False).head(ROWS // 2)
    examples, objective = make_examples(few, pair=tuple(rows["factual_class"].unique())), masked_lm(tokenizer)
    gradiend = GradiendModel.create(ParameterSpace.from_model(model), GradiendConfig(pair=examples.pair))
    same = {"split": "train", "batch_size": min(ROWS, 64)}
    kinds = {"the same": {"neutral_training": False}, "with neutral words": {}, "with all controls, too": {"controls": ("shuffled", "untrained", "class_mean")}}
    with threads(THREADS):
        unit = median_seconds(forward_pass(tokenizer, model, list(few["masked"])), 5)
        seconds = {name: median_seconds(lambda o=options: evaluate_encoder(gradiend, model, objective, examples, **same, **o), RUNS) for name, options in kinds.items()}
        n = evaluate_encoder(gradiend, model, objective, examples, **same, neutral_training=False).n_samples
    lines = [{"ours": name, "reference [s]": theirs["encode_seconds"], "ours [s]": s, "reference [forward passes]": theirs["encode"], "ours [forward passes]": s / unit,
              "times as fast": theirs["encode_seconds"] / s, "wanted": 8 if name == "the same" else "-"} for name, s in seconds.items()]
    with capsys.disabled():
        print(f"\nreference {theirs['version']}, {theirs['parameters']:,} parameters, {theirs['encoded']} rows, {THREADS} thread(s)\n" + pd.DataFrame(lines).round(2).to_string(index=False))
    assert n == theirs["encoded"] == ROWS
