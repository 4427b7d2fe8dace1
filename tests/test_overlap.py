"Overlap: sets against a slow reference, chance against exact counting and against blind drawing."
import math
import random
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from gradiend.core import InputError
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.overlap import (chance_of_at_least, chance_overlap, compare_sets, kept_expectation, model_labels, topk_overlap,
                              topk_sets)

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


def test_moments_of_the_full_distribution():
    a, b, n = 13, 9, 40
    p = [math.comb(a, i) * math.comb(n - a, b - i) / math.comb(n, b) for i in range(10)]
    mean = sum(i * q for i, q in enumerate(p))
    std = math.sqrt(sum((i - mean) ** 2 * q for i, q in enumerate(p)))
    assert chance_overlap(a, b, n) == pytest.approx((mean, std))


def test_expectation_within_the_kept_weights_is_what_blind_drawing_gives():
    first, second = model(0, keep=range(0, 120)), model(0, keep=range(60, 200))
    rng = np.random.default_rng(0)
    drawn = [len(np.intersect1d(rng.choice(range(0, 120), 30, replace=False), rng.choice(range(60, 200), 50, replace=False)))
             for _ in range(3000)]
    assert kept_expectation(first, second, 30, 50) == pytest.approx(np.mean(drawn), abs=0.15)
    assert kept_expectation(model(0), second, 30, 50) == pytest.approx(30 * 50 / SPACE.full_n)


def test_unrelated_models_are_within_chance_and_equal_ones_are_not():
    frame = topk_overlap([model(s) for s in range(6)], topk=40).frame
    assert len(frame) == 15 and frame.z.abs().max() < 4 and frame.p_value.min() > 1e-4
    same = topk_overlap([model(1), model(1)], topk=40).frame.iloc[0]
    assert same.z > 10 and same.p_value < 1e-20


def test_empty_and_full_sets_do_not_divide_by_zero():
    row = compare_sets({"a": frozenset(), "b": frozenset({1})}, 10).iloc[0]
    assert (row.fraction, row.z, row.p_value) == (0.0, 0.0, 1.0)
    everything = frozenset(range(10))
    row = compare_sets({"a": everything, "b": everything}, 10).iloc[0]
    assert (row.fraction, row.z, row.p_value) == (1.0, 0.0, 1.0)


def test_labels():
    assert model_labels([model(pair=("x", "y"))] * 3) == ["x-y", "x-y (2)", "x-y (3)"]
    for bad in (["one"], ["same", "same"], "ab"):
        with pytest.raises(InputError, match="labels"):
            model_labels([model(), model()], bad)


def test_other_spaces_are_refused_and_other_base_models_warned_about():
    stranger = model(space=ParameterSpace.from_model(nn.Linear(5, 5)))
    with pytest.raises(InputError, match="cannot be compared"):
        topk_overlap([model(), stranger], topk=5)
    bases = [{"name": "one", "fingerprint": "f1"}, {"name": "two", "fingerprint": "f2"}]
    with pytest.warns(UserWarning, match="trained on one .* on two"):
        topk_overlap([model(0, base=bases[0]), model(1, base=bases[1])], topk=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_overlap([model(0, base=bases[0]), model(1, base=bases[0])], topk=5)


def test_too_few_weights_are_said():
    with pytest.warns(UserWarning, match="pruned to 12 weights"):
        assert len(topk_sets([model(keep=range(12))], topk=20)["a-b"]) == 12
    with pytest.raises(InputError, match="at least two"):
        topk_overlap([model()])
