"Similarity and the sums behind it, against dense float64 references that spell the definitions out."
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradiend import comparison
from gradiend.comparison import ONE, add_pairs, add_tables, check_comparable, entry_groups, named_models, own_products, shared_columns, shared_products
from gradiend.core import InputError
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.similarities import MEASURES, midranks, part_values, similarity, used_entries

SPACE = ParameterSpace.from_model(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))  # 39 entries in four tensors


def model(values, kept=None, pair=("a", "b"), **config):
    "A GRADIEND with these encoder weights over all of the space or the given global indices; its decoder is twice that, turned."
    space = SPACE if kept is None else SPACE.keep(list(kept))
    made = GradiendModel.create(space, GradiendConfig(pair=pair, **config))
    with torch.no_grad():
        made.encoder_weight.copy_(torch.as_tensor(np.asarray(values, dtype=np.float32))[None, :space.n])
        made.decoder_weight.copy_(-2 * made.encoder_weight.T)
    return made


def dense(m, part="encoder-weight"):
    "The values of a model in the full space, zero where it kept nothing."
    own = m.encoder_weight[0] if part == "encoder-weight" else m.decoder_weight[:, 0]
    full = torch.zeros(SPACE.full_n, dtype=torch.float64)
    full[m.space.global_index] = own.detach().double()
    return full.numpy()


def slow(measure, x, y):
    "The definition of section 7.2, with zeros written out."
    if not measure.endswith("_signed"): x, y = abs(x), abs(y)
    if not x.any() or not y.any(): return math.nan
    if measure.startswith("cosine"): return x @ y / math.sqrt((x @ x) * (y @ y))
    if measure == "mass_overlap":
        shared = (x != 0) & (y != 0)
        return (math.sqrt((x[shared] @ x[shared]) / (x @ x)) + math.sqrt((y[shared] @ y[shared]) / (y @ y))) / 2
    union = (x != 0) | (y != 0)
    ranks = [pd.Series(v[union]).rank(method="average").to_numpy() for v in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    return a @ b / math.sqrt((a @ a) * (b @ b)) if a.any() and b.any() else math.nan


@st.composite
def several(draw):
    "Two to four models: whole or pruned, with ties, zeros and perhaps nothing at all."
    numbers = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 0.25, 7.5])
    found = []
    for i in range(draw(st.integers(2, 4))):
        kept = draw(st.none() | st.sets(st.integers(0, SPACE.full_n - 1), min_size=1))
        n = SPACE.full_n if kept is None else len(kept)
        found.append(model(draw(st.lists(numbers, min_size=n, max_size=n)), kept and sorted(kept), pair=(f"a{i}", "b")))
    return found


@settings(max_examples=15, deadline=None)
@given(several(), st.sampled_from([None, "parameter", "layer"]))
def test_every_measure_agrees_with_its_definition(models, by):
    groups = entry_groups(SPACE, by)
    code = np.repeat(groups.codes, SPACE.totals)
    for measure in MEASURES:
        result = similarity(models, measure, by=by)
        for g, group in enumerate(groups.names):
            square = result.matrix(group)
            for i, a in enumerate(models):
                for j, b in enumerate(models):
                    x, y = (np.where(code == g, dense(m), 0) for m in (a, b))
                    expected = slow(measure, x, y)
                    if i == j: expected = 1.0 if x.any() else math.nan
                    assert square.iloc[i, j] == pytest.approx(expected, abs=2e-6, nan_ok=True), (measure, group, i, j)


@settings(max_examples=12, deadline=None)
@given(several(), st.sampled_from([1, 10**9]), st.sampled_from([(1, 1), (7, 2), (2**16, 1000)]), st.sampled_from([0, 4, 10**9]))
def test_sums_do_not_depend_on_how_the_space_is_cut(models, sparse, limits, dear):
    "Stretches of one place or of a few, numbered by counting or by sorting, added up by pairs or by tables, give what the dense table gives."
    spaces, values = [m.space for m in models], [m.encoder_weight.detach()[0] for m in models]
    groups = entry_groups(SPACE, "parameter")
    table, there = np.stack([dense(m) for m in models]), np.zeros((len(models), SPACE.full_n))
    for row, m in zip(there, models, strict=True): row[m.space.global_index.numpy()] = 1
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SPARSE": sparse, "WIDE": limits[0], "FEW": limits[1], "DEAR": dear}.items(): patch.setattr(comparison, name, value)
        found = shared_products(spaces, {"x": values}, [("x", "x"), ("x", ONE), (ONE, ONE)], groups)
        counts = shared_products(spaces, {}, [(ONE, ONE)], groups)
        own = own_products(spaces, {"x": values}, [("x", ONE), (ONE, ONE)], groups)
    assert (counts[ONE, ONE] == found[ONE, ONE]).all()
    code = np.repeat(groups.codes, SPACE.totals)
    for g in range(4):
        x, one = table * (code == g), there * (code == g)
        for pair, expected in ((("x", "x"), x @ x.T), (("x", ONE), x @ one.T), ((ONE, ONE), one @ one.T)):
            assert np.allclose(found[pair][g], expected, atol=1e-5)
        assert np.allclose(own["x", ONE][g], x.sum(1), atol=1e-5) and np.allclose(own[ONE, ONE][g], one.sum(1))


def test_columns_by_counting_and_by_sorting_are_the_same():
    places = np.random.default_rng(0).integers(0, 300, 400)
    by_counting, by_sorting = shared_columns(places, 300), shared_columns(places, 10**6)
    assert all((a == b).all() for a, b in zip(by_counting, by_sorting, strict=True))
    counts = np.bincount(places, minlength=300)
    column, fill = by_counting
    assert fill.tolist() == counts[counts > 1].tolist() and ((column < len(fill)) == (counts[places] > 1)).all()


@pytest.mark.parametrize("columns", [3, 200, 300, 70_000])
def test_pairs_and_tables_add_up_to_the_same(columns):
    "Two to five of nine vectors in each column, whatever number of bits the columns take."
    rng, m = np.random.default_rng(columns), 9
    there = rng.random((m, columns)).argsort(axis=0) < rng.integers(2, 6, columns)
    vector, column = there.nonzero()
    values = {"x": rng.normal(size=len(vector)), "y": rng.normal(size=len(vector)).astype(np.float32)}
    tables = {name: np.zeros((m, columns)) for name in values} | {ONE: there.astype(float)}
    for name, v in values.items(): tables[name][vector, column] = v
    wanted = [("x", "x"), ("x", "y"), ("y", ONE), (ONE, ONE)]
    by_pairs, by_tables = ({pair: np.zeros((m, m)) for pair in wanted} for _ in range(2))
    add_pairs(by_pairs, vector, column, values)
    add_tables(by_tables, tables)
    for x, y in wanted:
        expected = np.array([[(tables[x][a] * tables[y][b]).sum() if a != b else 0 for b in range(m)] for a in range(m)])
        assert np.allclose(by_pairs[x, y], expected, rtol=1e-12, atol=1e-9)
        assert np.allclose(by_tables[x, y] * ~np.eye(m, dtype=bool), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dear", [0, 10**9])
def test_measures_across_many_stretches(dear, monkeypatch):
    "Four models of a few thousand values, many of them equal, spread over two parameters and several stretches, against dense float64."
    monkeypatch.setattr(comparison, "DEAR", dear)
    monkeypatch.setattr(comparison, "FEW", 500)
    space = ParameterSpace.from_global(["a", "b"], [[400, 250], [300, 100]], None)
    rng, models, full = np.random.default_rng(1), [], np.zeros((4, space.full_n))
    for row in full:
        kept = np.sort(rng.choice(space.full_n, 9000, replace=False))
        made = GradiendModel.create(space.keep(kept.tolist()), GradiendConfig(pair=("a", "b")))
        row[kept] = np.round(rng.normal(0.4, 1, 9000), 2).astype(np.float32)
        with torch.no_grad(): made.encoder_weight.copy_(torch.from_numpy(row[kept])[None])
        models.append(made)
    for measure in MEASURES:
        square = similarity(models, measure).matrix().to_numpy()
        for i, j in ((0, 1), (0, 3), (1, 2)): assert square[i, j] == pytest.approx(slow(measure, full[i], full[j]), abs=1e-6 if dear else 1e-9), measure


def test_pruning_zeros_changes_nothing():
    values = np.where(np.arange(SPACE.full_n) % 3 == 0, 0.0, np.linspace(-2, 3, SPACE.full_n))
    other = model(np.cos(np.arange(SPACE.full_n)))
    kept = np.flatnonzero(values)
    whole, cut = model(values), model(values[kept], kept)
    for measure in MEASURES:
        assert similarity([whole, other], measure).frame.equals(similarity([cut, other], measure).frame)
        assert similarity([whole, cut], measure).frame["similarity"][0] == pytest.approx(1.0, abs=1e-6)


def test_signs_matter_only_where_they_are_asked_for():
    values = np.linspace(-2, 3, SPACE.full_n)
    x, turned = model(values), model(-values)
    for measure in MEASURES:
        assert similarity([x, turned], measure).frame["similarity"][0] == pytest.approx(-1 if "signed" in measure else 1, abs=1e-6)


def test_chance_is_what_dealing_the_values_out_gives():
    rng = np.random.default_rng(0)
    kept = [np.arange(0, 30), np.arange(10, 39)]
    values = [rng.gamma(1.0, size=len(k)) for k in kept]
    dealt = {measure: [] for measure in ("cosine", "spearman", "mass_overlap")}
    for _ in range(300):
        drawn = [np.zeros(SPACE.full_n) for _ in kept]
        for full, k, v in zip(drawn, kept, values, strict=True): full[k] = rng.permutation(v)
        for measure, found in dealt.items(): found.append(slow(measure, *drawn))
    for measure, found in dealt.items():
        row = similarity([model(v, k) for v, k in zip(values, kept, strict=True)], measure).frame.iloc[0]
        assert row["expected_by_chance"] == pytest.approx(np.mean(found), abs=0.03), measure
        assert (row["shared"], row["used_a"], row["used_b"]) == (20, 30, 29)


def test_topk_uses_the_largest_by_size():
    values = np.linspace(-3, 2, SPACE.full_n)
    row = similarity([model(values), model(values[::-1].copy())], "cosine_signed", topk=4).frame.iloc[0]
    expected = slow("cosine_signed", *(np.where(abs(v) >= np.sort(abs(v))[-4], v, 0) for v in (values, values[::-1])))
    assert row["similarity"] == pytest.approx(expected, abs=1e-6, nan_ok=True) and row["used_a"] == 4
    assert similarity([model(values), model(values)], topk=0.1).frame["used_a"][0] == 4  # a share of 39, rounded up
    with pytest.raises(InputError, match="kept 3"): similarity([model(values), model(values[:3], [0, 1, 2])], topk=4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0, 1e-45, -1e-45, math.inf, -math.inf]), st.floats(allow_nan=False, width=32))))
def test_midranks_are_those_of_pandas(dtype, numbers):
    values = np.array(numbers, dtype=dtype)
    assert midranks(torch.from_numpy(values)).tolist() == pd.Series(values).rank(method="average").tolist()


def test_midranks_of_many_values_and_of_none():
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[::7] = np.round(values[::7], 2)
    assert (midranks(torch.from_numpy(values)).numpy() == pd.Series(values).rank(method="average").to_numpy()).all()
    assert midranks(torch.empty(0)).tolist() == []


@pytest.mark.slow
def test_midranks_of_more_values_than_float32_can_number():
    n = 2**23 + 4  # halves of such ranks are no float32 any more
    values = torch.arange(n, dtype=torch.float32)
    values[-2:] = values[-1]
    assert midranks(values)[-3:].tolist() == [n - 2, n - 0.5, n - 0.5]


def test_parts_and_dimensions():
    two = GradiendModel.create(SPACE, GradiendConfig(pair=("a", "b"), latent_dim=2))
    assert torch.equal(part_values(two, "decoder-weight", 1), two.decoder_weight.detach()[:, 1])
    assert torch.equal(part_values(two, signed=False), two.importance("encoder-weight"))
    assert torch.equal(part_values(two, "decoder-bias"), two.decoder_bias.detach())
    with pytest.raises(InputError, match="dimension=0 to 1"): similarity([two, two], "spearman_signed")
    with pytest.raises(InputError, match="counted from 0"): similarity([two, two], dimension=2)
    one = GradiendModel.create(SPACE, GradiendConfig(pair=("a", "b"), bias_decoder=False))
    assert torch.equal(part_values(one, "encoder-weight", signed=False), one.importance("encoder-weight"))
    with pytest.raises(InputError, match="decoder bias"): similarity([one, one], part="decoder-sum")
    half = GradiendModel(two.space, two.config, {name: p.detach().half() for name, p in two.named_parameters()})
    assert part_values(half, dimension=0).dtype == torch.float32


@pytest.mark.parametrize("part", ["decoder-bias", "decoder-sum"])
def test_other_parts_agree_with_importance(part):
    m = GradiendModel.create(SPACE, GradiendConfig(pair=("a", "b")))
    assert torch.allclose(part_values(m, part, signed=False), m.importance(part))


def test_used_entries_of_unpruned_and_pruned_tensors():
    space = SPACE.keep([0, 1, 5, 21, 30])
    small, values = used_entries(space, torch.tensor([1.0, 0.0, -2.0, 0.0, 3.0]))
    assert small.global_index.tolist() == [0, 5, 30] and values.tolist() == [1.0, -2.0, 3.0]
    nothing, values = used_entries(SPACE, torch.zeros(SPACE.n))
    assert nothing.n == 0 and len(values) == 0


# --- what may be compared, and under which names ------------------------------------------------------------------

def test_names():
    x = model(np.ones(SPACE.n), pair=("x", "y"))
    assert list(named_models([x, x, x])) == ["x-y", "x-y (2)", "x-y (3)"]
    assert list(named_models({"a": x})) == ["a"] and list(named_models((x,), labels=["b"])) == ["b"]
    assert list(named_models({"a": x, "b": x}, labels=["c", "d"])) == ["c", "d"]


class Suite:
    def __init__(self, models): self.models = models
    def get_models(self): return self.models


def test_folders_and_suites_are_read(tmp_path):
    x = model(np.ones(SPACE.n))
    x.save_pretrained(tmp_path / "x")
    found = named_models(Suite({"memory": x, "path": tmp_path / "x", "text": str(tmp_path / "x")}))
    assert list(found) == ["memory", "path", "text"] and all(torch.equal(m.encoder_weight, x.encoder_weight) for m in found.values())


@pytest.mark.parametrize("models, labels, message", [
    ([], None, "empty"), ({}, None, "empty"), (Suite({}), None, "empty"), ("folder", None, "no list"), (3, None, "no list"),
    ({1: "x", "1": "x"}, None, "'1' names more than one"), (["x", "x"], ["a", "a"], "'a' names more than one"), (["x", "x"], ["a"], "2 names"),
    (["x", "x"], "ab", "2 names"), ([nn.Linear(2, 2)], None, "entry 0 is a Linear"), ({"a": None}, None, "'a' is a NoneType"), (["no/such/folder"], None, "no/such/folder")])
def test_bad_collections(models, labels, message):
    with pytest.raises(InputError, match=message): named_models(models, labels)


def test_one_model_is_no_comparison():
    with pytest.raises(InputError, match="at least 2"): similarity([model(np.ones(SPACE.n))])
    with pytest.raises(InputError, match="no list"): similarity(model(np.ones(SPACE.n)))


def test_other_base_models_are_refused():
    one, two, unknown = (model(np.ones(SPACE.n), base_model=base) for base in (
        {"name": "bert", "fingerprint": "f1"}, {"name": "tuned", "fingerprint": "f2"}, {"name": "old"}))
    with pytest.raises(InputError, match=r"bert \(fingerprint f1\) and 'b' on tuned \(fingerprint f2\)"): similarity({"a": one, "b": two})
    check_comparable({"a": one, "b": unknown, "c": one})
    other = GradiendModel.create(ParameterSpace.from_model(nn.Linear(3, 3)), GradiendConfig(pair=("a", "b")))
    with pytest.raises(InputError, match="one has 0.weight"): similarity({"a": one, "b": other})


def test_groups():
    names = ["emb.weight", "layers.0.mlp.weight", "layers.0.mlp.bias", "layers.1.mlp.weight"]
    space = ParameterSpace.from_global(names, [[3, 2], [2, 2], [2], [2, 2]], [0, 7])
    assert entry_groups(space, "component").names == ("emb.weight", "layers.*.mlp.weight", "layers.*.mlp.bias")
    assert entry_groups(space, "component").sizes == (6, 8, 2) and entry_groups(space, "component").codes == (0, 1, 2, 1)
    assert entry_groups(space, "parameter").sizes == (6, 4, 2, 4)
    with pytest.raises(InputError, match="gives None for 'emb.weight'"): entry_groups(space, lambda name: None)
    with pytest.raises(InputError, match="by='layers'"): entry_groups(space, "layers")


def test_result():
    x, y = model(np.ones(SPACE.n)), model(np.arange(SPACE.n))
    result = similarity({"x": x, "y": y}, by="layer")
    assert result.groups == ("0", "1") and result["measure"] == "cosine"
    with pytest.raises(InputError, match="2 of them"): result.matrix()
    with pytest.raises(InputError, match="choose one of '0', '1'"): result.matrix("2")
    assert result.matrix("0", "shared").loc["x", "y"] == 23 and result.matrix("0", "shared").loc["x", "x"] == 24
    assert math.isnan(result.matrix("0", "expected_by_chance").loc["x", "x"])
    with pytest.raises(InputError, match="column='used_a'"): result.matrix("0", "used_a")
    assert replace(result, groups=("0",)).matrix().shape == (2, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value):
    fine, broken = model(np.ones(SPACE.n)), model([value, *np.ones(SPACE.n - 1)])
    for measure in MEASURES:
        with pytest.raises(InputError, match="'broken' has 1 values in its encoder-weight"): similarity({"fine": fine, "broken": broken}, measure)
