"""Changes of weights: taking back is the identity on bytes, sums are sums, files are checked, nothing is half-applied."""
import copy
import gc
import json
import weakref
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import gradiend.delta as delta_module
from gradiend.core import InputError
from gradiend.delta import Delta, applied, in_force, load_delta
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from tests.tiny import ARCHITECTURES, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (2, 3), "1.bias": (2,)}
TOTAL = 23


def network(dtype=torch.float32, seed=0):
    "Two layers whose first weight lies transposed in memory."
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g)
    model.to(dtype)
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    return model


def as_bytes(model):
    return {name: p.detach().contiguous().view(torch.uint8).clone() for name, p in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def delta_of(entries, values, names=tuple(SHAPES)):
    space = ParameterSpace.from_global(names, [SHAPES[n] for n in names], None)
    space = space if entries is None else space.keep(sorted(entries))
    return Delta(space, torch.tensor(values[:space.n], dtype=torch.float32))


def numbers(count, exact=False):
    "Numbers to add; exact: multiples of 1/8, whose sums with the weights of `integers` are exact."
    each = st.integers(-64, 64).map(lambda i: i / 8) if exact else st.floats(-100, 100, width=32)
    return st.lists(each, min_size=count, max_size=count)


@st.composite
def deltas(draw, exact=False):
    "A change of some or all entries of some of the tensors, in any order of the tensors."
    names = tuple(draw(st.permutations(list(SHAPES)))[:draw(st.integers(1, 4))])
    total = sum(torch.Size(SHAPES[n]).numel() for n in names)
    entries = draw(st.none() | st.sets(st.integers(0, total - 1)))
    return delta_of(entries, draw(numbers(total, exact)), names)


@settings(max_examples=30, deadline=None)
@given(st.lists(deltas(), min_size=1, max_size=4), st.sampled_from(DTYPES), st.randoms(use_true_random=False))
def test_reverting_in_any_order_is_the_identity_on_bytes(changes, dtype, random):
    model = network(dtype)
    before = as_bytes(model)
    for change in changes:
        change.apply_(model)
    order = list(changes)
    random.shuffle(order)
    for i, change in enumerate(order):
        change.revert_(model)
        left = [c for c in changes if not any(c is gone for gone in order[:i + 1])]
        fresh = network(dtype)
        for c in left:
            c.apply_(fresh)
        assert same(as_bytes(model), as_bytes(fresh))  # as if the reverted ones had never been applied
    assert same(as_bytes(model), before) and in_force(model) == ()


@settings(max_examples=25, deadline=None)
@given(st.lists(deltas(), min_size=1, max_size=4), st.sampled_from(DTYPES))
def test_nested_blocks_are_the_identity_on_bytes(changes, dtype):
    model = network(dtype)
    before = as_bytes(model)
    with pytest.raises(ZeroDivisionError), applied(model, *changes), ExitStack() as stack:
        for change in changes:
            stack.enter_context((-0.5 * change).applied(model))
        raise ZeroDivisionError
    assert same(as_bytes(model), before)


@settings(max_examples=30, deadline=None)
@given(deltas(exact=True), deltas(exact=True), st.sampled_from([torch.float32, torch.float64]))
def test_the_sum_is_one_after_the_other(a, b, dtype):
    model = network(dtype)
    for p in model.parameters():
        p.data = (8 * p.data).round() / 8  # so that every sum is exact
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    (a + b).apply_(one)
    a.apply_(two)
    b.apply_(two)
    assert same({k: v + 0.0 for k, v in one.state_dict().items()}, {k: v + 0.0 for k, v in two.state_dict().items()})  # + 0.0: -0 is 0
    assert (a + b).norm == pytest.approx((b + a).norm)


@settings(max_examples=25, deadline=None)
@given(deltas(), deltas(), st.sampled_from(DTYPES))
def test_the_sum_is_one_after_the_other_up_to_rounding(a, b, dtype):
    one, two = network(dtype), network(dtype)
    (a + b).apply_(one)
    a.apply_(two)
    b.apply_(two)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * 512, msg=name)


@settings(max_examples=25, deadline=None)
@given(deltas(), deltas())
def test_vectors_agree_with_dense_tensors(a, b):
    def dense(change):
        found = change.space.dense(change.values.double())
        return torch.cat([found.get(name, torch.zeros(shape)).reshape(-1).double() for name, shape in SHAPES.items()])

    torch.testing.assert_close(dense(a + b), dense(a) + dense(b), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(dense(a - 2 * b), dense(a) - 2 * dense(b), atol=1e-4, rtol=1e-5)
    assert a.norm == pytest.approx(float(dense(a).norm()))
    expected = float(dense(a) @ dense(b) / (dense(a).norm() * dense(b).norm()))
    assert a.cosine(b) == pytest.approx(expected, nan_ok=True, abs=1e-9)
    assert (a.norm_by_layer("parameter")["norm"] ** 2).sum() == pytest.approx(a.norm ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nine_architectures(kind, dtype, tmp_path):
    _, model = tiny_model(kind, dtype=dtype)
    space = ParameterSpace.from_model(model)
    before = as_bytes(model)
    full = Delta(space, torch.randn(space.n, generator=torch.Generator().manual_seed(0)))
    part = Delta(space.take(torch.arange(0, space.n, 7)), torch.ones(len(range(0, space.n, 7))))
    with applied(model, full, part):
        expected = {k: v + full.space.dense(full.values)[k] for k, v in tiny_model(kind, dtype=dtype)[1].named_parameters() if k in space.names}
        mask = part.space.dense(part.values)
        for name, p in model.named_parameters():
            if name in space.names:
                torch.testing.assert_close(p.detach(), (expected[name].to(dtype) + mask.get(name, torch.zeros(()))).to(dtype), rtol=0, atol=0)
    assert same(as_bytes(model), before)
    again = Delta.from_pretrained(part.save_pretrained(tmp_path / "part"))
    assert torch.equal(again.values, part.values) and again.space.fingerprint == part.space.fingerprint


def test_tied_weights_move_together_and_are_not_added_twice():
    _, model = tiny_model("bert", dtype=torch.float32)
    head, body = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    shape = tuple(model.get_input_embeddings().weight.shape)
    by_head = Delta(ParameterSpace.from_global([head], [shape], [3]), torch.tensor([1.0]))
    old = model.get_input_embeddings().weight[0, 3].item()
    with by_head.applied(model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_input_embeddings().weight[0, 3].item() == pytest.approx(old + 1)
    with pytest.raises(InputError, match="one and the same tensor"):
        Delta(ParameterSpace.from_global([head, body], [shape, shape], None), torch.ones(2 * shape[0] * shape[1])).apply_(model)


def test_offloaded_and_quantised_weights_are_refused():
    model = network()
    before = as_bytes(model)
    model[1].bias = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(InputError, match="rewrite_checkpoint"):
        delta_of(None, [1.0] * TOTAL).apply_(model)
    assert torch.equal(as_bytes(model[0])["weight"], before["0.weight"])
    model[1].bias = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantised"):
        delta_of(None, [1.0] * TOTAL).apply_(model)


def test_nothing_is_half_applied(monkeypatch):
    model = network(torch.float16)
    before = as_bytes(model)
    with pytest.raises(InputError, match="out of the range of torch.float16"):
        delta_of(None, [1.0] * (TOTAL - 1) + [1e6]).apply_(model)
    assert same(as_bytes(model), before) and in_force(model) == ()
    import gradiend.weights as weights
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = weights.moved
    monkeypatch.setattr(weights, "moved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        delta_of(None, [1.0] * TOTAL).apply_(model)
    assert same(as_bytes(model), before) and in_force(model) == ()


def test_a_step_of_training_in_between_is_not_thrown_away():
    model = network()
    lower, upper = delta_of({0, 20}, [1.0, 2.0]), delta_of({20}, [4.0])
    lower.apply_(model)
    upper.apply_(model)
    model[0].weight.data[0, 0] += 1  # touches what `lower` has changed and `upper` has not
    state = as_bytes(model)
    with pytest.raises(InputError, match="changed by something else"):
        lower.revert_(model)
    assert same(as_bytes(model), state) and len(in_force(model)) == 2
    upper.revert_(model)  # this one is untouched, and can go
    assert in_force(model) == (lower,)


def test_a_cast_in_between_is_noticed():
    model = network()
    change = delta_of(None, [0.1] * TOTAL)
    change.apply_(model)
    model.to(torch.bfloat16)
    with pytest.raises(InputError, match="changed by something else"):
        change.revert_(model)


def test_revert_finds_the_same_change_read_back_and_only_on_this_model(tmp_path):
    model = network()
    before, change = as_bytes(model), delta_of({1, 2, 3}, [1.0, 2.0, 3.0])
    (0.5 * change).apply_(model)
    twin = copy.deepcopy(model)
    assert in_force(twin) == ()
    with pytest.raises(InputError, match="not in force"):
        (0.5 * change).revert_(twin)
    with pytest.raises(InputError, match="not in force"):
        change.revert_(model)
    load_delta((0.5 * change).save_pretrained(tmp_path / "half")).revert_(model)
    assert same(as_bytes(model), before)


def test_the_register_does_not_keep_a_model_alive():
    model = network()
    delta_of(None, [1.0] * TOTAL).apply_(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("part", delta_module.DELTA_PARTS)
@pytest.mark.parametrize("source,target", [("alternative", "diff"), ("factual", "diff"), ("diff", "alternative")])
def test_parts_follow_their_definition(part, source, target):
    space = ParameterSpace.from_global(["w"], [(5, 2)], [1, 4, 7])
    model = GradiendModel.create(space, GradiendConfig(pair=("A", "B"), source=source, target=target, latent_dim=2), seed=3)
    h = torch.tensor([0.5, -2.0])
    w = {name: p.detach() for name, p in model.named_parameters()}
    sign = -model.feature_factor_towards("A")
    expected = {"decoder": w["decoder_weight"] @ h + w["decoder_bias"], "decoder-weight": w["decoder_weight"] @ h,
                "encoder-weight": sign * (w["encoder_weight"].T @ h), "decoder-bias": h.mean() * w["decoder_bias"],
                "decoder-sum": w["decoder_weight"] @ h + h.mean() * w["decoder_bias"]}[part]
    change = Delta.from_gradiend(model, [0.5, -2.0], 0.1, part=part)
    torch.testing.assert_close(change.values, 0.1 * expected)
    assert change.note["part"] == part and change.note["feature_factor"] == [0.5, -2.0]
    assert json.dumps(dict(change.note))
    with pytest.raises(InputError, match="2 latent dimensions"):
        Delta.from_gradiend(model, [1.0, 1.0, 1.0])
    bare = GradiendModel.create(space, GradiendConfig(pair=("A", "B"), bias_decoder=False), seed=3)
    if part in ("decoder-bias", "decoder-sum"):
        with pytest.raises(InputError, match="bias_decoder=False"):
            Delta.from_gradiend(bare, 1.0, part=part)


def test_a_bfloat16_gradiend_gives_a_change():
    space = ParameterSpace.from_global(["w"], [(5, 2)], None)
    model = GradiendModel.create(space, GradiendConfig(pair=("A", "B")), seed=3).to(torch.bfloat16)
    change = Delta.from_gradiend(model, -1.0)
    assert change.values.dtype == torch.float32 and change.norm > 0


def files(tmp_path):
    folder = delta_of({1, 5, 22}, [1.0, 2.0, 3.0]).save_pretrained(tmp_path / "d")
    return folder, folder / "delta.safetensors", folder / "delta.json"


def test_a_folder_of_the_first_version_is_read(tmp_path):
    folder, _, described = files(tmp_path)
    old = {key: value for key, value in json.loads(described.read_text()).items() if key in ("names", "shapes", "note")}
    described.write_text(json.dumps(old))
    assert load_delta(folder).values.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("tensors,message", [
    ({"values": torch.tensor([1.0, float("inf"), 2.0])}, "not, first inf"),
    ({"values": torch.ones(4)}, "shape \\(4,\\)"),
    ({"global_index": torch.tensor([1, 5, 99])}, "99 is outside"),
    ({"global_index": torch.tensor([1, 5, 5])}, "2 finite numbers"),
    ({"global_index": torch.tensor([1, 5, 21])}, "fingerprint"),
    ({"global_index": torch.tensor([1.0, 5.0, 22.0])}, "no indices"),
    ({"values": torch.tensor([1, 2, 3])}, "int64"),
])
def test_tampered_tensors(tmp_path, tensors, message):
    folder, path, _ = files(tmp_path)
    save_file({**load_file(path), **tensors}, path)
    with pytest.raises(InputError, match=message) as error:
        load_delta(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("change,message", [
    ({"format": "gradiend-delta-7"}, "delta-7"), ({"shapes": [[3, 4]]}, "cannot be used"), ({"names": None}, "cannot be used"),
    ({"names": ["x", "0.bias", "1.weight", "1.bias"]}, "do not belong together"),
])
def test_tampered_description(tmp_path, change, message):
    folder, _, described = files(tmp_path)
    described.write_text(json.dumps(json.loads(described.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_delta(folder)


def test_cut_off_missing_and_foreign_files(tmp_path):
    folder, path, described = files(tmp_path)
    content = path.read_bytes()
    for keep in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match="delta.safetensors"):
            load_delta(folder)
    path.unlink()
    with pytest.raises(InputError, match="delta.safetensors missing"):
        load_delta(folder)
    path.write_bytes(content)
    described.write_text("[1]")
    with pytest.raises(InputError, match="do not describe"):
        load_delta(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="notes.txt"):
        delta_of(None, [1.0] * TOTAL).save_pretrained(tmp_path / "mine")


def test_saving_twice_gives_the_same_bytes(tmp_path):
    change = delta_of({1, 5, 22}, [1.0, 2.0, 3.0])
    one, two = change.save_pretrained(tmp_path / "a"), load_delta(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_hub(monkeypatch, tmp_path):
    sent = {}

    class FakeApi:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            sent["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message, revision):
            import pathlib
            sent["files"] = {p.name: p.read_bytes() for p in pathlib.Path(folder_path).iterdir()}
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr(delta_module, "HfApi", FakeApi)
    change = Delta(delta_of(None, [1.0] * TOTAL).space, torch.ones(TOTAL), {"pair": ["A", "B"], "base_model": {"name": "own/base", "fingerprint": "abc"}})
    assert change.push_to_hub("me/change", private=True, token="t") == "https://example.org/me/change"
    assert sent["repo"] == ("me/change", True, True) and sent["token"] == "t"
    assert set(sent["files"]) == {"delta.json", "delta.safetensors", "README.md"}
    card = sent["files"]["README.md"].decode()
    assert "base_model: own/base" in card and "fingerprint abc" in card

    def download(repo_id, revision=None, allow_patterns=None):
        assert (repo_id, revision, allow_patterns) == ("me/change", "v1", ["delta.*"])
        for name, content in sent["files"].items():
            (tmp_path / name).write_bytes(content)
        return str(tmp_path)

    monkeypatch.setattr(delta_module, "snapshot_download", download)
    assert torch.equal(Delta.from_pretrained("me/change", revision="v1").values, change.values)

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(delta_module, "snapshot_download", offline)
    with pytest.raises(InputError, match="no network"):
        Delta.from_pretrained("me/change")


def test_differently_pruned_changes_of_other_bases_are_not_mixed():
    base = {"base_model": {"name": "a", "fingerprint": "1"}}, {"base_model": {"name": "b", "fingerprint": "2"}}
    a, b = (Delta(delta_of({0}, [1.0]).space, torch.ones(1), note) for note in base)
    for action in (lambda: a + b, lambda: a - b, lambda: a.cosine(b)):
        with pytest.raises(InputError, match="made for the same base model"):
            action()


def test_numbers_of_every_kind(tmp_path):
    import json

    import numpy as np
    space = ParameterSpace.from_global(["w"], [(3,)], None)
    gradiend = GradiendModel.create(space, GradiendConfig(pair=("a", "b")), seed=0)
    expected = Delta.from_gradiend(gradiend, 1.0, 0.5)
    for one, half in ((np.float32(1), np.float32(0.5)), (torch.tensor(1.0), torch.tensor(0.5)), (1, np.float64(0.5)), ([1.0], 0.5), (torch.ones(1), 0.5)):
        delta = Delta.from_gradiend(gradiend, one, half)
        assert torch.equal(delta.values, expected.values)
        delta.save_pretrained(tmp_path / "d")
        assert json.loads((tmp_path / "d" / "delta.json").read_text())["note"]["learning_rate"] == 0.5
    for two in (2, np.float32(2), np.float64(2), torch.tensor(2.0)):
        for scaled in (two * expected, expected * two, expected / (1 / two)):
            scaled.save_pretrained(tmp_path / "d")
            assert type(scaled) is Delta and torch.equal(scaled.values, 2 * expected.values) and scaled.note["learning_rate"] == 1.0
    for wrong in ("1", None, [["1"]]):
        with pytest.raises(InputError, match="feature_factor"):
            Delta.from_gradiend(gradiend, wrong)
        with pytest.raises(InputError, match="learning_rate"):
            Delta.from_gradiend(gradiend, 1.0, wrong)
    with pytest.raises(InputError, match="divided by zero"):
        expected / 0


def test_sums_and_what_cannot_be_added():
    space = ParameterSpace.from_global(["w"], [(3,)], None)
    delta = Delta(space, torch.ones(3))
    assert torch.equal(sum([delta, delta]).values, torch.full((3,), 2.0))
    for wrong in (lambda: delta + 1, lambda: 1 + delta, lambda: delta - 1.5, lambda: delta + torch.ones(3)):
        with pytest.raises(TypeError, match="2 \\* change"):
            wrong()
    with pytest.raises(InputError, match="factor="):
        delta * "2"
