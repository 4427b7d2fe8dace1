"""The language modelling score: which tokens are hidden, and that the share is counted right."""
import copy
import re

import pytest
import torch
from tests.tiny import SENTENCES, byte_level_tokenizer, masked_model, tokenizer
from transformers import PreTrainedTokenizerFast

from gradiend.core import InputError
from gradiend.evaluator.lms import evaluation_mode, hidden_logits, language_modelling_score, lms_batches

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
        1 / 0
    assert [m.training for m in model.modules()] == [True, True, False]
