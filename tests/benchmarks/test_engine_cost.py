"""What the engine costs, as multiples of one batched forward pass without gradients; run with

    pytest tests/benchmarks -m benchmark -s

Nothing is asserted about time: the numbers are printed, to be read on a quiet machine.
"""
import time

import pandas as pd
import pytest
import torch

from gradiend import TextFilterConfig, TextPredictionDataCreator, corpora, make_examples, zoo
from gradiend.gradients.engine import accumulate, encode, pair_weights, row_gradients
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace

pytestmark = pytest.mark.benchmark


def median_seconds(action, runs: int = 5) -> float:
    action()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]


def test_cost_of_the_two_passes(capsys):
    tokenizer, model = zoo.load("gradiend/mini-mlm")
    targets = [TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")]
    tables = TextPredictionDataCreator(corpora.load("pronoun", n=600, seed=1), targets).generate_training_data(max_size_per_class=64)
    frame, objective = make_examples(tables).frame, masked_lm(tokenizer)
    whole = ParameterSpace.from_model(model)
    rows = []
    for size in (8, 32, 128):
        part = frame.head(size)
        batch = objective.prepare(part)
        with torch.no_grad():
            forward = median_seconds(lambda batch=batch: objective.losses(model, batch))
        costs = {
            "forward pass [ms]": 1e3,
            "encode, 1 direction": median_seconds(lambda part=part, size=size: encode(model, objective, part, torch.ones(whole.n), space=whole, batch_size=size)) / forward,
            "encode, 3 directions": median_seconds(lambda part=part, size=size: encode(model, objective, part, torch.ones(3, whole.n), space=whole, batch_size=size)) / forward,
            "accumulate, 2 sums": median_seconds(lambda batch=batch, size=size: accumulate(model, objective, batch, pair_weights(("alternative", "diff"), size), space=whole)) / forward,
            "one backward per row": median_seconds(lambda: row_gradients(model, objective, frame.head(8), space=whole), runs=1) * size / 8 / forward,
        }
        costs["forward pass [ms]"] *= forward
        rows.append({"rows": size, **costs})
    with capsys.disabled():
        print("\n" + pd.DataFrame(rows).round(1).to_string(index=False))
    assert len(rows) == 3 and all(row["encode, 1 direction"] > 0 for row in rows)
