"""Choosing the largest entries against a plain sort, importance against one gradient per row, samples and configurations."""
import json
import math
import warnings

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradiend.pruning as pruning
from gradiend.core import InputError
from gradiend.data.examples import make_examples
from gradiend.gradients.engine import KINDS
from gradiend.gradients.rows import row_gradients
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.pruning import (BUDGETS, PostPruneConfig, PrePruneConfig, chosen_entries, class_weights, cut_space, gradient_importance, largest, largest_in,
                              prune_space, sample_rows, shares, topk_count)
from gradiend.trainer.arguments import TrainingArguments

from .tiny import tiny_model

ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "The baker was late because [MASK] missed the bus.",
               "The dogs barked because [MASK] were cold.", "Anna said that [MASK] was tired.", "The kettle whistled until [MASK] was empty."],
    "factual": ["they", "he", "they", "she", "it"], "alternative": ["he", "they", "it", "they", "they"],
    "factual_class": ["3PL", "3SG", "3PL", "3SG", "3SG"], "alternative_class": ["3SG", "3PL", "3SG", "3PL", "3PL"], "split": "train",
})


def examples(rows=ROWS):
    return make_examples(rows, pair=("3SG", "3PL"))


def many_examples(singular: int, plural: int):
    "So many rows whose factual word is singular, and plural."
    one, two = ROWS.iloc[[1] * singular], ROWS.iloc[[0] * plural]
    frame = pd.concat([one, two], ignore_index=True)
    return examples(frame.assign(masked=[f"{text} {i}" for i, text in enumerate(frame.masked)]))


@pytest.fixture(scope="module")
def tiny():
    tokenizer, model = tiny_model("bert")
    return masked_lm(tokenizer), model, ParameterSpace.from_model(model)


# --- the largest -----------------------------------------------------------------------------------------------

def by_sorting(values, k):
    return values.argsort(descending=True, stable=True)[:k].sort().values


SPECIAL = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, 1.0 + 2**-23, -1.0, 3.4e38, -3.4e38, 65504.0, 1.0])


@pytest.mark.parametrize("chunk", [5, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_largest_equals_a_stable_sort(dtype, chunk, monkeypatch):
    monkeypatch.setattr(pruning, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    special = SPECIAL.clamp(-6e4, 6e4) if dtype == torch.float16 else SPECIAL.clamp(-3e38, 3e38)
    for values in (special.to(dtype), torch.randn(60, generator=g).to(dtype), torch.randint(0, 4, (60,), generator=g).to(dtype), torch.zeros(9, dtype=dtype),
                   (torch.rand(60, generator=g, dtype=torch.float64) * 1e-9 + 1).to(dtype), torch.tensor([2.5], dtype=dtype)):
        for k in sorted({1, 2, *range(3, len(values), 5), len(values)} & set(range(len(values) + 1))):
            assert torch.equal(largest(values, k), by_sorting(values, k)), (values, k)


def test_pieces_are_searched_together():
    g = torch.Generator().manual_seed(1)
    pieces = [torch.randint(0, 9, (n,), generator=g).float() for n in (4, 0, 7, 1)]
    begins = [0, 4, 4, 11]
    for k in range(13):
        found = torch.cat([p + b for p, b in zip(largest_in(pieces, k), begins)])
        assert torch.equal(found, by_sorting(torch.cat(pieces), k))


class Allocations(TorchDispatchMode):
    "Remembers the bytes of the largest new tensor."

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def test_no_memory_grows_with_the_number_of_entries():
    "Never more than a few chunks of 8 bytes, although the values alone take eleven times as much."
    values = torch.rand(11 * 2**20 + 3, generator=torch.Generator().manual_seed(0))
    with Allocations(values) as seen:
        found = largest(values, 1000)
    assert seen.largest <= 8 * pruning.CHUNK + 8 * 1000
    assert torch.equal(found, values.topk(1000).indices.sort().values)


def test_values_that_are_not_finite_are_refused():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="NaN or infinite"):
            largest(torch.tensor([1.0, bad]), 1)


@pytest.mark.parametrize("topk,n,expected", [(1, 5, 1), (5, 5, 5), (1.0, 5, 5), (0.5, 5, 3), (0.07, 100, 7), (0.29, 100, 29), (1e-9, 5, 1), (0.01, 5_983_488, 59_835)])
def test_topk_count(topk, n, expected):
    assert topk_count(topk, n) == expected


@pytest.mark.parametrize("topk", [0, -1, 0.0, -0.5, 1.5, math.nan, True, "10", None])
def test_topk_that_can_never_work(topk):
    with pytest.raises(InputError, match="topk"):
        topk_count(topk, 10)


def test_topk_above_n():
    with pytest.raises(InputError, match="topk: 11 entries are asked for and there are 10"):
        topk_count(11, 10)


# --- choosing entries ------------------------------------------------------------------------------------------

SPACE = ParameterSpace(("l.0.w", "l.1.w", "l.0.b", "end", "none"), ((20,), (5, 4), (7,), (3,), (0,)), (None,) * 5).keep([i for i in range(50) if i % 6])


def chosen_slowly(importance, space, topk, threshold, mask, budget):
    "Group by group: sort, cut, filter."
    owners = [space.locate(i).name for i in range(space.n)]
    labels = [BUDGETS[budget](name) for name in owners]
    k = space.n if topk is None else topk_count(topk, space.n)
    groups = list(dict.fromkeys(BUDGETS[budget](name) for name in space.names))
    quotas = shares([labels.count(g) for g in groups], k)
    kept = []
    for group, quota in zip(groups, quotas):
        candidates = [i for i in range(space.n) if labels[i] == group and (mask is None or int(space.global_index[i]) in mask)
                      and (threshold is None or importance[i] >= threshold)]
        kept += sorted(candidates, key=lambda i: (-float(importance[i]), i))[:quota]
    return sorted(kept)


@pytest.mark.parametrize("budget", list(BUDGETS))
@pytest.mark.parametrize("topk", [None, 1, 7, 0.25, 1.0])
@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("mask", [None, tuple(range(0, 50, 2))])
def test_chosen_entries_equal_a_slow_choice(budget, topk, threshold, mask):
    importance = torch.randint(0, 6, (SPACE.n,), generator=torch.Generator().manual_seed(4)).float()
    expected = chosen_slowly(importance, SPACE, topk, threshold, mask, budget)
    if expected:
        assert chosen_entries(importance, SPACE, topk=topk, threshold=threshold, mask=mask, budget=budget).tolist() == expected
    else:
        with pytest.raises(InputError, match="leaves? no entry|shares no entry"):
            chosen_entries(importance, SPACE, topk=topk, threshold=threshold, mask=mask, budget=budget)


def test_shares_are_proportional_and_exact():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(0, 30, (6,), generator=g).tolist()
        for k in range(sum(sizes) + 1):
            quotas = shares(sizes, k)
            assert sum(quotas) == k and all(0 <= q <= s for q, s in zip(quotas, sizes))
            assert all(abs(q - k * s / max(sum(sizes), 1)) < 1 for q, s in zip(quotas, sizes))


@pytest.mark.parametrize("action,match", [
    (lambda: chosen_entries(torch.ones(SPACE.n + 1), SPACE, topk=1), "does not fit a space"),
    (lambda: chosen_entries(torch.ones(SPACE.n), SPACE, threshold=1.5), f"^threshold: 1.5 leaves no entry of {SPACE.n} .the largest importance is 1"),
    (lambda: chosen_entries(torch.ones(SPACE.n), SPACE, mask=[0]), "^mask: it shares no entry"),
    (lambda: chosen_entries(torch.ones(SPACE.n), SPACE, mask=SPACE.global_index, threshold=1.5), "^threshold 1.5 and mask together leave no entry"),
    (lambda: chosen_entries(torch.zeros(0), SPACE.keep([]), threshold=1.0), "^space: it has no entries"), (lambda: chosen_entries(torch.ones(SPACE.n), SPACE, mask=[50]), "50 is outside"),
    (lambda: chosen_entries(torch.ones(SPACE.n), SPACE, topk=SPACE.n + 1), "topk"), (lambda: chosen_entries(torch.ones(SPACE.n), SPACE, topk=1, budget="tensor"), "budget"),
])
def test_nothing_left_and_other_errors(action, match):
    with pytest.raises(InputError, match=match):
        action()


def test_an_importance_of_zero_chooses_nothing():
    nothing = torch.zeros(SPACE.n)
    for options in ({"topk": 3}, {"topk": 0.5}, {"topk": 3, "budget": "parameter"}, {"topk": 3, "mask": SPACE.global_index[:5]}):
        with pytest.raises(InputError, match=f"importance: it is zero for all {SPACE.n} entries, so there is nothing to choose"):
            chosen_entries(nothing, SPACE, **options)
    mask = SPACE.global_index[[1, 4]]
    assert chosen_entries(nothing, SPACE, mask=mask).tolist() == [1, 4]  # nothing has to be chosen
    assert chosen_entries(nothing, SPACE, topk=1.0).tolist() == list(range(SPACE.n))
    nothing[7] = 1e-40  # one entry decides, and ties are resolved as ever
    assert chosen_entries(nothing, SPACE, topk=2).tolist() == [0, 7]


def test_rows_without_a_difference_are_found_out(tiny):
    objective, model, space = tiny
    with pytest.warns(UserWarning, match="same word"): same = examples(ROWS.assign(alternative=ROWS.factual))
    with pytest.raises(InputError, match="nothing to choose"):
        prune_space(model, objective, same, space, PrePruneConfig(n_samples=4, topk=10, source="diff"))


# --- importance ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("source", list(KINDS))
def test_importance_is_half_the_difference_of_the_class_means(tiny, source, batch_size):
    objective, model, space = tiny
    rows = examples()  # three rows against two
    slow, labels = row_gradients(model, objective, rows.frame, space=space, kind=source), torch.from_numpy(rows.labels(source))
    expected = (slow[labels == 1].mean(0) - slow[labels == -1].mean(0)).abs() / 2
    found = gradient_importance(model, objective, rows, space, source=source, batch_size=batch_size)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)
    assert (found >= 0).all() and found.dtype == torch.float32


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_importance_over_a_cut_space_is_a_part_of_the_whole(kind):
    tokenizer, model = tiny_model(kind, dtype=torch.float32)
    objective, space = masked_lm(tokenizer), ParameterSpace.from_model(model)
    whole = gradient_importance(model, objective, examples(), space)
    small = space.take(torch.arange(0, space.n, 11))
    torch.testing.assert_close(gradient_importance(model, objective, examples(), small), whole[::11], rtol=1e-4, atol=1e-6)


def test_mirrored_rows_cancel_in_the_plain_mean_only(tiny):
    "Each row once with either word as the true one: the plain mean of the difference gradient is zero, the signed one is not."
    objective, model, space = tiny
    swapped = ROWS.rename(columns={"factual": "alternative", "alternative": "factual", "factual_class": "alternative_class", "alternative_class": "factual_class"})
    rows = examples(pd.concat([ROWS, swapped.assign(split="train")], ignore_index=True))
    plain = row_gradients(model, objective, rows.frame, space=space, kind="diff").mean(0)
    signed = gradient_importance(model, objective, rows, space, source="diff")
    assert plain.abs().max() < 1e-9 and signed.max() > 1e-3


def test_class_weights():
    weights = class_weights(torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0]))
    assert weights.tolist() == pytest.approx([1 / 6, -1 / 2, 1 / 6, 0, 1 / 6])


# --- samples ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("singular,plural,n,expected", [
    (20, 20, 8, (4, 4)), (20, 20, 7, (3, 4)), (20, 3, 12, (9, 3)), (2, 20, 12, (2, 10)), (20, 20, 40, (20, 20)), (1, 1, 2, (1, 1)),
])
def test_sample_has_exactly_the_rows_asked_for(singular, plural, n, expected):
    "The label is that of the alternative word, so singular rows have label -1; an odd row goes to the first class."
    rows = many_examples(singular, plural)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = sample_rows(rows, n, source="alternative")
    labels = sample.labels("alternative")
    assert (int((labels == -1).sum()), int((labels == 1).sum())) == expected
    assert sample.frame.masked.is_unique and set(sample.frame.masked) <= set(rows.frame.masked)


def test_samples_are_seeded_and_grow():
    rows = many_examples(30, 30)
    texts = {n: sample_rows(rows, n, source="factual", seed=3).frame.masked.tolist() for n in (4, 8, 32)}
    assert texts[4] == sample_rows(rows, 4, source="factual", seed=3).frame.masked.tolist()
    assert set(texts[4]) < set(texts[8]) < set(texts[32])
    assert len({tuple(sample_rows(rows, 4, source="factual", seed=s).frame.masked) for s in range(20)}) > 15


def test_too_few_rows_are_said_aloud():
    with pytest.warns(UserWarning, match="100 rows are asked for and there are 5"):
        assert len(sample_rows(examples(), 100, source="diff")) == 5
    rows = examples()
    one_sided = rows.take([i for i, label in enumerate(rows.labels("factual")) if label > 0])
    with pytest.raises(InputError, match="both classes"):
        sample_rows(one_sided, 2, source="factual")


# --- configurations --------------------------------------------------------------------------------------------

def test_pruned_space_holds_the_largest(tiny):
    objective, model, space = tiny
    small = prune_space(model, objective, examples(), space, PrePruneConfig(n_samples=4, topk=25))
    importance = gradient_importance(model, objective, sample_rows(examples(), 4, source="alternative"), space)
    assert set(small.global_index.tolist()) == set(importance.topk(25).indices.tolist())
    space.check_comparable(small)


@pytest.mark.parametrize("change", [{"n_samples": 4}, {"topk": 30}, {"topk": 0.5}, {"threshold": 0.4}, {"source": "factual"}, {"seed": 5}, {"budget": "parameter"},
                                    {"mask": range(100, 2000)}])
def test_every_field_of_the_pre_pruning_matters(tiny, change):
    objective, model, space = tiny
    base = {"n_samples": 2, "topk": 60}
    plain, changed = (prune_space(model, objective, examples(), space, PrePruneConfig(**options)) for options in (base, base | change))
    assert plain.fingerprint != changed.fingerprint


def test_the_batch_size_is_used(tiny):
    objective, model, space = tiny
    sizes = []

    class Watched:
        name = objective.name
        losses = staticmethod(objective.losses)

        def prepare(self, frame):
            sizes.append(len(frame))
            return objective.prepare(frame)

    config = PrePruneConfig(n_samples=5, topk=30, batch_size=2)
    small = prune_space(model, Watched(), examples(), space, config)
    assert sizes == [2, 2, 1] and small.fingerprint == prune_space(model, objective, examples(), space, PrePruneConfig(n_samples=5, topk=30)).fingerprint


@pytest.mark.parametrize("change,expected", [
    ({}, [4, 5, 6]), ({"topk": 0.25}, [5, 6]), ({"threshold": 4.5}, [5, 6]), ({"mask": [2, 3, 6, 9]}, [2, 3, 6]), ({"budget": "parameter"}, [1, 4, 6]), ({"topk": None, "threshold": 5.0}, [5, 6]),
])
def test_every_field_of_the_post_pruning_matters(change, expected):
    space = ParameterSpace(("a", "b", "c"), ((2,), (3,), (5,)), (None,) * 3).keep(range(7))
    assert cut_space(space, torch.arange(7.0), PostPruneConfig(**({"topk": 3} | change))).global_index.tolist() == expected


def test_configurations_survive_json():
    mask = torch.tensor([9, 3, 3])
    args = TrainingArguments(pre_prune_config=PrePruneConfig(topk=None, threshold=0.1, mask=mask, budget="layer", batch_size=4), post_prune_config=PostPruneConfig(mask=mask.numpy()))
    again = TrainingArguments.from_dict(json.loads(json.dumps(args.to_dict())))
    assert again == args and again.post_prune_config.mask == (3, 9) and hash(again.pre_prune_config) == hash(args.pre_prune_config)


@pytest.mark.parametrize("make,match", [
    (lambda: PrePruneConfig(topk=0.0), "topk"), (lambda: PrePruneConfig(topk=-3), "topk"), (lambda: PrePruneConfig(source="both"), "source"), (lambda: PrePruneConfig(n_samples=1), "n_samples"),
    (lambda: PrePruneConfig(batch_size=0), "batch_size"), (lambda: PrePruneConfig(budget="layers"), "layer"), (lambda: PrePruneConfig(threshold=0.0), "threshold"),
    (lambda: PrePruneConfig(threshold=math.nan), "threshold"), (lambda: PrePruneConfig(topk=None), "nothing would be pruned"), (lambda: PostPruneConfig(topk=1.2), "topk"),
    (lambda: PostPruneConfig(part="decoder"), "part"), (lambda: PostPruneConfig(mask=[]), "mask"), (lambda: PostPruneConfig(mask=[True, False]), "mask"),
    (lambda: PrePruneConfig(n_samples=8.5), "n_samples: 8.5"), (lambda: PrePruneConfig(n_samples="8"), "n_samples: '8'"), (lambda: PrePruneConfig(batch_size=1.5), "batch_size: 1.5"),
    (lambda: PrePruneConfig(batch_size=True), "batch_size: True"), (lambda: PrePruneConfig(seed="a"), "seed: 'a'"), (lambda: PrePruneConfig(seed=None), "seed: None"),
    (lambda: PrePruneConfig(threshold="8"), "threshold: '8'"), (lambda: PostPruneConfig(threshold="8"), "threshold: '8'"), (lambda: PostPruneConfig(threshold=True), "threshold: True"),
    (lambda: PostPruneConfig(topk="8"), "topk: '8'"), (lambda: PostPruneConfig(mask="a"), "mask: 'a'"), (lambda: PrePruneConfig(mask=[None]), "mask"), (lambda: PrePruneConfig(source=3), "source"),
    (lambda: PostPruneConfig(budget=None), "budget"), (lambda: PostPruneConfig(mask=[-1]), "mask"), (lambda: PostPruneConfig(mask=[0.5]), "mask"), (lambda: PostPruneConfig(threshold=-1.0), "threshold"),
])
def test_values_that_cannot_work_are_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()
