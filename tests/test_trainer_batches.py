"Which rows form a batch, where gradients come from, and what the validation rows are encoded to."
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.gradients.objectives import objective_for
from gradiend.gradients.rows import both_row_gradients, row_gradients
from gradiend.gradients.space import ParameterSpace
from gradiend.gradients.store import GradientStore, write_store
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.batches import CachedStream, GradientBatch, batch_weights, class_batches, fits_budget, gradient_scale, gradient_stream, row_groups, shuffled, stacked, validation_encoder
from tests.test_trainer_loop import PAIR, examples, setting
from tests.tiny import tiny_model

FRESH = TrainingArguments(train_batch_size=5, num_train_epochs=2, cache_gradients=False)
STORED = replace(FRESH, cache_gradients="auto")


@pytest.mark.parametrize("trial", range(12))
def test_batches_hold_one_class_every_row_once_and_take_turns(trial):
    rng = np.random.default_rng(trial)
    labels, size = rng.choice([1.0, -1.0, 0.0], int(rng.integers(1, 90))), int(rng.integers(1, 12))
    batches = class_batches(labels, size, seed=trial, epoch=1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(labels)))
    kinds = [set(labels[b]) for b in batches]
    assert all(len(k) == 1 for k in kinds) and all(0 < len(b) <= size for b in batches)
    counts = Counter(next(iter(k)) for k in kinds)
    assert counts == {v: -(-int((labels == v).sum()) // size) for v in set(labels)}
    for value, total in counts.items():  # spread evenly: after any part of the epoch, that part of each class is done
        done = np.cumsum([k == {value} for k in kinds])
        share = np.arange(1, len(batches) + 1) / len(batches)
        assert np.abs(done - share * total).max() <= len(counts)


@pytest.mark.parametrize("trial", range(12))
def test_weights_make_all_classes_equal_and_all_rows_of_a_class_equal(trial):
    rng = np.random.default_rng(trial)
    labels, size = rng.choice([1.0, -1.0, 0.0], int(rng.integers(3, 90)), p=[0.6, 0.3, 0.1]), int(rng.integers(1, 12))
    batches = class_batches(labels, size, seed=trial, epoch=0)
    weights = batch_weights(labels, batches)
    per_row = np.zeros(len(labels))
    for rows, weight in zip(batches, weights): per_row[rows] = weight / len(rows)
    assert np.mean(weights) == pytest.approx(1.0)
    for value in set(labels):
        assert len(set(per_row[labels == value].round(12))) == 1
        assert per_row[labels == value].sum() == pytest.approx(len(batches) / len(set(labels)))


def test_batches_are_new_each_epoch_and_the_same_for_the_same_seed():
    labels = np.repeat([1.0, -1.0], 20)
    order = lambda **kw: [b.tolist() for b in class_batches(labels, 4, **kw)]
    assert order(seed=0, epoch=0) == order(seed=0, epoch=0) != order(seed=0, epoch=1) != order(seed=1, epoch=1)


def test_stream_gives_the_mean_of_the_row_gradients():
    model, objective, space, _ = setting()
    rows = examples(other=6).select("train")
    stream = gradient_stream(model, objective, rows, space, FRESH)
    got = list(stream)
    pair_rows = rows.take(np.flatnonzero(rows.labels("alternative")))
    assert len(got) == len(stream) == 2 * len(class_batches(pair_rows.labels("alternative"), 5, seed=0, epoch=0))
    used = [position for _, position in zip(got, stream.positions())]
    for batch, positions in zip(got, used):
        chosen = pair_rows.frame.iloc[positions]
        assert set(np.where(chosen.alternative_class == "3SG", 1.0, -1.0)) == {batch.label}
        for value, kind in ((batch.source, "alternative"), (batch.target, "diff")):
            assert torch.allclose(value, row_gradients(model, objective, chosen, space=space, kind=kind).mean(0), atol=1e-6)
        factual, _ = objective.losses(model, objective.prepare(chosen))
        assert float(batch.loss_factual) == pytest.approx(float(factual.detach().mean()), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("source,target", [("alternative", "diff"), ("factual", "factual"), ("diff", "alternative")])
def test_a_stored_batch_is_the_fresh_one_up_to_rounding(source, target):
    model, objective, space, _ = setting()
    rows = examples().select("train")
    fresh, stored = (gradient_stream(model, objective, rows, space, replace(args, source=source, target=target)) for args in (FRESH, STORED))
    assert isinstance(stored, CachedStream) and not isinstance(fresh, CachedStream)
    for a, b in zip(fresh, stored, strict=True):
        limit = 2e-3 * max(float(a.source.norm()), float(a.target.norm())) + 1e-3 * float(row_gradients(model, objective, rows.frame, space=space).norm(dim=1).max())
        assert (a.source - b.source).norm() < limit and (a.target - b.target).norm() < limit and a.label == b.label and a.weight == b.weight


def test_any_step_can_be_had_without_the_ones_before():
    model, objective, space, _ = setting()
    for args in (FRESH, STORED, replace(FRESH, gradiend_batch_size=3), replace(FRESH, max_steps=40)):
        stream = gradient_stream(model, objective, examples().select("train"), space, args)
        every = list(stream)
        assert len(every) == len(stream)
        for start in (0, 3, len(stream) - 1):
            for a, b in zip(stream.from_step(start), every[start:], strict=True):
                assert torch.equal(a.source, b.source) and torch.equal(a.target, b.target) and torch.equal(torch.as_tensor(a.weight), torch.as_tensor(b.weight))


def test_several_batches_in_one_step_use_every_row_once():
    model, objective, space, _ = setting()
    ones, threes = (gradient_stream(model, objective, examples().select("train"), space, replace(FRESH, num_train_epochs=1, gradiend_batch_size=g)) for g in (1, 3))
    assert len(threes) == -(-len(ones) // 3)
    assert torch.equal(torch.cat([b.source.reshape(-1, space.n) for b in threes]), torch.stack([b.source for b in ones]))


def test_a_class_with_fewer_rows_than_a_batch_works_with_a_note(caplog):
    model, objective, space, _ = setting()
    rows = examples().select("train")
    few = rows.take(np.r_[np.flatnonzero(rows.labels("alternative") > 0)[:2], np.flatnonzero(rows.labels("alternative") < 0)])
    stream = gradient_stream(model, objective, few, space, FRESH)
    assert "3SG has 2 training rows, fewer than train_batch_size=5" in caplog.text
    sizes = [(len(b), stream.labels[b[0]]) for b, _ in stream.plan(0)]
    assert (2, 1.0) in sizes and sum(n for n, _ in sizes) == len(few)


def test_train_max_size_caps_every_class():
    model, objective, space, _ = setting()
    rows = examples().select("train")
    capped = [gradient_stream(model, objective, rows, space, replace(FRESH, train_max_size=4, seed=s)) for s in (0, 0, 1)]
    assert Counter(capped[0].labels.tolist()) == {1.0: 4, -1.0: 4}
    assert capped[0].frame.index.tolist() == capped[1].frame.index.tolist() != capped[2].frame.index.tolist()


def identity(rows: Examples, count: int = 7) -> Examples:
    "The same rows, and some of two further classes that are their own alternatives."
    more = rows.frame.head(count).assign(factual="it", alternative="it", factual_class=["X", "Y"] * (count // 2) + ["X"] * (count % 2))
    more["alternative_class"] = more["factual_class"]
    frame = pd.concat([rows.frame, more], ignore_index=True)
    return Examples(frame, rows.pair)


def test_identity_rows_form_batches_of_their_own_class():
    model, objective, space, _ = setting()
    objective.prepare = lambda frame, old=objective.prepare: old(frame.replace({"it": "he"}))
    rows = identity(examples().select("train"))
    stream = gradient_stream(model, objective, rows, space, replace(FRESH, target="diff"))
    assert Counter(stream.labels.tolist())[0.0] == 7
    groups, names = row_groups(rows, rows.labels("alternative"))
    assert [names[g] for g in sorted(names, reverse=True)] == ["3SG", "3PL", "X", "Y"] and Counter(groups[-7:]) == {2: 4, 1: 3}
    zero = [b for b in stream if b.label == 0]
    assert len(zero) == 4 and all(not b.target.any() and b.source.any() for b in zero)  # two classes, two epochs


def test_rows_of_ordinary_other_transitions_are_left_out():
    model, objective, space, _ = setting()
    assert len(gradient_stream(model, objective, examples(other=6).select("train"), space, FRESH).frame) == len(examples().select("train"))


def test_shuffled_labels_are_a_rearrangement_that_the_seed_decides():
    model, objective, space, _ = setting()
    rows = examples().select("train")
    plain, one, same, other = (gradient_stream(model, objective, rows, space, args) for args in
                               (FRESH, replace(FRESH, shuffle_labels=True), replace(FRESH, shuffle_labels=True), replace(FRESH, shuffle_labels=True, seed=5)))
    assert sorted(plain.labels) == sorted(one.labels) and (plain.labels != one.labels).any() and (one.labels == same.labels).all() and (one.labels != other.labels).any()
    assert one.frame.equals(plain.frame) and sorted(shuffled(np.arange(9), 3)) == list(range(9))
    values = validation_encoder(model, objective, examples().select("validation"), replace(FRESH, shuffle_labels=True))(setting()[3])
    plain_values = validation_encoder(model, objective, examples().select("validation"), FRESH)(setting()[3])
    assert (values[0][0] == plain_values[0][0]).all() and (values[0][1] != plain_values[0][1]).any() and sorted(values[0][1]) == sorted(plain_values[0][1])


def test_a_supervised_part_needs_one_gradient_only():
    model, objective, space, _ = setting()
    rows = examples().select("train")
    both, encoder, decoder = (next(iter(gradient_stream(model, objective, rows, space, args))) for args in (FRESH, replace(FRESH, supervised_encoder=True), replace(FRESH, supervised_decoder=True)))
    assert torch.allclose(encoder.source, both.source, atol=1e-7) and encoder.target is not None and torch.equal(encoder.source, encoder.target)
    assert torch.allclose(decoder.target, both.target, atol=1e-7) and torch.equal(decoder.source, decoder.target)


def test_validation_encodes_the_gradients_of_all_models_and_keeps_other_rows():
    model, objective, space, models = setting(seeds=3)
    rows = examples(other=8).select("validation")
    for cache, limit in ((False, 1e-5), ("auto", 2e-3)):
        evaluate = validation_encoder(model, objective, rows, TrainingArguments(eval_batch_size=3, cache_gradients=cache))
        for source_model, (encodings, labels) in zip(models, evaluate(models)):
            expected = source_model.encode(row_gradients(model, objective, rows.frame, space=space, kind="alternative"))
            assert np.allclose(encodings, expected.detach().numpy(), atol=limit)
            assert Counter(labels.tolist())[0.0] == 4 and (labels == rows.labels("alternative")).all()
    capped = validation_encoder(model, objective, rows, TrainingArguments(eval_max_size=2))(models)[0][1]
    assert sorted(capped.tolist()) == [-1, -1, 0, 0, 1, 1]


def test_from_a_store_a_model_is_encoded_the_same_alone_and_among_others():
    model, objective, _, models = setting(seeds=5)
    evaluate = validation_encoder(model, objective, examples().select("validation"), STORED)
    together = evaluate(models)
    for i, one in enumerate(models): assert (evaluate([one])[0][0] == together[i][0]).all()


def test_one_class_only_is_refused():
    model, objective, space, _ = setting()
    rows = examples()
    one = rows.take(np.flatnonzero(rows.frame.factual_class == "3SG"))
    with pytest.raises(InputError, match="training rows hold none.*'3SG'"): gradient_stream(model, objective, one, space, TrainingArguments())
    with pytest.raises(InputError, match="validation rows hold none.*'3PL'"): validation_encoder(model, objective, one, replace(TrainingArguments(), source="factual"))


def test_the_budget_decides_and_says_nothing_else(tmp_path):
    space = setting()[2]
    assert fits_budget(100, space, STORED, role="train", folder=tmp_path) and not fits_budget(100, space, FRESH, role="train")
    assert not fits_budget(10**9, space, STORED, role="train") and fits_budget(10**9, space, replace(STORED, cache_gradients=True), role="train")
    edge = replace(STORED, cache_gradients_gb=70e-6)  # 100 rows need about 38 KB
    assert fits_budget(100, space, edge, role="train") and not fits_budget(100, space, edge, role="validation")


def test_one_epoch_is_not_worth_a_store():
    model, objective, space, _ = setting()
    rows = examples().select("train")
    assert not isinstance(gradient_stream(model, objective, rows, space, replace(STORED, num_train_epochs=1)), CachedStream)
    assert isinstance(gradient_stream(model, objective, rows, space, replace(STORED, num_train_epochs=1, cache_gradients=True)), CachedStream)


def test_an_objective_without_a_name_for_its_content_is_not_cached():
    model, objective, space, _ = setting()
    objective.helper = object()
    assert not isinstance(gradient_stream(model, objective, examples().select("train"), space, STORED), CachedStream)


def test_a_store_in_a_folder_stays_and_serves_again_and_a_temporary_one_goes(tmp_path):
    model, objective, space, _ = setting()
    rows = examples().select("train")
    stream = gradient_stream(model, objective, rows, space, STORED, folder=tmp_path)
    first = stream.batch_at(0)
    shards = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard*")}
    again = gradient_stream(model, objective, rows, space, replace(STORED, source="factual"), folder=tmp_path)
    again.batch_at(0)
    assert shards and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard*")} == shards and first.source.any()
    temporary = gradient_stream(model, objective, rows, space, STORED)
    temporary.batch_at(0)
    place = Path(temporary.kept.store.folder)
    assert place.is_dir()
    del temporary
    assert not place.exists()


def test_means_reads_several_kinds_at_once(tmp_path):
    model, objective, space, _ = setting()
    store: GradientStore = write_store(tmp_path, model, objective, examples().frame, space=space)
    found = store.means([3, 1, 7], ["diff", "alternative"])
    for kind in found: assert torch.allclose(found[kind], store.rows([3, 1, 7], kind).mean(0), atol=1e-6)
    assert torch.equal(store.mean([3, 1, 7], "diff"), found["diff"])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "roberta"])
@pytest.mark.parametrize("keep", [1, 40])
def test_both_gradients_of_a_row_are_those_of_two_backward_passes(kind, keep):
    tokenizer, model = tiny_model(kind)
    objective = objective_for(tokenizer, model)
    frame = examples(6).frame.assign(masked=["The dogs barked because [MASK] were cold.", "[MASK] was tired.", "Anna said that [MASK] was late."] * 2, factual=["they", "She", "he"] * 2, alternative=["he", "They", "they"] * 2)
    full = ParameterSpace.from_model(model)
    space = full.keep(torch.arange(3, full.n, keep)) if keep > 1 else full
    for found, name in zip(both_row_gradients(model, objective, frame, space=space, batch_size=4), ("factual", "alternative")):
        expected = row_gradients(model, objective, frame, space=space, kind=name, engine="loop")
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_stacking_keeps_labels_and_weights():
    a, b = (GradientBatch(torch.full((3,), v), torch.zeros(3), v, weight=w) for v, w in ((1.0, 2.0), (-1.0, 0.5)))
    both = stacked([a, b])
    assert both.label.tolist() == [1, -1] and both.weight.tolist() == [2, 0.5] and both.source.shape == (2, 3)
    assert gradient_scale([both], TrainingArguments()) == pytest.approx(gradient_scale([a, b], TrainingArguments()))


def test_the_store_of_another_space_is_made_anew():
    model, objective, space, _ = setting()
    evaluate = validation_encoder(model, objective, examples().select("validation"), STORED)
    half = space.keep(torch.arange(0, space.n, 2))
    for one in (space, half):
        fresh = GradiendModel.create(one, GradiendConfig(pair=PAIR), seed=0)
        expected = fresh.encode(row_gradients(model, objective, examples().select("validation").frame, space=one, kind="alternative"))
        assert np.allclose(evaluate([fresh])[0][0], expected.detach().numpy(), atol=2e-3)
