"""Rewriting files: the same bits as in memory, for every architecture and type, in bounded memory, all or nothing."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import gradiend.rewrite_checkpoint as module
from gradiend import zoo
from gradiend.core import InputError
from gradiend.delta import Delta
from gradiend.gradients.space import ParameterSpace
from gradiend.rewrite import load_rewrite_record, rewrite_model
from gradiend.rewrite_checkpoint import Checkpoint, add_in_file, checkpoint_fingerprint, find_places, places_in, rewrite_checkpoint
from gradiend.weights import moved
from tests.tiny import ARCHITECTURES, tiny_model

ROOT = Path(__file__).resolve().parents[1]


def delta_for(model, *, every=3, scale=0.1, seed=0, note=None):
    space = ParameterSpace.from_model(model)
    space = space.take(torch.arange(0, space.n, every))
    return Delta(space, scale * torch.randn(space.n, generator=torch.Generator().manual_seed(seed)), note or {})


def saved(tmp_path, kind="bert", dtype=torch.float32, size="10KB"):
    words, model = tiny_model(kind, dtype=dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size=size)
    words.save_pretrained(tmp_path / "base")
    return words, model


def load(folder, like):
    return type(like).from_pretrained(folder, dtype=next(like.parameters()).dtype)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_same_bits_as_in_memory(tmp_path, kind, dtype):
    words, model = saved(tmp_path, kind, dtype, "5KB")
    delta = delta_for(model, every=1 if kind == "bert" else 3)
    expected = rewrite_model(model, delta, output_dir=tmp_path / "memory", tokenizer=words)
    assert rewrite_checkpoint(tmp_path / "base", delta, tmp_path / "disk") == tmp_path / "disk"
    assert same(load(tmp_path / "disk", model), expected) and not same(expected, model)
    on_disk, in_memory = load_rewrite_record(tmp_path / "disk"), load_rewrite_record(tmp_path / "memory")
    assert on_disk["rewritten"] == in_memory["rewritten"] and on_disk["delta"] == in_memory["delta"]
    assert on_disk["base_model"]["fingerprint"] == in_memory["base_model"]["fingerprint"]
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) >= 4  # shards and the change
    text = "Anna said that she was tired."
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "disk")(text)["input_ids"] == words(text)["input_ids"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.integers(1, 9))
def test_pieces_agree_with_the_whole(tmp_path_factory, n, data, dtype, piece):
    folder = tmp_path_factory.mktemp("piece")
    weights = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    save_file({"before": torch.ones(3), "w": weights, "after": torch.zeros(2)}, folder / "m.safetensors")
    positions = data.draw(st.none() | st.sets(st.integers(0, n - 1)).map(lambda s: torch.tensor(sorted(s), dtype=torch.int64)))
    change = torch.randn(n if positions is None else len(positions), generator=torch.Generator().manual_seed(1))
    expected = weights.clone()
    if positions is None:
        expected = moved(weights, change)
    else:
        expected[positions] = moved(weights[positions], change)
    count = add_in_file(places_in(folder / "m.safetensors")["w"], positions, change, piece=piece)
    found = load_file(folder / "m.safetensors")
    assert torch.equal(found["w"], expected) and found["before"].tolist() == [1, 1, 1] and found["after"].tolist() == [0, 0]
    assert count == int((expected != weights).sum())


def test_old_spellings_and_duplicates(tmp_path):
    "A checkpoint as of 2018: gamma and beta, the tied matrix twice, and one without the prefix of the backbone."
    words, model = saved(tmp_path, size="1GB")
    delta = delta_for(model)
    expected = rewrite_model(model, delta)
    path = tmp_path / "base" / "model.safetensors"
    tensors = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in load_file(path).items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    rewrite_checkpoint(tmp_path / "base", delta, tmp_path / "disk")
    found = load_file(tmp_path / "disk" / "model.safetensors")
    state = expected.state_dict()
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name.replace("gamma", "weight").replace("LayerNorm.beta", "LayerNorm.bias")]), name

    model.base_model.save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(json.loads((tmp_path / "backbone" / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}))
    rewrite_checkpoint(tmp_path / "backbone", delta, tmp_path / "disk2")
    assert load_rewrite_record(tmp_path / "disk2")["base_model"]["fingerprint"] is None  # the head is not in the files
    found = load_file(tmp_path / "disk2" / "model.safetensors")
    assert found and all(torch.equal(t, state["bert." + name]) for name, t in found.items() if "bert." + name in state)


def test_both_names_of_a_tied_tensor_are_refused(tmp_path):
    _, model = saved(tmp_path)
    shape = tuple(model.get_input_embeddings().weight.shape)
    names = ["cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"]
    one = Delta(ParameterSpace.from_global(names[:1], [shape], [0]), torch.ones(1))
    assert len(find_places(Checkpoint(tmp_path / "base"), one)[names[0]]) == 1
    both = Delta(ParameterSpace.from_global(names, [shape, shape], [0, shape[0] * shape[1] + 1]), torch.ones(2))
    with pytest.raises(InputError, match="under two names"):
        find_places(Checkpoint(tmp_path / "base"), both)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_without_loading(tmp_path, kind, dtype):
    _, model = saved(tmp_path, kind, dtype)
    checkpoint = Checkpoint(tmp_path / "base")
    assert checkpoint_fingerprint(checkpoint) == zoo.model_fingerprint(model)
    assert checkpoint_fingerprint(checkpoint, torch.float32) == zoo.model_fingerprint(model.float())


def test_warning_for_other_weights_only(tmp_path, recwarn):
    _, model = saved(tmp_path, dtype=torch.bfloat16)
    for base in (zoo.model_fingerprint(model), zoo.model_fingerprint(model.float())):
        rewrite_checkpoint(tmp_path / "base", delta_for(model, note={"base_model": {"name": "b", "fingerprint": base}}), tmp_path / "out")
        assert not [w for w in recwarn if "was made for" in str(w.message)]
        assert load_rewrite_record(tmp_path / "out")["base_model"]["fingerprint"] == base
    with pytest.warns(UserWarning, match="was made for"):
        rewrite_checkpoint(tmp_path / "base", delta_for(model, note={"base_model": {"name": "b", "fingerprint": "0" * 16}}), tmp_path / "out")


def test_companions_are_copied_and_other_weights_are_not(tmp_path):
    words, model = saved(tmp_path, "gpt2")
    base = tmp_path / "base"
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (base / "LICENSE").write_text("free")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    (base / "README.md").write_text("card of the base model")
    (base / "onnx").mkdir()
    rewrite_checkpoint(base, delta_for(model), tmp_path / "out", details={"why": "x"}, scores={"before": {"lms": 0.5}, "after": {"lms": 0.4}})
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"generation_config.json", "LICENSE", "config.json", "tokenizer.json", "delta.json", "gradiend_rewrite.json"} <= names
    assert not names & {"pytorch_model.bin", "onnx"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "changed on purpose" in card and "| lms | 0.5 | 0.4 |" in card
    again = delta_for(model, seed=5)  # a rewritten checkpoint can be rewritten; the record is that of the last change
    rewrite_checkpoint(tmp_path / "out", again, tmp_path / "out2")
    assert torch.equal(Delta.from_pretrained(tmp_path / "out2").values, again.values)


def test_refused_and_nothing_left(tmp_path, monkeypatch):
    words, model = saved(tmp_path)
    delta = delta_for(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="thesis.txt"):
        rewrite_checkpoint(tmp_path / "base", delta, tmp_path / "full")
    rewrite_checkpoint(tmp_path / "base", delta, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x" and same(load(tmp_path / "full", model), rewrite_model(model, delta))
    base = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    _, other = tiny_model("distilbert", dtype=torch.float32)
    with pytest.raises(InputError, match="no tensor 'distilbert"):
        rewrite_checkpoint(tmp_path / "base", delta_for(other), tmp_path / "out")
    with pytest.raises(InputError, match="out of the range"):
        tiny_model("bert", dtype=torch.float16)[1].save_pretrained(tmp_path / "half")
        rewrite_checkpoint(tmp_path / "half", delta_for(model, scale=1e6), tmp_path / "out")
    calls = []
    original = module.add_in_file

    def fails_later(*args, **options):
        calls.append(1)
        if len(calls) == 20:
            raise OSError("no space left on device")
        return original(*args, **options)

    monkeypatch.setattr(module, "add_in_file", fails_later)
    with pytest.raises(OSError, match="no space"):
        rewrite_checkpoint(tmp_path / "base", delta, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "full", "half"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()} == base


def test_integer_weights_and_pickles_are_refused(tmp_path):
    _, model = saved(tmp_path, size="1GB")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path)
    with pytest.raises(InputError, match="quantised"):
        rewrite_checkpoint(tmp_path / "base", delta_for(model), tmp_path / "out")
    path.rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(InputError, match="neither model.safetensors"):
        rewrite_checkpoint(tmp_path / "base", delta_for(model), tmp_path / "out")


def test_hub_id(tmp_path, monkeypatch):
    _, model = saved(tmp_path)
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(tmp_path / "base")

    monkeypatch.setattr(module, "snapshot_download", download)
    rewrite_checkpoint("owner/model", delta_for(model), tmp_path / "out", revision="v1")
    assert asked == [("owner/model", "v1")]
    record = load_rewrite_record(tmp_path / "out")
    assert record["base_model"]["name"] == "owner/model" and record["base_model"]["revision"] == "v1"
    assert "base_model: owner/model" in (tmp_path / "out" / "README.md").read_text()

    def offline(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(module, "snapshot_download", offline)
    with pytest.raises(InputError, match="no network"):
        rewrite_checkpoint("owner/model", delta_for(model), tmp_path / "out3")


PEAK = """
import json, resource, sys
from pathlib import Path
import torch
from gradiend.delta import load_delta
from gradiend.rewrite_checkpoint import rewrite_checkpoint
work = Path(sys.argv[1])
rewrite_checkpoint(work / "small", load_delta(work / "small-delta"), work / "warm")  # whatever is imported late is there now
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
def peak(): return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
before = peak()
rewrite_checkpoint(work / "large", load_delta(work / "large-delta"), work / "out")
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_ten_shards_take_the_memory_of_one_at_most(tmp_path):
    config = transformers.GPT2Config(vocab_size=320, n_positions=64, n_embd=512, n_layer=10, n_head=4, bos_token_id=0, eos_token_id=0)
    large = transformers.GPT2LMHeadModel(config)
    large.save_pretrained(tmp_path / "large", max_shard_size="13MB")
    delta_for(large, every=1000).save_pretrained(tmp_path / "large-delta")
    _, small = tiny_model("gpt2", dtype=torch.float32)
    small.save_pretrained(tmp_path / "small", max_shard_size="10KB")
    delta_for(small).save_pretrained(tmp_path / "small-delta")
    shards = [p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) >= 10
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout.splitlines()[-1])
    print(f"peak {used / 1e6:.1f} MB above the start; shards of up to {max(shards) / 1e6:.1f} MB, {sum(shards) / 1e6:.0f} MB in all")
    assert used <= max(shards) + 4e6
    model = type(large).from_pretrained(tmp_path / "out")
    assert same(model, rewrite_model(large, Delta.from_pretrained(tmp_path / "large-delta"), in_place=True))


def sparse_checkpoint(folder, config, numbers="BF16"):
    "A checkpoint of zeros that takes no room on the disk until it is copied."
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    header, end = {}, 0
    for name, p in model.named_parameters():
        header[name] = {"dtype": numbers, "shape": list(p.shape), "data_offsets": [end, end := end + 2 * p.numel()]}
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return model


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_one_large_file_takes_the_memory_of_a_piece(tmp_path):
    model = sparse_checkpoint(tmp_path / "large", transformers.GPT2Config(vocab_size=750_000, n_positions=64, n_embd=64, n_layer=1, n_head=2))
    name = "transformer.h.0.mlp.c_fc.weight"
    space = ParameterSpace.from_global((name,), (tuple(dict(model.named_parameters())[name].shape),), None)
    note = {"base_model": {"name": "x", "fingerprint": "0" * 16}}  # so that it is read a second time, as float32
    Delta(space, torch.full((space.n,), 0.01), note).save_pretrained(tmp_path / "large-delta")
    _, small = tiny_model("gpt2", dtype=torch.float32)
    small.save_pretrained(tmp_path / "small")
    delta_for(small).save_pretrained(tmp_path / "small-delta")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    size, used = (tmp_path / "large" / "model.safetensors").stat().st_size, json.loads(done.stdout.splitlines()[-1])
    print(f"peak {used / 1e6:.1f} MB above the start; one file of {size / 1e6:.1f} MB")
    assert size > 95e6 and used < 30e6
    (tmp_path / "out" / "model.safetensors").unlink()


def test_the_single_file_is_taken_where_an_index_lies_beside_it(tmp_path):
    words, model = saved(tmp_path)
    model.save_pretrained(tmp_path / "base", max_shard_size="1GB")
    other = tiny_model("bert", dtype=torch.float32)[1]
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(3.0)
    other.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for file in (tmp_path / "shards").glob("model*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    rewrite_checkpoint(tmp_path / "base", delta_for(model), tmp_path / "out")
    assert same(load(tmp_path / "base", model), model)
    assert same(load(tmp_path / "out", model), rewrite_model(model, delta_for(model)))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_several_deltas_and_deltas_that_change_nothing(tmp_path):
    _, model = saved(tmp_path)
    a, b = delta_for(model), delta_for(model, every=5, seed=1)
    rewrite_checkpoint(tmp_path / "base", [a, b], tmp_path / "out")
    assert same(load(tmp_path / "out", model), rewrite_model(model, [a, b]))
    norms = ParameterSpace.from_model(model, "*LayerNorm.weight")  # ones
    for nothing, message in ((0 * a, "zero everywhere"), (Delta(norms, torch.full((norms.n,), 1e-12)), "not one weight moves"), (None, "give one Delta")):
        with pytest.raises(InputError, match=message):
            rewrite_checkpoint(tmp_path / "base", nothing, tmp_path / "none")
    assert not (tmp_path / "none").exists()
