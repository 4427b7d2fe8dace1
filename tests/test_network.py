"The network: its pieces, its precisions, its signs, and where its entries are."
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiend import network
from gradiend.core import InputError
from gradiend.gradients.space import ParameterSpace
from gradiend.network import ACTIVATIONS, ODD_ACTIVATIONS, PARTS, GradiendConfig, GradiendNetwork, initial_weights, keep_entries, locate_entries, top_entries

SPACE = ParameterSpace.from_global(["a.weight", "a.bias", "kernel", "b.weight"], [(6, 5), (6,), (3, 2, 4), (4, 10)], None)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(space=SPACE, *, seed=0, **options):
    return GradiendNetwork.create(space, GradiendConfig(pair=("A", "B"), **options), seed=seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_pieces_give_the_same_and_stay_below_the_limit(monkeypatch, limit, k, dtype):
    model = make(latent_dim=k, activation_decoder="tanh").to(dtype)
    g = normal(4, SPACE.n).requires_grad_()
    whole = model(g)
    whole.sum().backward()
    expected = [g.grad, *(p.grad for p in model.parameters())]
    cut, h = copy.deepcopy(model), g.detach().clone().requires_grad_()
    for p in cut.parameters(): p.grad = None
    monkeypatch.setattr(network, "LIMIT", limit)
    monkeypatch.setattr(network, "WIDENED", limit)
    parts = network.pieces(SPACE.n, 4, dtype)
    assert parts[0].start == 0 and parts[-1].stop == SPACE.n and all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert all((p.stop - p.start) * 4 <= max(limit, 4) for p in parts) and (len(parts) > 1 or limit >= 4 * SPACE.n)
    pieced = cut(h)
    torch.testing.assert_close(pieced, whole, rtol=1e-5, atol=1e-6)
    pieced.sum().backward()
    precise = dtype in (torch.float64, torch.float32)
    for found, wanted in zip([h.grad, *(p.grad for p in cut.parameters())], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4 if precise else 0.02, atol=1e-5 if precise else 1e-3)


@pytest.mark.slow
def test_more_weights_than_a_32_bit_number_counts():
    "2**31 + 1000 entries, all of them the same number: the tensors repeat one value, so only the pieces take room."
    n = 2**31 + 1000
    weight, gradients = torch.full((1, 1), 2.0, dtype=torch.bfloat16).expand(1, n), torch.full((1, 1), 0.5, dtype=torch.bfloat16).expand(1, n)
    assert network.products(gradients, weight).item() == pytest.approx(n, rel=1e-6)


def test_an_ordinary_model_is_calculated_in_one_piece():
    assert network.pieces(10**8, 8, torch.float32) == [slice(0, 10**8)]
    g, model = normal(5, SPACE.n), make(latent_dim=2)
    assert torch.equal(model.encode(g), torch.tanh(g @ model.encoder_weight.T + model.encoder_bias))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gradient_dtype", FLOATS)
def test_every_precision_encodes_and_decodes(dtype, gradient_dtype):
    model = make(latent_dim=2).to(dtype)
    exact = copy.deepcopy(model).double()  # the same, rounded weights
    g = (3e-4 * normal(7, SPACE.n)).to(gradient_dtype)
    h, y = model.encode(g), model.decode(-0.7)
    assert h.dtype == y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(h.double(), exact.encode(g.double()), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(y.double(), exact.decode(-0.7), rtol=1e-5, atol=1e-7)
    assert all(p.dtype == dtype for p in model.parameters())
    for part in PARTS: torch.testing.assert_close(model.importance(part).double(), exact.importance(part), rtol=1e-5, atol=1e-7)
    assert torch.equal(top_entries(model, 9), top_entries(exact, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_can_be_trained(dtype):
    model, g = make().to(dtype), normal(8, SPACE.n)
    with torch.no_grad(): model.encoder_weight.copy_(0.3 * g[:1])
    losses = []
    for _ in range(30):
        loss = (model(g) - g).square().mean()
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p in model.parameters(): p -= 0.5 * p.grad
    assert losses[-1] < 0.97 * losses[0] and all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation_is_honoured(name):
    g = normal(6, SPACE.n, dtype=torch.float64)
    model = make(activation_encoder=name, activation_decoder=name).double()
    products = g @ model.encoder_weight.T
    h = ACTIVATIONS[name](products + model.encoder_bias)
    torch.testing.assert_close(model.encode(g), h)
    torch.testing.assert_close(model.encode_from_products(products), h)
    torch.testing.assert_close(model(g), ACTIVATIONS[name](h @ model.decoder_weight.T + model.decoder_bias))
    assert float(model.encode(g).detach().std()) > 0  # never a constant
    assert model.can_be_oriented == (name in ODD_ACTIVATIONS)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 4), signs=st.lists(st.sampled_from([1, -1]), min_size=4, max_size=4), bias=st.booleans(),
       encoder=st.sampled_from(ODD_ACTIVATIONS), decoder=st.sampled_from(list(ACTIVATIONS)), seed=st.integers(0, 99))
def test_orientation_turns_h_and_nothing_else(k, signs, bias, encoder, decoder, seed):
    model = make(seed=seed, latent_dim=k, bias_decoder=bias, activation_encoder=encoder, activation_decoder=decoder)
    g = normal(5, SPACE.n, seed=seed)
    h, y = model.encode(g).detach(), model(g).detach()
    model.orient(signs[:k])
    torch.testing.assert_close(model.encode(g), h * torch.tensor(signs[:k]), rtol=0, atol=1e-7)
    torch.testing.assert_close(model(g), y, rtol=1e-6, atol=1e-7)
    model.orient(signs[:k])
    assert torch.equal(model.encode(g), h)  # twice is not at all


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - set(ODD_ACTIVATIONS)))
def test_a_model_that_cannot_be_turned_stays_as_it_is(name):
    model = make(latent_dim=2, activation_encoder=name)
    before = copy.deepcopy(model.state_dict())
    model.orient(1)  # nothing to do
    for sign in (-1, [1, -1]):
        with pytest.raises(InputError, match=f"{name}.*reconstruction"): model.orient(sign)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("sign", [0, 2, 0.5, [1, -1, 1], []])
def test_other_signs_are_refused(sign):
    with pytest.raises(InputError, match="sign"): make(latent_dim=2).orient(sign)


@pytest.mark.parametrize("k", [1, 4])
def test_initial_weights_have_the_distribution_of_the_paper(k):
    n = 20_000
    weights = initial_weights(n, GradiendConfig(pair=("A", "B"), latent_dim=k), seed=1)
    largest = float(weights["encoder_weight"].abs().max())
    for name, bound in (("encoder_weight", 1 / math.sqrt(n)), ("decoder_weight", largest), ("decoder_bias", largest)):
        w = weights[name]
        assert float(w.abs().max()) <= bound and abs(float(w.mean())) < 0.03 * bound
        assert float(w.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)  # uniform
    assert float(weights["encoder_bias"].abs().max()) <= 1 / math.sqrt(n)
    other = initial_weights(n, GradiendConfig(pair=("A", "B"), latent_dim=k), seed=2)
    assert not any(torch.equal(w, other[name]) for name, w in weights.items())


def test_importance_is_what_the_parts_say():
    model = make(latent_dim=3)
    e, d, b = (getattr(model, name).detach() for name in ("encoder_weight", "decoder_weight", "decoder_bias"))
    slow = {"encoder-weight": [sum(abs(float(e[j, i])) for j in range(3)) for i in range(SPACE.n)],
            "decoder-weight": [sum(abs(float(d[i, j])) for j in range(3)) for i in range(SPACE.n)],
            "decoder-bias": [abs(float(b[i])) for i in range(SPACE.n)],
            "decoder-sum": [abs(sum(float(d[i, j]) for j in range(3)) + float(b[i])) for i in range(SPACE.n)]}
    assert set(slow) == set(PARTS)
    for part, expected in slow.items(): torch.testing.assert_close(model.importance(part), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [None, 40, 1])
def test_entries_are_found_in_their_parameters(kept):
    space = SPACE if kept is None else SPACE.keep(torch.randperm(SPACE.n, generator=torch.Generator().manual_seed(3))[:kept])
    model = make(space)
    wanted = space.global_index[torch.randperm(space.n, generator=torch.Generator().manual_seed(4))]
    found = locate_entries(model, wanted, "encoder-weight")
    assert found["global_index"].tolist() == wanted.tolist()
    numbers = SPACE.dense(torch.arange(SPACE.n, dtype=torch.float64))
    for row in found.itertuples():
        tensor = numbers[row.parameter]
        value = tensor[row.row] if tensor.ndim == 1 else tensor.flatten(1)[row.row, row.column]
        assert int(value) == row.global_index
        assert (row.column is not None and str(row.column) == "<NA>") == (tensor.ndim == 1)
        assert row.importance == pytest.approx(float(model.encoder_weight[0, (space.global_index == row.global_index).nonzero()[0]].detach().abs()))
    assert locate_entries(model, top_entries(model, space.n))["importance"].is_monotonic_decreasing


def test_a_smaller_model_measures_with_what_it_kept():
    model, kept = make(latent_dim=2), torch.tensor([3, 50, 7, 99])
    small = keep_entries(model, kept)
    g = normal(4, SPACE.n)
    at = small.space.global_index
    torch.testing.assert_close(small.encode(g[:, at]), torch.tanh(g[:, at] @ model.encoder_weight[:, at].T + model.encoder_bias))
    torch.testing.assert_close(small.decode(0.4), model.decode(0.4)[:, at])
    assert small.encoder_weight.data_ptr() != model.encoder_weight.data_ptr() and torch.equal(small.encoder_bias, model.encoder_bias)


@pytest.mark.parametrize("change", [{"latent_dim": 0}, {"latent_dim": True}, {"latent_dim": 1.0}, {"bias_decoder": 1}, {"pair": ("A",)}, {"pair": "AB"}, {"pair": ("A", 2)}, {"pair": 5},
                                    {"mask": None}, {"objective": 3}, {"base_model": "bert"}, {"source": "both"}, {"activation_decoder": "id"}])
def test_configurations_that_cannot_work(change):
    with pytest.raises(InputError, match=next(iter(change))): GradiendConfig(**({"pair": ("A", "B")} | change))


def test_tensors_that_do_not_fit():
    config = GradiendConfig(pair=("A", "B"))
    weights = initial_weights(SPACE.n, config, seed=0)
    for wrong in ({k: v for k, v in weights.items() if k != "decoder_bias"}, weights | {"more": torch.zeros(1)}, weights | {"encoder_weight": weights["encoder_weight"].T}):
        with pytest.raises(InputError, match="weights"): GradiendNetwork(SPACE, config, wrong)
    model = make(latent_dim=2)
    with pytest.raises(InputError, match="gradients.*100"): model.encode(normal(3, 99))
    with pytest.raises(InputError, match="2 latent"): model.decode(torch.zeros(3, 3))
    for index in ([100], [-1], [0.5]):
        with pytest.raises(InputError, match="global_index"): locate_entries(model, index)
