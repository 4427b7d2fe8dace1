"Several seeds: selection, verdicts, warnings, and the rows that may not be looked at."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gradiend.core import InputError, write_json
from gradiend.data.examples import Examples
from gradiend.model import GradiendConfig
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.seeds import seed_stability, train_seeds
from tests.test_trainer_loop import PAIR, examples, setting

ARGS = TrainingArguments(train_batch_size=4, max_steps=60, eval_steps=20, learning_rate=1e-2, max_seeds=2, convergent_mean_by_class_threshold=0.05)


def train(rows: Examples | None = None, args: TrainingArguments = ARGS, **config):
    model, objective, space, _ = setting()
    return train_seeds(model, objective, rows or examples(96), space, GradiendConfig(pair=PAIR, **config), args, progress=False)


def test_report_and_what_the_models_remember(tmp_path):
    report = train()
    assert [run.seed for run in report.runs] == [0, 1] and report.converged >= 1
    assert report.run.correlation == max(run.correlation for run in report.runs if run.converged)
    assert report.model is report.models[report.best] and len(report.stability) == 1
    info = json.loads(write_json(tmp_path / "training.json", report.model.info).read_text())
    assert TrainingArguments.from_dict(info["arguments"]) == ARGS
    assert info["run"]["seed"] == report.run.seed and len(info["history"]) == 4 and len(info["losses"]) == 60
    assert info["data"]["rows"] == {"train": 48, "validation": 32, "test": 16}


def test_test_rows_play_no_part():
    rows = examples(96)
    changed = rows.frame.copy()
    test = changed["split"] == "test"
    changed.loc[test, "masked"] = "0 [MASK]"
    a, b = train(rows), train(Examples(changed, PAIR))
    assert torch.equal(a.model.encoder_weight, b.model.encoder_weight) and a.best == b.best


def test_seeds_count_up_and_do_not_depend_on_each_other():
    together = train(args=replace(ARGS, max_seeds=3))
    alone = train(args=replace(ARGS, max_seeds=1))
    assert torch.equal(together.models[0].decoder_weight, alone.models[0].decoder_weight)
    assert not torch.equal(together.models[0].encoder_weight, together.models[1].encoder_weight)


def test_too_few_converged_warns_or_raises_with_the_reasons():
    hard = replace(ARGS, convergent_mean_by_class_threshold=1.5)
    with pytest.warns(UserWarning, match="0 of 2 seeds converged, 1 wanted .*seed 0: .*seed 1: "): report = train(args=hard)
    assert report.converged == 0 and report.run.correlation == max(run.correlation for run in report.runs)
    with pytest.raises(RuntimeError, match="closer to zero than 1.5"): train(args=replace(hard, fail_on_non_convergence=True))


def test_without_validation_rows_the_training_rows_are_used_with_a_warning():
    rows = examples(96)
    rows = rows.take(np.flatnonzero(rows.frame["split"] != "validation"))
    with pytest.warns(UserWarning, match="no validation rows"): train(rows)


def test_config_and_arguments_must_agree():
    with pytest.raises(InputError, match="config.target='factual' contradicts args.target='diff'"): train(target="factual")
    with pytest.raises(InputError, match="latent_dim"): train(latent_dim=2)


def test_stability_counts_shared_weights():
    _, _, space, models = setting()
    table = seed_stability(models, (0, 1), topk=30)
    shared = len(set.intersection(*(set(m.decoder_weight[:, 0].abs().argsort(descending=True)[:30].tolist()) for m in models)))
    assert table.loc[0, "shared"] == shared and table.loc[0, "expected_by_chance"] == 30 / space.n
    with pytest.raises(InputError, match="topk=0"): seed_stability(models, (0, 1), topk=0)


def test_the_arguments_of_the_comparison_have_an_effect():
    short = replace(ARGS, max_steps=20)
    table = train(args=replace(short, seed_stability_topk=3, seed_stability_part="encoder-weight")).stability
    by_default = train(args=short)
    assert table.topk.tolist() == [3] and by_default.stability.topk.tolist() == [by_default.model.space.n // 10]
    assert table.shared.tolist() == seed_stability(by_default.models, (0, 1), topk=3, part="encoder-weight").shared.tolist()
    assert len(train(args=replace(short, seed_stability_topk=None)).stability) == 0
    with pytest.raises(InputError, match="decoder-bias"): train(args=replace(short, bias_decoder=False, seed_stability_part="decoder-bias"), bias_decoder=False)


def test_without_evaluations_no_validation_rows_are_needed_and_the_last_step_is_kept(recwarn):
    rows = examples(96)
    report = train(rows.take(np.flatnonzero(rows.frame["split"] != "validation")), replace(ARGS, do_eval=False, max_steps=7))
    assert [run.best_step for run in report.runs] == [7, 7] and report.complete and not report.converged
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_a_control_is_marked_and_does_not_complain():
    report = train(args=replace(ARGS, shuffle_labels=True, convergent_score_threshold=1.0, fail_on_non_convergence=True))
    assert report.shuffled and "control with shuffled labels" in repr(report)
    with pytest.warns(UserWarning, match="converged although the labels were shuffled"):
        train(args=replace(ARGS, shuffle_labels=True, convergent_score_threshold=0.0, convergent_mean_by_class_threshold=None))
