"""Encoder evaluation against a slow reference: one backward pass a row, the activation written out."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tests.tiny import masked_model

from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.core import pearson
from gradiend.evaluator.encoder import balanced_rows, evaluate_encoder, shuffled_control
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel

PAIR = ("3SG", "3PL")
ROWS = [
    ("The drummers lost the beat because [MASK] were watching the crowd.", "they", "he", "3PL"),
    ("The baker was late because [MASK] missed the bus.", "he", "they", "3SG"),
    ("Anna said that [MASK] was tired.", "she", "they", "3SG"),
    ("When the twins arrived, [MASK] were hungry.", "they", "it", "3PL"),
    ("The dogs barked because [MASK] were cold.", "they", "she", "3PL"),
]


def table(rows, split="test"):
    frame = pd.DataFrame(rows, columns=["masked", "factual", "alternative", "factual_class"])
    frame["alternative_class"] = frame["factual_class"].map({"3SG": "3PL", "3PL": "3SG", "neutral": "neutral"})
    frame["split"] = split
    frame["transition"] = frame["factual_class"] + "->" + frame["alternative_class"]
    frame["text"] = [m.replace("[MASK]", w) for m, w in zip(frame["masked"], frame["factual"])]
    return frame


NEUTRAL = table([("The [MASK] whistled until noon.", "kettle", "kettle", "neutral"), ("The pilot checked the [MASK].", "engine", "engine", "neutral")])


@pytest.fixture(scope="module")
def parts():
    words, model = masked_model("bert")
    space = ParameterSpace.from_model(model, "*layer.1*")
    made = {}
    for source in ("factual", "alternative", "diff"):
        gradiend = GradiendModel.create(space, GradiendConfig(source=source, target="diff", pair=PAIR, latent_dim=2), seed=1).to(torch.float64)
        with torch.no_grad():
            gradiend.encoder_weight.mul_(3)
            gradiend.encoder_bias.copy_(torch.tensor([0.1, -0.2]))
        made[source] = gradiend
    return model, masked_lm(words), Examples(table(ROWS), pair=PAIR), made


def reference(model, objective, frame, gradiend, kind):
    "One backward pass a row, then tanh(W g + c)."
    out = []
    for i in range(len(frame)):
        factual, alternative = objective.losses(model, objective.prepare(frame.iloc[[i]]))
        loss = {"factual": factual, "alternative": alternative, "diff": factual - alternative}[kind].sum()
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, [named[n] for n in gradiend.space.names], allow_unused=True)
        g = gradiend.space.gather({n: torch.zeros_like(named[n]) if d is None else d for n, d in zip(gradiend.space.names, grads)})
        out.append(torch.tanh(gradiend.encoder_weight @ g + gradiend.encoder_bias).detach().numpy())
    return np.stack(out)


@pytest.mark.parametrize("source", ["factual", "alternative", "diff"])
@pytest.mark.parametrize("latent", [0, 1])
def test_encodings_and_labels_match_the_reference(parts, source, latent):
    model, objective, examples, made = parts
    result = evaluate_encoder(made[source], model, objective, examples, neutral=NEUTRAL, latent=latent, batch_size=2)
    training, neutral = result.frame[result.frame["kind"] == "training"], result.frame[result.frame["kind"] == "neutral"]
    np.testing.assert_allclose(training["encoded"], reference(model, objective, examples.frame, made[source], source)[:, latent], rtol=1e-8)
    np.testing.assert_allclose(neutral["encoded"], reference(model, objective, NEUTRAL, made[source], "factual")[:, latent], rtol=1e-8)
    sign = -1 if source == "alternative" else 1
    assert training["label"].tolist() == [sign * (1 if c == "3SG" else -1) for c in examples.frame["factual_class"]]
    assert result.correlation == pytest.approx(np.corrcoef(training["label"], training["encoded"])[0, 1])
    wanted = np.sign(training["encoded"]) * (training["encoded"].abs() >= 0.5)
    assert result.accuracy == pytest.approx((wanted == training["label"]).mean())
    assert set(result.mean_by_feature_class) == set(PAIR)
    for name, mean in result.mean_by_feature_class.items():
        assert mean == pytest.approx(training.loc[training["source_class"] == name, "encoded"].mean())
    assert result.neutral_mean_by_type["neutral_dataset"] == pytest.approx(neutral["encoded"].mean())


def test_source_given_by_the_caller_is_used(parts):
    model, objective, examples, made = parts
    result = evaluate_encoder(made["alternative"], model, objective, examples, source="factual")
    np.testing.assert_allclose(result.frame["encoded"], reference(model, objective, examples.frame, made["alternative"], "factual")[:, 0], rtol=1e-8)
    assert result.source == "factual"


def test_neutral_rows_change_only_the_neutral_numbers(parts):
    model, objective, examples, made = parts
    without, with_neutral = (evaluate_encoder(made["factual"], model, objective, examples, neutral=n) for n in (None, NEUTRAL))
    for name in ("correlation", "accuracy", "mean_by_class", "mean_by_feature_class", "control", "n_samples"):
        assert without[name] == with_neutral[name]
    assert (without.n_neutral, with_neutral.n_neutral, without.neutral_mean_by_type) == (0, 2, {})


def test_more_rows_asked_than_there_are(parts):
    model, objective, examples, made = parts
    result = evaluate_encoder(made["factual"], model, objective, examples, neutral=NEUTRAL, max_size=4)
    assert (result.n_samples, result.n_neutral) == (4, 2)
    assert result.frame.query("kind == 'training'")["source_class"].value_counts().to_dict() == {"3SG": 2, "3PL": 2}


def test_nothing_else_is_touched(parts):
    model, objective, examples, made = parts
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    frame, numpy_state = examples.frame.copy(), np.random.get_state()[1].copy()
    first, second = (evaluate_encoder(made["diff"], model, objective, examples, neutral=NEUTRAL, max_size=3, seed=5) for _ in range(2))
    pd.testing.assert_frame_equal(first.frame, second.frame)
    pd.testing.assert_frame_equal(examples.frame, frame)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *made["diff"].parameters()])
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


def test_splits(parts):
    model, objective, _, made = parts
    both = Examples(pd.concat([table(ROWS, "train"), table(ROWS[:2], "test")], ignore_index=True), pair=PAIR)
    assert evaluate_encoder(made["factual"], model, objective, both).n_samples == 2
    assert evaluate_encoder(made["factual"], model, objective, both, split=["train", "test"]).split == "train+test"
    assert evaluate_encoder(made["factual"], model, objective, both, split="all").n_samples == 7


@pytest.mark.parametrize("wrong, message", [
    ({"split": "tset"}, "tset"), ({"source": "dif"}, "source='dif'"), ({"latent": 2}, "latent=2"), ({"max_size": 0}, "max_size=0"),
    ({"examples": Examples(table(ROWS), pair=PAIR[::-1])}, "pair"),
])
def test_wrong_input_is_named(parts, wrong, message):
    model, objective, examples, made = parts
    with pytest.raises(InputError, match=message):
        evaluate_encoder(made["factual"], model, objective, **{"examples": examples, **wrong})


def test_one_class_only_warns(parts):
    model, objective, _, made = parts
    with pytest.warns(UserWarning, match="undefined"):
        result = evaluate_encoder(made["factual"], model, objective, Examples(table(ROWS[:1]), pair=PAIR))
    assert np.isnan(result.correlation) and np.isnan(result.control["p_value"])


def test_control_covers_chance_and_is_exact_where_it_can_be():
    rng = np.random.default_rng(0)
    labels = np.resize([1.0, -1.0], 60)
    inside = 0
    for seed in range(40):
        encoded = rng.normal(size=60)
        control = shuffled_control(labels, encoded, seed=seed)
        inside += control["low"] <= pearson(labels, encoded) <= control["high"]
    assert 34 <= inside <= 40  # 95 % of 40 is 38
    assert shuffled_control(labels, labels)["p_value"] == pytest.approx(1 / 201)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(shuffled_control(np.ones(3), np.arange(3.0))["mean"])


def test_balanced_rows_is_even_whatever_the_order():
    rng = np.random.default_rng(1)
    classes = rng.permutation(["a"] * 100 + ["b"] * 30 + ["c"] * 2)
    for size in (1, 7, 40, 90, 131):
        rows = balanced_rows(classes, size, seed=size)
        counts = pd.Series(classes[rows]).value_counts().reindex(["a", "b", "c"], fill_value=0)
        assert len(set(rows)) == size and (np.diff(rows) > 0).all()
        for name, available in (("a", 100), ("b", 30), ("c", 2)):  # a class is short only if it has no more rows
            assert counts[name] >= min(available, counts.max() - 1)
