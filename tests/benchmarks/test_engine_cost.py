"""What the engine costs in time and memory; run with

    pytest tests/benchmarks/test_engine_cost.py -m benchmark -s

Times are multiples of one batched forward pass without gradients over the same rows, backbone plus head at the labelled positions, in
the same process. They are printed, to be read on a quiet machine, and not asserted. Memory does not depend on the noise of the machine
and is asserted. How much is measured: see `common.py`.
"""
import pandas as pd
import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig

from gradiend import zoo
from gradiend.data.examples import Examples
from gradiend.gradients.check import activation_bytes, estimate
from gradiend.gradients.engine import encode, pair_gradients, pair_weights, weighted_sums
from gradiend.gradients.rows import row_gradients
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.pruning import gradient_importance

from .common import DEVICE, ROWS, RUNS, THREADS, median_seconds, one_token_rows, peak_bytes, threads

pytestmark = pytest.mark.benchmark


def settings(kind: str):
    "Tokenizer, model and whole space: the embedded model, or a random BERT of 4.7 million parameters with the same vocabulary."
    tokenizer, model = zoo.load("gradiend/mini-mlm")
    if kind == "bert":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)).eval()
    model = model.to(DEVICE)
    return masked_lm(tokenizer), model, ParameterSpace.from_model(model)


def timed(action, runs: int = RUNS) -> float:
    def finished():
        action()
        if DEVICE.type == "cuda": torch.cuda.synchronize()

    return median_seconds(finished, runs)


@pytest.mark.parametrize("kind", ["embedded", "bert"])
def test_time(kind, capsys):
    objective, model, space = settings(kind)
    pruned = space.keep(torch.arange(0, space.n, 100))
    lines = []
    with threads(THREADS):
        for rows in sorted({8, ROWS}):
            frame = one_token_rows(rows)
            batch = objective.prepare(frame).to(DEVICE)
            with torch.no_grad():
                unit = timed(lambda: objective.losses(model, batch), max(RUNS, 5))  # noqa: B023
            lines.append({"rows": len(frame), "what": "forward pass [ms]", "whole model": 1e3 * unit})
            jobs = [(f"encode, {k} directions, {engine}", lambda s, k=k, engine=engine: encode(model, objective, frame, torch.ones(k, s.n), space=s, kind="alternative", engine=engine, batch_size=len(frame)))  # noqa: B023
                    for k in (1, 2, 4) for engine in ("auto", "jvp", "ghost")]
            jobs.append(("pair_gradients (wanted: forward + 2 backward)", lambda s: pair_gradients(model, objective, objective.prepare(frame), source="alternative", target="diff", space=s)))  # noqa: B023
            for name, job in jobs:
                lines.append({"rows": len(frame), "what": name, "whole model": timed(lambda: job(space)) / unit, "1 %": timed(lambda: job(pruned)) / unit})  # noqa: B023
            few = frame.head(4)
            lines.append({"rows": len(frame), "what": "one backward per row", "whole model": timed(lambda: row_gradients(model, objective, few, space=space, engine="loop"), 1) * len(frame) / len(few) / unit})  # noqa: B023
    with capsys.disabled():
        print(f"\n{kind}, {sum(p.numel() for p in model.parameters()):,} parameters, {THREADS} thread(s), {DEVICE}; multiples of a forward pass\n" + pd.DataFrame(lines).round(2).to_string(index=False))
    assert all(line["whole model"] > 0 for line in lines)


def test_prune_time(capsys):
    objective, model, space = settings("embedded")
    frame = one_token_rows(ROWS)
    batch = objective.prepare(frame)
    with threads(THREADS), torch.no_grad():
        unit = timed(lambda: objective.losses(model, batch), max(RUNS, 5))
    examples = Examples(frame, tuple(frame["factual_class"].unique()))
    with threads(THREADS):
        cost = timed(lambda: gradient_importance(model, objective, examples, space=space, source="alternative", batch_size=len(frame)))
    with capsys.disabled(): print(f"\nimportance for pre-pruning over {len(frame)} rows: {cost / unit:.2f} forward passes (wanted: at most 3.5)")
    assert cost > 0


@pytest.mark.parametrize("kind", ["embedded", "bert"])
@pytest.mark.parametrize("share", [1, 100])
def test_peak_memory_of_weighted_sums(kind, share, capsys):
    "Weights + largest parameter + n + activations + 10 %."
    objective, model, space = settings(kind)
    space = space.keep(torch.arange(0, space.n, share)) if share > 1 else space
    frame = one_token_rows(ROWS)
    batch = objective.prepare(frame).to(DEVICE)
    weights = pair_weights(("diff",), len(frame)).to(DEVICE)
    weighted_sums(model, objective, batch, weights, space=space)  # what is made only once does not count
    peak = peak_bytes(lambda: weighted_sums(model, objective, batch, weights, space=space))
    parts = {"weights": sum(p.numel() * p.element_size() for p in model.parameters()), "largest parameter": max(p.numel() * p.element_size() for p in model.parameters()),
             "n": 4 * space.n, "activations": activation_bytes(model, objective, batch, space)}
    allowed = 1.1 * sum(parts.values())
    with capsys.disabled():
        print(f"\n{kind}, {len(frame)} rows, 1/{share} of the weights: peak {(peak + parts['weights']) / 1e6:.1f} MB, allowed {allowed / 1e6:.1f} MB (" + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in parts.items()) + ")")
    assert peak + parts["weights"] <= allowed


@pytest.mark.parametrize("what", ["encode", "train", "store"])
def test_the_estimate_of_memory(what, capsys):
    objective, model, space = settings("bert")
    space = space.keep(torch.arange(0, space.n, 50))
    frame = one_token_rows(ROWS)
    guess = estimate(model, objective, frame, space=space, what=what)
    jobs = {"encode": lambda: encode(model, objective, frame, torch.ones(space.n), space=space), "store": lambda: row_gradients(model, objective, frame, space=space),
            "train": lambda: pair_gradients(model, objective, objective.prepare(frame.head(32)), source="alternative", target="diff", space=space)}
    jobs[what]()
    peak = guess.weight_bytes + peak_bytes(jobs[what])
    with capsys.disabled(): print(f"\n{what}: measured peak {peak / 1e6:.1f} MB, estimated {guess.peak_bytes / 1e6:.1f} MB, {guess}")
    assert peak <= guess.peak_bytes


def test_nothing_is_padded_beyond_the_longest_row():
    objective, _, _ = settings("embedded")
    frame = one_token_rows(ROWS)
    batch = objective.prepare(frame)
    assert batch.input_ids.shape[1] == int(batch.attention_mask.sum(1).max())
