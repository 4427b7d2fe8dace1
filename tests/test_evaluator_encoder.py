"""Encoder evaluation against a slow reference: one backward pass a row, the activation written out."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tests.tiny import ARCHITECTURES, masked_model, tiny_model

from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.core import pearson
from gradiend.evaluator.encoder import balanced_rows, evaluate_encoder, shuffled_control
from gradiend.gradients.objectives import masked_lm, objective_for
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
    frame["text"] = [m.replace("[MASK]", w) for m, w in zip(frame["masked"], frame["factual"], strict=True)]
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
        g = gradiend.space.gather({n: torch.zeros_like(named[n]) if d is None else d for n, d in zip(gradiend.space.names, grads, strict=True)})
        out.append(torch.tanh(gradiend.encoder_weight @ g + gradiend.encoder_bias).detach().numpy())
    return np.stack(out)


@pytest.mark.parametrize("source", ["factual", "alternative", "diff"])
@pytest.mark.parametrize("latent", [0, 1])
def test_encodings_and_labels_match_the_reference(parts, source, latent):
    model, objective, examples, made = parts
    result = evaluate_encoder(made[source], model, objective, examples, neutral=NEUTRAL, latent=latent, batch_size=2, bootstrap=20)
    training, neutral = result.frame[result.frame["kind"] == "training"], result.frame[result.frame["kind"] == "neutral_dataset"]
    np.testing.assert_allclose(training["encoded"], reference(model, objective, examples.frame, made[source], source)[:, latent], rtol=1e-8)
    np.testing.assert_allclose(neutral["encoded"], reference(model, objective, NEUTRAL, made[source], "factual")[:, latent], rtol=1e-8)
    quiet = result.frame[result.frame["kind"] == "neutral_training_masked"]
    np.testing.assert_allclose(quiet["encoded"], reference(model, objective, quiet, made[source], "factual")[:, latent], rtol=1e-8)
    assert len(quiet) == len(ROWS) and (quiet["label"] == 0).all() and not set(quiet["factual"].str.lower()) & {"he", "she", "it", "they"}
    both = reference(model, objective, examples.frame, made[source], source)
    np.testing.assert_allclose(training[["encoded_0", "encoded_1"]], both, rtol=1e-8)
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
    result = evaluate_encoder(made["alternative"], model, objective, examples, source="factual", neutral_training=False)
    np.testing.assert_allclose(result.frame["encoded"], reference(model, objective, examples.frame, made["alternative"], "factual")[:, 0], rtol=1e-8)
    assert result.source == "factual"


def test_neutral_rows_change_only_the_neutral_numbers(parts):
    model, objective, examples, made = parts
    without, with_neutral = (evaluate_encoder(made["factual"], model, objective, examples, neutral=n, neutral_training=n is not None) for n in (None, NEUTRAL))
    pd.testing.assert_frame_equal(without.metrics, with_neutral.metrics)
    for name in ("correlation", "accuracy", "mean_by_class", "mean_by_feature_class", "control", "n_samples"):
        assert without[name] == with_neutral[name]
    assert (without.n_neutral, with_neutral.n_neutral, without.neutral_mean_by_type) == (0, 7, {})


def test_more_rows_asked_than_there_are(parts):
    model, objective, examples, made = parts
    result = evaluate_encoder(made["factual"], model, objective, examples, neutral=NEUTRAL, max_size=4)
    assert (result.n_samples, result.n_neutral) == (4, 6)  # four other words, and two of the neutral sentences
    assert result.notes == ("max_size=4: there are only 2 rows of kind neutral_dataset, all of them are used",) and "only 2 rows" in repr(result)
    assert len(evaluate_encoder(made["factual"], model, objective, examples, max_size=99).notes) == 1
    assert result.frame.query("kind == 'training'")["source_class"].value_counts().to_dict() == {"3SG": 2, "3PL": 2}


def test_nothing_else_is_touched(parts):
    model, objective, examples, made = parts
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    frame, numpy_state = examples.frame.copy(), np.random.get_state()[1].copy()
    everything = {"controls": ("shuffled", "untrained"), "neutral": NEUTRAL, "max_size": 3, "seed": 5, "bootstrap": 10}
    first, second = (evaluate_encoder(made["diff"], model, objective, examples, **everything) for _ in range(2))
    assert first.controls == second.controls
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
    ({"controls": ["class_mean"]}, "class_mean"), ({"controls": "shufled"}, "shufled"), ({"transitions": ["3SG->1SG"]}, "no row turns 3SG->1SG"),
    ({"include_other_classes": True}, "identity_rows=True"), ({"bootstrap": -1}, "samples=-1"),
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


def with_training(rows=ROWS):
    "The rows twice: in train without *she* as a factual word, and in test."
    train = [row for row in rows if row[1] != "she" and row[2] != "she"]
    return Examples(pd.concat([table(train, "train"), table(rows, "test")], ignore_index=True), pair=PAIR)


@pytest.mark.parametrize("source", ["factual", "alternative", "diff"])
def test_the_class_mean_control_is_the_difference_of_the_class_means(parts, source):
    model, objective, _, made = parts
    examples, gradiend = with_training(), made[source]
    result = evaluate_encoder(gradiend, model, objective, examples, controls=("class_mean",), batch_size=2, bootstrap=0)
    train, named = examples.select("train"), dict(model.named_parameters())

    def gradient(row):
        factual, alternative = objective.losses(model, objective.prepare(row))
        loss = {"factual": factual, "alternative": alternative, "diff": factual - alternative}[source].sum()
        grads = torch.autograd.grad(loss, [named[n] for n in gradiend.space.names], allow_unused=True)
        return gradiend.space.gather({n: torch.zeros_like(named[n]) if d is None else d for n, d in zip(gradiend.space.names, grads, strict=True)})

    g, y = torch.stack([gradient(train.frame.iloc[[i]]) for i in range(len(train))]), train.labels(source)
    plus, minus = g[y == 1].mean(0), g[y == -1].mean(0)
    w = plus - minus
    test = torch.stack([gradient(examples.select("test").frame.iloc[[i]]) for i in range(5)])
    np.testing.assert_allclose(result.frame.query("kind == 'training'")["class_mean"], (2 * (test - (plus + minus) / 2) @ w / (w @ w)).numpy(), rtol=1e-6)
    assert result.controls["class_mean"]["correlation"] == pytest.approx(pearson(result.frame["label"].to_numpy()[:5], result.frame["class_mean"].to_numpy()[:5]))
    assert result.control == {} and "shuffled" not in repr(result)


def test_untrained_encoders_are_fresh_models(parts):
    model, objective, examples, made = parts
    result = evaluate_encoder(made["factual"], model, objective, examples, controls=["untrained"], seed=4, bootstrap=0)
    fresh = GradiendModel.create(made["factual"].space, made["factual"].config, seed=6).to(torch.float64)
    np.testing.assert_allclose(result.frame["untrained_2"][:5], reference(model, objective, examples.frame, fresh, "factual")[:, 0], rtol=1e-5)
    labels = result.frame["label"].to_numpy()[:5]
    sizes = [abs(pearson(labels, result.frame[f"untrained_{i}"].to_numpy()[:5])) for i in range(5)]
    assert result.controls["untrained"]["correlation"] == pytest.approx(np.mean(sizes)) and result.controls["untrained"]["high"] == pytest.approx(max(sizes))


def test_controls_change_nothing_else(parts):
    model, objective, _, made = parts
    plain, controlled = (evaluate_encoder(made["factual"], model, objective, with_training(), controls=c, bootstrap=30) for c in (("shuffled",), ("shuffled", "untrained", "class_mean")))
    np.testing.assert_allclose(plain.frame["encoded"], controlled.frame["encoded"], rtol=1e-9)
    assert plain.control["p_value"] == controlled.control["p_value"]
    assert set(controlled.controls) == {"shuffled", "untrained", "class_mean"}


def test_words_that_training_has_not_seen(parts):
    model, objective, _, made = parts
    result = evaluate_encoder(made["factual"], model, objective, with_training(), bootstrap=0)
    seen = dict(zip(result.frame["source_word"], result.frame["seen"], strict=True))
    assert (seen["he"], seen["they"], seen["she"]) == (True, True, False)
    assert set(result.generalisation.index) == {"seen words", "held-out words", "gap"}
    assert result.generalisation.loc["held-out words", "n"] == 1
    assert not result.by_target.loc[("3SG", "she"), "seen"]


def test_several_splits_have_a_gap(parts):
    model, objective, _, made = parts
    result = evaluate_encoder(made["factual"], model, objective, with_training(), split="all", bootstrap=0)
    assert list(result.by_split.index) == ["train", "test"] and result.by_split["n"].sum() == result.n_samples
    for metric in ("separation", "accuracy", "mean_first"):
        gap = result.by_split.loc["train", metric] - result.by_split.loc["test", metric]
        assert result.split_generalization["gap to test"][metric] == pytest.approx(gap)
    assert set(result.frame.query("kind == 'neutral_training_masked'")["split"]) == {"test"}  # a sentence of both splits is used once


def test_one_transition(parts):
    model, objective, examples, made = parts
    with pytest.warns(UserWarning, match="undefined"):
        result = evaluate_encoder(made["factual"], model, objective, examples, transitions=("3PL->3SG",), bootstrap=0)
    assert result.n_samples == 3 and set(result.mean_by_feature_class) == {"3PL"}


def test_other_classes_never_enter_the_metrics(parts):
    model, objective, examples, made = parts
    other = table([("The pilot said that [MASK] was late.", "she", "she", "2SG")]).assign(alternative_class="2SG")
    more = Examples(pd.concat([examples.frame, other], ignore_index=True), pair=PAIR)
    plain, asked = (evaluate_encoder(made["diff"], model, objective, more, include_other_classes=o, neutral_training=False) for o in (False, True))
    pd.testing.assert_frame_equal(plain.metrics, asked.metrics)
    assert len(plain.frame) == 5 and len(asked.frame) == 6
    row = asked.frame.query("kind == 'other'")
    assert row["label"].tolist() == [0.0] and row["group"].tolist() == ["2SG"]  # the factual gradient: factual minus alternative would be zero
    np.testing.assert_allclose(row["encoded"], reference(model, objective, other, made["diff"], "factual")[:, 0], rtol=1e-8)
    assert asked.mean_by_feature_class["2SG"] == pytest.approx(row["encoded"].iloc[0]) and asked.n_samples == 5


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind):
    words, model = tiny_model(kind)
    space = ParameterSpace.from_model(model, "*1*")
    gradiend = GradiendModel.create(space, GradiendConfig(pair=PAIR), seed=1).to(torch.float64)
    with torch.no_grad(): gradiend.encoder_weight.mul_(3)
    objective, examples = objective_for(words, model), with_training()
    result = evaluate_encoder(gradiend, model, objective, examples, neutral=NEUTRAL, controls=("shuffled", "untrained", "class_mean"), batch_size=2, bootstrap=10)
    rows = result.frame[result.frame["kind"] == "training"]
    np.testing.assert_allclose(rows["encoded"], reference(model, objective, examples.select("test").frame, gradiend, "alternative")[:, 0], rtol=1e-3, atol=1e-5)
    assert (result.n_samples, result.n_neutral) == (5, 7) and np.isfinite(result.controls["class_mean"]["correlation"])


def test_a_bfloat16_gradiend(parts):
    model, objective, examples, made = parts
    exact = evaluate_encoder(made["factual"], model, objective, examples, neutral_training=False, bootstrap=0)
    rough = evaluate_encoder(made["factual"].to(torch.bfloat16), model, objective, examples, neutral_training=False, controls=("untrained",), bootstrap=0)
    made["factual"].to(torch.float64)
    np.testing.assert_allclose(rough.frame["encoded"], exact.frame["encoded"], atol=0.05)
