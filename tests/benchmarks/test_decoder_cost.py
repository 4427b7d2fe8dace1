"""What the evaluation of decoder candidates costs in time and memory; run with

    pytest tests/benchmarks/test_decoder_cost.py -m benchmark -s

Times are CPU time and multiples of one *forward sweep* of the same data in the same process: every batch of rows and of texts once through the
model, without gradients, head at every position. They are printed, to be read on a quiet machine, and not asserted; the memory is asserted.
"""
import time
from collections.abc import Callable

import pandas as pd
import pytest
import torch

from gradiend import corpora
from gradiend.data.examples import Examples
from gradiend.evaluator.candidates import LEARNING_RATES, Bench
from gradiend.evaluator.decoder import DecoderResult, evaluate_decoder, evaluation_rows, measurement
from gradiend.gradients.engine import weighted_sums
from gradiend.model import GradiendConfig, GradiendModel

from .common import DEVICE, ROWS, RUNS, THREADS, one_token_rows, peak_bytes, threads
from .test_engine_cost import settings

pytestmark = pytest.mark.benchmark
TEXTS = 200


def cpu_seconds(action: Callable[[], object], runs: int = RUNS) -> float:
    "The median CPU time of `action`, after one call that does not count."
    action()
    times = []
    for _ in range(runs):
        start = time.process_time() if DEVICE.type == "cpu" else time.perf_counter()
        action()
        if DEVICE.type == "cuda": torch.cuda.synchronize()
        times.append((time.process_time() if DEVICE.type == "cpu" else time.perf_counter()) - start)
    return sorted(times)[runs // 2]


def setting(kind: str, share: int):
    "A model, a direction over 1/share of its weights, rows and texts."
    objective, model, space = settings(kind)
    space = space.keep(torch.arange(0, space.n, share)) if share > 1 else space
    frame = one_token_rows(2 * ROWS).assign(split="test")
    examples = Examples(frame, pair=("3SG", "3PL"))
    labels = torch.tensor(examples.labels("alternative"), dtype=torch.float32) / len(examples)
    direction = weighted_sums(model, objective, objective.prepare(frame).to(DEVICE), torch.stack([labels, -labels])[None].to(DEVICE), space=space)
    gradiend = GradiendModel.create(space, GradiendConfig(source="alternative", target="diff", pair=examples.pair, bias_decoder=False))
    with torch.no_grad(): gradiend.decoder_weight.copy_(direction.T.cpu() / direction.norm().cpu())
    return objective, model, gradiend, examples, corpora.load("neutral", n=TEXTS, seed=3)


def sweep(model, measure) -> Callable[[], None]:
    "Every batch once through the model, and nothing else."
    def run() -> None:
        with torch.no_grad():
            for _, batch in measure.questions: model(**batch.to(DEVICE).inputs)
            for batch in measure.lms: model(**batch.to(DEVICE).inputs)

    return run


@pytest.mark.parametrize("kind", ["embedded", "bert"])
@pytest.mark.parametrize("share", [1, 100])
def test_a_candidate_costs_a_forward_sweep(kind, share, capsys):
    objective, model, gradiend, examples, texts = setting(kind, share)
    measure = measurement(objective, examples, evaluation_rows(examples), texts, batch_size=32)
    with threads(THREADS):
        unit = cpu_seconds(sweep(model, measure), max(RUNS, 3))
        _, measure = measure.take_base(model)

        def sixteen() -> None:
            bench = Bench(gradiend, model, measure)
            for lr in LEARNING_RATES: bench.candidate(1.0, lr)

        grid = cpu_seconds(sixteen)
    with capsys.disabled():
        print(f"\n{kind}, 1/{share} of the weights, {len(examples)} rows, {TEXTS} texts, {THREADS} thread(s), {DEVICE}: forward sweep {unit:.3f} s; "
              f"16 candidates {grid:.2f} s = {grid / unit:.1f} sweeps (wanted: at most 17.6)")
    assert grid > 0


def test_halving_beside_the_grid(capsys):
    objective, model, gradiend, examples, texts = setting("embedded", 100)

    def evaluate(search: str) -> DecoderResult:
        return evaluate_decoder(gradiend, model, objective, examples, lms_texts=texts, target_class="3SG", search=search, batch_size=32)

    with threads(THREADS):
        lines = [{"search": search, "seconds": cpu_seconds(lambda: evaluate(search)), **{name: evaluate(search)["3SG"][name] for name in ("learning_rate", "value", "lms")},  # noqa: B023
                  "measurements": evaluate(search).measured} for search in ("grid", "bisect")]
        border = evaluate("bisect").brackets["3SG"][0]
    with capsys.disabled():
        print("\n" + pd.DataFrame(lines).round(3).to_string(index=False) + f"\nhalving is {lines[0]['seconds'] / lines[1]['seconds']:.2f} times as fast (wanted: 1.5), the border lies between {border.keeps:.4g} and {border.fails:.4g}")
    assert border.precision <= 0.05 and lines[1]["measurements"] < lines[0]["measurements"] / 1.5


@pytest.mark.parametrize("share", [1, 100])
def test_no_copy_of_the_model(share, capsys):
    "Sixteen candidates need no more memory than one sweep and the change itself: the direction, its multiple, and what it overwrites."
    objective, model, gradiend, examples, texts = setting("bert", share)
    measure = measurement(objective, examples, evaluation_rows(examples), texts, batch_size=32)
    _, measure = measure.take_base(model)
    one = peak_bytes(lambda: measure.take(model))

    def sixteen() -> None:
        bench = Bench(gradiend, model, measure)
        for lr in LEARNING_RATES: bench.candidate(1.0, lr)

    sixteen()
    many, weights, change = peak_bytes(sixteen), sum(p.numel() * p.element_size() for p in model.parameters()), 4 * gradiend.space.n
    with capsys.disabled():
        print(f"\n1/{share} of the weights: one sweep {one / 1e6:.1f} MB, sixteen candidates {many / 1e6:.1f} MB, the model {weights / 1e6:.1f} MB, the change {change / 1e6:.2f} MB")
    assert many <= 1.1 * one + 6 * change  # the direction, its multiple, the overwritten weights; the positions of a pruned one take 8 bytes each
    if share > 1: assert many - one < 0.1 * weights
