"""The network, its signs and its files; changes of a model and the way back; pruning."""
import itertools
import json

import pandas as pd
import pytest
import torch

from gradiend.core import InputError
from gradiend.data.examples import make_examples
from gradiend.delta import Delta, load_delta, save_delta
from gradiend.gradients.engine import KINDS, encode, weighted_sums
from gradiend.gradients.rows import row_gradients
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.pruning import PostPruneConfig, PrePruneConfig, gradient_importance, prune_space, sample_rows

from .tiny import CONFIGS, masked_model

ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "The baker was late because [MASK] missed the bus.",
               "The dogs barked because [MASK] were cold.", "Anna said that [MASK] was tired."],
    "factual": ["they", "he", "they", "she"], "alternative": ["he", "they", "it", "they"],
    "factual_class": ["3PL", "3SG", "3PL", "3SG"], "alternative_class": ["3SG", "3PL", "3SG", "3PL"], "split": "train",
})
KIND_NAMES = list(KINDS)


def examples():
    return make_examples(ROWS, pair=("3SG", "3PL"))


def model_of(space, *, seed=0, **options):
    return GradiendModel.create(space, GradiendConfig(pair=("3SG", "3PL"), **options), seed=seed)


@pytest.fixture(scope="module")
def tiny():
    tokenizer, model = masked_model("bert")
    return masked_lm(tokenizer), model, ParameterSpace.from_model(model)


@pytest.mark.parametrize("source,target", list(itertools.product(KIND_NAMES, KIND_NAMES)))
@pytest.mark.parametrize("towards", ["3SG", "3PL"])
def test_factor_towards_a_class_makes_it_more_likely(tiny, source, target, towards):
    """A decoder that gives the label-signed mean target gradient is the ideal one; moved towards a class, the words that the
    target gradient speaks about must become more likely where they belong to that class, and less where they do not."""
    objective, base, space = tiny
    rows = examples()
    labels = torch.from_numpy(rows.labels(source))
    signs = torch.stack([c * labels / len(rows) for c in KINDS[target]])[None]
    ideal = weighted_sums(base, objective, objective.prepare(rows.frame), signs, space=space)[0]
    gradiend = model_of(space, source=source, target=target, bias_decoder=False).double()
    with torch.no_grad():
        gradiend.decoder_weight[:, 0] = ideal

    def advantage():
        "Mean log-probability of the words of `towards` minus that of the other class, among the words the target is about."
        with torch.no_grad():
            losses = torch.stack(objective.losses(base, objective.prepare(rows.frame)))  # (2, B)
        classes = [rows.frame.factual_class, rows.frame.alternative_class]
        total = 0.0
        for side in (0, 1):
            if KINDS[target][side] != 0:
                sign = torch.tensor([1.0 if c == towards else -1.0 for c in classes[side]], dtype=torch.float64)
                total -= float((sign * losses[side]).sum())
        return total

    factor = gradiend.feature_factor_towards(towards)
    before = advantage()
    with Delta.from_gradiend(gradiend, factor, learning_rate=1e-4).applied(base):
        after = advantage()
    assert after > before


def test_feature_factors_of_the_two_classes_are_opposite(tiny):
    for source, target in itertools.product(KIND_NAMES, KIND_NAMES):
        gradiend = model_of(tiny[2], source=source, target=target)
        assert gradiend.feature_factor_towards("3SG") == -gradiend.feature_factor_towards("3PL") != 0


@pytest.mark.parametrize("options", [{}, {"latent_dim": 3}, {"bias_decoder": False}, {"activation_encoder": "relu", "activation_decoder": "tanh"}])
def test_every_option_has_its_effect_and_survives_saving(tiny, tmp_path, options):
    space = tiny[2].keep(torch.arange(0, tiny[2].full_n, 11))
    gradiend = model_of(space, **options)
    g = torch.randn(4, space.n, generator=torch.Generator().manual_seed(0))
    h = gradiend.encode(g)
    act = torch.relu if options.get("activation_encoder") == "relu" else torch.tanh
    torch.testing.assert_close(h, act(g @ gradiend.encoder_weight.T + gradiend.encoder_bias))
    y = h @ gradiend.decoder_weight.T + (0 if gradiend.decoder_bias is None else gradiend.decoder_bias)
    torch.testing.assert_close(gradiend(g), torch.tanh(y) if options.get("activation_decoder") == "tanh" else y)
    again = GradiendModel.from_pretrained(gradiend.save_pretrained(tmp_path / "m"))
    assert torch.equal(again(g), gradiend(g)) and again.config == gradiend.config
    assert torch.equal(again.topk(7), gradiend.topk(7))


def test_damaged_artifacts_are_refused(tiny, tmp_path):
    gradiend = model_of(tiny[2].keep(torch.arange(50)))
    folder = gradiend.save_pretrained(tmp_path / "m")
    described = json.loads((folder / "config.json").read_text())
    for change in ({"format": 99}, {"space": described["space"] | {"shapes": described["space"]["shapes"][::-1]}},
                   {"config": described["config"] | {"latent_dim": 2}}):
        (folder / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(InputError, match="folder"):
            GradiendModel.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json missing"):
        GradiendModel.from_pretrained(folder)


def test_not_finite_weights_are_refused(tiny, tmp_path):
    gradiend = model_of(tiny[2].keep(torch.arange(50)))
    with torch.no_grad():
        gradiend.decoder_weight[3] = float("nan")
    folder = gradiend.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="finite"):
        GradiendModel.from_pretrained(folder)


def test_failed_save_leaves_the_old_model(tiny, tmp_path):
    gradiend = model_of(tiny[2].keep(torch.arange(50)))
    folder = gradiend.save_pretrained(tmp_path / "m")
    old = (folder / "model.safetensors").read_bytes()
    broken = model_of(tiny[2].keep(torch.arange(60)))
    broken.info["bad"] = object()
    with pytest.raises(TypeError):
        broken.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_delta_is_undone_bit_for_bit(kind, dtype):
    _, model = masked_model(kind, dtype=dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    space = ParameterSpace.from_model(model)
    delta = Delta(space, torch.randn(space.n, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(KeyboardInterrupt), delta.applied(model):
        assert not all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_delta_changes_exactly_its_entries(tiny):
    _, model, space = tiny
    part = space.keep(torch.tensor([3, 77, 500]))
    before = space.gather(dict(model.named_parameters())).detach().clone()
    with Delta(part, torch.tensor([1.0, -2.0, 0.5])).applied(model):
        change = space.gather(dict(model.named_parameters())).detach() - before
    assert torch.nonzero(change).flatten().tolist() == [3, 77, 500]
    torch.testing.assert_close(change[[3, 77, 500]], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def test_delta_arithmetic_and_files(tiny, tmp_path):
    space = tiny[2]
    a, b = (Delta(space.keep(torch.tensor(i)), torch.ones(2)) for i in ([1, 5], [5, 9]))
    total = 2 * a + -b
    assert total.space.global_index.tolist() == [1, 5, 9] and total.values.tolist() == [2.0, 1.0, -1.0]
    for delta in (total, Delta(space, torch.ones(space.n))):
        again = load_delta(save_delta(delta, tmp_path / "d"))
        assert torch.equal(again.values, delta.values) and again.space.fingerprint == delta.space.fingerprint


def test_delta_for_another_model_touches_nothing(tiny):
    _, other = masked_model("distilbert")
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(InputError, match="no parameter"):
        Delta(tiny[2], torch.ones(tiny[2].n)).apply_(other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


@pytest.mark.parametrize("source", KIND_NAMES)
def test_importance_is_the_label_signed_mean(tiny, source):
    objective, model, space = tiny
    rows = examples()
    slow = row_gradients(model, objective, rows.frame, space=space, kind=source)
    expected = (torch.from_numpy(rows.labels(source))[:, None] * slow).mean(0).abs()
    torch.testing.assert_close(gradient_importance(model, objective, rows, space, source=source, batch_size=3), expected.float(), rtol=1e-5, atol=1e-7)


def test_pruned_space_holds_the_largest(tiny):
    objective, model, space = tiny
    config = PrePruneConfig(n_samples=4, topk=25)
    small = prune_space(model, objective, examples(), space, config)
    importance = gradient_importance(model, objective, sample_rows(examples(), 4, source="alternative"), space)
    assert small.n == 25 and set(small.global_index.tolist()) == set(importance.topk(25).indices.tolist())


def test_sample_is_balanced_seeded_and_never_repeats():
    rows = examples()
    one, two = (sample_rows(rows, 2, source="factual", seed=s).frame.masked.tolist() for s in (1, 1))
    assert one == two and len(set(one)) == 2
    assert len(sample_rows(rows, 100, source="factual")) == 4  # what there is
    assert len({tuple(sample_rows(rows, 2, source="factual", seed=s).frame.masked) for s in range(20)}) > 1


@pytest.mark.parametrize("make,match", [
    (lambda: PrePruneConfig(topk=0.0), "topk"), (lambda: PrePruneConfig(topk=-3), "topk"), (lambda: PrePruneConfig(source="both"), "source"),
    (lambda: PostPruneConfig(topk=1.2), "topk"), (lambda: GradiendConfig(pair=("a", "a")), "pair"), (lambda: GradiendConfig(pair=("a", "b"), target="dif"), "diff"),
])
def test_values_that_cannot_work_are_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_gradiend_works_from_encoding_to_rewriting(dtype, base_dtype, tmp_path):
    tokenizer, base = masked_model("bert", dtype=base_dtype)
    objective, rows, space = masked_lm(tokenizer), examples().frame, ParameterSpace.from_model(base)
    exact = model_of(space.keep(torch.arange(0, space.n, 7)), latent_dim=2)
    half = GradiendModel.from_pretrained(GradiendModel(exact.space, exact.config, {n: p.detach().to(dtype) for n, p in exact.named_parameters()}).save_pretrained(tmp_path / "m"))
    rounded = GradiendModel(exact.space, exact.config, {n: p.detach().float() for n, p in half.named_parameters()})
    assert half.dtype == dtype
    gradients = row_gradients(base, objective, rows, space=half.space, kind="alternative")
    torch.testing.assert_close(half.encode(gradients), rounded.encode(gradients.float()))
    encoded = half.encode_from_products(encode(base, objective, rows, half.encoder_weight.detach(), space=half.space, kind="alternative"))
    torch.testing.assert_close(encoded, rounded.encode(gradients.float()), rtol=0.05, atol=0.05 if base_dtype == torch.bfloat16 else 1e-3)
    change = Delta.from_gradiend(half, 0.5, learning_rate=0.1)
    torch.testing.assert_close(change.values, Delta.from_gradiend(rounded, 0.5, learning_rate=0.1).values)
    with change.applied(base): assert all(p.dtype == base_dtype for p in base.parameters())


def test_everything_of_before_is_still_found_here():
    from gradiend import model
    for name in ("ACTIVATIONS", "GRADIENTS", "GradiendConfig", "feature_factor_towards", "initial_weights", "PARTS", "part_importance", "GradiendNetwork", "top_entries", "keep_entries",
                 "FORMAT", "package_versions", "write_artifact", "expected_shapes", "read_artifact", "GradiendModel"):
        assert hasattr(model, name) and name in model.__all__


def test_methods_are_the_functions_of_the_lower_notebooks(tiny):
    gradiend = model_of(tiny[2].keep(torch.arange(0, tiny[2].full_n, 11)), latent_dim=3)
    assert gradiend.latent_dim == 3 and gradiend.can_be_oriented
    table = gradiend.locate(gradiend.topk(5, "encoder-weight"), "encoder-weight")
    names = dict(tiny[1].named_parameters())
    assert table["parameter"].isin(list(names)).all() and table["importance"].is_monotonic_decreasing
    gradiend.check_base(tiny[1])
    with pytest.raises(InputError, match="has shape|no parameter"):
        gradiend.check_base(masked_model("distilbert")[1])
