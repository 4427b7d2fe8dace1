"Long rows in passes: the same losses, sums and encodings as together, for every objective."

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend.data.examples import make_examples
from gradiend.gradients import passes as module
from gradiend.gradients.engine import accumulate, encode, pair_gradients
from gradiend.gradients.objectives import CausalCloze, CausalLM, MaskedLM, objective_for
from gradiend.gradients.passes import batches, groups_of_similar_length, pass_tokens, passes
from gradiend.gradients.rows import both_row_gradients, row_gradients
from gradiend.gradients.space import ParameterSpace
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.batches import gradient_stream
from gradiend.trainer.sweeps import remembering
from gradiend.zoo import load
from tests.tiny import SENTENCES, tiny_model

PAIR = ("3SG", "3PL")
KINDS = ("bert", "gpt2", "llama", "t5", "cloze")


def rows() -> pd.DataFrame:
    "Sixteen rows of very different length, half of them with their gap at the end."
    texts = [" ".join([SENTENCES[(i // 2 + k) % 8] for k in range(1 + i % 3)] + ["They said that [MASK] was here."]) if i % 2 else "[MASK] said: " + SENTENCES[i // 2] for i in range(16)]
    factual = [("he", "they")[i % 4 // 2] for i in range(16)]
    other = {"he": "they", "they": "he"}
    return pd.DataFrame({"masked": texts, "factual": factual, "alternative": [other[w] for w in factual], "factual_class": [PAIR[w == "they"] for w in factual],
                         "alternative_class": [PAIR[w != "they"] for w in factual], "split": "train"})


@pytest.fixture(params=KINDS)
def case(request):
    tokenizer, model = tiny_model("gpt2" if request.param == "cloze" else request.param)
    objective = CausalCloze(tokenizer) if request.param == "cloze" else objective_for(tokenizer, model)
    return model, objective, make_examples(rows(), pair=PAIR)


@pytest.fixture
def cutting(monkeypatch):
    "Short rows count as long ones."
    monkeypatch.setattr(module, "WIDE", 8)
    monkeypatch.setattr(module, "PASS", 60)
    monkeypatch.setitem(batches.__kwdefaults__, "tokens", 60)


def close(a: torch.Tensor, b: torch.Tensor) -> bool: return torch.allclose(a, b, atol=2e-5 * float(b.abs().max()))


def test_every_row_is_in_one_pass_and_passes_keep_to_the_limit(case, cutting):
    _, objective, examples = case
    parts = list(passes(objective.prepare, examples.frame, tokens=60))
    assert len(parts) > 1 and sorted(i for own, _ in parts for i in own.tolist()) == list(range(len(examples)))
    assert all(batch.input_ids.numel() <= 60 or len(own) == 1 for own, batch in parts)
    longest = [batch.input_ids.shape[1] for _, batch in parts]
    assert longest == sorted(longest, reverse=True)
    assert sum(batch.input_ids.numel() for _, batch in parts) < objective.prepare(examples.frame).input_ids.numel()


def test_table_in_passes_gives_the_same_sums_encodings_and_gradients(case, monkeypatch):
    model, objective, examples = case
    space = ParameterSpace.from_model(model)
    frame, weights = examples.frame, np.random.default_rng(0).normal(size=(2, len(examples)))
    direction = torch.randn(2, space.n, generator=torch.Generator().manual_seed(0))

    def everything() -> list[torch.Tensor]:
        return [accumulate(model, objective, frame, *weights, space=space, batch_size=8),
                *(encode(model, objective, frame, direction, space=space, kind="diff", engine=engine, batch_size=8) for engine in ("auto", "jvp")),
                row_gradients(model, objective, frame, space=space, kind="alternative", batch_size=8), *both_row_gradients(model, objective, frame, space=space, batch_size=8)]

    whole = everything()
    monkeypatch.setattr(module, "WIDE", 8)
    monkeypatch.setattr(module, "PASS", 60)
    monkeypatch.setitem(batches.__kwdefaults__, "tokens", 60)
    assert len(list(batches(objective.prepare, frame, 8))) > 2
    for a, b in zip(everything(), whole, strict=True): assert close(a, b)


@pytest.mark.parametrize("options", [{}, {"source": "diff"}, {"supervised_encoder": True}])
def test_training_batch_in_passes_is_the_mean_over_its_rows(case, cutting, options):
    model, objective, examples = case
    args = TrainingArguments(train_batch_size=8, num_train_epochs=1, cache_gradients=False, **options)
    space = ParameterSpace.from_model(model)
    stream = gradient_stream(model, objective, examples, space, args)
    positions = stream.plan(0)[0][0]
    assert len(list(passes(objective.prepare, stream.frame.iloc[positions], tokens=60))) > 1
    found, prepared = stream.batch(positions), objective.prepare(stream.frame.iloc[positions])
    kinds = (args.source, args.source if args.supervised_encoder else args.target)
    for got, wanted in zip((found.source, found.target), pair_gradients(model, objective, prepared, source=kinds[0], target=kinds[1], space=space), strict=True): assert close(got, wanted)
    with torch.no_grad(): losses = objective.losses(model, prepared)
    assert torch.allclose(torch.stack([found.loss_factual, found.loss_alternative]), torch.stack([loss.mean() for loss in losses]), atol=1e-5)


def test_short_rows_word_sets_and_other_batches_are_left_alone(case):
    model, objective, examples = case
    [(own, batch)] = passes(objective.prepare, examples.frame, tokens=10)  # no row is wide
    assert own.tolist() == list(range(len(examples))) and torch.equal(batch.input_ids, objective.prepare(examples.frame).input_ids)
    assert pass_tokens(model) == module.PASS


def test_word_sets_are_never_cut(cutting):
    tokenizer, model = tiny_model("bert")
    objective, examples = objective_for(tokenizer, model), make_examples(rows(), pair=PAIR)
    assert len(list(passes(lambda frame: objective.prepare_words(frame, [["he"], ["they"]]), examples.frame, tokens=60))) == 1
    assert [(own.tolist(), list(part.index)) for own, part in passes(lambda frame: frame, examples.frame, tokens=1)] == [(list(range(16)), list(range(16)))]


@pytest.mark.parametrize("trial", range(20))
def test_groups_fit_and_hold_every_row_once(trial):
    rng = np.random.default_rng(trial)
    lengths, inputs, limit = rng.integers(1, 100, 12).tolist(), rng.integers(1, 4, 12).tolist(), int(rng.integers(1, 400))
    groups = groups_of_similar_length(lengths, inputs, limit)
    assert sorted(i for group in groups for i in group) == list(range(12))
    for group in groups:
        assert lengths[group[0]] == max(lengths[i] for i in group)
        assert len(group) == 1 or max(lengths[i] for i in group) * sum(inputs[i] for i in group) <= limit


def test_a_row_without_a_word_is_named_by_its_own_index(cutting):
    tokenizer, model = tiny_model("gpt2")
    objective, frame = CausalLM(tokenizer), make_examples(rows(), pair=PAIR).frame
    frame = frame.assign(alternative=[*frame["alternative"][:-1], ""])
    with pytest.raises(ValueError, match="row 15"): list(passes(objective.prepare, frame))


def test_other_devices_have_no_limit():
    assert pass_tokens(torch.nn.Linear(2, 2, device="meta")) is None


def test_rows_of_a_batch_that_is_cut_into_passes_are_remembered_once():
    tokenizer, _ = load("gradiend/mini-mlm")
    text = " ".join(["The boat turned back because [MASK] had seen the storm."] + ["The dogs barked again ."] * 14)
    frame, asked = pd.DataFrame({"masked": [text] * 8, "factual": "they", "alternative": "he"}), []

    class Counting(MaskedLM):
        def prepare(self, part):
            asked.append(len(part))
            return super().prepare(part)

    for limit, expected in ((8, [8, 5, 3]), (7, [8, 5, 3, 8, 3])):  # with seven, the batch of eight and one pass are prepared again
        asked.clear()
        twin = remembering(Counting(tokenizer), frame, limit)
        for _ in range(2): assert len(list(passes(twin.prepare, frame))) == 2
        assert asked == expected
