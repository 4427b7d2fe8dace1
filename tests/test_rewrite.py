"""Rewriting: the saved checkpoint is the model in memory, the base model is left alone, a folder is whole or absent."""
import pytest
import torch
from tests.tiny import masked_model
from transformers import AutoModelForMaskedLM, AutoTokenizer

from gradiend.core import InputError
from gradiend.delta import Delta, load_delta
from gradiend.gradients.space import ParameterSpace
from gradiend.rewrite import RECORD, load_rewrite_record, rewrite_model


def make_delta(model, *, seed=0, params=None):
    space = ParameterSpace.from_model(model, params)
    values = torch.randn(space.n, generator=torch.Generator().manual_seed(seed)) / 10
    return Delta(space, values, {"why": "test"})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_is_the_changed_model(tmp_path, kind, dtype):
    words, base = masked_model(kind, dtype=dtype)
    before, delta = state(base), make_delta(base)
    changed = rewrite_model(base, delta, output_dir=tmp_path / "out", tokenizer=words)
    assert same(state(base), before) and not same(state(changed), before)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert same(state(loaded), state(changed))
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")("Anna said that she was tired.", return_tensors="pt")
    assert inputs["input_ids"].tolist() == words("Anna said that she was tired.", return_tensors="pt")["input_ids"].tolist()
    if dtype == torch.float32:  # ModernBERT computes its rotary table anew when loaded, not in half precision
        with torch.no_grad():
            assert torch.equal(loaded.eval()(inputs["input_ids"]).logits, changed(inputs["input_ids"]).logits)


def test_weights_are_base_plus_delta_and_ties_hold():
    _, base = masked_model("bert", dtype=torch.float32)
    delta = make_delta(base, params=["*word_embeddings*", "*layer.0*"])
    changed, added = rewrite_model(base, delta), delta.space.dense(delta.values)
    for (name, new), old in zip(changed.named_parameters(), base.parameters()):
        assert torch.equal(new, old + added[name] if name in added else old)
    assert changed.get_input_embeddings().weight is changed.get_output_embeddings().weight
    assert changed.get_input_embeddings().weight is not base.get_input_embeddings().weight


def test_in_place_changes_the_model_itself():
    _, base = masked_model("bert", dtype=torch.float32)
    delta = make_delta(base)
    expected = state(rewrite_model(base, delta))
    assert rewrite_model(base, delta, in_place=True) is base
    assert same(state(base), expected)


def test_record(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    delta = make_delta(base)
    rewrite_model(base, delta, output_dir=tmp_path / "out", tokenizer=words, details={"target_class": "3SG"})
    record = load_rewrite_record(tmp_path / "out")
    assert record["details"] == {"target_class": "3SG"} and record["delta"]["note"] == {"why": "test"}
    assert record["delta"]["entries"] == delta.space.n and record["delta"]["norm"] == pytest.approx(float(delta.values.norm()))
    assert record["base_model"]["fingerprint"] != record["rewritten"]["fingerprint"]
    assert set(record["versions"]) == {"gradiend", "torch", "transformers", "numpy"}
    stored = load_delta(tmp_path / "out")
    assert torch.equal(stored.values, delta.values)
    assert same(state(rewrite_model(base, stored)), state(AutoModelForMaskedLM.from_pretrained(tmp_path / "out")))


def test_saving_again_replaces_our_folder_only(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    for seed in (0, 1):
        rewrite_model(base, make_delta(base, seed=seed), output_dir=tmp_path / "out", tokenizer=words)
    assert torch.equal(load_delta(tmp_path / "out").values, make_delta(base, seed=1).values)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="notes.txt"):
        rewrite_model(base, make_delta(base), output_dir=tmp_path / "mine", tokenizer=words)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_leaves_nothing(tmp_path, in_place, error):
    words, base = masked_model("bert", dtype=torch.float32)
    before = state(base)

    class Full:
        def save_pretrained(self, folder):
            (folder / "half.json").write_text("{")
            raise error

    with pytest.raises(type(error)):
        rewrite_model(base, make_delta(base), output_dir=tmp_path / "a" / "out", tokenizer=Full(), in_place=in_place)
    assert list(tmp_path.iterdir()) == [] and same(state(base), before)


def test_wrong_input(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    with pytest.raises(InputError, match="tokenizer=None"):
        rewrite_model(base, make_delta(base), output_dir=tmp_path / "out")
    with pytest.raises(InputError, match=RECORD):
        load_rewrite_record(tmp_path)
    with pytest.raises(TypeError):  # details that cannot be stored: nothing is written
        rewrite_model(base, make_delta(base), output_dir=tmp_path / "out", tokenizer=words, details={"x": object()})
    _, other = masked_model("distilbert", dtype=torch.float32)
    before = state(other)
    with pytest.raises(ValueError):
        rewrite_model(other, make_delta(base), output_dir=tmp_path / "out", tokenizer=words)
    assert same(state(other), before) and list(tmp_path.iterdir()) == []
