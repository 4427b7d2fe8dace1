"The folder of a model: complete or not at all, the same bytes again, and every kind of damage is named."
import json
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gradiend import artifact
from gradiend.artifact import artifact_folder, card, check_base, read_artifact, read_description, summary, write_artifact
from gradiend.core import InputError
from gradiend.delta import Delta
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.zoo import model_fingerprint

from .tiny import ARCHITECTURES, tiny_model

FULL = ParameterSpace.from_global(["a.weight", "a.bias", "b.weight"], [(6, 5), (6,), (4, 10)], None)
PRUNED = FULL.keep(torch.tensor([0, 3, 31, 36, 40, 75]))
INFO = {"scores": {"correlation": 0.93, "by_class": {"A": 0.8, "B": -0.7}}, "data": {"fingerprint": "0123456789abcdef", "rows": 12}, "arguments": {"learning_rate": 1e-5, "params": None}}


def make(space=PRUNED, *, dtype=torch.float32, info=INFO, base=None, **options):
    base = {"name": "owner/base", "revision": "abc", "fingerprint": None} if base is None else base
    model = GradiendModel.create(space, GradiendConfig(pair=("A", "B"), base_model=base, **options), seed=1).to(dtype)
    model.info.update(info)
    return model


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture
def folder(tmp_path):
    return write_artifact(make(), tmp_path / "model")


def test_every_model_survives_and_gives_the_same_bytes_again(tmp_path):
    odd = {"note": "ümlaut | pipe", "nan": float("nan"), "path": Path("x/y"), "tuple": (1, (2, 3)), 7: "number as key", "scores": {"c": float("inf")}}
    for i, (space, dtype, options, info) in enumerate([
        (FULL, torch.float32, {}, INFO), (PRUNED, torch.bfloat16, {"latent_dim": 3}, {}), (FULL.keep(FULL.global_index), torch.float16, {"bias_decoder": False}, odd),
        (PRUNED, torch.float64, {"source": "diff", "target": "factual", "mask": "___", "activation_encoder": "relu", "activation_decoder": "gelu", "objective": "causal_lm"}, INFO),
    ]):
        model = make(space, dtype=dtype, info=info, **options)
        first = model.save_pretrained(tmp_path / f"{i}")
        again = GradiendModel.from_pretrained(first)
        second = again.save_pretrained(tmp_path / f"{i} again")
        assert contents(first) == contents(second)
        assert again.config == model.config and again.space.fingerprint == space.fingerprint
        assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(again.parameters(), model.parameters(), strict=True))


def test_another_process_writes_the_same_bytes(folder, tmp_path):
    code = f"from gradiend.model import GradiendModel; GradiendModel.from_pretrained({str(folder)!r}).save_pretrained({str(tmp_path / 'other')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
    assert contents(folder) == contents(tmp_path / "other")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_a_file_cut_off_anywhere_is_named(folder, name):
    whole = (folder / name).read_bytes()
    for length in sorted({0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2}):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"folder: {name} in .* (cut off|cannot be read)"): GradiendModel.from_pretrained(folder)
    (folder / name).write_bytes(whole)
    GradiendModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_a_changed_byte_anywhere_is_named_or_harmless(folder, name):
    whole, loaded, chosen = (folder / name).read_bytes(), GradiendModel.from_pretrained(folder), random.Random(0)
    noticed = 0
    for at in chosen.sample(range(len(whole)), 60):
        changed = bytes([whole[at] ^ (1 << chosen.randrange(8))])
        (folder / name).write_bytes(whole[:at] + changed + whole[at + 1:])
        try: again = GradiendModel.from_pretrained(folder)
        except InputError as error:
            noticed += 1
            assert name in str(error)
        else:  # such as a space that became another blank
            assert again.info == loaded.info and again.config == loaded.config and name != "model.safetensors"
    assert noticed >= 50


def unchecked(folder, name="config.json", change=lambda content: content):
    "Take the checksums out, as in the first folders, and change one of the JSON files."
    described = json.loads((folder / "config.json").read_text())
    described.pop("files"), described.pop("checksum")
    (folder / "config.json").write_text(json.dumps(described))
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(content)))


def test_folders_from_before_checksums_are_read(folder):
    unchecked(folder)
    (folder / "README.md").unlink()
    assert GradiendModel.from_pretrained(folder).space.n == PRUNED.n


def put(content, *path, value):
    "The same content with one place changed."
    if not path: return value
    changed = content.copy()
    changed[path[0]] = put(content[path[0]] if len(path) > 1 else None, *path[1:], value=value)
    return changed


@pytest.mark.parametrize("path,value,why", [
    (("format",), 2, "newer gradiend"), (("format",), "1", "format '1'"), (("format",), None, "format None"),
    (("config",), [], "no configuration"), (("config", "pair"), ["A"], "pair"), (("config", "pair"), ["A", ["B"]], "pair"), (("config", "source"), "factuel", "did you mean 'factual'"),
    (("config", "latent_dim"), 2, r"asks for \(6, 2\)"), (("config", "latent_dim"), "1", "latent_dim"), (("config", "learning_rate"), 1, "unknown setting 'learning_rate'"),
    (("config", "bias_decoder"), False, "unknown tensor 'decoder_bias'"), (("config", "base_model"), None, "base_model"),
    (("space",), None, "no parameter space"), (("space", "names"), ["a.weight", "a.bias", "a.bias"], "each once"), (("space", "names"), ["a.weight"], "one shape"),
    (("space", "names"), ["a.weight", "a.bias", "c.weight"], "fingerprints differ"), (("space", "shapes"), [[6, 5], [6], [10, 4]], "fingerprints differ"),
    (("space", "shapes"), [[6, 5], [6], [4, -10]], "whole numbers"), (("space", "shapes"), [[6, 5], [6], [4, 2.5]], "whole numbers"), (("space", "shapes"), [[6, 5], [6], [4]], r"index 40|fingerprints"), (("space", "shapes"), 5, "whole numbers"),
    (("space", "shapes"), [[6, 5], [6], True], "whole numbers"), (("space", "names"), ["a.weight", "a.bias", 3], "each once"), (("space", "names"), 3, "each once"),
    (("space", "n"), 5, r"\(6,|\(1, 6\)"), (("space", "n"), 0, "0 entries"), (("space", "n"), 10**9, "its shapes hold 76"), (("space", "n"), True, "True entries"),
])
def test_an_edited_description_is_refused_without_checksums_too(folder, path, value, why):
    unchecked(folder, change=lambda content: put(content, *path, value=value))
    with pytest.raises(InputError, match=why): GradiendModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "training.json"])
@pytest.mark.parametrize("content", [[], "text", None, 3])
def test_json_that_is_no_mapping(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{name}.*instead of a mapping"): GradiendModel.from_pretrained(folder)


@pytest.mark.parametrize("change,why", [
    (lambda t: t | {"encoder_weight": t["encoder_weight"].T.contiguous()}, r"'encoder_weight' of shape \(6, 1\)"), (lambda t: {k: v for k, v in t.items() if k != "encoder_bias"}, "lacks 'encoder_bias'"),
    (lambda t: t | {"space.global_index": torch.tensor([0, 3, 31, 36, 40, 76])}, "index 76, .* 76 entries"), (lambda t: t | {"space.global_index": torch.tensor([-1, 3, 31, 36, 40, 75])}, "index -1"),
    (lambda t: t | {"space.global_index": torch.tensor([0, 3, 3, 36, 40, 75])}, "index 3 more than once"), (lambda t: t | {"space.global_index": torch.tensor([0, 3, 36, 31, 40, 75])}, "ascend"),
    (lambda t: t | {"space.global_index": torch.tensor([0, 3, 31, 36, 40, 74])}, "fingerprints differ"), (lambda t: t | {"space.global_index": t["space.global_index"].int()}, "I32"),
    (lambda t: t | {"space.global_index": t["space.global_index"][:, None]}, r"\(6, 1\)"), (lambda t: {k: v for k, v in t.items() if k != "space.global_index"}, "lacks 'space.global_index'"),
    (lambda t: t | {"decoder_weight": t["decoder_weight"].bfloat16()}, "one type"), (lambda t: {k: v.long() for k, v in t.items()}, "I64"),
    (lambda t: t | {"encoder_bias": torch.tensor([torch.inf])}, "1 values in 'encoder_bias' that are not finite"),
])
def test_weights_that_cannot_be(folder, change, why):
    unchecked(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(InputError, match=f"model.safetensors in .*{why}"): GradiendModel.from_pretrained(folder)


def test_files_of_two_models_are_not_mixed(folder, tmp_path):
    other = make(PRUNED).save_pretrained(tmp_path / "other")
    assert contents(other) == contents(folder)
    moved = make(PRUNED, info={**INFO, "run": {"seed": 2}}).save_pretrained(tmp_path / "other")
    (folder / "training.json").write_bytes((moved / "training.json").read_bytes())
    with pytest.raises(InputError, match=r"training\.json"): read_artifact(folder)


def test_reformatted_json_is_still_the_same(folder):
    for name in ("config.json", "training.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content, indent=8).replace("\n", "\r\n"))
    assert GradiendModel.from_pretrained(folder).info["scores"] == INFO["scores"]


@pytest.mark.parametrize("where", ["save_file", "write_json", "card"])
def test_a_full_disk_leaves_the_old_model(folder, monkeypatch, where):
    before = contents(folder)
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(artifact, where, full)
    with pytest.raises(OSError, match="No space left"): make(FULL).save_pretrained(folder)
    assert contents(folder) == before and [p.name for p in folder.parent.iterdir()] == ["model"]


def test_somebody_elses_folder_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.txt"): make().save_pretrained(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


# --- the card ----------------------------------------------------------------------------------------------------

def test_the_card_says_what_the_files_say(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "gradiend", "base_model": "owner/base", "tags": ["gradiend", "interpretability"]}
    for row in ("| A (+1), B (-1) |", "| name | owner/base |", "| revision | abc |", "| correlation | 0.93 |", "| by_class.B | -0.7 |", "| fingerprint | 0123456789abcdef |", "| Entries | 6 of 76 |",
                "GradiendModel.from_pretrained(", f"| torch | {version('torch')} |"):
        assert row in body, row
    assert card(json.loads((folder / "config.json").read_text()), json.loads((folder / "training.json").read_text())) == text


def test_what_is_not_known_is_said_and_paths_are_no_hub_ids():
    text = str(make(info={}, base={"name": "/home/me/models/bert", "fingerprint": None}).generate_model_card())
    assert "base_model:" not in text and "| scores | not recorded |" in text and "| fingerprint | not recorded |" in text
    assert "base_model:" not in str(make(base={}).generate_model_card())
    assert "| note \\| x | a \\| b |" in str(make(info={"scores": {"note | x": "a | b"}}).generate_model_card())


# --- the hub -----------------------------------------------------------------------------------------------------

class Hub:
    "Stands in for the client of the hub and keeps what is uploaded."
    log: list[tuple] = []

    def __init__(self, token=None): self.token = token

    def create_repo(self, repo_id, **options):
        self.log.append(("create", repo_id, self.token, options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.log.append(("upload", repo_id, contents(folder_path), options))
        return "address of the commit"


def test_push_sends_the_folder_and_the_cache_gives_it_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr(Hub, "log", [])
    assert make().push_to_hub("me/number", private=True, token="secret", branch="v2", commit_message="better") == "address of the commit"
    (_, made, token, options), (_, sent, files, how) = Hub.log
    assert (made, token, options["private"]) == ("me/number", "secret", True) and (sent, how["revision"], how["commit_message"]) == ("me/number", "v2", "better")
    assert files == contents(folder)
    commit, cache = "a" * 40, tmp_path / "cache" / "models--me--number"
    for name, content in files.items():
        path = cache / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (cache / "refs").mkdir()
    (cache / "refs" / "v2").write_text(commit)
    for revision in (commit, "v2"):
        shared = GradiendModel.from_pretrained("me/number", revision=revision, cache_dir=tmp_path / "cache", local_files_only=True)
        assert torch.equal(shared.decoder_weight, make().decoder_weight)
    for revision in (None, "v3"):
        with pytest.raises(InputError, match="fetching 'me/number'"): GradiendModel.from_pretrained("me/number", revision=revision, cache_dir=tmp_path / "cache", local_files_only=True)
    (cache / "snapshots" / commit / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cut off"): GradiendModel.from_pretrained("me/number", revision=commit, cache_dir=tmp_path / "cache", local_files_only=True)


def test_the_hub_is_asked_for_what_was_named_and_nothing_else(folder, monkeypatch):
    asked = []
    def fetch(name, **options): asked.append((name, options)); return str(folder)
    monkeypatch.setattr(artifact, "snapshot_download", fetch)
    assert artifact_folder("me/number", revision="v1", token="t", cache_dir="c", force_download=True) == folder
    (name, options), = asked
    assert (name, options["revision"], options["token"], options["cache_dir"], options["force_download"], options["local_files_only"]) == ("me/number", "v1", "t", "c", True, False)
    assert set(options["allow_patterns"]) == {"config.json", "model.safetensors", "training.json", "README.md"}
    for no_id in ("missing", "a/b/c", "../number", "/missing/number", "me/", Path("me/number"), "a b/c"):
        with pytest.raises(InputError, match="does not exist"): artifact_folder(no_id)
    artifact_folder(folder)
    with pytest.raises(InputError, match="revision='v1'"): artifact_folder(folder, revision="v1")
    assert len(asked) == 1
    with pytest.raises(TypeError): GradiendModel.from_pretrained(folder, map_location="cpu")


@pytest.mark.parametrize("call", [lambda m, f: m.save_pretrained(f, config={"k": 2}), lambda m, f: m.save_pretrained(f, model_card_kwargs={"title": "x"}), lambda m, f: m.generate_model_card(title="x")])
def test_what_would_not_be_written_is_refused(folder, call):
    with pytest.raises(InputError, match="config and info"): call(make(), folder.parent / "new")


# --- base models and summaries -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_belongs_to_its_base_and_to_no_other(kind, tmp_path):
    _, base = tiny_model(kind, dtype=torch.float32)
    space = ParameterSpace.from_model(base).keep(torch.arange(40))
    model = make(space, base={"name": "tiny", "fingerprint": model_fingerprint(base)})
    again = GradiendModel.from_pretrained(model.save_pretrained(tmp_path / "m"))
    again.check_base(base)
    change = Delta(space, torch.full((40,), 1e-3))
    with change.applied(base), pytest.raises(InputError, match="other weights.*weights=False"): check_base(again, base)
    check_base(again, base)  # undone
    other = "bert" if kind != "bert" else "gpt2"
    with pytest.raises(InputError, match="no parameter|has shape"): check_base(again, tiny_model(other, dtype=torch.float32)[1], weights=False)
    check_base(again, base.to(torch.bfloat16), weights=False)
    with pytest.raises(InputError, match=r"in torch\.bfloat16"): check_base(again, base)


def test_a_base_without_fingerprint_is_compared_by_shape():
    _, base = tiny_model("bert", dtype=torch.float32)
    check_base(make(ParameterSpace.from_model(base), base={}), base)
    for shape in ((161, 16), (16, 160)):
        space = ParameterSpace.from_global(["bert.embeddings.word_embeddings.weight"], [shape], None)
        with pytest.raises(InputError, match="has shape"): check_base(make(space, base={}), base)


def test_summary_reads_descriptions_only(tmp_path, monkeypatch):
    folders = [make(PRUNED).save_pretrained(tmp_path / "one"), make(FULL, dtype=torch.bfloat16, info={}, latent_dim=2, source="diff").save_pretrained(tmp_path / "two")]
    monkeypatch.setattr(artifact, "load_file", lambda path: pytest.fail("weights were read"))
    frame = summary([*folders, make(FULL), str(folders[0])])
    assert list(frame.index) == ["one", "two", "2", "one (3)"] and list(frame["entries"]) == [6, 76, 76, 6] and list(frame["dtype"]) == ["float32", "bfloat16", "float32", "float32"]
    assert frame["space"].nunique() == 1 and frame.loc["one", "correlation"] == 0.93 and frame.loc["two", "latent_dim"] == 2 and frame.loc["one", "by_class.A"] == 0.8
    assert frame.loc["one", "share"] == 6 / 76 and frame.loc["one", "data"] == "0123456789abcdef" and frame.loc["two", "data"] is not frame.loc["one", "data"]
    (tmp_path / "two" / "model.safetensors").write_bytes(b"")
    for bad in ([tmp_path / "two"], [tmp_path], [tmp_path / "nothing"], [], str(folders[0])):
        with pytest.raises(InputError): summary(bad)


def test_a_file_is_no_folder(folder):
    with pytest.raises(InputError, match="not a saved GRADIEND"): GradiendModel.from_pretrained(folder / "config.json")
    with pytest.raises(InputError, match="not a saved GRADIEND"): read_description(folder.parent)
