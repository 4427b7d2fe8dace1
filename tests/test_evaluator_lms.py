"""The language modelling score: which tokens are hidden, and that the share is counted right."""
import copy
import math
import re

import pytest
import torch
from tests.tiny import ARCHITECTURES, CAUSAL, CONFIGS, SENTENCES, TOKENIZERS, byte_level_tokenizer, masked_model, t5_tokenizer, tiny_model, tokenizer
from transformers import PreTrainedTokenizerFast

from gradiend.core import InputError
from gradiend.evaluator.lms import LMS_SHARES, evaluation_mode, hidden_logits, language_modelling_score, lms_batches, replace_spans, sentinel_ids
from gradiend.evaluator.perplexity import divergence, kept_rows, log_probabilities, pseudo_perplexity, text_sweep

KINDS = ["bert", "roberta", "distilbert", "modernbert"]


@pytest.mark.parametrize("words", [tokenizer(), byte_level_tokenizer()], ids=["wordpiece", "byte-level"])
def test_only_ordinary_tokens_are_hidden(words):
    ignored = ["he", "she", "it", "they"]
    texts = [*SENTENCES, "They said: it is Anna's."]
    batches = lms_batches(words, texts, ignore_words=ignored, share=1.0, batch_size=3)
    assert not {t for b in batches for t in b.tokens.tolist()} & set(words.all_special_ids)
    lines = [line for b in batches for line in b.inputs["input_ids"].tolist()]
    visible = ["".join(words.decode(line, skip_special_tokens=True).lower().split()) for line in lines]
    wanted = ["".join(re.findall(r"\b(?:he|she|it|they)\b", text.lower())) for text in texts]
    assert sorted(visible) == sorted(wanted)  # all else is hidden
    for b in batches:
        assert (b.inputs["attention_mask"][b.rows, b.columns] == 1).all()
        assert (b.inputs["input_ids"][b.rows, b.columns] == words.mask_token_id).all()


def test_unknown_tokens_are_not_hidden():
    with pytest.raises(InputError, match="ordinary token"):
        lms_batches(tokenizer(), ["\u2603 \u2603"], share=1.0)


def test_share_is_of_all_texts_together_and_seeded():
    everything, some = (sum(map(len, lms_batches(tokenizer(), SENTENCES, share=s))) for s in (1.0, 0.3))
    assert some == round(0.3 * everything)
    one, same, other = (lms_batches(tokenizer(), SENTENCES, share=0.3, seed=s, batch_size=99)[0] for s in (0, 0, 1))
    assert torch.equal(one.inputs["input_ids"], same.inputs["input_ids"])
    assert one.tokens.tolist() != other.tokens.tolist()


def test_long_texts_are_cut():
    batches = lms_batches(tokenizer(), [" ".join(SENTENCES)], share=1.0, max_length=12)
    assert batches[0].inputs["input_ids"].shape == (1, 12) and sum(map(len, batches)) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_that_of_one_text_at_a_time(kind):
    words, model = masked_model(kind)
    batches = lms_batches(words, SENTENCES, share=0.5, batch_size=4)
    right = total = 0
    for batch in batches:
        assert torch.allclose(hidden_logits(model, batch), model(**batch.inputs).logits[batch.rows, batch.columns])
        for row in range(len(batch.inputs["input_ids"])):
            length = int(batch.inputs["attention_mask"][row].sum())
            guess = model(input_ids=batch.inputs["input_ids"][row:row + 1, :length]).logits.argmax(-1)[0]
            here = batch.rows == row
            right += int((guess[batch.columns[here]] == batch.tokens[here]).sum())
            total += int(here.sum())
    assert total == sum(map(len, batches))
    assert language_modelling_score(model, batches) == right / total


def test_score_counts_right_guesses():
    words, model = masked_model("bert")
    batches = lms_batches(words, SENTENCES, share=0.5)
    favourite = int(batches[0].tokens[0])
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().bias[favourite] = 1e6  # a model with one word in its head
    tokens = torch.cat([b.tokens for b in batches])
    assert language_modelling_score(model, batches) == pytest.approx((tokens == favourite).double().mean().item())


def test_tokenizer_without_mask_token():
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    with pytest.raises(InputError, match="no mask token"):
        lms_batches(bare, SENTENCES)


def test_evaluation_mode_restores_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1)).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(m.training for m in model.modules())
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == [True, True, False]


def kind_of(name: str) -> str:
    return "masked_lm" if name in CONFIGS else "causal_lm" if name in CAUSAL else "seq2seq"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_one_text_at_a_time(name):
    "Score, perplexity and divergence on nine architectures, against one text at a time without padding and a head at every position."
    (words, model), (_, other), kind = tiny_model(name), tiny_model(name, seed=1), kind_of(name)
    batches = lms_batches(words, SENTENCES, kind=kind, share=0.5, batch_size=4, ignore_words=["they"])
    right, log_p, apart = [], [], []
    for batch in batches:
        for row in range(len(batch.inputs["input_ids"])):
            here = batch.rows == row
            inputs = {"input_ids": batch.inputs["input_ids"][[row], :int(batch.inputs["attention_mask"][row].sum())]}
            if kind == "seq2seq":
                inputs["decoder_input_ids"] = batch.inputs["decoder_input_ids"][[row], :int(batch.inputs["decoder_attention_mask"][row].sum())]
            with torch.no_grad():
                p, q = (m(**inputs).logits[0, batch.columns[here]].double().log_softmax(-1) for m in (model, other))
            right += (p.argmax(-1) == batch.tokens[here]).tolist()
            log_p += p[range(len(p)), batch.tokens[here]].tolist()
            apart += (q.exp() * (q - p)).sum(-1).tolist()
    mean = sum(log_p) / len(log_p)
    expected = sum(right) / len(right) if kind == "masked_lm" else 1 / (1 - mean)
    _, remembered = text_sweep(other, batches, remember=True)
    scores, _ = text_sweep(model, batches, base=remembered)
    assert scores.tokens == len(log_p) == sum(map(len, batches))
    assert language_modelling_score(model, batches) == pytest.approx(expected, rel=1e-6)
    assert scores.lms == pytest.approx(expected, rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(-mean), rel=1e-5)
    assert scores.kl == pytest.approx(sum(apart) / len(apart), rel=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_do_not_depend_on_batches(name):
    words, model = tiny_model(name)
    many, few = (text_sweep(model, lms_batches(words, SENTENCES, kind=kind_of(name), batch_size=n))[0] for n in (8, 1))
    assert (many.lms, many.perplexity, many.tokens) == pytest.approx((few.lms, few.perplexity, few.tokens), rel=1e-6)


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_a_causal_model_is_asked_about_everything_but_special_and_target_words(name):
    words = TOKENIZERS[name]()
    batches = lms_batches(words, SENTENCES, kind="causal_lm", ignore_words=["they", "he", "she", "it"], batch_size=3)
    asked = {}
    for batch in batches:
        assert (batch.inputs["attention_mask"][batch.rows, batch.columns + 1] == 1).all()
        assert torch.equal(batch.inputs["input_ids"][batch.rows, batch.columns + 1], batch.tokens)
        assert not set(batch.tokens.tolist()) & set(words.all_special_ids)
        for row, line in enumerate(batch.inputs["input_ids"].tolist()):
            asked[words.decode([t for t, a in zip(line, batch.inputs["attention_mask"][row].tolist(), strict=True) if a], skip_special_tokens=True).strip()] = \
                [(int(c) + 1, int(t)) for r, c, t in zip(batch.rows, batch.columns, batch.tokens, strict=True) if r == row]
    assert set(asked) == set(SENTENCES)
    for text, found in asked.items():
        encoded, targets = words(text, return_offsets_mapping=True), [m.span() for m in re.finditer(r"\b(?:they|he|she|it)\b", text)]
        tokens = list(enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)))[1:]  # nothing predicts the first one
        assert found == [(i, token) for i, (token, (a, b)) in tokens if b > a and not any(a < stop and start < b for start, stop in targets)]


def test_spans_can_be_put_back():
    "What the encoder reads and the decoder writes together hold the whole text."
    words = t5_tokenizer()
    sentinels = sentinel_ids(words)
    assert len(sentinels) == 10
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 30):
        ids = list(range(100, 100 + length))
        for share in (0.1, 0.5, 1.0):
            hidden = torch.nonzero(torch.rand(length, generator=generator) <= share).flatten().tolist()
            read, write, asked = replace_spans(ids, hidden, sentinels)
            parts, current = {}, None
            for token in write:
                if token in sentinels: current = token
                else: parts.setdefault(current, []).append(token)
            assert [t for token in read for t in (parts[token] if token in sentinels else [token])] == ids
            assert [write[i] for i in asked] == [ids[p] for p in hidden][:len(asked)]


def test_no_more_spans_than_sentinels():
    words, model = tiny_model("t5")
    long = [" ".join(SENTENCES)]
    batches = lms_batches(words, long, kind="seq2seq", share=0.5, max_length=64)
    used = set(batches[0].inputs["input_ids"][0].tolist()) & set(sentinel_ids(words))
    assert used == set(sentinel_ids(words)) and 0 < language_modelling_score(model, batches) < 1


def test_kinds_and_tokenizers_that_do_not_fit():
    with pytest.raises(InputError, match="sentinel"): lms_batches(tokenizer(), SENTENCES, kind="seq2seq")
    with pytest.raises(InputError, match="masked_lm"): lms_batches(tokenizer(), SENTENCES, kind="mlm")
    with pytest.raises(InputError, match="mask token"): lms_batches(TOKENIZERS["gpt2"](), SENTENCES)
    assert set(LMS_SHARES) == {"masked_lm", "causal_lm", "seq2seq"}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_pseudo_perplexity_hides_one_token_at_a_time(name):
    words, model = tiny_model(name)
    nll = []
    for text in SENTENCES[:3]:
        ids = words(text, return_tensors="pt")["input_ids"]
        for p in range(ids.shape[1]):
            if int(ids[0, p]) in words.all_special_ids or (p == 0 and name == "gpt2"): continue
            given = ids.clone()
            if name == "bert": given[0, p] = words.mask_token_id
            with torch.no_grad(): nll.append(-model(input_ids=given).logits[0, p - (name == "gpt2")].log_softmax(-1)[ids[0, p]].item())
    assert pseudo_perplexity(model, words, SENTENCES[:3], kind=kind_of(name)) == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-6)


def test_divergence_is_measured_at_the_remembered_places_only():
    (words, model), (_, other) = tiny_model("bert"), tiny_model("bert", seed=1)
    batches = lms_batches(words, SENTENCES, share=0.6, batch_size=3)
    limit = 4 * model.config.vocab_size * 6  # room for six places
    _, remembered = text_sweep(other, batches, remember=True, limit=limit)
    assert sum(map(len, remembered)) <= 6 + len(batches)
    expected = []
    for batch, kept in zip(batches, remembered, strict=True):
        rows = kept_rows(len(batch), limit / (4 * model.config.vocab_size * sum(map(len, batches))))
        with torch.no_grad():
            expected += divergence(log_probabilities(hidden_logits(other, batch)[rows]), log_probabilities(hidden_logits(model, batch)[rows])).tolist()
        assert len(kept) == len(rows)
    assert text_sweep(model, batches, base=remembered, limit=limit)[0].kl == pytest.approx(sum(expected) / len(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    words, model = tiny_model("bert", dtype=dtype)
    scores, remembered = text_sweep(model, lms_batches(words, SENTENCES), remember=True)
    assert math.isfinite(scores.perplexity) and all(t.dtype == torch.float32 for t in remembered)
