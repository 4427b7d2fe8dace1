"""Comparing 44 saved models: ours beside the reference package 0.2.3, and ours alone at full size. Run with

    GRADIEND_REFERENCE_PYTHON=/its/venv/bin/python pytest tests/benchmarks/test_reference_overlap.py -m benchmark -s

Both sides load the same 44 models from disk (each in its own form, pruned to different weights of one space) and compute the top-k overlap
and the cosine of all pairs. The matrices must agree. The reference's top-k overlap only counts what each pair shares; ours also says what chance
gives, within the whole space and within the kept weights, and the row "counts" is ours without that. All times are those of the processor, so
that a busy machine does not matter. How many weights each model kept is set by GRADIEND_BENCHMARK_KEPT (default 10,000): the
reference keeps a Python object for every weight, so it cannot be measured at the million weights of the second benchmark.
"""
import json
import os
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from gradiend.comparison import ONE, entry_groups, shared_products
from gradiend.gradients.space import EntryTable, ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.overlap import topk_indices, topk_overlap
from gradiend.similarities import similarity

from .common import THREADS, threads

PYTHON = os.environ.get("GRADIEND_REFERENCE_PYTHON")
MODELS, K, KEPT = 44, 1000, int(os.environ.get("GRADIEND_BENCHMARK_KEPT", 10_000))
pytestmark = pytest.mark.benchmark


def full_space(scale: int) -> ParameterSpace:
    "A space shaped like a language model: word embeddings and 48 matrices."
    shapes = {"embeddings": [300 * scale, 80 * scale], **{f"layers.{i}.{part}": [40 * scale, 46 * scale] for i in range(12) for part in "qkvo"}}
    return ParameterSpace.from_global(list(shapes), list(shapes.values()), None)


def random_model(full: ParameterSpace, common: torch.Tensor | None, kept: int, seed: int) -> GradiendModel:
    "Different weights kept by each model, out of `common` or (None) out of all; directions that have a part in common."
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(full.full_n, (kept + kept // 10,), generator=generator).unique() if common is None else common
    space = full.keep(pool[torch.randperm(len(pool), generator=generator)[:kept]])
    model = GradiendModel.create(space, GradiendConfig(pair=(f"feature {seed}", "other")), seed=seed)
    with torch.no_grad():
        shared = torch.sin(space.global_index.double()).float() / kept ** 0.5
        model.encoder_weight.add_(shared)
        model.decoder_weight.add_(shared[:, None])
    return model


@pytest.mark.skipif(PYTHON is None, reason="GRADIEND_REFERENCE_PYTHON does not name the reference's Python")
def test_beside_the_reference(tmp_path, capsys):
    full = full_space(8)
    common = torch.randperm(full.full_n, generator=torch.Generator().manual_seed(0))[:3 * KEPT]
    names = [f"m{i}" for i in range(MODELS)]
    for seed, name in enumerate(names):
        model = random_model(full, common, KEPT, seed)
        model.save_pretrained(tmp_path / "ours" / name)
        save_file({"index": model.space.global_index, "encoder": model.encoder_weight.detach().contiguous(), "decoder": model.decoder_weight.detach().contiguous()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "models.json").write_text(json.dumps({"names": names, "shapes": dict(zip(full.names, full.shapes, strict=True))}))
    theirs = reference(tmp_path)
    with threads(THREADS):
        models, mine, results = {}, {}, {}
        for what, action in (("load", lambda: models.update({name: GradiendModel.from_pretrained(tmp_path / "ours" / name) for name in names})), ("overlap", lambda: topk_overlap(models, K)),
                             ("counts", lambda: counts(models)), ("cosine", lambda: similarity(models, "cosine_signed"))):
            before = time.process_time()
            results[what] = action()
            mine[what] = time.process_time() - before
    assert np.allclose(results["overlap"].matrix(), np.array(theirs["overlaps"])) and np.allclose(results["cosine"].matrix(), np.array(theirs["cosines"]), atol=1e-5)
    assert np.allclose(results["counts"] / K, np.array(theirs["overlaps"]))
    theirs["counts"] = theirs["overlap"]
    for times in (mine, theirs):
        times |= {"load + overlap": times["load"] + times["overlap"], "overlap + cosine": times["overlap"] + times["cosine"], "all": times["load"] + times["overlap"] + times["cosine"]}
    table = pd.DataFrame([{"what": what, "reference [s]": theirs[what], "ours [s]": mine[what], "times as fast": theirs[what] / mine[what]}
                          for what in ("load", "overlap", "counts", "cosine", "load + overlap", "overlap + cosine", "all")])
    with capsys.disabled(): print(f"\n{MODELS} models of {KEPT:,} weights in a space of {full.full_n:,}, reference {theirs['version']}, {THREADS} thread(s), processor time\n{table.round(3).to_string(index=False)}")
    assert theirs["overlap + cosine"] / mine["overlap + cosine"] >= 20 and theirs["all"] / mine["all"] >= 20
    assert theirs["overlap"] / mine["overlap"] >= 1 and theirs["counts"] / mine["counts"] >= 2  # sets of a thousand weights are no burden to either side


def counts(models: dict[str, GradiendModel]) -> np.ndarray:
    "What each pair shares, and nothing else."
    full = next(iter(models.values())).space.full_n
    tables = [EntryTable(("all",), ((full,),), (index,)) for index in topk_indices(models, K).values()]
    return shared_products(tables, {}, [(ONE, ONE)], entry_groups(tables[0]))[ONE, ONE][0]


def reference(folder: Path) -> dict:
    "Run its side, with the processor's clock."
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # it would put our package in front of theirs
    command = [str(PYTHON), str(Path(__file__).with_name("reference_overlap_side.py")), str(folder), str(K), str(THREADS)]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("choice", ["from all", "from a few"])
def test_a_million_weights_each(choice, capsys):
    "44 models of a million kept weights out of 110 million: under 5 seconds of one core and 1 GB for each comparison."
    full = full_space(31)
    generator = torch.Generator().manual_seed(0)
    common = None if choice == "from all" else torch.randint(full.full_n, (2_000_000,), generator=generator).unique()
    models = {f"m{seed}": random_model(full, common, 1_000_000, seed) for seed in range(MODELS)}
    rows = []
    with threads(THREADS):
        for what, action in (("top-k overlap", lambda: topk_overlap(models, K)), ("cosine", lambda: similarity(models, "cosine")), ("signed cosine", lambda: similarity(models, "cosine_signed")),
                             ("mass overlap", lambda: similarity(models, "mass_overlap")), ("spearman", lambda: similarity(models, "spearman")),
                             ("signed spearman", lambda: similarity(models, "spearman_signed"))):
            before, wall, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
            action()
            grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            rows.append({"what": what, "wall [s]": time.perf_counter() - wall, "cpu [s]": time.process_time() - cpu, "more memory [MB]": grew})
    table = pd.DataFrame(rows)
    with capsys.disabled(): print(f"\n{MODELS} models of 1,000,000 weights in a space of {full.full_n:,}, chosen {choice}, {THREADS} thread(s)\n{table.round(1).to_string(index=False)}")
    assert (table["more memory [MB]"] < 1000).all()
    assert (table["cpu [s]"] < 5 * THREADS).all()  # processor time, so that a busy machine does not matter
