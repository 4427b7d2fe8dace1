"The search for a learning rate: probes side by side are probes alone, outcomes are what was seen, the choice is the centre of a window."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from gradiend.core import InputError
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.batches import GradientBatch
from gradiend.trainer.loop import fit
from gradiend.trainer.optimisation import LRSearchConfig
from gradiend.trainer.tuning import (LRSearch, NoConvergentLearningRate, centre, convergent_window, outcome_of, outcomes_by_rate, probe_arguments, probe_rates, rate_grid,
                                     rates_between, search_rates)

N, STEPS = 400, 40
SPACE, CONFIG = ParameterSpace.from_model(nn.Linear(20, 20, bias=False)), GradiendConfig(pair=("a", "b"))


def problem(size=1e-3, noise=1.0, signal=1.0):
    draw = torch.Generator().manual_seed(5)
    direction = torch.randn(N, generator=draw)
    def batch(i):
        label, (first, second) = 1.0 - 2 * (i % 2), torch.randn(2, N, generator=draw)
        return GradientBatch(size * (signal * label * direction + noise * first), size * (noise * second - 2 * signal * label * direction), label)
    batches, held = [batch(i) for i in range(STEPS)], [batch(i) for i in range(12)]
    sources, labels = torch.stack([b.source for b in held]), np.array([b.label for b in held])
    return batches, lambda models: [(m.encode(sources).detach().numpy(), labels) for m in models]


def create(seed): return GradiendModel.create(SPACE, CONFIG, seed=seed)


SEARCH = LRSearchConfig(probe_steps=STEPS, bounds=(1e-6, 10.0))
ARGS = probe_arguments(TrainingArguments(), SEARCH)


def test_grid_is_one_two_five():
    assert rate_grid(1e-3, 1e-1) == (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1) and rate_grid(1e-7, 1.0, 1) == tuple(float(f"1e{e}") for e in range(-7, 1))
    assert rate_grid(3e-4, 3e-3) == (5e-4, 1e-3, 2e-3) and rate_grid(2e-4, 8e-4, 1) == (2e-4, 5e-4)
    with pytest.raises(InputError, match="widen"): rate_grid(1.1e-3, 1.9e-3)


def test_a_rate_in_company_is_the_rate_alone_to_the_bit():
    batches, evaluate = problem()
    rates = (1e-4, 1e-2, 1.0)
    together = probe_rates(rates, create, batches, evaluate, ARGS, SEARCH, progress=False)
    in_turns = probe_rates(rates, create, batches, evaluate, ARGS, replace(SEARCH, parallel=1), progress=False)
    for rate, one, other in zip(rates, together, in_turns, strict=True):
        (_, alone), = fit([create(0)], batches, evaluate, replace(ARGS, learning_rate=rate), progress=False)
        assert one.losses == other.losses == alone.losses and one.history[1:] == other.history[1:] == alone.history[1:] and one.learning_rate == rate


def test_search_finds_a_rate_that_trains():
    batches, evaluate = problem()
    found = search_rates(create, batches, evaluate, ARGS, SEARCH, progress=False)
    assert found.best in found.window and set(found.frame["round"]) == {1, 2}
    assert set(found.frame.loc[found.frame["learning_rate"].isin(found.window), "outcome"]) == {"converged"}
    (_, run), = fit([create(0)], batches, evaluate, replace(ARGS, learning_rate=found.best), progress=False)
    assert run.converged and outcome_of(run, ARGS) == "converged"
    assert found.frame.set_index("learning_rate").loc[found.best, "score"] == run.history[-1].score


@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_the_choice_does_not_depend_on_the_size_of_the_gradients(size):
    batches, evaluate = problem(1e-3)
    expected = search_rates(create, batches, evaluate, ARGS, SEARCH, progress=False)
    batches, evaluate = problem(size)
    assert search_rates(create, batches, evaluate, ARGS, SEARCH, progress=False).best == expected.best


def test_a_diverged_rate_does_not_stop_the_others():
    batches, evaluate = problem()
    runs = probe_rates((1e-3, 1e30), create, batches, evaluate, ARGS, SEARCH, progress=False)
    assert outcomes_by_rate(runs, ARGS)[1e30] == "diverged" and np.isfinite(runs[0].losses).all()


def test_no_rate_raises_with_the_table_and_an_advice():
    batches, evaluate = problem()
    with pytest.raises(NoConvergentLearningRate, match="raise bounds") as caught:
        search_rates(create, batches, evaluate, ARGS, LRSearchConfig(probe_steps=STEPS, bounds=(1e-9, 1e-7)), progress=False)
    assert list(caught.value.frame["outcome"]) == ["frozen"] * 3
    batches, evaluate = problem(signal=0.0)
    with pytest.raises(NoConvergentLearningRate): search_rates(create, batches, evaluate, ARGS, LRSearchConfig(probe_steps=STEPS, bounds=(1e-5, 1.0)), progress=False)


def test_several_starts_have_to_converge_all():
    batches, evaluate = problem()
    config = LRSearchConfig(probe_steps=STEPS, bounds=(1e-3, 1e-2), seeds=3, parallel=4, refine=False)
    found = search_rates(create, batches, evaluate, ARGS, config, progress=False)
    assert len(found.frame) == 6 and set(found.frame["seed"]) == {0, 1, 2}
    runs = probe_rates((1e-2,), create, batches, evaluate, ARGS, config, progress=False)
    stuck = replace(runs[0], history=(runs[0].history[0], replace(runs[0].history[0], step=40, loss_mean=runs[0].losses[0], explained=0.0)), converged=False)
    assert outcomes_by_rate([stuck, *runs[1:]], ARGS) == {1e-2: "frozen"} and outcomes_by_rate(runs, ARGS) == {1e-2: "converged"}


def test_probes_leave_out_what_a_short_training_must_not_have():
    args = TrainingArguments(lr_scheduler_type="linear", warmup_steps=50, early_stopping_patience=2, experiment_dir="x", report_to="tensorboard", use_cache=True, save_strategy="steps",
                             eval_strategy="epoch", weight_decay=0.1, optim="sgd", source="factual", seed=7)
    probe = probe_arguments(args, LRSearchConfig(probe_steps=100, probe_evals=4), total=60)
    assert (probe.max_steps, probe.eval_steps, probe.eval_strategy, probe.lr_scheduler_type, probe.experiment_dir, probe.save_strategy) == (60, 15, "steps", "constant", None, "no")
    assert (probe.weight_decay, probe.optim, probe.source, probe.seed) == (0.1, "sgd", "factual", 7) and probe.scheduler_factor(0, 60) == 1.0
    assert probe_arguments(replace(args, do_eval=False, early_stopping_patience=None), LRSearchConfig()).evaluates


WORDS = st.sampled_from(["frozen", "slow", "converged", "degraded", "collapsed", "diverged"])


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=9))
def test_the_choice_for_any_outcomes(words):
    rates = rate_grid(1e-7, 10.0, 1)[:len(words)]
    outcomes = dict(zip(rates, words, strict=True))
    window = convergent_window(outcomes)
    assert bool(window) == ("converged" in words) and all(outcomes[rate] == "converged" for rate in window)
    if window:
        first = rates.index(window[0])
        assert rates[first:first + len(window)] == window and centre(window) in window
        middle = math.log10(window[0] * window[-1]) / 2
        assert abs(math.log10(centre(window)) - middle) <= min(abs(math.log10(r) - middle) for r in window) + 1e-5
    more = rates_between(outcomes, (rates[0], rates[-1]))
    assert all(rates[0] <= rate <= rates[-1] and rate not in outcomes for rate in more)


def test_a_search_survives_its_file(tmp_path):
    batches, evaluate = problem()
    found = search_rates(create, batches, evaluate, ARGS, SEARCH, progress=False)
    back = LRSearch.load(found.save(tmp_path / "lr_search.json"))
    assert repr(back) == repr(found) and back.frame[["learning_rate", "outcome"]].equals(found.frame[["learning_rate", "outcome"]])
    (tmp_path / "x.json").write_text('{"best": "much"}')
    with pytest.raises(InputError, match="does not hold"): LRSearch.load(tmp_path / "x.json")
