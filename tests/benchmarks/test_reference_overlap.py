"""Comparing 44 saved models: ours beside the reference package 0.2.3, and ours alone at full size. Run with

    GRADIEND_REFERENCE_PYTHON=/its/venv/bin/python pytest tests/benchmarks/test_reference_overlap.py -m benchmark -s

Both sides load the same 44 models from disk (each in its own form, pruned to different weights of one space) and say what each pair shares:
the square of fractions, for a tenth of the weights that each model kept, and the cosines. The squares must agree. The overlap is computed
several times by both sides: the first call in a fresh process and the median are reported. What only ours gives, the statistics (expectations, z and
p-values within the whole space and within the kept weights), is a row of its own. All times are those of the processor, so
that a busy machine does not matter. How many weights each model kept is set by GRADIEND_BENCHMARK_KEPT (default 10,000); the overlap is also
measured at ten times as many, where the reference's cosine would take a day.
"""
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.overlap import topk_overlap
from gradiend.similarities import similarity

from .common import THREADS, threads

PYTHON = os.environ.get("GRADIEND_REFERENCE_PYTHON")
MODELS, K, RUNS, KEPT = 44, 1000, 9, int(os.environ.get("GRADIEND_BENCHMARK_KEPT", 10_000))
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


def prepare(folder: Path, kept: int) -> list[str]:
    "Write the models in our form and as plain tensors for the other side; their names."
    full = full_space(8)
    common = torch.randperm(full.full_n, generator=torch.Generator().manual_seed(0))[:3 * kept]
    names = [f"m{i}" for i in range(MODELS)]
    for seed, name in enumerate(names):
        model = random_model(full, common, kept, seed)
        model.save_pretrained(folder / "ours" / name)
        save_file({"index": model.space.global_index, "encoder": model.encoder_weight.detach().contiguous(), "decoder": model.decoder_weight.detach().contiguous()}, folder / f"{name}.safetensors")
    (folder / "models.json").write_text(json.dumps({"names": names, "shapes": dict(zip(full.names, full.shapes, strict=True))}))
    return names


def measured(action: Callable[[], Any]) -> tuple[float, Any]:
    "Seconds of the processor, and what came out."
    before = time.process_time()
    result = action()
    return time.process_time() - before, result


def ours(folder: Path, names: list[str], k: int) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    "Times by what was done; fractions; cosines."
    load, models = measured(lambda: {name: GradiendModel.from_pretrained(folder / "ours" / name) for name in names})
    runs = [measured(lambda: topk_overlap(models, k).matrix()) for _ in range(RUNS)]
    result = topk_overlap(models, k)
    statistics, _ = measured(lambda: result.frame)
    cosine, alike = measured(lambda: similarity(models, "cosine_signed"))
    return {"load": load, **overlap_times([seconds for seconds, _ in runs]), "statistics": statistics, "cosine": cosine}, runs[0][1].to_numpy(), alike.matrix().to_numpy()


def overlap_times(runs: list[float]) -> dict[str, float]:
    "How the times of the overlap are reported, of either side."
    return {"overlap, first call": runs[0], "overlap, median": float(np.median(runs))}


@pytest.mark.skipif(PYTHON is None, reason="GRADIEND_REFERENCE_PYTHON does not name the reference's Python")
@pytest.mark.parametrize("kept, with_cosine, least", [(KEPT, True, 5), (10 * KEPT, False, 12)])
def test_beside_the_reference(kept, with_cosine, least, tmp_path, capsys):
    names, k = prepare(tmp_path, kept), kept // 10
    answer = reference(tmp_path, k, with_cosine)
    with threads(THREADS): mine, fractions, cosines = ours(tmp_path, names, k)
    assert np.allclose(fractions, np.array(answer["overlaps"]))
    theirs = {"load": answer["load"], **overlap_times(answer["overlap"])}
    sums = {"load + overlap": ["load", "overlap, first call"]}
    if with_cosine:
        assert np.allclose(cosines, np.array(answer["cosines"]), atol=1e-5)
        theirs["cosine"], sums["all"] = answer["cosine"], ["load", "overlap, first call", "cosine"]
    for times in (mine, theirs): times |= {name: sum(times[part] for part in parts) for name, parts in sums.items()}
    table = pd.DataFrame([{"what": what, "reference [s]": theirs.get(what), "ours [s]": seconds, "times as fast": theirs.get(what, np.nan) / seconds} for what, seconds in mine.items()])
    with capsys.disabled(): print(f"\n{MODELS} models of {kept:,} weights, k = {k:,}, reference {answer['version']}, {THREADS} thread(s), processor time\n{table.round(4).to_string(index=False)}")
    assert theirs["overlap, median"] / mine["overlap, median"] >= least
    if with_cosine: assert theirs["all"] / mine["all"] >= 20


def reference(folder: Path, k: int, with_cosine: bool) -> dict:
    "Run its side, with the processor's clock."
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # it would put our package in front of theirs
    command = [str(PYTHON), str(Path(__file__).with_name("reference_overlap_side.py")), str(folder), str(k), str(THREADS), str(RUNS), str(int(with_cosine))]
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
        for what, action in (("top-k overlap", lambda: topk_overlap(models, K)), ("with statistics", lambda: topk_overlap(models, K).frame), ("cosine", lambda: similarity(models, "cosine")), ("signed cosine", lambda: similarity(models, "cosine_signed")),
                             ("mass overlap", lambda: similarity(models, "mass_overlap")), ("spearman", lambda: similarity(models, "spearman")),
                             ("signed spearman", lambda: similarity(models, "spearman_signed"))):
            before, wall, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
            action()
            grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            rows.append({"what": what, "wall [s]": time.perf_counter() - wall, "cpu [s]": time.process_time() - cpu, "more memory [MB]": grew})
    table = pd.DataFrame(rows)
    with capsys.disabled(): print(f"\n{MODELS} models of 1,000,000 weights in a space of {full.full_n:,}, chosen {choice}, {THREADS} thread(s)\n{table.round(2).to_string(index=False)}")
    assert (table["more memory [MB]"] < 1000).all()
    assert (table["cpu [s]"] < 5 * THREADS).all()  # processor time, so that a busy machine does not matter
