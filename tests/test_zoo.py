"Loading models: never the network for an embedded name, the ordinary hub code for a hub id, one clear line otherwise."
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from gradiend import zoo
from gradiend.core import InputError

NAME = "gradiend/mini-mlm"


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    "Run code in a fresh process, with a home of the hub's client that it cannot share with this one."
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **environment},
                          capture_output=True, text=True)


def test_embedded_model_never_asks_the_network(tmp_path):
    "Every attempt to resolve a host name or to connect ends the process."
    done = python("""
        import os, socket
        def refuse(*_, **__): os._exit(77)
        socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
        from gradiend import zoo
        zoo.load("gradiend/mini-mlm")
        print("loaded", len(zoo.embedded_models()))
    """, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded", "1"]
    assert not list(tmp_path.rglob("models--*"))


def test_same_weights_as_transformers_loads():
    ours = zoo.load(NAME)[1].state_dict()
    theirs = AutoModelForMaskedLM.from_pretrained(zoo.embedded_folder(NAME), dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_embedded_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert zoo.load(NAME)[1].num_parameters() == zoo.embedded_models().parameters[0]


HUB = """
    import sys
    from gradiend import zoo
    try: print(zoo.model_fingerprint(zoo.load(sys.argv[1] if len(sys.argv) > 1 else "owner/tiny")[1]))
    except zoo.InputError as error: print("InputError", error)
"""


def test_hub_model_in_the_cache_loads_offline(tmp_path):
    cache = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(zoo.embedded_folder(NAME), cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    done = python(HUB, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.stdout.split() == [zoo.model_fingerprint(zoo.load(NAME)[1])], done.stderr


def test_hub_model_out_of_reach_is_one_clear_line(tmp_path):
    done = python(HUB, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    [line] = done.stdout.splitlines()
    assert line.startswith("InputError model='owner/tiny' is not known") and NAME in line and "asking there failed" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["", ".", "..", "no such model", "a/b/c", "/nowhere/model", "~/nowhere/model", "./x"])
def test_names_that_cannot_be_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="model="):
        zoo.load(name)


def test_broken_config_and_missing_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        zoo.load(tmp_path)
    BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                               intermediate_size=8)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its tokenizer has no vocabulary"):  # transformers makes up an empty one
        zoo.load(tmp_path)


def test_fingerprint_sees_dtype_and_heads():
    model = zoo.load(NAME)[1]
    name = zoo.model_fingerprint(model)
    assert zoo.model_fingerprint(zoo.load(NAME, dtype=None)[1]) != name
    model.config.num_attention_heads += 1
    assert zoo.model_fingerprint(model) != name


def test_loading_leaves_the_random_state_and_the_defaults_alone():
    state, dtype, threads = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    zoo.load(NAME, dtype=torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
