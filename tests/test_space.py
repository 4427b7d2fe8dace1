"""Parameter spaces against a slow list of every entry; selection, very large models, files."""
import json
import random
import re

import pytest
import torch
from torch import nn

from gradiend.core import InputError
from gradiend.gradients.space import Location, ParameterSpace, backbone_parameters, component_of, layer_of, positions_of, select_names

from .tiny import ARCHITECTURES, tiny_model

SHAPES = {"layers.0.w": (3, 4), "layers.0.b": (4,), "layers.1.w": (2, 2, 2), "empty": (0, 3), "last": (5,)}
FULL = ParameterSpace(tuple(SHAPES), tuple(SHAPES.values()), (None,) * len(SHAPES))
TENSORS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, (name, shape) in enumerate(SHAPES.items())}


def every_entry(space):
    "The slow truth: (global index, name, flat position) of each entry, in order."
    result, start = [], 0
    for name, shape, index in zip(space.names, space.shapes, space.indices):
        total = torch.Size(shape).numel()
        result += [(start + i, name, i) for i in (range(total) if index is None else index.tolist())]
        start += total
    return result


def some_space(seed: int) -> ParameterSpace:
    "A space with whole, cut and emptied tensors."
    r = random.Random(seed)
    indices = [r.choice([None, torch.tensor(sorted(r.sample(range(max(t, 1)), r.randint(0, t))), dtype=torch.int64)]) for t in FULL.totals]
    return ParameterSpace(FULL.names, FULL.shapes, tuple(indices))


# --- the vector and its addresses ------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(25))
def test_everything_agrees_with_the_list_of_entries(seed):
    space = some_space(seed)
    entries = every_entry(space)
    assert space.n == len(space) == len(entries) and space.global_index.tolist() == [g for g, _, _ in entries]
    vector = space.gather(TENSORS)
    assert vector.tolist() == [TENSORS[name].flatten()[i].item() for _, name, i in entries]
    scattered = space.scatter(vector)
    assert [(name, i) for name, (at, _) in scattered.items() for i in at.tolist()] == [(name, i) for _, name, i in entries]
    assert torch.equal(torch.cat([values for _, values in scattered.values()]) if scattered else torch.zeros(0), vector)
    for name, whole in space.dense(vector).items():
        expected = torch.zeros(SHAPES[name]).flatten()
        for _, n, i in entries:
            if n == name: expected[i] = TENSORS[name].flatten()[i]
        assert torch.equal(whole, expected.view(SHAPES[name]))
    for p, (_, name, i) in enumerate(entries):
        found = space.locate(p)
        assert found.name == name and TENSORS[name][found.coordinates] == TENSORS[name].flatten()[i]


@pytest.mark.parametrize("seed", range(25))
def test_smaller_spaces(seed):
    space, other, r = some_space(seed), some_space(seed + 100), random.Random(seed)
    index = space.global_index.tolist()
    chosen = r.sample(index, len(index) // 2)
    small = space.keep(chosen + chosen[:1])  # order and repetition make no difference
    assert small.global_index.tolist() == sorted(chosen)
    places = positions_of(space, chosen)
    assert space.global_index[places].tolist() == chosen
    mask = torch.zeros(space.n, dtype=torch.bool)
    mask[places] = True
    for same in (space.take(places), space.take(places.tolist()), space.take(mask)):
        assert same.fingerprint == small.fingerprint
    both = space.intersect(other)
    assert both.global_index.tolist() == sorted(set(index) & set(other.global_index.tolist()))
    assert both.fingerprint == other.intersect(space).fingerprint
    assert torch.equal(small.gather(TENSORS), space.gather(TENSORS)[places.sort().values])


def test_what_is_not_needed_may_be_missing():
    small = FULL.keep([13])  # layers.0.b
    assert small.gather({"layers.0.b": TENSORS["layers.0.b"]}).tolist() == [TENSORS["layers.0.b"][1].item()]
    assert list(small.dense(torch.ones(1))) == list(small.scatter(torch.ones(1))) == ["layers.0.b"]


def test_dense_copies_nothing_that_is_whole():
    vector = torch.zeros(FULL.n)
    FULL.dense(vector)["last"][0] = 1.0
    assert vector.sum() == 1.0


def test_half_precision_stays_half_precision():
    small = FULL.keep([0, 13])
    assert small.gather({name: t.bfloat16() for name, t in TENSORS.items()}).dtype == torch.bfloat16
    assert small.dense(torch.ones(2, dtype=torch.float16))["layers.0.w"].dtype == torch.float16


def test_the_fingerprint_is_that_of_saved_models():
    "Files of earlier versions hold these; should one change, no saved model could be loaded any more."
    assert FULL.fingerprint == "d69bf6607e084722"
    assert FULL.keep([0, 13, 24]).fingerprint == "6a13164992538372"


# --- very large models, without their memory -------------------------------------------------------------------

def test_addresses_beyond_two_to_the_31():
    side = 2**17
    space = ParameterSpace(("a", "b", "c"), ((side, side), (side, side), (4,)), (None,) * 3)
    assert space.full_n == space.n == 2 * side**2 + 4 > 2**34
    assert space.locate(side**2 + 3 * side + 5) == Location("b", (3, 5))
    last = space.full_n - 1
    small = space.keep([last, 2**31, 2**32 + 1, side**2])
    assert small.global_index.tolist() == [2**31, 2**32 + 1, side**2, last] and small.locate(3) == Location("c", (3,))
    assert positions_of(space, [last, 2**33]).tolist() == [last, 2**33]
    assert small.take([0, 3]).global_index.tolist() == [2**31, last]
    assert space.intersect(small).fingerprint == small.fingerprint
    assert small.gather({name: torch.empty(shape, device="meta") for name, shape in zip(space.names, space.shapes)}).shape == (4,)
    assert str(space).startswith("ParameterSpace(34,359,738,372 of")


def test_values_beyond_two_to_the_31(tmp_path):
    "A file with holes stands in for a tensor of more than 2**31 entries; only the pages that are touched exist."
    n = 2**31 + 2**20
    huge = torch.from_file(str(tmp_path / "holes"), shared=True, size=n, dtype=torch.int8)
    huge[2**31 + 77] = 5
    space = ParameterSpace(("first", "huge"), ((3,), (n,)), (None, None)).keep([1, 3 + 2**31 + 77, 3 + n - 1])
    assert space.gather({"first": torch.tensor([1, 2, 3], dtype=torch.int8), "huge": huge}).tolist() == [2, 5, 0]


# --- backbones -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_backbone_is_what_the_last_hidden_state_depends_on(kind):
    tokenizer, model = tiny_model(kind)
    ids = torch.tensor([[5, 6, 7, 8]])
    out = model(input_ids=ids, output_hidden_states=True, **({"decoder_input_ids": ids} if kind == "t5" else {}))
    (out.decoder_hidden_states if kind == "t5" else out.hidden_states)[-1].pow(2).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    backbone = backbone_parameters(model)
    assert reached <= set(backbone)
    assert len({id(p) for p in backbone.values()}) == len(backbone)
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    assert any(p is head for p in backbone.values()) == tied
    assert [n for n, p in model.named_parameters() if n in backbone] == list(backbone)


def test_an_encoder_decoder_with_its_own_output_layer():
    _, model = tiny_model("t5")
    assert model.base_model is model
    tied = set(backbone_parameters(model))
    model.lm_head = nn.Linear(16, model.config.vocab_size, bias=False)
    assert "lm_head.weight" in dict(model.named_parameters())
    assert set(backbone_parameters(model)) == tied - {"lm_head.weight"} and "shared.weight" in tied


def test_any_module_is_its_own_backbone():
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(backbone_parameters(module)) == ["0.weight", "0.bias"]
    assert ParameterSpace.from_model(module).n == 6
    with pytest.raises(InputError, match="no parameters"):
        ParameterSpace.from_model(nn.ReLU())


# --- selection -------------------------------------------------------------------------------------------------

NAMES = ["emb.weight", "layers.0.q.weight", "layers.0.q.bias", "layers.1.q.weight", "layers.10.q.weight", "odd[1].weight"]


@pytest.mark.parametrize("params,expected", [
    (None, [0, 1, 2, 3, 4, 5]), ("emb.weight", [0]), ("layers.1.*", [3]), ("layers.?.q.weight", [1, 3]), ("odd[1].weight", [5]),
    (re.compile(r"^layers\.1"), [3, 4]), (re.compile("bias|emb"), [0, 2]), (lambda name: name.endswith("bias"), [2]),
    (["layers.10*", "emb*"], [0, 4]), ([re.compile(r"\.0\."), "emb.weight", lambda name: "odd" in name], [0, 1, 2, 5]), (("*",), [0, 1, 2, 3, 4, 5]),
])
def test_select_names(params, expected):
    assert select_names(NAMES, params) == [NAMES[i] for i in expected]


@pytest.mark.parametrize("params,match", [
    ("layer.0.q.weight", "most similar name is 'layers.0.q.weight'"), (["emb*", "nothing*"], "nothing"), (re.compile("xyz"), "xyz"), (lambda name: False, "matches none"),
    ([], "empty"), ("weight", "matches none"),  # a wildcard fits the whole name
])
def test_a_pattern_without_a_match_is_refused(params, match):
    with pytest.raises(InputError, match=match):
        select_names(NAMES, params)


def test_what_is_no_pattern_is_a_type_error():
    with pytest.raises(TypeError, match="params: 3"):
        select_names(NAMES, [3])


# --- summaries -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,layer,component", [
    ("model.layers.11.mlp.Wo.weight", "model.layers.11", "model.layers.*.mlp.Wo.weight"), ("shared.weight", "shared", "shared.weight"),
    ("encoder.block.0.layer.1.layer_norm.weight", "encoder.block.0", "encoder.block.*.layer.1.layer_norm.weight"),
    ("decoder.block.0.layer.1.layer_norm.weight", "decoder.block.0", "decoder.block.*.layer.1.layer_norm.weight"),
    ("0.weight", "0", "*.weight"), ("weight", "weight", "weight"), ("h2o.weight", "h2o", "h2o.weight"),
])
def test_layer_and_component(name, layer, component):
    assert (layer_of(name), component_of(name)) == (layer, component)
    assert select_names([name, "other"], component) == [name]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_summaries_add_up(kind):
    space = ParameterSpace.from_model(tiny_model(kind)[1])
    small = space.keep(torch.arange(0, space.n, 3))
    for by in ("parameter", "layer", "component"):
        frame = small.summary(by)
        assert frame[by].is_unique and frame["entries"].sum() == small.n
        assert frame["share"].between(0, 1).all() and (space.summary(by)["share"] == 1).all()
    assert len(small.summary("layer")) < len(small.summary("component")) < len(small.summary())
    with pytest.raises(InputError, match="by='layers'"):
        small.summary("layers")


# --- comparing, keeping, errors --------------------------------------------------------------------------------

def test_spaces_of_other_models_cannot_be_mixed():
    renamed = ParameterSpace(("x", *FULL.names[1:]), FULL.shapes, FULL.indices)
    reshaped = ParameterSpace(FULL.names, ((4, 3), *FULL.shapes[1:]), FULL.indices)
    shorter = ParameterSpace(FULL.names[:2], FULL.shapes[:2], (None, None))
    for other, match in ((renamed, r"x \(3, 4\)"), (reshaped, r"\(4, 3\)"), (shorter, "5 parameter tensors against 2")):
        for action in (FULL.check_comparable, FULL.intersect):
            with pytest.raises(InputError, match=match):
                action(other)


@pytest.mark.parametrize("space", [FULL, FULL.keep([0, 13, 24]), FULL.keep([])], ids=["whole", "cut", "empty"])
def test_save_and_load(space, tmp_path):
    again = ParameterSpace.load(space.save(tmp_path / "space"))
    assert again.fingerprint == space.fingerprint and again.names == space.names and again.shapes == space.shapes
    assert torch.equal(again.global_index, space.global_index)
    again.save(tmp_path / "space")  # what we wrote may be replaced
    assert not (tmp_path / "space" / "space.safetensors").exists() or space is not FULL


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    a, b = FULL.keep([0, 1]).save(tmp_path / "a"), FULL.keep([0, 2]).save(tmp_path / "b")
    (a / "space.safetensors").write_bytes((b / "space.safetensors").read_bytes())
    with pytest.raises(InputError, match="does not match its fingerprint"):
        ParameterSpace.load(a)
    (b / "space.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="format 1"):
        ParameterSpace.load(b)
    with pytest.raises(InputError, match="no such file"):
        ParameterSpace.load(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="notes.txt"):
        FULL.save(tmp_path / "mine")


@pytest.mark.parametrize("action,match", [
    (lambda: FULL.keep([0]).keep([1]), "1 is not an entry"), (lambda: FULL.keep([29]), "29 is outside"), (lambda: FULL.keep([-1]), "-1 is outside"),
    (lambda: FULL.keep(torch.ones(29, dtype=torch.bool)), "bool values are no indices"), (lambda: FULL.keep([0.5]), "float32 values are no indices"),
    (lambda: FULL.keep([0]).take([1]), "1 is outside the 1 entries"), (lambda: FULL.take(torch.ones(3, dtype=torch.bool)), r"\(3,\) does not fit"),
    (lambda: FULL.scatter(torch.zeros(30)), "30"), (lambda: FULL.dense(torch.zeros(1, 29)), r"\(1, 29\)"), (lambda: FULL.gather({}), "'layers.0.w' is missing"),
    (lambda: FULL.gather({**TENSORS, "last": torch.zeros(6)}), r"'last' has shape \(6,\)"),
])
def test_errors_name_the_value(action, match):
    with pytest.raises(InputError, match=match):
        action()


def test_outside_the_vector():
    for position in (-1, 29):
        with pytest.raises(IndexError, match=str(position)):
            FULL.locate(position)
