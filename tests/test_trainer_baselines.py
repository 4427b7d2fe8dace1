"The mean difference: the means against a slow loop, the closed form at the means, and what it refuses."
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend.core import InputError
from gradiend.gradients.engine import pair_gradients
from gradiend.gradients.objectives import objective_for
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.data.examples import Examples, make_examples
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.baselines import ClassMeans, class_means, fit_mean_difference, mean_difference_model
from gradiend.trainer.batches import gradient_stream
from gradiend.trainer.optimisation import LRSearchConfig
from gradiend.trainer.tuning import NoConvergentLearningRate, search_learning_rate

from tests.tiny import tiny_model

ROWS = [{"masked": f"The {noun} left because [MASK] {end}.", "factual": word, "alternative": other, "factual_class": name, "alternative_class": not_name,
         "split": "validation" if i % 3 == 0 else "train"}
        for i, (noun, end) in enumerate([("pilot", "was tired"), ("baker", "was cold"), ("twins", "was late"), ("dogs", "had the keys"), ("sister", "was hungry"), ("crowd", "lost")])
        for word, other, name, not_name in (("he", "they", "3SG", "3PL"), ("they", "he", "3PL", "3SG"))]


@pytest.fixture(scope="module")
def setting():
    words, model = tiny_model("bert", dtype=torch.float32)
    examples = make_examples(pd.DataFrame(ROWS), pair=("3SG", "3PL"))
    space = ParameterSpace.from_model(model, "*layer.0.output.dense.weight")
    return model, objective_for(words, model), examples, space


@pytest.mark.parametrize("source, target", [("alternative", "diff"), ("factual", "alternative"), ("diff", "factual")])
def test_means_equal_a_loop_over_single_rows(setting, source, target):
    model, objective, examples, space = setting
    args = TrainingArguments(source=source, target=target, train_batch_size=3, max_steps=4)
    train = examples.select("train")
    means = class_means(gradient_stream(model, objective, train, space, args))
    labels = train.labels(source)
    for i, sign in enumerate((1, -1)):
        rows = np.flatnonzero(labels == sign)
        each = [pair_gradients(model, objective, objective.prepare(train.frame.iloc[[r]]), source=source, target=target, space=space) for r in rows]
        for slow, quick in zip(zip(*each, strict=True), (means.source[i], means.target[i]), strict=True):
            expected = torch.stack(slow).mean(0)
            assert (quick - expected).norm() < 1e-4 * expected.norm()
        assert means.rows[i] == len(rows)


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_means_are_encoded_and_decoded_exactly(setting, activation, bias):
    space = setting[3]
    g = torch.Generator().manual_seed(0)
    means = ClassMeans(torch.randn(2, space.n, generator=g) * 1e-5, torch.randn(2, space.n, generator=g) * 1e-5, (3, 4), 2)
    model = mean_difference_model(means, space, GradiendConfig(pair=("a", "b"), activation_encoder=activation, bias_decoder=bias))
    height = 0.9 if activation == "tanh" else 1.0
    assert torch.allclose(model.encode(means.source)[:, 0], torch.tensor([height, -height]), atol=1e-4)
    difference = model(means.source)[0] - model(means.source)[1]
    assert torch.allclose(difference, means.target[0] - means.target[1], atol=1e-9, rtol=1e-3)
    if bias: assert torch.allclose(model(means.source), means.target, atol=1e-9, rtol=1e-3)


def test_model_is_a_gradiend_like_any_other(setting, tmp_path):
    model, objective, examples, space = setting
    args = TrainingArguments(train_batch_size=4, solver="mean_difference")
    fitted, run = fit_mean_difference(model, objective, examples, space, GradiendConfig(pair=("3SG", "3PL")), args, progress=False)
    fitted.save_pretrained(tmp_path / "m")
    back = GradiendModel.from_pretrained(tmp_path / "m")
    assert torch.equal(back.encoder_weight, fitted.encoder_weight) and back.info["arguments"]["solver"] == "mean_difference"
    assert run.best_step == run.history[0].step > 0 and run.losses == () and np.isfinite(run.correlation)


def test_refused_architectures_and_missing_classes(setting):
    model, objective, examples, space = setting
    means = ClassMeans(torch.ones(2, space.n), torch.ones(2, space.n), (1, 1), 2)
    config = GradiendConfig(pair=("a", "b"))
    with pytest.raises(InputError, match="equal or not finite"): mean_difference_model(means, space, config)
    for wrong in ({"latent_dim": 3}, {"activation_encoder": "sigmoid"}, {"activation_decoder": "relu"}):
        with pytest.raises(InputError, match="another solver"): mean_difference_model(means, space, replace(config, **wrong))
    one = examples.take(np.flatnonzero(examples.labels("alternative") > 0).tolist())
    with pytest.raises(InputError, match="3PL"): fit_mean_difference(model, objective, one, space, GradiendConfig(pair=("3SG", "3PL")), TrainingArguments(), progress=False)


def test_without_validation_rows_the_training_rows_judge_the_baseline_and_the_search(setting):
    model, objective, examples, space = setting
    train = examples.select("train")
    config, args = GradiendConfig(pair=train.pair), TrainingArguments(train_batch_size=4, eval_batch_size=4, max_steps=4, cache_gradients=False)
    with pytest.warns(UserWarning, match="no validation rows: the baseline is judged on the training rows"):
        _, run = fit_mean_difference(model, objective, train, space, config, args)
    frame = pd.concat([train.frame, train.frame.assign(split="validation")])
    _, told = fit_mean_difference(model, objective, Examples(frame, train.pair), space, config, args)
    assert run.correlation == told.correlation
    search = LRSearchConfig(probe_steps=4, probe_evals=2, bounds=(1e-3, 1e-1), per_decade=1, refine=False)
    with pytest.warns(UserWarning, match="no validation rows: the learning rate is chosen on the training rows"), suppress(NoConvergentLearningRate):
        search_learning_rate(model, objective, train, space, config, replace(args, learning_rate="tune", lr_search_config=search), progress=False)
