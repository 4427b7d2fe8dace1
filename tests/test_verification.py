"""Verifying a rewrite: numbers against a slow walk, the three forms of a rewrite, and what is no rewrite."""
import copy
import warnings

import pandas as pd
import pytest
import torch
from tokenizers import processors

from gradiend.core import InputError
from gradiend.data.examples import make_examples
from gradiend.delta import Delta, in_force
from gradiend.gradients.objectives import objective_for
from gradiend.gradients.space import ParameterSpace
from gradiend.rewrite import rewrite_model
from gradiend.verification import compare_weights, top_words, verify_rewrite
from tests.tiny import ARCHITECTURES, SENTENCES, tiny_model

ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "The baker was late because [MASK] missed the bus.",
               "The dogs barked because [MASK] were cold.", "Anna said that [MASK] was tired."],
    "factual": ["they", "he", "they", "she"], "alternative": ["he", "they", "it", "they"],
    "factual_class": ["3PL", "3SG", "3PL", "3SG"], "alternative_class": ["3SG", "3PL", "3SG", "3PL"], "split": "test",
})


def setting(kind="bert", dtype=torch.float32):
    words, base = tiny_model(kind, dtype=dtype)
    return words, base, objective_for(words, base), make_examples(ROWS, pair=("3SG", "3PL"))


def delta_for(model, every=5, scale=0.05):
    space = ParameterSpace.from_model(model)
    space = space.take(torch.arange(0, space.n, every))
    return Delta(space, scale * torch.randn(space.n, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_form_of_a_rewrite_gives_the_same_report(tmp_path, kind):
    words, base, objective, examples = setting(kind)
    if kind == "t5" or base.config.model_type == "t5":
        shown = ["Anna said that [MASK] was tired."]
    else:
        shown = 1
    before, delta = {k: v.clone() for k, v in base.state_dict().items()}, delta_for(base)
    changed = rewrite_model(base, delta, output_dir=tmp_path / "out", tokenizer=words)
    forms = [delta, changed, tmp_path / "out", str(tmp_path / "out")]
    reports = [verify_rewrite(base, form, objective, examples, lms_texts=SENTENCES, sentences=shown) for form in forms]
    for report in reports[1:]:
        pd.testing.assert_frame_equal(report.weights, reports[0].weights)
        pd.testing.assert_frame_equal(report.frame, reports[0].frame, atol=1e-5)
        assert report.sentences["text"].tolist() == reports[0].sentences["text"].tolist()
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items()) and in_force(base) == ()
    report = reports[0]
    assert report.norm == pytest.approx(delta.norm, rel=1e-3) and 0 < report.moved <= delta.space.n
    assert set(report.probabilities["word_class"]) == {"3SG", "3PL"} and report.lms_tokens > 0
    assert report.scores.loc[2, "after"] > 0 and report.record["before"]["LMS"] == report.scores.loc[0, "before"]


def test_weights_against_a_slow_walk():
    _, base, _, _ = setting()
    delta = delta_for(base, every=97)
    table = compare_weights(base, delta).set_index("parameter")
    changed = rewrite_model(base, delta)
    for (name, old), new in zip(base.named_parameters(), changed.parameters(), strict=True):
        step = (new.detach().double() - old.detach().double()).flatten().tolist()
        hit = [s for s in step if s]
        assert (name in table.index) == bool(hit)
        if hit:
            line = table.loc[name]
            assert line["moved"] == len(hit) and line["largest"] == max(map(abs, hit))
            assert line["norm"] == pytest.approx(sum(s * s for s in hit) ** 0.5)
            assert line["relative"] == pytest.approx(line["norm"] / float(old.detach().double().norm()))


def test_top_words_against_the_model():
    for kind in ("bert", "gpt2", "t5"):
        words, base, _, _ = setting(kind)
        found = top_words(base, words, "Anna said that [MASK] was tired.", count=3)
        if kind == "bert":
            inputs = words(f"Anna said that {words.mask_token} was tired.", return_tensors="pt")
            at = inputs["input_ids"][0].tolist().index(words.mask_token_id)
            logits = base(input_ids=inputs["input_ids"]).logits[0, at]
        elif kind == "gpt2":
            logits = base(**words("Anna said that", return_tensors="pt")).logits[0, -1]
        else:
            sentinel = words.convert_tokens_to_ids("<extra_id_0>")
            logits = base(**words("Anna said that <extra_id_0> was tired.", return_tensors="pt"), decoder_input_ids=torch.tensor([[0, sentinel]])).logits[0, 1]
        p, ids = logits.softmax(-1).topk(3)
        assert [q for _, q in found] == pytest.approx(p.tolist(), rel=1e-4)
        assert [w for w, _ in found] == [words.decode([i]).strip() for i in ids]


def test_what_is_no_rewrite(tmp_path):
    words, base, objective, examples = setting()
    delta = delta_for(base)
    for nothing in (0.0 * delta, copy.deepcopy(base)):
        with pytest.raises(InputError, match="not a single weight differs"):
            verify_rewrite(base, nothing, objective, examples, lms_texts=SENTENCES)
    half = tiny_model("bert", dtype=torch.bfloat16)[1]
    flat = Delta(ParameterSpace.from_model(half, "*LayerNorm.weight"), torch.full((80,), 1e-9))
    with torch.no_grad():
        for name, p in half.named_parameters():
            if name.endswith("LayerNorm.weight"):
                p.fill_(1.0)
    with pytest.raises(InputError, match="too small for the type"):
        compare_weights(half, flat)
    for wrong, message in ((base, "base model itself"), (3, "int is no rewritten model"), (tmp_path / "no", "cannot be loaded"),
                           (tiny_model("roberta", dtype=torch.float32)[1], "not a rewrite"), (copy.deepcopy(base).half(), "same type")):
        with pytest.raises(InputError, match=message):
            verify_rewrite(base, wrong, objective, examples, lms_texts=SENTENCES)
    broken = copy.deepcopy(base)
    next(broken.parameters()).data[0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        verify_rewrite(base, broken, objective, examples, lms_texts=SENTENCES)


def test_missing_data():
    words, base, objective, examples = setting()
    delta = delta_for(base)
    with pytest.warns(UserWarning, match="none were given"):
        assert verify_rewrite(base, delta, objective, examples).texts == "rows"
    with pytest.raises(InputError, match="no row of class|has no|no rows"):
        verify_rewrite(base, delta, objective, make_examples(ROWS.assign(split=["test", "train", "test", "train"]), pair=("3SG", "3PL")), lms_texts=SENTENCES)
    with pytest.raises(InputError, match="exactly one"):
        verify_rewrite(base, delta, objective, examples, lms_texts=SENTENCES, sentences=["two [MASK] and [MASK]"])


def test_a_faint_rewrite_warns():
    _, base, objective, examples = setting()
    space = ParameterSpace.from_model(base, "*position_embeddings*")
    last = space.take([space.n - 1])  # the last position, which no sentence reaches
    with pytest.warns(UserWarning, match="not one prediction does"):
        verify_rewrite(base, Delta(last, torch.ones(1)), objective, examples, lms_texts=SENTENCES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify_rewrite(base, delta_for(base), objective, examples, lms_texts=SENTENCES)


def test_a_text_longer_than_the_model():
    for kind in ("bert", "roberta", "gpt2", "t5"):
        words, base, objective, _ = setting(kind)
        long = "The drummers lost the beat. " * 60 + "Anna said that [MASK] was tired." + " The baker was late." * 60
        found = top_words(base, words, long, count=3)
        assert len(found) == 3 and found[0][1] > 0
        if kind == "gpt2":  # what is kept is the end of the left side
            ids = words("The drummers lost the beat. " * 60 + "Anna said that")["input_ids"][-objective.max_length:]
            p = base(input_ids=torch.tensor([ids])).logits[0, -1].detach().softmax(-1)
            assert found[0][1] == pytest.approx(float(p.max()), rel=1e-4)
        if kind == "bert":
            ids = words(long.replace("[MASK]", words.mask_token), verbose=False)["input_ids"]
            at = ids.index(words.mask_token_id)
            room = objective.max_length - 3
            kept = [ids[0], *ids[at - room // 2:at], ids[at], *ids[at + 1:at + 1 + room - room // 2], ids[-1]]
            p = base(input_ids=torch.tensor([kept])).logits[0, 1 + room // 2].detach().softmax(-1)
            assert found[0][1] == pytest.approx(float(p.max()), rel=1e-4)


def test_a_tokenizer_that_appends_an_end_token():
    words, base, _, _ = setting("gpt2")
    ending = copy.deepcopy(words)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {words.eos_token}", special_tokens=[(words.eos_token, words.eos_token_id)])
    assert ending("Anna")["input_ids"][-1] == words.eos_token_id
    for text in ("Anna said that [MASK] was tired.", "[MASK] was tired."):
        assert top_words(base, ending, text) == top_words(base, words, text)


def test_one_sentence_is_a_sentence():
    _, base, objective, examples = setting()
    report = verify_rewrite(base, delta_for(base), objective, examples, lms_texts=SENTENCES, sentences="Anna said that [MASK] was tired.")
    assert report.sentences["text"].tolist() == ["Anna said that [MASK] was tired."]
