"What a training writes down: one score for every decision, and records that can be taken out and put back."
import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from gradiend.core import InputError
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.records import EvalPoint, SeedRecord, TrainingRun, beats, evaluation_point, has_converged, point_from, record_state, restore_record, verdict

PAIR = ("a", "b")
SPACE = ParameterSpace.from_model(nn.Linear(4, 3, bias=False))


def model(**config) -> GradiendModel: return GradiendModel.create(SPACE, GradiendConfig(pair=PAIR, **config), seed=0)


def point(step: int, c: float, **options) -> EvalPoint: return EvalPoint(step, c, {"a": c, "b": -c}, {"a": 0.1, "b": 0.1}, 1.0, **options)


def finished(points, args=None, **config):
    record = SeedRecord(0, PAIR)
    for p in points: record.observe(model(**config), p)
    return record.finish([0.0] * 10, 1.0, args or TrainingArguments())


@pytest.mark.parametrize("trial", range(20))
def test_the_best_step_is_the_one_a_plain_search_finds(trial):
    rng = np.random.default_rng(trial)
    scores = [float(c) if rng.random() > 0.15 else math.nan for c in rng.uniform(-1, 1, 8)]
    orientable = bool(trial % 2)
    run = finished([point(10 * i, c, orientable=orientable) for i, c in enumerate(scores)], TrainingArguments(activation_encoder="tanh" if orientable else "relu"))[1]
    usable = [(round(abs(c) if orientable else c, 3), i) for i, c in enumerate(scores) if i and math.isfinite(c)]
    expected = max(usable)[1] if usable else 0
    assert run.best_step == 10 * expected
    if usable: assert run.correlation == pytest.approx(abs(scores[expected]) if orientable else scores[expected]) and run.score == run.best.score


def test_selection_and_convergence_never_contradict_each_other():
    "The run with the higher score is never refused for its correlation while the one with the lower score is accepted."
    runs = [finished([point(10, c)])[1] for c in (-0.95, 0.9, 0.49, -0.51)]
    order = sorted(runs, key=lambda run: run.score)
    assert [run.converged for run in order] == sorted(run.converged for run in order)
    assert [run.correlation for run in runs] == [0.95, 0.9, 0.49, 0.51]


def test_a_run_that_cannot_be_turned_says_so():
    args = TrainingArguments(activation_encoder="relu")
    kept, run = finished([point(10, -0.9, orientable=False)], args, activation_encoder="relu")
    assert not run.converged and "relu cannot be turned" in run.reason and torch.equal(kept.encoder_weight, model().encoder_weight)
    loose = replace(args, convergent_mean_by_class_threshold=None)
    assert has_converged(0.9, {"a": 0.9, "b": 0.1}, args)[0] is False and has_converged(0.9, {"a": 0.9, "b": 0.1}, loose)[0] is True


def test_every_latent_value_gets_its_own_sign():
    labels = np.array([1.0, 1.0, -1.0, -1.0])
    columns = np.stack([-labels + [0.1, -0.1, 0.2, 0.0], 0.3 * labels + [0.5, -0.5, 0.5, -0.5]], 1)
    p = evaluation_point(10, columns, labels, PAIR)
    assert p.latent == 0 and p.correlation < 0 < p.correlations[1]
    record = SeedRecord(0, PAIR)
    record.observe(start := model(latent_dim=2), p)
    before, gradient = copy.deepcopy(start), torch.randn(5, SPACE.n, generator=torch.Generator().manual_seed(1))
    kept, run = record.finish([0.0], 1.0, TrainingArguments(latent_dim=2))
    assert torch.allclose(kept.encode(gradient), before.encode(gradient) * torch.tensor([-1.0, 1.0]))
    assert torch.allclose(kept(gradient), before(gradient), atol=1e-6)
    assert all(c > 0 for c in run.history[0].correlations) and run.correlation == -p.correlation and run.mean_by_class["a"] > 0


def test_turning_twice_changes_nothing():
    here, there = model(latent_dim=2), model(latent_dim=2)
    for _ in range(2): here.orient([-1, 1])
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters()))


def test_a_state_survives_a_json_file():
    record, again = SeedRecord(3, PAIR, learning_rate=1e-4), SeedRecord(3, PAIR, learning_rate=1e-4)
    for p in (point(0, math.nan), point(10, 0.4), replace(point(20, -0.8), correlations=(0.1, -0.8), latent=1)): record.observe(model(), p)
    record.diverged = 15
    tensors, facts = record_state(record)
    through = json.loads(json.dumps(facts).replace("NaN", "null"))
    restore_record(again, model(), tensors, through)
    assert again.best == record.best and again.history[1:] == record.history[1:] and math.isnan(again.history[0].correlation) and again.diverged == 15
    assert all(torch.equal(a, b) for a, b in zip(record.model.parameters(), again.model.parameters()))
    assert not again.model.encoder_weight.requires_grad
    with pytest.raises(InputError, match="holds seed 3 where this run has seed 4"): restore_record(SeedRecord(4, PAIR), model(), tensors, through)


def test_tuples_and_missing_numbers_come_back():
    p = replace(point(5, 0.5), correlations=(0.5, math.nan), loss_mean=math.nan)
    back = point_from(json.loads(json.dumps(asdict(p)).replace("NaN", "null")))
    assert back.correlations[0] == 0.5 and math.isnan(back.correlations[1]) and math.isnan(back.loss_mean) and isinstance(back.correlations, tuple)


def test_a_score_that_is_no_number_never_wins():
    assert not beats(math.nan, 0.1) and not beats(math.inf, 0.1) and beats(-0.5, math.nan)
    run = finished([point(0, 0.9), point(10, math.nan)])[1]
    assert run.best_step == 0 and "constant" in run.reason and math.isnan(run.score)


def test_a_decoder_alone_is_judged_by_what_it_explains():
    told = {"by": "explained", "orientable": True}
    run = finished([replace(point(10, 0.99, **told), explained=0.2), replace(point(20, 0.1, **told), explained=0.3)])[1]
    assert run.best_step == 20 and run.converged and run.score == 0.3 and "30.0%" in run.reason
    assert not verdict(replace(point(10, 0.99, **told), explained=-0.2), TrainingArguments())[0]


def test_a_seed_that_diverged_after_its_best_step_says_so():
    record = SeedRecord(0, PAIR)
    record.observe(model(), point(10, 0.9))
    record.diverged = 17
    run = record.finish([0.0] * 20, 1.0, TrainingArguments())[1]
    assert run.converged and "not finite from step 17 on" in run.reason


def test_a_run_reads_as_a_mapping():
    run = TrainingRun(1, 10, 0.9, True, "fine", (point(0, 0.1), point(10, 0.9)), (1.0,))
    assert run["mean_by_class"] == {"a": 0.9, "b": -0.9} and set(run.frame["class"]) == {"a", "b"} and run.frame["best"].sum() == 2
    assert not run["interrupted"] and "interrupted" in repr(replace(run, interrupted=True))


def test_a_class_may_be_called_other():
    encodings, labels = np.array([0.9, 0.8, -0.7, -0.9, 0.0]), np.array([1.0, 1.0, -1.0, -1.0, 0.0])
    point = evaluation_point(1, encodings, labels, ("some", "other"))
    assert {name: round(mean, 6) for name, mean in point.mean_by_class.items()} == {"some": 0.85, "other": -0.8, "neither": 0.0}
    assert list(evaluation_point(1, encodings, labels, ("a", "b")).mean_by_class) == ["a", "b", "other"]
