"""What five seeds cost beside one, and what a gradient store saves; run with

    pytest tests/benchmarks/test_seed_cost.py -m benchmark -s

The embedded model, one per cent of its weights, the pronoun sentences, three epochs. Processor time of a whole training, evaluations and
the writing of stores included, in forward passes over one batch of 32 rows per step. The ratio of five seeds to one is asserted, because
both sides suffer alike from a busy machine; the rest is printed.
"""
import time

import pandas as pd
import pytest
import torch

from gradiend import zoo
from gradiend.corpora import load
from gradiend.data.creation import TextPredictionDataCreator
from gradiend.data.examples import make_examples
from gradiend.data.filters import TextFilterConfig
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.loop import fit, gradient_stream, validation_encoder

from .common import threads

pytestmark = pytest.mark.benchmark


def training(seeds: int, cache, model, objective, examples, space) -> float:
    "Processor time per step of a whole training."
    args = TrainingArguments(train_batch_size=32, num_train_epochs=3, eval_steps=10, learning_rate=1e-4, cache_gradients=cache)
    start = time.process_time()
    stream = gradient_stream(model, objective, examples.select("train"), space, args)
    evaluate = validation_encoder(model, objective, examples.select("validation"), args)
    models = [GradiendModel.create(space, GradiendConfig(pair=examples.pair), seed=s) for s in range(seeds)]
    runs = fit(models, stream, evaluate, args, progress=False)
    assert min(run.correlation for _, run in runs) > 0.8
    return (time.process_time() - start) / len(runs[0][1].losses)


def test_five_seeds_cost_little_more_than_one():
    tokenizer, model = zoo.load("gradiend/mini-mlm")
    targets = [TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")]
    creator = TextPredictionDataCreator(load("pronoun", n=900, seed=7), targets, seed=0)
    examples, objective = make_examples(creator.generate_training_data(max_size_per_class=200), pair=("3SG", "3PL")), masked_lm(tokenizer)
    full = ParameterSpace.from_model(model)
    space = full.keep(torch.randperm(full.n, generator=torch.Generator().manual_seed(0))[:full.n // 100].sort().values)
    batch = objective.prepare(examples.frame.head(32))
    with threads(1):
        with torch.no_grad():
            objective.losses(model, batch)
            start = time.process_time()
            for _ in range(5): objective.losses(model, batch)
        unit = (time.process_time() - start) / 5
        rows = [{"gradients": name, **{f"{s} seeds": training(s, cache, model, objective, examples, space) / unit for s in (1, 5)}} for name, cache in (("stored", "auto"), ("computed", False))]
    table = pd.DataFrame(rows).assign(ratio=lambda t: t["5 seeds"] / t["1 seeds"])
    print("\n" + table.round(2).to_string(index=False))
    assert (table.ratio <= 1.4).all()
    assert table["1 seeds"][0] < table["1 seeds"][1]
