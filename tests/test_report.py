"The report: self-contained, escaped everywhere, and predictions against a one-by-one reference."
import re
from contextlib import contextmanager
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from gradiend.core import InputError
from gradiend.report import before_after, before_after_html, gap_probabilities, top_predictions, write_report

WORDS = ["[PAD]", "[UNK]", "<gap>", ".", "he", "she", "they", "left", "<b>", "a&b"]
TEXTS = ["[MASK] left .", "they left . [MASK] left he .", "she [MASK]"]
EVIL = "<script>alert('1')</script> & \"quoted\" <b>"


@pytest.fixture()
def tokenizer():
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", mask_token="<gap>",
                                   model_max_length=16)


@pytest.fixture()
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=8, initializer_range=1.0)
        return BertForMaskedLM(config).eval()


class Push:
    "A stand-in for a delta: adds to the output bias and takes it back."
    def __init__(self, fail=False):
        self.fail = fail

    @contextmanager
    def applied(self, model):
        bias = model.cls.predictions.bias
        saved = bias.detach().clone()
        with torch.no_grad():
            bias[4] += 2
        try:
            yield
        finally:
            with torch.no_grad():
                bias.copy_(saved)


def one_by_one(model, tokenizer, text):
    "The reference: one text, no padding, no batch."
    ids = torch.tensor([tokenizer(text.replace("[MASK]", "<gap>"))["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    return logits[ids[0].tolist().index(2)].softmax(-1)


def test_probabilities_agree_with_one_text_at_a_time(model, tokenizer):
    expected = torch.stack([one_by_one(model, tokenizer, text) for text in TEXTS])
    for size in (1, 2, 32):
        assert torch.allclose(gap_probabilities(model, tokenizer, TEXTS, batch_size=size), expected, atol=1e-6)
    top = top_predictions(model, tokenizer, TEXTS, k=2)
    assert [[w for w, _ in row] for row in top] == [[WORDS[i] for i in p.topk(2).indices] for p in expected]


def test_before_after_has_both_probabilities_and_leaves_the_model_alone(model, tokenizer):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    frame = before_after(model, tokenizer, Push(), TEXTS, k=2)
    assert model.training and all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    model.eval()
    for i, text in enumerate(TEXTS):
        before = one_by_one(model, tokenizer, text)
        with Push().applied(model):
            after = one_by_one(model, tokenizer, text)
        part = frame[frame.sentence == i].set_index("word")
        assert set(part.index) == {WORDS[t] for t in {*before.topk(2).indices.tolist(), *after.topk(2).indices.tolist()}}
        for word, row in part.iterrows():
            t = WORDS.index(word)
            assert (row.before, row.after) == pytest.approx((float(before[t]), float(after[t])), abs=1e-5)
            assert row.rank_after == 1 + int((after > after[t]).sum())
            assert row.change == pytest.approx(row.after - row.before)


def test_texts_that_do_not_fit(model, tokenizer):
    for texts, message in ((["no gap"], r"masked_texts\[0\]"), (["[MASK]", "[MASK] [MASK]"], r"\[1\]"), ([], "at least one"),
                           ("[MASK]", "list"), (["left " * 40 + "[MASK]"], "too long")):
        with pytest.raises(InputError, match=message):
            gap_probabilities(model, tokenizer, texts)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text, self.stack = set(), [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for n, v in attrs if n in ("src", "href", "srcset", "action")]
        assert not any(n.startswith("on") for n, _ in attrs)
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_everything_is_escaped(tmp_path):
    picture = tmp_path / "drawn.svg"
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    evil = pd.DataFrame({EVIL: [EVIL, "x"], "n": [1.5, None]})
    words = pd.DataFrame([{"sentence": 0, "masked": f"{EVIL} [MASK]", "word": EVIL, "before": 0.4, "after": 0.6, "change": 0.2,
                           "rank_before": 1, "rank_after": 1}])
    path = write_report(tmp_path / "new", title=EVIL, summary={EVIL: EVIL, "pair": (0.5, EVIL)}, before_after=words,
                        figures={EVIL: (picture, EVIL)}, tables={EVIL: evil})
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags <= {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "dl", "div", "dt", "dd",
                         "strong", "span", "table", "thead", "tbody", "tr", "th", "td", "ol", "li", "b", "em", "i", "mark",
                         "figure", "img", "figcaption"}
    assert [a.split(",")[0] for a in page.addresses] == ["data:image/svg+xml;base64"]
    # title, h1; name, value and sentence of the summary; text and word (twice); heading and caption of the figure;
    # heading, column and cell of the table
    assert "".join(page.text).count("alert('1')") == 2 + 3 + 3 + 2 + 3
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]


def test_an_unusable_figure_leaves_the_old_report_alone(tmp_path):
    path = write_report(tmp_path, title="first", summary={})
    with pytest.raises(InputError, match="missing.png"):
        write_report(tmp_path, title="second", summary={}, figures={"a": tmp_path / "missing.png"})
    assert "first" in path.read_text() and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_long_tables_are_folded_and_empty_parts_left_out(tmp_path):
    frame = pd.DataFrame({"n": range(40)})
    text = write_report(tmp_path, title="t", summary={"rows": 40}, tables={"Long": frame}, before_after=pd.DataFrame()).read_text()
    assert "<summary>40 rows</summary>" in text and "What the model says" not in text and "Figures" not in text
    assert "prefers-color-scheme: dark" in text and not re.search(r"https?://", text)


def test_word_lists_show_the_same_number_of_words_before_and_after():
    ranks = [(1, 5), (2, 1), (3, 6), (7, 2), (4, 3)]  # top 3 before or after, and one rank that fits by accident
    frame = pd.DataFrame([{"sentence": 0, "masked": "[MASK]", "word": f"w{i}", "before": 0.1, "after": 0.1, "change": 0.0,
                           "rank_before": b, "rank_after": a} for i, (b, a) in enumerate(ranks)])
    before, after = re.findall("<ol>(.*?)</ol>", before_after_html(frame))
    assert re.findall("<span>(.*?)</span>", before) == ["w0", "w1", "w2"]
    assert re.findall("<span>(.*?)</span>", after) == ["w1", "w3", "w4"]
