"Overlap: sets against a slow reference, chance against exact counting and against blind drawing."
import copy
import math
import pickle
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from gradiend.comparison import ONE, entry_groups, shared_products
from gradiend.core import InputError
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend import comparison, overlap as module
from gradiend.overlap import chance_of_at_least, chance_overlap, chance_within_kept, kept_expectation, largest, overlap_of, topk_overlap, topk_sets

SPACE = ParameterSpace.from_model(nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 3)))


def model(seed=0, keep=None, pair=("a", "b"), space=SPACE, base=None):
    "A GRADIEND with a random decoder over all of a space or over the given global indices."
    config = GradiendConfig(source="alternative", target="diff", pair=pair)
    if base is not None:
        config = replace(config, base_model=base)
    made = GradiendModel.create(space if keep is None else space.keep(torch.as_tensor(keep)), config, seed=seed)
    with torch.no_grad():
        made.decoder_weight.copy_(torch.randn(made.space.n, 1, generator=torch.Generator().manual_seed(seed)))
    return made


def slow_topk(m, k):
    "Rank (size, position) pairs in plain Python; the position is translated through the space by hand."
    sizes = m.decoder_weight[:, 0].abs().tolist()
    order = sorted(range(m.space.n), key=lambda i: -sizes[i])[:k]
    return {int(m.space.global_index[i]) for i in order}


@pytest.mark.parametrize("k", [1, 7, 100])
def test_sets_agree_with_the_slow_reference(k):
    members = [model(1), model(2, keep=range(0, SPACE.n, 2)), model(3, keep=range(100, 220))]
    assert list(topk_sets(members, topk=k).values()) == [slow_topk(m, k) for m in members]


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), levels=st.sampled_from([1, 2, 5, 300, None]), order=st.sampled_from(["drawn", "rising", "falling", "those looked at"]), seed=st.integers(0, 99), data=st.data())
def test_the_largest_are_those_of_topk(n, levels, order, seed, data):
    "Whatever the sample says that is looked at first, and wherever the cut falls among equal values: the set that `Tensor.topk` takes."
    g, k = torch.Generator().manual_seed(seed), data.draw(st.integers(1, n))
    values = torch.rand(n, generator=g) if levels is None else torch.randint(levels, (n,), generator=g).float()
    if order in ("rising", "falling"): values = values.sort(descending=order == "falling").values
    if order == "those looked at": values[::module.STEP] += 400
    found = largest(values, k)
    assert found.tolist() == sorted(values.topk(k).indices.tolist()) and (np.diff(found) > 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), members=st.integers(2, 5), levels=st.sampled_from([3, 40, None]), k=st.one_of(st.integers(1, 60), st.floats(0.01, 0.25)), by=st.sampled_from([None, "parameter", "layer"]))
def test_counts_are_those_of_naive_sets(seed, members, levels, k, by):
    "Differently pruned and whole models, with and without ties, k as a number and as a share: against Python's sets of what each model's own topk says."
    rng, models = random.Random(seed), {}
    for i in range(members):
        made = model(seed + i, keep=None if rng.random() < 0.3 else sorted(rng.sample(range(SPACE.n), rng.randint(65, SPACE.n))))
        if levels is not None:
            with torch.no_grad(): made.decoder_weight.mul_(levels / 3).round_()
        models[f"m{i}"] = made
    result, count = topk_overlap(models, k, by=by), k if isinstance(k, int) else math.ceil(Fraction(repr(k)) * SPACE.n)
    naive = {name: set(made.topk(count).tolist()) for name, made in models.items()}
    assert result.sets == naive == topk_sets(models, topk=k) and [index.tolist() for index in result.indices.values()] == [sorted(own) for own in naive.values()]
    kept = {name: set(made.space.global_index.tolist()) for name, made in models.items()}
    starts = np.cumsum([0, *SPACE.totals])
    where = {None: ["all"] * 4, "parameter": list(SPACE.names), "layer": ["0", "0", "1", "1"]}[by]
    for group in result.groups:
        here = {e for name, start, end in zip(where, starts, starts[1:], strict=False) if name == group for e in range(start, end)}
        squares = {column: result.matrix(column, group) for column in ("intersection", "fraction", "jaccard")}
        for a in models:
            for b in models:
                own, other = naive[a] & here, naive[b] & here
                if a == b and not own:
                    assert math.isnan(squares["fraction"].loc[a, a])
                    continue
                shared = len(own & other)
                assert squares["intersection"].loc[a, b] == shared
                assert squares["fraction"].loc[a, b] == shared / max(min(len(own), len(other)), 1)
                assert squares["jaccard"].loc[a, b] == shared / max(len(own | other), 1)
                both = result.kept.counts[result.groups.index(group)][list(models).index(a), list(models).index(b)]
                assert both == len(kept[a] & kept[b] & here)


def test_a_fraction_is_relative_to_the_full_space():
    sets = topk_sets([model(1), model(2, keep=range(150))], topk=0.1)
    assert {len(s) for s in sets.values()} == {math.ceil(0.1 * SPACE.full_n)}


def test_pruning_does_not_change_which_weights_are_shared():
    whole = model(4)
    best = sorted(slow_topk(whole, 50))
    cut = model(0, keep=best)
    with torch.no_grad():
        cut.decoder_weight.copy_(whole.decoder_weight[best])
    row = topk_overlap([whole, cut], topk=50).frame.iloc[0]
    assert row.intersection == 50 and row.fraction == 1.0


def test_tail_is_exact():
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 60)
        a, b = rng.randint(0, n), rng.randint(0, n)
        x = rng.randint(0, min(a, b))
        hits = sum(math.comb(a, i) * math.comb(n - a, b - i) for i in range(x, min(a, b) + 1))
        assert chance_of_at_least(x, a, b, n) == pytest.approx(float(Fraction(hits, math.comb(n, b))), rel=1e-9), (x, a, b, n)


def test_tail_at_its_ends_and_for_large_spaces():
    assert chance_of_at_least(0, 5, 5, 100) == 1.0
    assert chance_of_at_least(6, 5, 5, 100) == 0.0
    assert chance_of_at_least(5, 5, 100, 100) == 1.0
    tails = [chance_of_at_least(x, 1000, 1000, 100_000_000) for x in range(4)]
    assert tails == sorted(tails, reverse=True)
    # one shared element, nearly Poisson with mean 0.01
    assert tails[1] == pytest.approx(1 - math.exp(-0.01), rel=1e-3)


def test_tail_of_sets_of_millions():
    "Where terms far from the mean are left out: against all terms, written with factorials."
    a, b, n = 300_000, 200_000, 5_000_000
    mean, std = chance_overlap(a, b, n)
    i = torch.arange(b + 1, dtype=torch.float64)
    terms = -torch.stack([torch.lgamma(m + 1) for m in (i, a - i, b - i, n - a - b + i)]).sum(0)
    weights = (terms - terms.max()).exp()
    for distance in (-6, -1, 0, 1, 5, 20):
        x = round(mean + distance * std)
        assert chance_of_at_least(x, a, b, n) == pytest.approx(float(weights[x:].sum() / weights.sum()), rel=1e-5)
    assert chance_of_at_least(a, a, b, n) == chance_of_at_least(b, a, b, n) == 0.0
    assert chance_of_at_least(b - 1, b, b, b) == 1.0


def test_moments_of_the_full_distribution():
    a, b, n = 13, 9, 40
    p = [math.comb(a, i) * math.comb(n - a, b - i) / math.comb(n, b) for i in range(10)]
    mean = sum(i * q for i, q in enumerate(p))
    std = math.sqrt(sum((i - mean) ** 2 * q for i, q in enumerate(p)))
    assert chance_overlap(a, b, n) == pytest.approx((mean, std))


def test_expectation_within_the_kept_weights_is_what_blind_drawing_gives():
    spaces = [SPACE.keep(range(0, 120)), SPACE.keep(range(60, 200)), SPACE]
    rng = np.random.default_rng(0)
    drawn = [len(np.intersect1d(rng.choice(range(0, 120), 30, replace=False), rng.choice(range(60, 200), 50, replace=False)))
             for _ in range(3000)]
    shared = shared_products(spaces, {}, [(ONE, ONE)], entry_groups(SPACE))[ONE, ONE]
    expected = kept_expectation(shared, np.array([[30.0, 50.0, 30.0]]))[0]
    for x in (1, 4, 7, 10, 13):
        assert chance_within_kept(x, (30, 50), (120, 140), 60) == pytest.approx(np.mean(np.array(drawn) >= x), abs=0.035)
    assert expected[0, 1] == pytest.approx(np.mean(drawn), abs=0.15)
    assert expected[2, 1] == pytest.approx(30 * 50 / SPACE.full_n)


def test_tail_within_kept_is_exact():
    "Against the double sum in whole numbers, and the same from either side."
    rng = random.Random(0)
    for _ in range(300):
        n_a, n_b = rng.randint(1, 25), rng.randint(1, 25)
        both, a, b = rng.randint(0, min(n_a, n_b)), rng.randint(0, n_a), rng.randint(0, n_b)
        x = rng.randint(0, min(a, b) + 1)
        hits = sum(math.comb(both, j) * math.comb(n_a - both, a - j) * math.comb(j, i) * math.comb(n_b - j, b - i)
                   for j in range(min(both, a) + 1) for i in range(x, min(j, b) + 1))
        expected = float(Fraction(hits, math.comb(n_a, a) * math.comb(n_b, b)))
        found = chance_within_kept(x, (a, b), (n_a, n_b), both)
        assert found == pytest.approx(expected, rel=1e-9), (x, a, b, n_a, n_b, both)
        assert found == pytest.approx(chance_within_kept(x, (b, a), (n_b, n_a), both), rel=1e-9)


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_chances_of_many_pairs_are_those_of_each(at_once, monkeypatch):
    "Pairs of equal and of different sizes, computed together, all at once or in portions, against whole numbers."
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    rng, cases = random.Random(1), []
    for n_a, n_b, a, b in [(30, 30, 9, 9)] * 40 + [(30, 25, 9, 12)] * 20 + [(25, 30, 12, 9)] * 20 + [(5, 5, 0, 3), (1, 1, 1, 1), (40, 0, 5, 0)]:
        cases.append((rng.randint(0, min(a, b)), a, b, n_a, n_b, rng.randint(0, min(n_a, n_b))))
    x, a, b, n_a, n_b, both = np.array(cases).T
    full, within = module._tails(x, a, b, np.full(len(x), 40)), module._within(x, (a, b), (n_a, n_b, both))
    for found, found_within, (x, a, b, n_a, n_b, both) in zip(full, within, cases, strict=True):
        hits = sum(math.comb(a, i) * math.comb(40 - a, b - i) for i in range(x, min(a, b) + 1))
        assert found == pytest.approx(float(Fraction(hits, math.comb(40, b))), rel=1e-9)
        hits = sum(math.comb(both, j) * math.comb(n_a - both, a - j) * math.comb(j, i) * math.comb(n_b - j, b - i)
                   for j in range(min(both, a) + 1) for i in range(x, min(j, b) + 1))
        assert found_within == pytest.approx(float(Fraction(hits, math.comb(n_a, a) * math.comb(n_b, b))), rel=1e-9), (x, a, b, n_a, n_b, both)


def test_chances_of_large_sets_do_not_depend_on_their_neighbours():
    "Windows of terms are cut for a portion of pairs; each pair must get what it gets alone."
    x, both = np.array([4_400, 5_001, 5_150, 7_600]), np.array([450_000, 500_000, 500_000, 700_000])
    size, kept = (200_000, 200_000), (2_000_000, 2_000_000)
    together = module._within(x, np.full((2, 4), size[0]), (*np.full((2, 4), kept[0]), both))
    alone = [chance_within_kept(*pair) for pair in zip(x.tolist(), [size] * 4, [kept] * 4, both.tolist(), strict=True)]
    assert together == pytest.approx(alone, rel=1e-9) and 0.4 < alone[1] < 0.6 and alone[3] < 1e-12


def test_tail_within_kept_of_large_sets():
    million = 1_000_000
    whole = chance_within_kept(10_500, (million, million), (100 * million,) * 2, 100 * million)
    assert whole == pytest.approx(chance_of_at_least(10_500, million, million, 100 * million), rel=1e-6)
    mean = 200_000 * (200_000 / 2_000_000) / 2  # half of what each kept is common
    tails = [chance_within_kept(round(mean + d), (200_000, 200_000), (2_000_000, 2_000_000), million) for d in (-1000, 0, 300, 1000)]
    assert tails[0] > 0.999999 and tails[1] == pytest.approx(0.5, abs=0.01) and tails[2] < 0.01 and 0 < tails[3] < 1e-15
    one_side = chance_within_kept(120, (1000, 1000), (10_000, million), 10_000)  # only one was pruned: as in the full space
    assert one_side == pytest.approx(chance_of_at_least(120, 1000, 1000, million), rel=1e-6)


def test_same_kept_weights_explain_what_the_full_space_cannot():
    kept = range(0, 40)
    row = topk_overlap([model(1, keep=kept), model(2, keep=kept)], topk=20).frame.iloc[0]
    assert row.p_value < 1e-4 < row.p_within_kept == pytest.approx(chance_of_at_least(row.intersection, 20, 20, 40))


def test_sets_that_cannot_be_compared_are_refused():
    one, two, other = SPACE.keep(range(5)), SPACE.keep(range(3, 9)), ParameterSpace.from_model(nn.Linear(5, 5))
    with pytest.raises(InputError, match="at least two"): overlap_of({})
    with pytest.raises(InputError, match="at least two"): overlap_of({"a": one})
    with pytest.raises(InputError, match="spaces: 'b' cannot be compared with 'a'"): overlap_of({"a": one, "b": other})
    with pytest.raises(InputError, match="kept: it has no entry for 'b'"): overlap_of({"a": one, "b": two}, {"a": SPACE})
    with pytest.raises(InputError, match="kept: 'b' cannot be compared"): overlap_of({"a": one, "b": two}, {"a": SPACE, "b": other})
    with pytest.raises(InputError, match="kept: 'b' has chosen weights"): overlap_of({"a": one, "b": two}, {"a": SPACE, "b": one})
    assert overlap_of({"a": one, "b": two}, {"a": one, "b": SPACE}).frame["intersection"].tolist() == [2]


def test_weights_that_are_no_numbers_are_refused():
    broken = model(2)
    with torch.no_grad(): broken.decoder_weight[3] = math.nan
    with pytest.raises(InputError, match="'broken' has 1 values in its decoder-weight"): topk_overlap({"fine": model(1), "broken": broken}, topk=5)


def test_unrelated_models_are_within_chance_and_equal_ones_are_not():
    frame = topk_overlap([model(s) for s in range(6)], topk=40).frame
    assert len(frame) == 15 and frame.z.abs().max() < 4 and frame.p_value.min() > 1e-4
    same = topk_overlap([model(1), model(1)], topk=40).frame.iloc[0]
    assert same.z > 10 and same.p_value < 1e-20


def sets_of(n, **sets):
    "The overlap of given sets among n entries of one tensor."
    full = ParameterSpace.from_global(["w"], [[n]], None)
    return overlap_of({name: full.keep(members) for name, members in sets.items()})


def test_empty_and_full_sets_do_not_divide_by_zero():
    row = sets_of(10, a=[], b=[1]).frame.iloc[0]
    assert (row.fraction, row.jaccard, row.z, row.p_value) == (0.0, 0.0, 0.0, 1.0)
    row = sets_of(10, a=range(10), b=range(10)).frame.iloc[0]
    assert (row.fraction, row.jaccard, row.z, row.p_value) == (1.0, 1.0, 0.0, 1.0)


def test_counts_of_random_sets():
    rng = random.Random(1)
    for n in (7, 300, 5000):
        sets = {name: rng.sample(range(n), rng.randint(0, n)) for name in "abcd"}
        result = sets_of(n, **sets)
        assert result.sets == {name: frozenset(own) for name, own in sets.items()}
        for row in result.frame.itertuples():
            a, b = set(sets[row.a]), set(sets[row.b])
            assert (row.size_a, row.size_b, row.intersection) == (len(a), len(b), len(a & b))
            assert row.fraction == len(a & b) / max(min(len(a), len(b)), 1) and row.jaccard == len(a & b) / max(len(a | b), 1)
            assert row.p_within_kept == pytest.approx(row.p_value, rel=1e-9) and row.expected_within_kept == pytest.approx(row.expected_by_chance)
            assert row.expected_by_chance == pytest.approx(len(a) * len(b) / n)


def test_groups_divide_the_whole():
    members = {"x": model(1), "y": model(2, keep=range(0, SPACE.n, 2)), "z": model(3)}
    whole, parts = topk_overlap(members, 60), topk_overlap(members, 60, by="parameter")
    assert parts.groups == list(SPACE.names) and len(parts.frame) == 3 * len(SPACE.names)
    starts = dict(zip(SPACE.names, np.cumsum([0, *SPACE.totals]), strict=False))
    for row in parts.frame.itertuples():
        here = set(range(starts[row.group], starts[row.group] + SPACE.totals[SPACE.names.index(row.group)]))
        a, b = whole.sets[row.a] & here, whole.sets[row.b] & here
        assert (row.size_a, row.size_b, row.intersection) == (len(a), len(b), len(a & b))
        assert row.expected_by_chance == pytest.approx(len(a) * len(b) / len(here))
        assert row.p_value == pytest.approx(chance_of_at_least(len(a & b), len(a), len(b), len(here)))
        assert parts.sizes[row.group][row.a] == len(a)
    sums = parts.frame.groupby(["a", "b"], sort=False)["intersection"].sum()
    assert sums.tolist() == whole.frame["intersection"].tolist()
    alone = parts.matrix("jaccard", SPACE.names[0])
    assert np.allclose(alone, alone.T) and alone.loc["x", "x"] == 1.0


def test_a_share_counts_the_full_space_and_by_takes_a_function():
    result = topk_overlap([model(1), model(2)], topk=0.1, by=lambda name: "bias" if name.endswith("bias") else "weight")
    assert {len(index) for index in result.indices.values()} == {math.ceil(0.1 * SPACE.full_n)} and result.groups == ["weight", "bias"]


def test_square_of_every_column():
    result = topk_overlap({"x": model(1), "y": model(2), "z": model(1)}, topk=40)
    for column in ("fraction", "jaccard", "intersection", "expected_by_chance", "expected_within_kept", "p_value", "p_within_kept", "z"):
        square = result.matrix(column)
        assert square.loc["x", "y"] == square.loc["y", "x"] == result.frame[column][0]
        assert np.isnan(square.loc["x", "x"]) == (column not in ("fraction", "jaccard", "intersection"))
    assert result.matrix("intersection").loc["x", "z"] == 40 == result.matrix("intersection").loc["x", "x"]
    with pytest.raises(InputError, match="column='size_a'"): result.matrix("size_a")
    with pytest.raises(InputError, match="choose one of 'all'"): result.matrix(group="0")


def test_other_spaces_and_other_base_models_are_refused():
    stranger = model(space=ParameterSpace.from_model(nn.Linear(5, 5)))
    with pytest.raises(InputError, match="cannot be compared"):
        topk_overlap([model(), stranger], topk=5)
    bases = [{"name": "one", "fingerprint": "f1"}, {"name": "two", "fingerprint": "f2"}]
    with pytest.raises(InputError, match="trained on one .* on two"):
        topk_overlap([model(0, base=bases[0]), model(1, base=bases[1])], topk=5)
    assert len(topk_overlap([model(0, base=bases[0]), model(1, base=bases[0])], topk=5).frame) == 1
    with pytest.raises(InputError, match="'x' and 'y' cannot be compared: 'x' was trained on one"):  # the first model knows nothing
        topk_overlap({"w": model(2), "x": model(0, base=bases[0]), "y": model(1, base=bases[1])}, topk=5)
    assert len(topk_overlap([model(2), model(0, base=bases[0]), model(3), model(1, base=bases[0])], topk=5).frame) == 6


def test_too_few_weights_are_refused():
    with pytest.raises(InputError, match="20 weights are asked for, and 'a-b' was pruned to 12; ask for at most 12"):
        topk_sets([model(keep=range(12))], topk=20)
    with pytest.raises(InputError, match="at least 2"):
        topk_overlap([model()])
    with pytest.raises(InputError, match="topk"):
        topk_overlap([model(), model()], topk=0)


def test_chance_waits_until_it_is_asked_for(monkeypatch):
    "What pairs share needs no probabilities; the table does, once, and not again after pickling or renaming."
    calls, real = [], module._tails
    monkeypatch.setattr(module, "_tails", lambda *given: calls.append(1) or real(*given))
    members = {"x": model(1, keep=range(150)), "y": model(2, keep=range(50, 220)), "z": model(3)}
    result = topk_overlap(members, 40)
    for column in ("fraction", "intersection", "jaccard"): result.matrix(column)
    assert result.sizes == {"all": {"x": 40, "y": 40, "z": 40}} and not calls and result.kept.tables
    for copied in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert not copied.kept.tables and copied.frame.equals(result.frame) and copied.sets == result.sets
    before = len(calls)
    assert result.frame is result.frame and len(calls) == before and not result.kept.tables
    renamed = replace(result, indices=dict(zip("abc", result.indices.values(), strict=True)))
    assert renamed.frame.drop(columns=["a", "b"]).equals(result.frame.drop(columns=["a", "b"])) and renamed.frame["b"].tolist() == ["b", "c", "c"]
    assert renamed.matrix("p_value").to_numpy()[0, 1] == result.frame["p_value"][0] and list(renamed.sizes["all"]) == ["a", "b", "c"]


def test_saved_models_are_compared_without_anything_else(tmp_path):
    for seed in (1, 2): model(seed).save_pretrained(tmp_path / str(seed))
    saved = topk_overlap({"one": tmp_path / "1", "two": str(tmp_path / "2")}, 30)
    assert saved.frame.equals(topk_overlap({"one": model(1), "two": model(2)}, 30).frame)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=60), st.sampled_from([1, 10**6]), st.sampled_from([401, 10**6, 2**31, 2**33]))
def test_columns_are_numbered_as_naive_counting_does(places, scale, width):
    "By counting and by sorting, in 32 and in 64 bits."
    places, width = [place * scale for place in places], max(width, 400 * scale + 1)
    if width > 10**7 and comparison.SPARSE * len(places) >= width: return
    column, fill = comparison.shared_columns(np.array(places, dtype=np.int64), width)
    shared = sorted({place for place in places if places.count(place) > 1})
    assert fill.tolist() == [places.count(place) for place in shared]
    assert column.tolist() == [shared.index(place) if place in shared else len(shared) for place in places]
