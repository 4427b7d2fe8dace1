"""The fast paths of the gradient stage against slow, obvious ones, in float64, on several architectures."""
import pandas as pd
import pytest
import torch

from gradiend.core import InputError
from gradiend.gradients.engine import accumulate, encode, pair_weights, row_gradients
from gradiend.gradients.objectives import Tokens, batches, crop, masked_lm, split_tokens
from gradiend.gradients.space import ParameterSpace

from .tiny import CONFIGS, masked_model

ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "[MASK] was tired.", "Anna said that [MASK] was late.", "The dogs barked because [MASK] were cold."],
    "factual": ["they", "She", "she", "they"],
    "alternative": ["he", "They", "unhappiness", "it"],  # "unhappiness" falls into more pieces than "she"
})
# ModernBERT computes its rotary embedding in float32 whatever the model's dtype, so it agrees to float32 precision only
SLACK = {"modernbert": 1e5}
architectures = pytest.mark.parametrize("kind", list(CONFIGS))


def check_close(kind, actual, expected, *, rtol, atol):
    torch.testing.assert_close(actual, expected, rtol=rtol * SLACK.get(kind, 1.0), atol=atol * SLACK.get(kind, 1.0))


def plain_losses(tokenizer, model, masked: str, word: str):
    "Mean cross entropy at the masks, by hand: whole head, no padding, one row."
    text = masked.replace("[MASK]", word)
    start = masked.index("[MASK]")
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < start + len(word) and b > start and b > a]
    labels = [ids[i] for i in inside]
    hidden = [tokenizer.mask_token_id if i in inside else t for i, t in enumerate(ids)]
    logits = model(input_ids=torch.tensor([hidden])).logits[0, inside]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels))


@architectures
def test_losses_equal_a_plain_computation(kind):
    tokenizer, model = masked_model(kind)
    objective = masked_lm(tokenizer)
    factual, alternative = objective.losses(model, objective.prepare(ROWS))
    for i, row in ROWS.iterrows():
        check_close(kind, factual[i], plain_losses(tokenizer, model, row.masked, row.factual), rtol=1e-9, atol=1e-9)
        check_close(kind, alternative[i], plain_losses(tokenizer, model, row.masked, row.alternative), rtol=1e-9, atol=1e-9)


@architectures
def test_rows_share_a_forward_pass_when_the_words_are_equally_long(kind):
    tokenizer, _ = masked_model(kind)
    objective = masked_lm(tokenizer)
    tokens = [split_tokens(tokenizer, ROWS.masked, ROWS[column]) for column in ("factual", "alternative")]
    same = [(f.before, len(f.word), f.after) == (a.before, len(a.word), a.after) for f, a in zip(*tokens)]
    assert objective.prepare(ROWS).input_ids.shape[0] == 2 * len(ROWS) - sum(same)
    assert same[0] and not same[2]  # both cases occur


@architectures
@pytest.mark.parametrize("gradient", ["factual", "alternative", "diff"])
def test_encode_equals_one_backward_per_row(kind, gradient):
    tokenizer, model = masked_model(kind)
    objective = masked_lm(tokenizer)
    full = ParameterSpace.from_model(model)
    space = full.keep(torch.arange(0, full.full_n, 7))
    directions = torch.randn(3, space.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = encode(model, objective, ROWS, directions, space=space, kind=gradient, engine="jvp", batch_size=3)
    slow = row_gradients(model, objective, ROWS, space=space, kind=gradient) @ directions.T
    check_close(kind, fast, slow, rtol=1e-8, atol=1e-9)


@architectures
def test_accumulate_equals_the_sum_of_row_gradients(kind):
    tokenizer, model = masked_model(kind)
    objective = masked_lm(tokenizer)
    space = ParameterSpace.from_model(model)
    weights = torch.randn(2, 2, len(ROWS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sums = accumulate(model, objective, objective.prepare(ROWS), weights, space=space)
    factual, alternative = (row_gradients(model, objective, ROWS, space=space, kind=k) for k in ("factual", "alternative"))
    check_close(kind, sums, weights[:, 0] @ factual + weights[:, 1] @ alternative, rtol=1e-8, atol=1e-10)
    mean = accumulate(model, objective, objective.prepare(ROWS), pair_weights(("diff",), len(ROWS)), space=space)
    check_close(kind, mean[0], (factual - alternative).mean(0), rtol=1e-8, atol=1e-10)


@architectures
def test_row_gradients_equal_finite_differences(kind):
    tokenizer, model = masked_model(kind)
    objective = masked_lm(tokenizer)
    space = ParameterSpace.from_model(model)
    direction = torch.randn(space.n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dense = space.dense(direction)

    def losses(t: float):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in dense: p.add_(dense[name], alpha=t)
            result = objective.losses(model, objective.prepare(ROWS))[0].clone()
            for name, p in model.named_parameters():
                if name in dense: p.sub_(dense[name], alpha=t)
        return result

    step = 1e-6
    expected = (losses(step) - losses(-step)) / (2 * step)
    check_close(kind, encode(model, objective, ROWS, direction, space=space)[:, 0], expected, rtol=1e-6, atol=1e-7)


@architectures
def test_the_model_is_left_alone(kind):
    tokenizer, model = masked_model(kind)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    objective = masked_lm(tokenizer)
    space = ParameterSpace.from_model(model)
    encode(model, objective, ROWS, torch.ones(space.n, dtype=torch.float64), space=space)
    accumulate(model, objective, objective.prepare(ROWS), pair_weights(("factual",), 4), space=space)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert not model.base_model._forward_hooks


@architectures
def test_probabilities_are_joint_and_independent_of_the_batch(kind):
    tokenizer, model = masked_model(kind)
    objective = masked_lm(tokenizer)
    words = [["watching"], ["they"]]
    together = objective.probabilities(model, objective.prepare_words(ROWS, words))
    alone = torch.cat([objective.probabilities(model, objective.prepare_words(ROWS.iloc[[i]], words)) for i in range(len(ROWS))])
    check_close(kind, together, alone, rtol=1e-9, atol=1e-12)
    expected = 0.0
    for form in ("watching", "Watching"):  # both spellings, each by the chain rule
        t = split_tokens(tokenizer, ROWS.masked[2:3], [form])[0]
        p = 1.0
        for j in range(len(t.word)):
            ids = t.before + t.word[:j] + (tokenizer.mask_token_id,) * (len(t.word) - j) + t.after
            p *= model(input_ids=torch.tensor([ids])).logits[0, len(t.before) + j].softmax(-1)[t.word[j]].item()
        expected += p
    assert together[2, 0].item() == pytest.approx(expected, rel=1e-8)


def test_batches_cover_every_row_once():
    tokenizer, _ = masked_model("bert")
    positions = torch.cat([p for p, _ in batches(masked_lm(tokenizer).prepare, ROWS, 3)])
    assert sorted(positions.tolist()) == [0, 1, 2, 3]


def test_byte_level_words_carry_their_space():
    tokenizer, _ = masked_model("roberta")
    middle, start = split_tokens(tokenizer, ["Anna said [MASK] was late.", "[MASK] was late."], ["she", "she"])
    assert tokenizer.decode(list(middle.word)) == " she" and tokenizer.decode(list(start.word)) == "she"


@pytest.mark.parametrize("limit", [6, 9, 20, 40])
def test_crop_keeps_the_word_and_the_ends(limit):
    tokens = Tokens(tuple(range(20)), (100, 101), tuple(range(200, 215)))
    short = crop(tokens, limit)
    total = sum(map(len, short))
    assert total == min(limit, 37) and short.word == tokens.word
    assert short.before[0] == 0 and short.after[-1] == 214
    assert list(short.before[1:]) == list(range(20))[len(range(20)) - len(short.before) + 1:]


def test_a_long_row_keeps_its_label():
    tokenizer, model = masked_model("bert")
    row = ROWS.iloc[[0]].assign(masked="The dogs barked. " * 40 + ROWS.masked[0] + " The dogs barked." * 40)
    batch = masked_lm(tokenizer).prepare(row)
    assert batch.input_ids.shape[1] == 64
    assert (batch.input_ids[batch.rows, batch.columns] == tokenizer.mask_token_id).all()


def test_errors_name_the_remedy():
    tokenizer, _ = masked_model("bert")
    with pytest.raises(InputError, match="unknown to this tokenizer"):
        masked_lm(tokenizer).prepare(ROWS.assign(factual="☃"))
    from transformers import PreTrainedTokenizerFast
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    with pytest.raises(InputError, match="no mask token"):
        masked_lm(without)
