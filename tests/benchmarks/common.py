"""Rows, models and measures that the benchmarks share.

How much is measured is set from outside, so that a quick look needs no editing:
GRADIEND_BENCHMARK_ROWS (default 16), GRADIEND_BENCHMARK_RUNS (default 1), GRADIEND_BENCHMARK_THREADS (default 1),
GRADIEND_BENCHMARK_DEVICE (default cpu).
"""
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from gradiend import TextFilterConfig, TextPredictionDataCreator, corpora, make_examples

from .unit import median_seconds

__all__ = ["DEVICE", "ROWS", "RUNS", "THREADS", "median_seconds", "one_token_rows", "peak_bytes", "threads"]

ROWS, RUNS, THREADS = (int(os.environ.get(f"GRADIEND_BENCHMARK_{name}", default)) for name, default in (("ROWS", 16), ("RUNS", 1), ("THREADS", 1)))
DEVICE = torch.device(os.environ.get("GRADIEND_BENCHMARK_DEVICE", "cpu"))


@contextmanager
def threads(n: int) -> Iterator[None]:
    "While active, torch computes with so many threads."
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_token_rows(n: int) -> pd.DataFrame:
    "About n rows of pronouns, half of them singular; each word is one token of the embedded model."
    targets = [TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")]
    tables = TextPredictionDataCreator(corpora.load("pronoun", n=max(600, 4 * n), seed=1), targets).generate_training_data(max_size_per_class=n // 2)
    return make_examples(tables).frame


def peak_bytes(action: Callable[[], object]) -> int:
    "How many bytes more than before were held at the worst moment of `action`."
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        action()
    held = peak = 0
    for event in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
