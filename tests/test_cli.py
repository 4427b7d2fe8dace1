"The command: what it says, what it leaves behind, and that it never shows a traceback."
import copy
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from gradiend import __version__
from gradiend.cli import main

from .tiny import tokenizer as make_tokenizer

BOTH = "The kettle whistled loudly.\nThe rain fell all night.\n" + "".join(  # twelve rows of each class
    f"The {one} said that he was {how}.\nThe {one}s said that they were {how}.\n"
    for one in ("king", "pilot", "twin") for how in ("tired", "hungry", "late", "cold"))


def said(capsys, *argv: str) -> tuple[int, str]:
    "Exit code and the one line on the error stream."
    code = main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("gradiend: ")]
    assert len(lines) == 1, error
    return code, lines[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty current directory; a text with both classes lies beside it."
    (tmp_path / "here").mkdir()
    (tmp_path / "both.txt").write_text(BOTH, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path
    assert list((tmp_path / "here").iterdir()) == [], "something was left behind"


@pytest.mark.parametrize(("argv", "part"), [
    ([], "required"), (["dmeo"], "invalid choice"), (["demo", "--modle", "x"], "did you mean --model?"),
    (["demo", "--mod", "x"], "--model"), (["demo", "--quickly"], "the options are"), (["demo", "--max-steps", "0"], "above zero"),
    (["demo", "--max-steps", "1e3"], "above zero"), (["demo", "--seed", "-1"], "--seed"), (["demo", "--seed", "one"], "--seed"),
    (["demo", "--text-column", "body"], "--text FILE"), (["demo", "--out"], "expected one argument"),
])
def test_wrong_arguments(argv, part, here, capsys):
    code, line = said(capsys, *argv)
    assert code == 2 and part in line


def test_unknown_model_lists_the_embedded_ones(here, capsys):
    code, line = said(capsys, "demo", "--model", "./no-such-model", "--text", here / "both.txt")
    assert code == 2 and "./no-such-model" in line and "gradiend/mini-mlm" in line


@pytest.mark.parametrize(("content", "part"), [
    (None, "text.txt"), (b"", "empty"), (b"\n  \n", "text"), (b"\xff\xfe\x00h\x00i", "UTF-8"),
    (b"The sun rose over the hills.\n", "no match"), (b"She sat down.\nThen he left early.\n", "3PL"),
])
def test_texts_that_cannot_be_used(content, part, here, capsys):
    file = here / "text.txt"
    if content is not None:
        file.write_bytes(content)
    code, line = said(capsys, "demo", "--text", file)
    assert code == 2 and part.lower() in line.lower()


def test_too_few_rows_are_told_before_anything_is_loaded(here, capsys):
    (here / "two.txt").write_text("They went home today.\nShe went home yesterday with the dog.\n", encoding="utf-8")
    code, line = said(capsys, "demo", "--text", here / "two.txt", "--model", "no-such-model")
    assert code == 2 and "only 1 rows" in line and "give more text" in line


def test_missing_column_lists_the_columns(here, capsys):
    (here / "table.csv").write_text("id,body\n1,He slept.\n2,They slept.\n", encoding="utf-8")
    code, line = said(capsys, "demo", "--text", here / "table.csv", "--text-column", "txet")
    assert code == 2 and "txet" in line and "body" in line


def save_bert(folder, tokenizer) -> None:
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                               intermediate_size=8, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_tokenizer_without_mask_token(here, capsys):
    tokenizer = copy.deepcopy(make_tokenizer())  # other tests use the same one
    tokenizer.mask_token = None
    save_bert(here / "model", tokenizer)
    code, line = said(capsys, "demo", "--model", here / "model", "--text", here / "both.txt")
    assert code == 2 and "mask token" in line


def test_word_that_the_model_does_not_know(here, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "he", "she", "it", "the", "king", "dogs", "were"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    save_bert(here / "model", PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]",
                                                      cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"))
    code, line = said(capsys, "demo", "--model", here / "model", "--text", here / "both.txt")
    assert code == 2 and "they" in line.lower() and "neutral" not in line


def test_folder_with_other_files_is_not_replaced(here, capsys):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").write_text("mine", encoding="utf-8")
    code, line = said(capsys, "demo", "--text", here / "both.txt", "--out", here / "thesis")
    assert code == 2 and "chapter.txt" in line
    assert (here / "thesis" / "chapter.txt").read_text(encoding="utf-8") == "mine"


def test_stopping_leaves_nothing(here, capsys, monkeypatch):
    from gradiend import demo

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.TextPredictionTrainer, "train", stop)
    assert said(capsys, "demo", "--text", here / "both.txt")[0] == 130


def test_as_a_process(tmp_path):
    "The exit code reaches the shell, and help and version come without loading anything heavy."
    def run(*argv: str) -> subprocess.CompletedProcess:
        code = "import sys; from gradiend.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
        return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "COLUMNS": "100"})

    version, helped, wrong = run("--version"), run("demo", "--help"), run("demo", "--fast")
    assert (version.returncode, version.stdout.strip()) == (0, f"gradiend {__version__}")
    assert helped.returncode == 0 and "--max-steps" in helped.stdout
    assert wrong.returncode == 2 and wrong.stdout == "" and len(wrong.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
