"Metrics and their intervals against slow references: rows copied, pairs compared one by one, samples drawn in a loop."
import numpy as np
import pandas as pd
import pytest

from gradiend.core import InputError, pearson
from gradiend.evaluator.metrics import METRICS, bootstrap_metrics, bootstrap_weights, midranks, predicted_labels, shuffled_control, weighted_metrics


def rows(seed, n=30, ties=True):
    rng = np.random.default_rng(seed)
    labels = rng.choice([1.0, -1.0, 0.0], n, p=[0.4, 0.4, 0.2])
    encoded = np.tanh(labels + rng.normal(0, 1, n))
    return labels, np.round(encoded, 1) if ties else encoded


def slow(labels, encoded):
    "Every metric by its definition."
    first, second = encoded[labels > 0], encoded[labels < 0]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in first for b in second]
    labelled = labels != 0
    return {"correlation": np.corrcoef(labels, encoded)[0, 1], "spearman": np.corrcoef(pd.Series(labels).rank(), pd.Series(encoded).rank())[0, 1],
            "roc_auc": np.mean(wins), "accuracy": np.mean(predicted_labels(encoded) == labels),
            "separation": np.mean((labels * encoded)[labelled]), "mean_first": first.mean(), "mean_second": second.mean()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_metrics_match_their_definitions(seed, ties):
    labels, encoded = rows(seed, ties=ties)
    found = weighted_metrics(labels, encoded, np.ones((1, len(labels))))
    assert list(found) == list(METRICS)
    for name, value in slow(labels, encoded).items():
        assert found[name][0] == pytest.approx(value, abs=1e-12), name
    assert found["correlation"][0] == pytest.approx(pearson(labels, encoded))


@pytest.mark.parametrize("seed", range(5))
def test_a_weight_is_a_number_of_copies(seed):
    labels, encoded = rows(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (6, len(labels))).astype(float)
    found = weighted_metrics(labels, encoded, weights)
    for b, times in enumerate(weights.astype(int)):
        for name, value in slow(np.repeat(labels, times), np.repeat(encoded, times)).items():
            assert found[name][b] == pytest.approx(value, abs=1e-12), name


def test_metrics_do_not_depend_on_the_order_of_rows_and_turn_with_the_sign():
    labels, encoded = rows(7)
    order = np.random.default_rng(0).permutation(len(labels))
    one = np.ones((1, len(labels)))
    a, b, c = weighted_metrics(labels, encoded, one), weighted_metrics(labels[order], encoded[order], one), weighted_metrics(labels, -encoded, one)
    for name in METRICS:
        assert a[name][0] == pytest.approx(b[name][0])
    for name in ("correlation", "spearman", "separation", "mean_first"):
        assert a[name][0] == pytest.approx(-c[name][0])
    assert a["roc_auc"][0] == pytest.approx(1 - c["roc_auc"][0])


def test_midranks_of_samples():
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    weights = np.random.default_rng(0).integers(0, 3, (4, 5))
    for b, times in enumerate(weights):
        copied = pd.Series(np.repeat(values, times)).rank().to_numpy() - 0.5
        np.testing.assert_allclose(np.repeat(midranks(values, weights.astype(float))[b], times), copied)


def test_samples_keep_the_classes_and_draw_sentences_together():
    labels = np.array([1.0] * 6 + [-1.0] * 4)
    units = ["a", "a", "b", "c", "c", "c", "d", "e", "f", "g"]
    weights = bootstrap_weights(labels, units, samples=400, generator=np.random.default_rng(0))
    assert weights.shape == (400, 10)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all() and (weights[:, 6:].sum(axis=1) == 4).all()  # as many sentences of each class
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.15)


def test_intervals_match_a_loop_of_draws():
    labels, encoded = np.resize([1.0, -1.0], 60), np.random.default_rng(0).normal(size=60) + np.resize([0.5, -0.5], 60)
    table = bootstrap_metrics(labels, encoded, samples=4000, seed=1)
    rng, values = np.random.default_rng(5), []
    for _ in range(4000):
        drawn = np.concatenate([rng.choice(np.flatnonzero(labels == s), 30) for s in (1, -1)])
        values.append(pearson(labels[drawn], encoded[drawn]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert table.loc["correlation", "low"] == pytest.approx(low, abs=0.02) and table.loc["correlation", "high"] == pytest.approx(high, abs=0.02)


def test_rows_of_one_sentence_widen_the_interval():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.resize([1.0, -1.0], 20), 10)
    encoded = np.repeat(rng.normal(0, 1, 20), 10) + 0.3 * labels  # ten copies of each of 20 sentences
    alone = bootstrap_metrics(labels, encoded, samples=300).loc["separation"]
    together = bootstrap_metrics(labels, encoded, np.repeat(np.arange(20), 10), samples=300).loc["separation"]
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])
    assert together["value"] == alone["value"]


def test_large_tables_in_portions_give_the_same():
    labels, encoded = np.resize([1.0, -1.0], 30_000), np.random.default_rng(0).normal(size=30_000)
    table = bootstrap_metrics(labels, encoded, samples=80)
    assert table["value"].notna().all() and (table["low"] < table["high"]).all()
    assert table.loc["correlation", "low"] < 0.02 and table.loc["correlation", "high"] > -0.02


@pytest.mark.parametrize("labels, encoded", [([], []), ([1.0], [0.5]), ([1.0, 1.0], [0.1, 0.2]), ([0.0, 0.0], [0.1, 0.2]), ([1.0, -1.0], [0.3, 0.3])])
def test_odd_data_gives_nan_and_no_warning(labels, encoded, recwarn):
    table = bootstrap_metrics(np.array(labels), np.array(encoded), samples=20)
    assert np.isnan(table.loc["correlation", "value"]) and np.isnan(table.loc["correlation", "low"])
    assert not len(recwarn)


@pytest.mark.parametrize("wrong", [{"samples": -1}, {"level": 1.0}, {"level": 0.0}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(InputError, match="level"):
        bootstrap_metrics(np.ones(3), np.ones(3), **wrong)


def test_shuffled_control_is_exact_in_the_limit():
    "Four rows have six arrangements, of which two reach the observed correlation in size."
    labels = np.array([1.0, 1.0, -1.0, -1.0])
    assert shuffled_control(labels, labels, shuffles=3000)["p_value"] == pytest.approx(1 / 3, abs=0.03)
