"Cross-encoding: against one backward pass per row and against tables made by hand."
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend import crossing
from gradiend.core import InputError, pearson
from gradiend.crossing import CrossEncoding, cross_encode, encode_with_all, score_rows, spread_out, union_space
from gradiend.data.examples import COLUMNS, Examples, gradient_labels
from gradiend.gradients.rows import row_gradients
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.zoo import model_fingerprint

from .tiny import tiny_model

WORDS = {"3SG": "he", "3PL": "they", "N": "it"}
TEXTS = ["The baker was late because [MASK] missed the bus.", "Anna said that [MASK] was tired.", "The dogs barked because [MASK] were cold."]


def examples(first, second, split="test"):
    rows = [(text, WORDS[a], WORDS[b], a, b, split, f"{a}->{b}", text.replace("[MASK]", WORDS[a])) for text in TEXTS for a, b in ((first, second), (second, first))]
    return Examples(pd.DataFrame(rows, columns=list(COLUMNS)), (first, second))


@pytest.fixture(scope="module")
def bench():
    "A tiny language model, its objective, three data sets, and encoders of three spaces and two sources."
    tokenizer, base = tiny_model("bert")
    space = ParameterSpace.from_model(base, "*layer.1*")
    data = {"number": examples("3SG", "3PL"), "person": examples("3SG", "N"), "other": examples("3PL", "N")}
    origin = {"name": "tiny", "fingerprint": model_fingerprint(base)}
    made = {}
    for seed, (name, kept, source) in enumerate((("number", None, "alternative"), ("person", slice(0, None, 3), "alternative"), ("other", slice(0, 900), "factual"))):
        own = space if kept is None else space.keep(space.global_index[kept])
        config = GradiendConfig(pair=data[name].pair, source=source, base_model=origin)
        made[name] = GradiendModel.create(own, config, seed=seed).double()
    return base, masked_lm(tokenizer), data, made


def test_encodings_are_those_of_one_backward_pass_per_row(bench):
    base, objective, data, models = bench
    crossed = cross_encode(models, base, objective, data)
    for name, rows in data.items():
        for i, model in enumerate(models.values()):
            gradients = row_gradients(base, objective, rows, space=model.space, kind=model.config.source, engine="loop")
            slow = model.encode(gradients.to(model.dtype)).detach()[:, 0].numpy()
            assert np.allclose(crossed.encoded[name][:, i], slow, atol=1e-7), (name, i)


def test_several_sweeps_give_what_one_gives(bench, monkeypatch):
    base, objective, data, models = bench
    whole = cross_encode(models, base, objective, data, source="factual")
    sweeps = []
    monkeypatch.setattr(crossing, "AT_ONCE", 1)
    monkeypatch.setattr(crossing, "encode", lambda *args, _encode=crossing.encode, **options: sweeps.append(1) or _encode(*args, **options))
    parts = cross_encode(models, base, objective, data, source="factual", batch_size=4)
    assert len(sweeps) == 9 and all(np.allclose(whole.encoded[name], parts.encoded[name], atol=1e-9) for name in data)


def test_one_sweep_per_data_set_and_source(bench, monkeypatch):
    base, objective, data, models = bench
    directions = []
    monkeypatch.setattr(crossing, "encode", lambda *args, _encode=crossing.encode, **options: directions.append(len(args[3])) or _encode(*args, **options))
    cross_encode(models, base, objective, data)
    assert directions == [2, 1] * 3  # two encoders read the alternative gradient, one the factual


def test_several_latent_numbers(bench):
    base, objective, data, models = bench
    space = models["number"].space
    two, three = (GradiendModel.create(space, GradiendConfig(pair=("3SG", "3PL"), latent_dim=k), seed=k).double() for k in (2, 3))
    crossed = cross_encode({"two": two, "three": three}, base, objective, data["number"], latent=1)
    assert list(crossed.rows) == ["3SG-3PL"]
    gradients = row_gradients(base, objective, data["number"], space=space, kind="alternative")
    assert np.allclose(crossed.encoded["3SG-3PL"], torch.stack([m.encode(gradients)[:, 1] for m in (two, three)], 1).detach(), atol=1e-7)
    with pytest.raises(InputError, match="latent=2: 'two' has 2"): cross_encode({"two": two, "three": three}, base, objective, data["number"], latent=2)


def test_union_of_spaces():
    full = ParameterSpace.from_global(["a", "b", "c"], [[4], [2, 2], [3]], None)
    rng = np.random.default_rng(0)
    for _ in range(20):
        spaces = [full if rng.random() < 0.2 else full.keep(np.sort(rng.choice(11, rng.integers(0, 8), replace=False)).tolist()) for _ in range(3)]
        union = union_space(spaces)
        assert set(union.global_index.tolist()) == set().union(*(s.global_index.tolist() for s in spaces))
        for space in spaces:
            values = torch.randn(2, space.n)
            expected = torch.zeros(2, 11)
            expected[:, space.global_index] = values
            assert torch.equal(spread_out(values, space, union), expected[:, union.global_index])


def test_scores_against_counting():
    rng = np.random.default_rng(1)
    labels = np.where(rng.random(60) < 0.4, 1.0, -1.0)
    encoded = np.stack([0.8 * labels + rng.normal(size=60), rng.normal(size=60), np.full(60, 0.5)], axis=1)
    table = score_rows(labels, encoded)
    for i in range(2):
        first, second = encoded[labels > 0, i], encoded[labels < 0, i]
        auc = np.mean([(a > b) + 0.5 * (a == b) for a in first for b in second])
        assert table["auc"][i] == pytest.approx(auc) and table["correlation"][i] == pytest.approx(pearson(labels, encoded[:, i]))
        assert table["positive_minus_negative"][i] == pytest.approx(first.mean() - second.mean()) and table["n"][i] == 60
    assert table["p_value"][0] == 1 / 201 and table["p_value"][1] > 0.05 and 0.15 < table["chance"][1] < 0.35
    assert math.isnan(table["correlation"][2]) and math.isnan(table["p_value"][2])  # a constant separates nothing


def by_hand(sources=("alternative", "factual")):
    "Two encoders and two data sets whose encodings are known: each is at +-1 on its own rows and at 0.25 elsewhere."
    data = {"ab": examples("3SG", "3PL"), "bc": examples("3PL", "N")}
    pairs, kinds = {"ab": ("3SG", "3PL"), "bc": ("3PL", "N")}, dict(zip(("ab", "bc"), sources, strict=True))
    encoded = {name: np.stack([gradient_labels(rows.frame, pairs[e], kinds[e]) if e == name else np.full(len(rows), 0.25) for e in pairs], 1) for name, rows in data.items()}
    return CrossEncoding(rows={n: e.frame for n, e in data.items()}, encoded=encoded, pairs=pairs, data_pairs=pairs, sources=kinds, split="test", seed=0)


def test_matrices_of_known_encodings():
    crossed = by_hand()
    square = crossed.matrix()
    assert square.loc["ab", "ab"] == square.loc["bc", "bc"] == 1.0 and math.isnan(square.loc["ab", "bc"])
    assert crossed.matrix("positive_minus_negative").to_numpy().tolist() == [[2, 0], [0, 2]]
    assert crossed.matrix("positive_minus_negative", normalize=True).to_numpy().tolist() == [[1, 0], [0, 1]]
    assert crossed.matrix("n").to_numpy().tolist() == [[6, 6], [6, 6]] and crossed["seed"] == 0
    assert set(crossed.frame.columns) >= {"encoder", "data", "transition", "factual_class", "kind", "n", "mean", "std", "correlation"}
    row = crossed.frame.set_index(["encoder", "data", "transition"]).loc[("ab", "ab", "3SG->3PL")]
    assert (row["n"], row["mean"], row["std"], row["kind"]) == (3, -1.0, 0.0, "alternative")
    assert "2 encoders, 2 data sets, 12 rows" in repr(crossed) and "<table" in crossed._repr_html_()


def test_transitions_and_features():
    crossed = by_hand()
    assert crossed.transitions().loc["ab"].to_dict() == {"3SG->3PL": -1, "3PL->3SG": 1, "3PL->N": 0.25, "N->3PL": 0.25}
    assert crossed.transitions("n").loc["bc"].tolist() == [3, 3, 3, 3]
    assert crossed.features().loc["ab"].to_dict() == {"3SG": -1, "3PL": (1 + 0.25) / 2, "N": 0.25}
    assert crossed.features("alternative").loc["ab"].to_dict() == {"3PL": (-1 + 0.25) / 2, "3SG": 1, "N": 0.25}
    assert crossed.features("source").loc["ab", "3SG"] == 1 and crossed.features("source").loc["bc", "3PL"] == (1 + 0.25) / 2
    assert crossed.features(value="n").loc["ab"].to_dict() == {"3SG": 3, "3PL": 6, "N": 3}
    assert crossed.features(value="std").loc["ab", "3PL"] == pytest.approx(0.375)


@pytest.mark.parametrize("sources", [("alternative", "factual"), ("factual", "factual"), ("alternative", "alternative"), ("diff", "alternative")])
@pytest.mark.parametrize("kind", ["factual", "alternative", "source", "transition"])
def test_anchors_stand_at_plus_one_whatever_an_encoder_reads(sources, kind):
    "The anchor-aligned matrix turns each encoder by the label of the rows it was trained on."
    crossed = by_hand(sources)
    square = crossed.aligned(kind)
    if kind == "transition":
        assert all(square.loc[t, t] == 1 for t in ("3SG->3PL", "3PL->3SG", "3PL->N", "N->3PL"))
        assert square.loc["3SG->3PL", "3PL->3SG"] == -1
    else:
        assert square.loc["3SG", "3SG"] == square.loc["N", "N"] == 1  # one encoder each, and rows of its own pair only
        # 3PL is known to both; of its rows each encoder was trained on half, and the others are at 0.25, turned as the encoder is
        own = [(1 + sign * 0.25) / 2 for sign in (crossed._anchors(e, kind)["3PL"] for e in ("ab", "bc"))]
        assert square.loc["3PL", "3PL"] == pytest.approx(np.mean(own))
        assert crossed.aligned(kind, "n").loc["3PL"].tolist() == [2, 2, 2]
        assert crossed.aligned(kind, "std").loc["3PL", "3PL"] == pytest.approx(np.std(own))


def test_an_encoder_that_came_out_the_wrong_way_round_is_turned():
    crossed, names = by_hand(), ("ab", "bc")
    turned = {name: values * np.array([-1.0, 1.0]) for name, values in crossed.encoded.items()}
    wrong = replace(crossed, encoded=turned)
    assert wrong.matrix().loc["ab", "ab"] == -1
    for kind in ("factual", "alternative", "source", "transition"): pd.testing.assert_frame_equal(wrong.aligned(kind), crossed.aligned(kind))
    swapped = replace(wrong, data_pairs={"ab": ("3PL", "3SG"), "bc": ("3PL", "N")})  # its own data, with the classes in the other order
    assert [wrong._turn(n) for n in names] == [swapped._turn(n) for n in names] == [-1, 1]
    without = replace(wrong, rows={"bc": wrong.rows["bc"]}, encoded={"bc": turned["bc"]}, data_pairs={"bc": ("3PL", "N")})
    assert without._turn("ab") == 1  # no data of its own: the label is believed
    renamed = replace(wrong, rows={"rows": wrong.rows["ab"]}, encoded={"rows": turned["ab"]}, data_pairs={"rows": ("3SG", "3PL")})
    assert renamed._turn("ab") == -1


@pytest.mark.parametrize("metric", ["p_value", "n", "chance", "auc"])
def test_what_has_no_meaningful_ratio_is_not_normalised(metric):
    with pytest.raises(InputError, match=f"normalize=True: '{metric}'"): by_hand().matrix(metric, normalize=True)


def test_bad_input(bench):
    base, objective, data, models = bench
    tables = {
        "data is empty": {}, "no collection": 3, "list of 3": [data["number"]], "make Examples": {"x": pd.DataFrame()},
        "not both classes": {"number": data["number"].take([0, 2])}}
    for message, wrong in tables.items():
        with pytest.raises(InputError, match=message): cross_encode(models, base, objective, wrong)
    with pytest.raises(InputError, match="split='train'"): cross_encode(models, base, objective, data, split="train")
    with pytest.raises(InputError, match="source='both'"): cross_encode(models, base, objective, data, source="both")
    with pytest.raises(InputError, match="empty"): cross_encode([], base, objective, data)
    crossed = cross_encode(models, base, objective, {"number": data["number"]}, max_size=4)
    assert crossed.scores["n"].tolist() == [4, 4, 4] and crossed.rows["number"]["factual_class"].value_counts().tolist() == [2, 2]
    with pytest.raises(InputError, match="no data set 'person'"): crossed.matrix(normalize=True)
    with pytest.raises(InputError, match="metric='mean'"): crossed.matrix("mean")
    with pytest.raises(InputError, match="value='max'"): crossed.transitions("max")
    with pytest.raises(InputError, match="kind='target'"): crossed.features("target")


def test_a_drawn_sample_keeps_both_classes(bench):
    base, objective, data, models = bench
    with pytest.raises(InputError, match="max_size=1: .*give at least 2"): cross_encode(models, base, objective, data, max_size=1)
    with pytest.raises(InputError, match="max_size=0"): cross_encode(models, base, objective, data, max_size=0)
    for seed in range(3):
        small = cross_encode(models, base, objective, data, max_size=2, seed=seed)
        assert small.scores["correlation"].notna().all() and all(set(frame["factual_class"]) == set(data[name].pair) for name, frame in small.rows.items())
    same = data["number"].frame.assign(alternative="he", alternative_class="3SG")  # every row ends at 3SG
    for given, size in (("source='alternative'", None), ("max_size=2", 2)):
        with pytest.raises(InputError, match=f"{given}: the . rows of data set 'x' that are read have only one class"):
            cross_encode(models, base, objective, {"x": Examples(same, ("3SG", "3PL"))}, max_size=size, source="alternative")


def test_rows_of_several_data_sets_are_read_once_and_count_once(bench, monkeypatch):
    base, objective, data, models = bench
    sweeps = []
    monkeypatch.setattr(crossing, "encode", lambda *args, _encode=crossing.encode, **options: sweeps.append(1) or _encode(*args, **options))
    crossed = cross_encode(models, base, objective, {"number": data["number"], "again": data["number"], "part": data["number"].take([0, 1, 2])})
    assert len(sweeps) == 2 * 2  # two sources, two different tables
    assert np.array_equal(crossed.encoded["number"], crossed.encoded["again"])
    assert {name: int(mask.sum()) for name, mask in crossed.first_seen.items()} == {"number": 6, "again": 0, "part": 0}
    alone = cross_encode(models, base, objective, {"number": data["number"]})
    for value in ("mean", "std", "n"):
        pd.testing.assert_frame_equal(crossed.transitions(value), alone.transitions(value), check_exact=False, atol=1e-6)
        pd.testing.assert_frame_equal(crossed.features("source", value), alone.features("source", value), check_exact=False, atol=1e-6)


def test_another_language_model_is_refused(bench):
    _, objective, data, models = bench
    with pytest.raises(InputError, match="base_model"): cross_encode(models, tiny_model("bert", seed=5)[1], objective, data)


def test_list_of_data_sets_takes_the_names_of_the_models(bench):
    base, objective, data, models = bench
    crossed = cross_encode(list(models.values()), base, objective, list(data.values()))
    assert list(crossed.rows) == list(crossed.pairs) == ["3SG-3PL", "3SG-N", "3PL-N"]
    alone = encode_with_all({"x": models["other"]}, base, objective, data["other"].frame, {"x": "factual"})
    assert np.allclose(crossed.encoded["3PL-N"][:, 2], alone[:, 0])


def test_gradients_of_another_objective_are_refused(bench):
    base, objective, data, models = bench
    other = GradiendModel.create(models["number"].space, replace(models["number"].config, objective="causal_lm"), seed=0).double()
    with pytest.raises(InputError, match="objective: it is 'masked_lm', and 'odd' was trained with 'causal_lm'"): cross_encode({"number": models["number"], "odd": other}, base, objective, {"number": data["number"], "odd": data["person"]})


@pytest.mark.parametrize("wrong", [2.5, "4", True])
def test_max_size_must_be_a_whole_number(bench, wrong):
    base, objective, data, models = bench
    with pytest.raises(InputError, match="max_size="): cross_encode(models, base, objective, data, max_size=wrong)


def test_rows_count_once_across_sets_and_twice_within_one(bench):
    base, objective, data, models = bench
    number = data["number"]
    doubled = Examples(pd.concat([number.frame, number.frame.head(2)], ignore_index=True), number.pair)
    crossed = cross_encode({"number": models["number"], "again": models["number"]}, base, objective, {"number": doubled, "again": number})
    assert crossed.first_seen["number"].all() and not crossed.first_seen["again"].any()
    assert crossed.transitions("n").loc["number"].sum() == len(doubled.frame) == len(number.frame) + 2
