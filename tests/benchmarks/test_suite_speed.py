"""A suite of eight children, one after another and on two processes; run with

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_suite_speed.py -m benchmark -s

The embedded model, pairs of pronouns, six hundred steps with three seeds. Both runs compute with one thread per process. The time on two
processes includes starting them, in which each imports torch and transformers. Needs two free cores: the load of the machine is printed.
"""
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from gradiend import PrePruneConfig, TextFilterConfig, TextPredictionDataCreator, TrainingArguments, corpora
from gradiend.children import all_pairs
from gradiend.suite import TrainerSuite

from .common import ROWS, threads

pytestmark = pytest.mark.benchmark

PRONOUNS = {"1SG": ["I"], "1PL": ["we"], "2": ["you"], "3SG": ["he", "she", "it"], "3PL": ["they"]}


def test_eight_children_on_two_processes(tmp_path):
    targets = [TextFilterConfig(words, id=name) for name, words in PRONOUNS.items()]
    data = TextPredictionDataCreator(corpora.load("pronoun", n=7000, seed=2), targets, seed=0).generate_training_data(max_size_per_class=max(250, ROWS))
    args = TrainingArguments(train_batch_size=16, max_steps=600, eval_steps=200, learning_rate=1e-4, max_seeds=3, pre_prune_config=PrePruneConfig(n_samples=16, topk=0.01))

    def suite(name: str) -> TrainerSuite:
        pairs = [child.target_classes for child in all_pairs(list(PRONOUNS))][:8]
        return TrainerSuite("gradiend/mini-mlm", data, target_pairs=pairs, args=replace(args, experiment_dir=str(tmp_path / name)))

    serial, parallel, load = suite("serial"), suite("parallel"), os.getloadavg()[0]
    with threads(1):
        start = time.perf_counter()
        serial.train(progress=False)
        one = time.perf_counter() - start
        start = time.perf_counter()
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool: report = parallel.train(pool, progress=False)
        two = time.perf_counter() - start
    print("\n", pd.DataFrame([{"children": len(serial), "one process": one, "two processes": two, "times as fast": one / two, "load before": load}]).round(2).to_string(index=False))
    for name in serial:
        a, b = (Path(s.tasks[name].folder) / "model/model.safetensors" for s in (serial, parallel))
        assert a.read_bytes() == b.read_bytes()
    assert not report.failed and one / two >= 1.6
