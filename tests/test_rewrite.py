"""Rewriting: the saved checkpoint is the model in memory, the base model is left alone, a folder is whole or absent."""
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, GenerationConfig

from gradiend.core import InputError
from gradiend.delta import Delta, in_force, load_delta
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.output import foreign_files
from gradiend.rewrite import RECORD, check_class_folders, chosen_delta, chosen_key, load_rewrite_record, rewrite_card, rewrite_for_classes, rewrite_model, rewrite_record
from gradiend.zoo import model_fingerprint
from tests.tiny import ARCHITECTURES, masked_model, tiny_model


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


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nine_architectures_with_tokenizer_and_generation_settings(tmp_path, kind):
    words, base = tiny_model(kind, dtype=torch.float32)
    writes = base.can_generate() and kind not in ("bert", "roberta", "distilbert", "modernbert")
    if writes:
        base.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=0)
    changed = rewrite_model(base, make_delta(base), output_dir=tmp_path / "out", tokenizer=words)
    assert same(state(type(base).from_pretrained(tmp_path / "out", dtype=torch.float32)), state(changed))
    text = "Anna said that she was tired."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == words(text)["input_ids"]
    if writes:
        assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    card = (tmp_path / "out" / "README.md").read_text()
    assert "changed on purpose" in card and model_fingerprint(base) in card


def test_several_deltas_are_their_sum(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    a, b = make_delta(base), make_delta(base, seed=1, params=["*layer.1*"])
    together = rewrite_model(base, [a, b], output_dir=tmp_path / "out", tokenizer=words)
    assert same(state(together), state(rewrite_model(base, a + b)))
    assert load_rewrite_record(tmp_path / "out")["delta"]["note"]["sum_of"] == [{"why": "test"}, {"why": "test"}]
    for wrong in ([], [a, 3], "delta", None):
        with pytest.raises(InputError, match="give one Delta"):
            rewrite_model(base, wrong)


def test_in_place_can_be_reverted():
    _, base = masked_model("bert", dtype=torch.bfloat16)
    before, delta = state(base), make_delta(base)
    rewrite_model(base, delta, in_place=True)
    assert in_force(base) == (delta,) and not same(state(base), before)
    delta.revert_(base)
    assert same(state(base), before)


def test_a_copy_of_a_model_that_is_already_changed():
    _, base = masked_model("bert", dtype=torch.float32)
    a, b = make_delta(base), make_delta(base, seed=1)
    with a.applied(base):
        copied = rewrite_model(base, b)
    expected = rewrite_model(rewrite_model(base, a), b)
    assert same(state(copied), state(expected))


def test_overwrite_keeps_the_files_of_others(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    out = tmp_path / "mine"
    (out / "sub").mkdir(parents=True)
    (out / "notes.txt").write_text("keep")
    (out / "sub" / "deep.bin").write_bytes(b"keep")
    (out / "config.json").write_text("my own config")
    for seed in (0, 1):
        changed = rewrite_model(base, make_delta(base, seed=seed), output_dir=out, tokenizer=words, overwrite=True)
    assert (out / "notes.txt").read_text() == "keep" and (out / "sub" / "deep.bin").read_bytes() == b"keep"
    assert (out / "config.json.kept").read_text() == "my own config" and not (out / "config.json.kept2").exists()
    assert same(state(AutoModelForMaskedLM.from_pretrained(out, dtype=torch.float32)), state(changed))
    assert foreign_files(out) == ["config.json.kept", "notes.txt", "sub/deep.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    base_before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    class Full:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError):
        rewrite_model(base, make_delta(base, seed=2), output_dir=out, tokenizer=Full(), overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == base_before


def test_shards_of_an_earlier_rewrite_do_not_stay(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    out = tmp_path / "out"
    rewrite_model(base, make_delta(base), output_dir=out, tokenizer=words)
    (out / "note.txt").write_text("x")
    import json
    listed = json.loads((out / ".gradiend.json").read_text())
    (out / "model-00003-of-00003.safetensors").write_bytes(b"old shard")
    (out / ".gradiend.json").write_text(json.dumps({"files": [*listed["files"], "model-00003-of-00003.safetensors"]}))
    rewrite_model(base, make_delta(base, seed=1), output_dir=out, tokenizer=words, overwrite=True)
    assert not (out / "model-00003-of-00003.safetensors").exists() and (out / "note.txt").exists()


def test_warns_for_other_weights(tmp_path, recwarn):
    words, base = masked_model("bert", dtype=torch.float32)
    delta = make_delta(base)
    own = Delta(delta.space, delta.values, {"base_model": {"name": "b", "fingerprint": model_fingerprint(base)}})
    rewrite_model(base, own, output_dir=tmp_path / "own", tokenizer=words)
    assert not [w for w in recwarn if "made for" in str(w.message)]
    other = Delta(delta.space, delta.values, {"base_model": {"name": "b", "fingerprint": "0" * 16}})
    with pytest.warns(UserWarning, match="was made for 'b'"):
        rewrite_model(base, other, output_dir=tmp_path / "other", tokenizer=words)


@pytest.fixture
def chosen():
    words, base = masked_model("bert", dtype=torch.float32)
    space = ParameterSpace.from_model(base)
    gradiend = GradiendModel.create(space, GradiendConfig(pair=("3SG", "3PL")), seed=0)
    choice = {"learning_rate": 0.1, "feature_factor": 1.0, "value": 0.7, "base_value": 0.2, "lms": 0.4, "base_lms": 0.5, "kl": 0.01, "perplexity": float("nan"), "base_perplexity": 9.0}
    results = {"3SG": choice, "3PL": {**choice, "feature_factor": -1.0, "part": "decoder-weight"}, "3SG_weaken": {**choice, "feature_factor": -1.0}, "grid": {}}
    return words, base, gradiend, results


def test_rewriting_as_the_decoder_chose(tmp_path, chosen):
    words, base, gradiend, results = chosen
    model = rewrite_for_classes(gradiend, base, results, target_class="3PL", output_dir=tmp_path / "one", tokenizer=words)
    assert same(state(model), state(rewrite_model(base, Delta.from_gradiend(gradiend, -1.0, 0.1, part="decoder-weight"))))
    record = load_rewrite_record(tmp_path / "one")
    assert record["scores"] == {"before": {"value": 0.2, "lms": 0.5, "kl_to_base": 0.0}, "after": {"value": 0.7, "lms": 0.4, "kl_to_base": 0.01}}
    assert record["details"]["target"] == "3PL" and record["delta"]["note"]["part"] == "decoder-weight"
    several = rewrite_for_classes(gradiend, base, results, target_class=["3SG", "3PL"], output_dir=tmp_path / "both", tokenizer=words)
    assert isinstance(several, list) and same(state(several[1]), state(model))
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["3PL", "3SG"]
    weaker = rewrite_for_classes(gradiend, base, results, target_class=["3SG"], increase_target_probabilities=False)
    assert same(state(weaker[0]), state(rewrite_model(base, chosen_delta(gradiend, results["3SG_weaken"]))))
    odd = rewrite_for_classes(gradiend, base, {"a/b c": results["3SG"]}, target_class=["a/b c"], output_dir=tmp_path / "odd", tokenizer=words)
    assert len(odd) == 1 and [p.name for p in (tmp_path / "odd").iterdir()] == ["a_b_c"]


def test_unknown_and_missing_classes(tmp_path, chosen):
    words, base, gradiend, results = chosen
    assert chosen_key({"3SG": {}}, None) == "3SG" and chosen_key({"3SG_weaken": {}}, None, False) == "3SG_weaken"
    with pytest.raises(InputError, match="3SG, 3PL, 3SG_weaken"):
        rewrite_for_classes(gradiend, base, results, target_class="3SGG")
    with pytest.raises(InputError, match="say which class"):
        rewrite_for_classes(gradiend, base, results)
    with pytest.raises(InputError, match="weaken"):
        rewrite_for_classes(gradiend, base, results, target_class="3PL", increase_target_probabilities=False)
    (tmp_path / "3PL").mkdir()
    (tmp_path / "3PL" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="mine.txt"):  # before the first of the two is written
        rewrite_for_classes(gradiend, base, results, target_class=["3SG", "3PL"], output_dir=tmp_path, tokenizer=words)
    assert [p.name for p in tmp_path.iterdir()] == ["3PL"]


def test_the_base_model_is_the_choice_of_last_resort(chosen):
    words, base, gradiend, results = chosen
    with pytest.warns(UserWarning, match="nothing was good enough"):
        model = rewrite_for_classes(gradiend, base, {"3SG": {**results["3SG"], "learning_rate": 0.0, "reason": "nothing was good enough"}})
    assert same(state(model), state(base))


def test_nothing_to_change_is_an_error(tmp_path, chosen):
    words, base, gradiend, results = chosen
    with torch.no_grad():
        for p in base.parameters():
            p.fill_(1.0)  # beside a one, 1e-12 is rounded away
    before, delta = state(base), make_delta(base)
    for nothing, message in ((0 * delta, "zero everywhere"), (1e-12 * delta, "not one weight moves")):
        for in_place in (False, True):
            with pytest.raises(InputError, match=message):
                rewrite_model(base, nothing, output_dir=tmp_path / "out", tokenizer=words, in_place=in_place)
    none = {**results, "3PL": {**results["3PL"], "learning_rate": 0.0, "reason": "nothing kept the score"}}
    with pytest.raises(InputError, match="nothing kept the score"):  # before the folder of the first class is written
        rewrite_for_classes(gradiend, base, none, target_class=["3SG", "3PL"], output_dir=tmp_path / "out", tokenizer=words)
    with pytest.warns(UserWarning, match="nothing kept the score"):
        assert same(state(rewrite_for_classes(gradiend, base, none, target_class="3PL")), before)
    assert list(tmp_path.iterdir()) == [] and same(state(base), before) and in_force(base) == ()


def test_weights_that_were_trained_on_are_not_ours(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    out, delta = tmp_path / "out", make_delta(base)
    changed = rewrite_model(base, delta, output_dir=out, tokenizer=words)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    changed.save_pretrained(out)  # trained further, saved under the same names
    trained = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="model.safetensors"):
        rewrite_model(base, delta, output_dir=out, tokenizer=words)
    assert (out / "model.safetensors").read_bytes() == trained
    loaded = AutoModelForMaskedLM.from_pretrained(out)
    with pytest.raises(InputError, match="loaded from"):
        rewrite_model(loaded, delta, output_dir=out, tokenizer=words, overwrite=True)
    rewrite_model(base, delta, output_dir=out, tokenizer=words, overwrite=True)
    assert (out / "model.safetensors.kept").read_bytes() == trained


def test_an_edited_card_is_not_ours(tmp_path):
    words, base = masked_model("bert", dtype=torch.float32)
    for _ in range(2):  # untouched it is
        rewrite_model(base, make_delta(base), output_dir=tmp_path / "out", tokenizer=words)
    (tmp_path / "out" / "README.md").write_text("my own words")
    with pytest.raises(InputError, match="README.md"):
        rewrite_model(base, make_delta(base), output_dir=tmp_path / "out", tokenizer=words)


def test_a_copy_keeps_no_old_values():
    _, base = masked_model("bert", dtype=torch.float32)
    delta = make_delta(base)
    changed = rewrite_model(base, delta)
    assert in_force(changed) == ()
    with pytest.raises(InputError, match="not in force"):
        delta.revert_(changed)


def test_folders_of_classes_are_looked_at_beforehand(tmp_path):
    (tmp_path / "3PL").mkdir()
    (tmp_path / "3PL" / "mine.txt").write_text("x")
    check_class_folders(tmp_path, ["3SG"])  # the parent need not be ours
    check_class_folders(tmp_path, ["3PL"], False)  # 3PL_weaken
    check_class_folders(tmp_path, ["3SG", "3PL"], overwrite=True)
    for wanted in (["3SG", "3PL"], "3PL"):
        with pytest.raises(InputError, match="mine.txt"):
            check_class_folders(tmp_path, wanted)
    with pytest.raises(InputError, match="same folder"):
        check_class_folders(tmp_path, ["a b", "a_b"])


def test_card_without_a_name():
    _, base = masked_model("bert", dtype=torch.float32)
    record = rewrite_record(base, make_delta(base))
    record["base_model"]["name"] = ""
    assert "weights of the base model a direction" in rewrite_card(record)
