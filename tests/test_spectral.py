"The closed-form solver against dense linear algebra in float64, on tiny models whose gradients are materialised one row at a time."
import warnings
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.gradients.rows import row_gradients
from gradiend.gradients.objectives import objective_for
from gradiend.gradients.space import ParameterSpace
from gradiend.gradients.store import write_store
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.trainer.certificate import explained_by, training_examples
from gradiend.trainer.krylov import averaging_factors, balanced_weights, least_squares
from gradiend.trainer.solution import spectral_problem
from gradiend.trainer.solution import encoder_target, shared_start, solve_encoder
from gradiend.trainer.spectral import BUDGET, estimate_spectral, fit_spectral
from gradiend.trainer.sweeps import ModelRows

from .tiny import tiny_model

PAIR = ("3SG", "3PL")
SUBJECTS = ("The drummers", "The baker", "Anna", "The kettle", "The twins", "The pilot", "My sister", "The dogs")
VERBS = ("lost the beat", "was late", "said that", "whistled until", "arrived", "barked")


def table(rows=24, validation=8):
    "Rows of both classes, of unequal size."
    made = []
    for i in range(rows + validation):
        first = i % 3 != 0  # class of the alternative word
        made.append({"masked": f"{SUBJECTS[i % 8]} {VERBS[i // 3 % 6]} because [MASK] {('was', 'were')[i % 2]} {('cold', 'hungry', 'tired', 'late', 'empty')[i % 5]}.",
                     "factual": "they" if first else ("he", "she", "it")[i % 3], "alternative": ("he", "she", "it")[i // 2 % 3] if first else "they",
                     "factual_class": PAIR[1] if first else PAIR[0], "alternative_class": PAIR[0] if first else PAIR[1], "split": "train" if i < rows else "validation", "transition": "", "text": ""})
    return Examples(pd.DataFrame(made), PAIR)


@lru_cache
def setting(kind="bert"):
    words, model = tiny_model(kind)
    full = ParameterSpace.from_model(model)
    return model, objective_for(words, model), full.keep(torch.arange(0, full.n, 5))


def fit(examples=None, kind="bert", config=None, **options):
    model, objective, space = setting(kind)
    return fit_spectral(model, objective, examples or table(), space, config, progress=False, **{"average": 1, **options})


@lru_cache
def fit8():
    "What many tests look at and none changes."
    return fit(average=8)


@lru_cache
def plain_gradients(kind, source):
    "Of the training rows of `table()`, by one backward pass per row."
    model, objective, space = setting(kind)
    return row_gradients(model, objective, table().select("train").frame, space=space, kind=source, engine="loop")


def dense(kind, rows, source, factors=None, center=True):
    "Weighted, centred (and averaged) gradients `(N, n)`, by one backward pass per row."
    plain = plain_gradients(kind, source)
    codes = np.where(rows.labels("alternative") > 0, 0, 1)
    w = balanced_weights(codes)
    centred = w.sqrt()[:, None] * (plain - (w @ plain if center else 0))
    if factors is None: return plain, centred, w, codes
    same = torch.from_numpy((codes[:, None] == codes) / np.bincount(codes)[codes][:, None])  # classes have equal weights inside
    return plain, same @ centred + factors(codes)[:, None] * (centred - same @ centred), w, codes


def dense_of(frame):
    "Target gradients `(N, n)` of the training rows of any table, and the numbers of their classes."
    model, objective, space = setting()
    train = Examples(frame, PAIR).select("train")
    return row_gradients(model, objective, train.frame, space=space, kind="diff", engine="loop"), np.where(train.labels("alternative") > 0, 0, 1)


def cosine(a, b): return float(torch.nn.functional.cosine_similarity(a.detach().flatten(), b.flatten(), dim=0).abs())


@pytest.mark.parametrize(("kind", "start", "average"), [("bert", "labels", 1), ("bert", "random", 1), ("gpt2", "labels", 4), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("gpt2", "labels", 1), ("gpt2", "random", 1), ("bert", "labels", 4)))])
def test_singular_direction_equals_dense_svd(kind, start, average):
    found = fit(kind=kind, start=start, average=average, decoder_iterations=14, encoder_iterations=1)
    _, matrix, _, _ = dense(kind, table().select("train"), "diff", lambda codes: averaging_factors(codes, average))
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert abs(found.certificate.singular_values[0] / float(values[0]) - 1) < 1e-6 and found.certificate.residual < 1e-5
    assert cosine(found.decoder.vectors[0], right[0]) > 0.999999
    if not found.certificate.supervised: assert cosine(found.model.decoder_weight, right[0]) > 0.999999


def test_several_directions_equal_dense_svd():
    found = fit(config=GradiendConfig(pair=PAIR, latent_dim=3), decoder_iterations=12, encoder_iterations=2)
    _, matrix, _, _ = dense("bert", table().select("train"), "diff")[:4]
    values, right = torch.linalg.svd(matrix, full_matrices=False)[1:]
    np.testing.assert_allclose(found.certificate.singular_values[:3], values[:3].numpy(), rtol=1e-6)
    for ours, theirs in zip(found.decoder.vectors, right, strict=False): assert cosine(ours, theirs) > 0.999999
    spanned = found.model.decoder_weight.detach()
    assert float((spanned - right[:3].T @ (right[:3] @ spanned)).norm() / spanned.norm()) < 1e-4


def test_encoder_equals_dense_ridge_and_full_steps_interpolate():
    found = fit(decoder_iterations=2, encoder_iterations=24, ridge=1e-3)
    plain, matrix, w, _ = dense("bert", table().select("train"), "alternative")
    scores = found.decoder.products[:, 0]
    target = w.sqrt() * (scores - w @ scores)
    if found.certificate.supervised: pytest.skip("this tiny model's top direction is not the class axis")
    by_hand = matrix.T @ torch.linalg.solve(matrix @ matrix.T + 1e-3 * torch.eye(len(target), dtype=torch.float64), target)
    assert cosine(found.encoder.vectors[0], by_hand) > 0.999999 and abs(float(found.encoder.vectors.norm() / by_hand.norm()) - 1) < 1e-6
    torch.testing.assert_close(found.encoder.products[:, 0], plain @ by_hand, rtol=1e-6, atol=1e-9)


def test_supervised_case_is_the_difference_of_the_class_means():
    found = fit(supervised=True, average=8, encoder_iterations=1)
    plain, _, _, codes = dense("bert", table().select("train"), "diff")
    first, second = (plain[codes == c].mean(0) for c in (0, 1))
    for h, mean in ((1.0, first), (-1.0, second)): torch.testing.assert_close(found.model.decode(torch.tensor([[h]], dtype=torch.float64))[0].detach(), mean, rtol=1e-6, atol=1e-10)
    source, _, _, _ = dense("bert", table().select("train"), "alternative")
    assert cosine(found.encoder.vectors[0], source[codes == 0].mean(0) - source[codes == 1].mean(0)) > 0.999999


def test_duals_say_what_the_directions_are_made_of():
    found = fit(decoder_iterations=4, encoder_iterations=3)
    for directions, kind in ((found.decoder, "diff"), (found.encoder, "alternative")):
        plain = dense("bert", table().select("train"), kind)[0]
        torch.testing.assert_close(directions.duals.T @ plain, directions.vectors, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(plain @ directions.vectors.T, directions.products, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("average", [1, 4])
def test_store_gives_the_same_solution(average, tmp_path):
    model, objective, space = setting("bert")
    store = write_store(tmp_path / "store", model, objective, table().select("train"), space=space)
    exact = fit(store=store, average=average, ridge=1e-3)
    walked = fit(average=average, decoder_iterations=14, encoder_iterations=24, ridge=1e-3)
    assert exact.certificate.supervised == walked.certificate.supervised
    assert cosine(exact.decoder.vectors, walked.decoder.vectors) > 0.9999 and cosine(exact.encoder.vectors, walked.encoder.vectors) > 0.999
    assert abs(exact.certificate.singular_values[0] / walked.certificate.singular_values[0] - 1) < 1e-3


def test_generalised_cross_validation_and_leave_one_out(tmp_path):
    model, objective, space = setting("bert")
    store = write_store(tmp_path / "store", model, objective, table().select("train"), space=space)
    found = fit(store=store, average=8)
    assert found.choice["gcv error"].idxmin() == found.choice["chosen"].idxmax() and np.isfinite(found.certificate.left_out_correlation)


@pytest.mark.parametrize("average", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_a_model_explains_equals_the_sum_over_rows(average):
    found = fit(average=average, decoder_iterations=3, encoder_iterations=2)
    rows, mean = found.rows, found.means.mean(0)
    source, target = (dense("bert", table().select("train"), kind)[0] for kind in ("alternative", "diff"))
    codes = found.problem.codes
    for model in (found.model, GradiendModel.create(rows.space, found.model.config, seed=1).double()):
        x, w = training_examples(source, codes, average, count=300)
        y, _ = training_examples(target, codes, average, count=300)
        with torch.no_grad(): slow = float(w @ ((y - mean).square().sum(1) - (y - model(x)).square().sum(1)))
        fast = explained_by(model, rows, codes, mean, average=average)
        assert fast == pytest.approx(slow, rel=1e-9 if average == 1 else 0.2)
    assert found.certify(found.model)["explained"] * found.certificate.energy == pytest.approx(found.certificate.explained, rel=1e-6)
    assert found.certificate.explained <= found.certificate.bound * (1 + (1e-9 if average == 1 else 0.05))


def test_energy_of_the_certificate_is_exact_if_all_rows_are_measured():
    found = fit(average=1, norm_rows=100)
    _, matrix, _, _ = dense("bert", table().select("train"), "diff")
    assert found.certificate.energy == pytest.approx(float(matrix.square().sum()), rel=1e-9) and found.certificate.energy_error == 0


def test_every_kind_of_gradient():
    for source, target in (("factual", "diff"), ("diff", "diff"), ("diff", "factual"), ("alternative", "alternative")):
        found = fit(config=GradiendConfig(pair=PAIR, source=source, target=target), average=8, decoder_iterations=1, encoder_iterations=1, norm_rows=4)
        assert float(np.corrcoef(found.scores["label"], found.scores["encoding"])[0, 1]) > 0.3


@pytest.mark.slow
def test_every_shape_of_network():
    for options in ({"bias_decoder": False}, {"activation_encoder": "identity"}, {"activation_encoder": "sigmoid"}):
        found = fit(config=GradiendConfig(pair=PAIR, **options), average=8, decoder_iterations=1, encoder_iterations=1, norm_rows=4)
        assert found.model.decoder_weight.isfinite().all() and found.certificate.explained > 0


def test_encodings_of_the_model_are_those_of_the_fit():
    found = fit8()
    plain = dense("bert", table().select("train"), "alternative")[0]
    np.testing.assert_allclose(found.model.encode(plain).detach().numpy()[:, 0], found.scores["encoding"], rtol=1e-6)
    assert found.scores.groupby("label").encoding.mean().loc[1.0] > 0 > found.scores.groupby("label").encoding.mean().loc[-1.0]


def test_saved_and_read_back(tmp_path):
    found = fit8()
    read = GradiendModel.from_pretrained(found.model.save_pretrained(tmp_path / "model"))
    assert torch.equal(read.decoder_weight, found.model.decoder_weight) and read.info["solver"] == "spectral" and read.info["certificate"]["verdict"]


def test_what_is_asked_together_costs_what_was_counted():
    """The default: a shared first step and one more of the encoder; the estimate knows it, and equal kinds cost less."""
    found, sampled = fit8(), 3 * 12 / 24
    assert found.certificate.forward_passes == pytest.approx(16 + sampled) == estimate_spectral(24, setting()[2], norm_rows=12)["forward_passes"]
    assert found.sweeps[["what", "kind", "vectors"]].values.tolist()[:2] == [["accumulate", "diff, alternative", 4], ["encode", "diff, alternative", 2]]
    one_kind = fit(config=GradiendConfig(pair=PAIR, source="diff", target="diff"), average=8, encoder_iterations=2)
    assert one_kind.certificate.forward_passes == pytest.approx(3 + 4 + 6 + sampled)
    two = fit(config=GradiendConfig(pair=PAIR, latent_dim=2), average=8)
    assert two.certificate.forward_passes == pytest.approx(18 + sampled) == estimate_spectral(24, setting()[2], latent_dim=2, encoder_iterations=1, norm_rows=12)["forward_passes"]


def test_the_shared_first_step_is_that_of_separate_walks():
    """Both first directions are the difference of the class means of their kind, and the products with them are exact."""
    model, objective, space = setting()
    problem = spectral_problem(table(), GradiendConfig(pair=PAIR), average=8)
    rows = ModelRows(model, objective, problem.examples, space)
    shared = shared_start(problem, rows)
    for step, kind in ((shared.decoder, "diff"), (shared.encoder, "alternative")):
        plain, _, _, codes = dense("bert", table().select("train"), kind)
        difference = plain[codes == 0].mean(0) - plain[codes == 1].mean(0)
        assert cosine(step.basis.vectors[0], difference) > 1 - 1e-12
        torch.testing.assert_close(step.products, plain @ step.basis.vectors.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(step.raws, problem.matrix(rows, "target" if kind == "diff" else "source").transposed(step.lefts), rtol=1e-9, atol=1e-12)


def test_the_regression_from_the_labels_comes_as_near_as_that_from_the_scores():
    """With a second step each, what is left of the target differs by a tenth at most."""
    found, (plain, _, w, _) = fit8(), dense("bert", table().select("train"), "alternative")
    rows, problem = found.rows, found.problem
    target = encoder_target(problem.matrix(rows, "target"), found.decoder.products, problem.labels)
    left = []
    for start in (shared_start(problem, rows).encoder, None):
        c = solve_encoder(problem.matrix(rows, "source"), target, start=start, iterations=2).directions
        left.append(float((target[:, 0] - w.sqrt() * (plain @ c.vectors[0] - w @ (plain @ c.vectors[0]))).norm()))
    assert left[0] < 1.1 * left[1]


def test_the_class_axis_costs_nothing_after_a_start_from_the_labels():
    rows = table()
    frame, shuffled = rows.frame.copy(), np.random.default_rng(0).permutation(len(rows.frame))
    for role in ("factual", "alternative"): frame[f"{role}_class"] = frame[f"{role}_class"].to_numpy()[shuffled]
    costs = {}
    for start in ("labels", "random"):
        with pytest.warns(UserWarning, match="not the class axis"): found = fit(Examples(frame, PAIR), start=start, decoder_iterations=3, encoder_iterations=1, norm_rows=4)
        costs[start] = found.certificate.forward_passes
        plain, codes = dense_of(frame)
        assert found.certificate.supervised and cosine(found.decoder.vectors[0], plain[codes == 0].mean(0) - plain[codes == 1].mean(0)) > 1 - 1e-9
    assert costs["labels"] == pytest.approx(10 + 2 * 6 + 0.5) and costs["random"] == pytest.approx(costs["labels"] + 2 + 3)


def several_classes(others, rows=36):
    "Rows of the pair and of other classes."
    frame = table(rows).frame.copy()
    for role in ("factual", "alternative"):
        mine = frame[f"{role}_class"] == "3SG"
        for k, name in enumerate(others): frame.loc[mine & (np.arange(len(frame)) % 9 == 3 * k + (2 if role == "factual" else 1)), f"{role}_class"] = name
    return Examples(frame, PAIR)


@pytest.mark.parametrize("others", [("2",), ("1", "2"), ("x", "y")])
def test_the_class_axis_is_that_of_the_pair_whatever_classes_take_part(others, tmp_path):
    examples = several_classes(others)
    model, objective, space = setting()
    train = examples.select("train")
    plain, words = row_gradients(model, objective, train.frame, space=space, kind="diff", engine="loop"), train.frame["alternative_class"].to_numpy()
    difference = plain[words == "3SG"].mean(0) - plain[words == "3PL"].mean(0)
    assert len(set(words)) == 2 + len(others)
    store = write_store(tmp_path / "store", model, objective, train, space=space)
    for options, least in (({}, 1 - 1e-12), ({"store": store}, 0.999)):
        found = fit(examples, supervised=True, other_classes=True, average=8, **options)
        assert cosine(found.decoder.vectors[0], difference) > least and cosine(found.model.decoder_weight, difference) > least


@pytest.mark.parametrize("budget", [10.0, 16.5, 22.0, 26.0, 39.0, 45.0])
@pytest.mark.parametrize("others", [(), ("2",), ("1", "2")])
def test_the_budget_is_kept_where_the_first_steps_leave_room(budget, others, monkeypatch):
    monkeypatch.setattr("gradiend.trainer.spectral.TOLERANCE", 1e-9)  # the decoder would walk on for ever
    found = fit(several_classes(others), other_classes=True, budget=budget, norm_rows=4)
    least = 5 + (3 + 2 * (1 + len(others))) + 3 * max(4, 2 * (2 + len(others))) / 36
    assert found.certificate.forward_passes <= max(budget, least) + 1e-9
    if budget >= least + 6: assert len(found.choice) >= 2  # a further step is kept for the encoder


def test_same_bits_again_and_budget_kept():
    a, b = fit8(), fit(average=8)
    assert torch.equal(a.model.encoder_weight, b.model.encoder_weight) and torch.equal(a.model.decoder_bias, b.model.decoder_bias)
    for average in (1, 32): assert fit(average=average, supervised=average == 1).certificate.forward_passes <= BUDGET
    assert estimate_spectral(24, setting("bert")[2])["forward_passes"] <= BUDGET


def test_an_interrupted_fit_goes_on(tmp_path):
    model, objective, space = setting("bert")
    plain, calls = fit8(), []

    def failing(*given):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(failing)
    try:
        with pytest.raises(KeyboardInterrupt): fit(average=8, folder=tmp_path / "run")
        kept = len(list((tmp_path / "run").iterdir()))
        resumed = fit(average=8, folder=tmp_path / "run")
    finally: hook.remove()
    assert kept > 0 and not (tmp_path / "run").exists()
    assert torch.equal(resumed.model.encoder_weight, plain.model.encoder_weight) and torch.equal(resumed.model.decoder_weight, plain.model.decoder_weight)


def test_what_was_kept_for_other_data_is_not_used(tmp_path):
    fit_folder = tmp_path / "run"
    model, _, _ = setting("bert")
    hook = model.register_forward_pre_hook(lambda *given, calls=[]: calls.append(1) or (_ for _ in ()).throw(KeyboardInterrupt) if len(calls) >= 3 else calls.append(1))
    try:
        with pytest.raises(KeyboardInterrupt): fit(average=8, folder=fit_folder)
    finally: hook.remove()
    other = table(rows=20)
    assert torch.equal(fit(other, average=8, folder=fit_folder).model.decoder_weight, fit(other, average=8).model.decoder_weight)


def test_without_validation_rows():
    rows = table()
    found = fit(rows.take(np.flatnonzero(rows.frame["split"] == "train")), average=8)
    assert np.isnan(found.certificate.validation_correlation) and found.model.info["certificate"]["validation_correlation"] is None


def test_the_top_direction_may_not_be_the_class():
    with pytest.warns(UserWarning, match="not the class axis"):
        rows = table()
        rng = np.random.default_rng(0)
        frame = rows.frame.copy()
        shuffled = rng.permutation(len(frame))
        for role in ("factual", "alternative"): frame[f"{role}_class"] = frame[f"{role}_class"].to_numpy()[shuffled]
        found = fit(Examples(frame, PAIR), average=1, decoder_iterations=10)
    assert found.certificate.supervised and "class axis" in found.note


def test_bad_input():
    rows = table()
    constant = rows.frame.copy()
    for role, name in (("factual", PAIR[1]), ("alternative", PAIR[0])): constant[f"{role}_class"] = name
    with pytest.raises(InputError, match="none whose source word belongs to '3PL', so there is nothing to tell apart"): fit(Examples(constant, PAIR))
    only = rows.take(np.flatnonzero((rows.labels("alternative") > 0) & (rows.frame["split"] == "train").to_numpy()))
    with pytest.raises(InputError, match="none whose source word belongs to '3PL'"): fit(only)
    with pytest.raises(InputError, match="latent_dim=40: 24 training rows"): fit(config=GradiendConfig(pair=PAIR, latent_dim=40))
    with pytest.raises(InputError, match="activation_decoder='tanh'"): fit(config=GradiendConfig(pair=PAIR, activation_decoder="tanh"))
    with pytest.raises(InputError, match="one label per row"): fit(config=GradiendConfig(pair=PAIR, latent_dim=2), supervised=True)
    for name, value in (("start", "labls"), ("average", 0), ("decoder_iterations", 0), ("encoder_iterations", "many")):
        with pytest.raises(InputError, match=name): fit(**{name: value})


def test_gradients_of_zero_and_broken_gradients_are_named():
    model, objective, space = setting("bert")
    rows = table()
    same = rows.frame.assign(alternative=rows.frame["factual"])
    with pytest.raises(InputError, match="all gradients are zero"): fit(Examples(same, PAIR))
    partly = rows.frame.copy()
    partly.loc[7, "alternative"] = partly.loc[7, "factual"]
    with pytest.warns(UserWarning, match=r"training rows \[7\] \(1 in all\) have a target gradient of zero"): fit(Examples(partly, PAIR), average=8)

    class Broken(type(objective)):
        def losses(self, model, batch):
            factual, alternative = super().losses(model, batch)
            return factual, alternative + torch.sqrt((alternative - alternative.detach()).clamp(min=0)) * 1.0

    with pytest.raises(InputError, match=r"rows \[0, 1, 2, 3, 4\] of the training rows have a gradient that is not finite"):
        fit_spectral(model, Broken(objective.tokenizer), rows, space, progress=False)


@pytest.mark.parametrize("row", [5, 9])
def test_a_loss_that_is_not_finite_names_its_row_though_classes_go_by_themselves(row):
    model, objective, space = setting()
    rows = table()
    with torch.no_grad(): known = objective.losses(model, objective.prepare(rows.frame.iloc[[row]]))[1]

    class Broken(type(objective)):
        def losses(self, model, batch):
            factual, alternative = super().losses(model, batch)
            return factual, torch.where((alternative - known).abs() < 1e-12, torch.nan, alternative)

    with pytest.raises(InputError, match=rf"rows \[{row}\]"): fit_spectral(model, Broken(objective.tokenizer), rows, space, progress=False)


def test_sums_are_counted_as_they_are_done():
    """Single passes where rows share sums, one pass for all where that would fall to pieces; nothing at all from a store."""
    model, objective, space = setting()
    rows = table().select("train")
    masks = (torch.rand(3, len(rows), generator=torch.Generator().manual_seed(0)) < 0.5).double()
    calls = []
    hook = model.register_forward_pre_hook(lambda module, given, options: calls.append(len(options["input_ids"])), with_kwargs=True)
    try:
        for weights, share, backward in ((masks, float(masks.any(0).double().mean()), 3 * float(masks.any(0).double().mean())), (torch.eye(2).repeat_interleave(12, 1).double(), 1.0, 1.0), (0 * masks, 0.0, 0.0)):
            calls.clear()
            matrix = ModelRows(model, objective, rows, space)
            found = matrix.sums(weights, "diff")
            assert (matrix.sweeps[0].share, matrix.sweeps[0].backward) == pytest.approx((share, backward)) and sum(calls) == round(share * len(rows))
            torch.testing.assert_close(found, weights @ dense("bert", rows, "diff")[0], rtol=1e-9, atol=1e-12)
    finally: hook.remove()


def test_a_fit_from_a_store_costs_no_forward_pass(tmp_path):
    model, objective, space = setting()
    found = fit(store=write_store(tmp_path / "store", model, objective, table().select("train"), space=space), average=8)
    assert found.certificate.forward_passes == 0 and len(found.sweeps) > 2


def test_a_regression_ends_when_nothing_is_left_also_in_float32():
    words, model = tiny_model("bert", dtype=torch.float32)
    objective = objective_for(words, model)
    problem = spectral_problem(table(), GradiendConfig(pair=PAIR))
    rows = ModelRows(model, objective, problem.examples, ParameterSpace.from_model(model))
    matrix, first = problem.matrix(rows, "source"), shared_start(problem, rows).encoder
    assert least_squares(matrix, matrix.adjusted(first.products), 9, start=first).steps == (1,)


def test_rows_of_other_classes_can_take_part():
    rows = table()
    frame = rows.frame.copy()
    third = np.arange(len(frame)) % 4 == 1
    frame.loc[third & (frame["alternative_class"] == "3SG"), "alternative_class"] = "2"
    examples = Examples(frame, PAIR)
    config = GradiendConfig(pair=PAIR, latent_dim=2)
    problem = spectral_problem(examples, config, other_classes=True)
    assert sorted(set(problem.codes)) == [0, 1, 2] and len(problem.codes) > len(spectral_problem(examples, config).codes)
    found = fit(examples, config=config, other_classes=True, average=8)
    assert found.model.decoder_weight.shape[1] == 2 and found.certificate.forward_passes > 0


def test_fewer_rows_and_shuffled_labels():
    found = fit(average=8, max_rows=5)
    assert found.certificate.rows == 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class is no direction any more
        control = fit(average=8, shuffle_labels=True)
    assert sorted(control.problem.labels) == sorted(fit8().problem.labels) and (control.problem.labels != fit8().problem.labels).any()
    assert control.certificate.explained / control.certificate.energy < 1
