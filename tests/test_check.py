"""Diagnoses of good and of broken models, and estimates against what is measured."""
import copy
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from gradiend.core import InputError
from gradiend.gradients import check as module
from gradiend.gradients.check import activation_bytes, check_model, deviation, engine_used, estimate, probe_rows, probe_words, tied_names
from gradiend.gradients.engine import encode
from gradiend.gradients.objectives import masked_lm, objective_for
from gradiend.gradients.space import ParameterSpace
from gradiend.gradients.store import estimate_store_size

from .tiny import ARCHITECTURES, tiny_model

ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "The pilot said [MASK] was tired.", "Anna said that [MASK] was late.", "The dogs barked because [MASK] were cold."],
    "factual": ["they", "he", "she", "they"], "alternative": ["he", "they", "unhappiness", "it"],
})


def answers(table: pd.DataFrame) -> dict[str, str]:
    return dict(zip(table.check, table.answer, strict=True))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_has_an_engine(kind):
    tokenizer, model = tiny_model(kind, dtype=torch.float32)
    flags = [p.requires_grad for p in model.parameters()]
    table = check_model(model, tokenizer, ROWS)
    found = answers(table)
    for name in ("batched = single", "padding side does not matter", "head at the words = full head", "tied weights are counted once"):
        assert found[name] == "yes", table.to_string()
    assert found["forward mode (jvp) works"] == "yes" or found["ghost works"] == "yes", table.to_string()
    assert found["engine for encode"] in ("ghost", "jvp"), table.to_string()
    assert flags == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gemma"])
def test_nonsense_sentences_suit_the_tokenizer(kind):
    tokenizer, model = tiny_model(kind)
    rows = probe_rows(tokenizer)
    objective = objective_for(tokenizer, model)
    assert torch.stack(objective.losses(model, objective.prepare(rows))).isfinite().all()
    assert rows.masked.str.count(r"\[MASK\]").eq(1).all() and rows.masked.str.len().nunique() >= 3
    assert (rows.factual != rows.alternative).all()


def test_a_vocabulary_without_words():
    tokenizer, _ = tiny_model("bert")
    with pytest.raises(InputError, match="give rows of your own"):
        probe_words(type("Digits", (), {"all_special_ids": [], "unk_token_id": None, "__len__": lambda self: 9, "decode": lambda self, ids: str(ids[0])})())
    assert len(set(probe_words(tokenizer, 6))) == 6


class Broken(BertForMaskedLM):
    "A masked language model with one fault."
    fault = ""

    def forward(self, input_ids=None, attention_mask=None, return_dict=True, **options):
        if self.fault == "padding": attention_mask = None
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options)
        if self.fault == "head": output.logits = output.logits + output.logits.mean(1, keepdim=True)
        if self.fault == "batch": output.logits = output.logits + output.logits.shape[1] * 0.1 * torch.arange(output.logits.shape[2]).sin() * input_ids.shape[0]
        return output


def broken(fault: str) -> Broken:
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    wrong = Broken(model.config).eval()
    wrong.load_state_dict(model.state_dict())
    wrong.fault = fault
    return wrong


@pytest.mark.parametrize("fault, check", [("padding", "batched = single"), ("head", "head at the words = full head"), ("batch", "batched = single")])
def test_a_broken_model_is_found_out(fault, check):
    tokenizer, _ = tiny_model("bert")
    assert answers(check_model(broken(""), masked_lm(tokenizer), ROWS))[check] == "yes"
    assert answers(check_model(broken(fault), masked_lm(tokenizer), ROWS))[check] == "no"


def test_a_tensor_counted_twice_is_found_out():
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    objective, full = masked_lm(tokenizer), ParameterSpace.from_model(model)
    [tied] = [names for names in tied_names(model) if any("word_embeddings" in name for name in names)]
    assert module.tied_once(model, objective, ROWS, full)[0]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    assert not module.tied_once(model, objective, ROWS, ParameterSpace.from_global(tied, [shapes[n] for n in tied], None))[0]


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return 2 * x

    @staticmethod
    def backward(ctx, g): return 2 * g


class Custom(nn.Module):
    "A scorer whose layer has an operation without forward mode, and a parameter used outside any layer."
    def __init__(self, borrowed: bool):
        super().__init__()
        self.layer, self.borrowed = nn.Linear(2, 3), borrowed

    def forward(self, x): return NoForwardMode.apply(x @ self.layer.weight.T if self.borrowed else self.layer(x))


class Scores:
    "Two classes of vectors; the loss of a class is its negative log-probability."
    name = "scores"

    def prepare(self, frame): return torch.tensor(frame["x"].tolist())

    def losses(self, model, batch): return -model(batch).log_softmax(-1)[:, 0], -model(batch).log_softmax(-1)[:, 1]


POINTS = pd.DataFrame({"x": [[1.0, 0.0], [0.5, 2.0], [1.0, 1.0]]})


@pytest.mark.parametrize("borrowed, engine", [(False, "ghost"), (True, "loop")])
def test_any_module_can_be_checked(borrowed, engine):
    table = check_model(Custom(borrowed), Scores(), POINTS)
    found = answers(table)
    assert found["batched = single"] == "yes" and found["padding side does not matter"] == "-" and found["head at the words = full head"] == "-"
    assert found["forward mode (jvp) works"] == "no" and found["engine for encode"] == engine, table.to_string()
    assert (found["ghost works"] == "yes") is not borrowed
    with pytest.raises(InputError, match="give a few rows of your data"):
        check_model(Custom(borrowed), Scores())


def test_listening_leaves_the_log_alone(caplog):
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    logger = logging.getLogger(encode.__module__)
    before = logger.level, logger.propagate, logger.handlers[:]
    with caplog.at_level(logging.DEBUG):
        engine_used(model, masked_lm(tokenizer), ROWS, ParameterSpace.from_model(model, "*layer.1.output*"))
        assert not caplog.records
    assert before == (logger.level, logger.propagate, logger.handlers)
    with pytest.raises(InputError):
        engine_used(model, masked_lm(tokenizer), ROWS.assign(factual="☃"), ParameterSpace.from_model(model, "*layer.1.output*"))
    assert before == (logger.level, logger.propagate, logger.handlers)


def test_deviation_is_relative_to_the_second():
    assert deviation(torch.tensor([1.0, 10.0]), torch.tensor([2.0, 10.0])) == pytest.approx(0.1)
    assert deviation(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize("what", ["check", "encode", "train", "store"])
def test_a_model_in_training_is_only_borrowed(what):
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    for part in model.modules():
        if isinstance(part, nn.Dropout): part.p = 0.5
    objective = masked_lm(tokenizer)
    model.train()
    model.bert.embeddings.eval()  # a mode of its own
    modes, dice = [m.training for m in model.modules()], torch.get_rng_state()
    seen: list[bool] = []
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: seen.append(module.training))
    if what == "check":
        table = check_model(model, objective, ROWS)
        assert not (table.answer == "no").any(), table.to_string()
    else: estimate(model, objective, ROWS, space=ParameterSpace.from_model(model), what=what)
    hook.remove()
    assert seen and not any(seen)
    assert torch.equal(dice, torch.get_rng_state()) and modes == [m.training for m in model.modules()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_does_not_matter(mode):
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    with mode():
        assert not (check_model(model, tokenizer, ROWS).answer == "no").any()
        for what in module.BATCH_SIZES: assert estimate(model, masked_lm(tokenizer), ROWS, space=ParameterSpace.from_model(model), what=what).activation_bytes > 0
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("frame, match", [(ROWS.head(0), "it has no rows"), (ROWS.drop(columns="factual"), "factual"), (pd.DataFrame({"a": [1]}), "masked|factual"),
                                          (ROWS.to_dict("list"), "a dict is no table"), (ROWS.assign(factual="☃"), "☃")])
def test_rows_that_cannot_be_read_are_an_error_and_no_diagnosis(frame, match):
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    with pytest.raises(InputError, match=match):
        check_model(model, tokenizer, frame)


def test_an_objective_that_cannot_read_the_rows_is_named():
    with pytest.raises(InputError, match=r"frame: the objective 'scores' cannot read these rows with the columns \['y'\] \(KeyError: 'x'\)"):
        check_model(Custom(False), Scores(), POINTS.rename(columns={"x": "y"}))


class Matrix(nn.Module):
    "x -> relu(x A) B, whose saved tensors can be counted by hand."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(32, 3))

    def forward(self, x): return (x @ self.a).relu() @ self.b


def test_activations_are_counted_once():
    model, points = Matrix(), pd.DataFrame({"x": torch.randn(5, 8).tolist()})
    objective = Scores()
    whole = ParameterSpace.from_model(model)
    # this objective calls the model twice: x is saved once, the hidden layer (by relu and by the second product) and the log-probabilities for each call
    assert activation_bytes(model, objective, objective.prepare(points), whole) == 4 * (5 * 8 + 2 * (5 * 32 + 5 * 3))
    upper = ParameterSpace.from_model(model, "b")
    assert activation_bytes(model, objective, objective.prepare(points), upper) == 4 * 2 * (5 * 32 + 5 * 3)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("what, batches", [("encode", 2), ("train", 2), ("store", 3)])
def test_an_estimate_adds_up(what, batches):
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    full = ParameterSpace.from_model(model)
    space = full.keep(torch.arange(0, full.n, 3))
    rows = pd.concat([ROWS] * 12, ignore_index=True).head(46)
    e = estimate(model, masked_lm(tokenizer), rows, space=space, what=what)
    assert (e.rows, e.batches) == (46, batches) and 0 < e.forward_seconds and e.batch_seconds <= e.total_seconds
    assert e.weight_bytes == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert e.peak_bytes == pytest.approx(1.1 * (e.weight_bytes + e.activation_bytes + e.gradient_bytes + e.vector_bytes), abs=1)
    assert e.disk_bytes == (estimate_store_size(46, space) if what == "store" else 0) and ("disk" in repr(e)) == (what == "store")
    assert e["forward_passes"] == e.batch_seconds / e.forward_seconds
    assert all(p.grad is None for p in model.parameters())


def test_the_typical_batch_is_in_the_middle_of_the_work():
    frame = pd.DataFrame({"masked": ["x" * n for n in (40, 10, 30, 20, 50, 60)]})
    parts = module._parts(frame, 2)
    assert [size for _, size in parts] == [40, 80, 120] and parts[0][0].masked.str.len().tolist() == [10, 20]
    assert module._typical(parts) == 1


def test_the_peak_of_training_is_not_exceeded():
    from .benchmarks.common import peak_bytes
    from gradiend.gradients.engine import pair_gradients

    tokenizer, _ = tiny_model("bert")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256)).eval()
    rows, objective = pd.concat([ROWS] * 4, ignore_index=True), masked_lm(tokenizer)
    space = ParameterSpace.from_model(model)
    e = estimate(model, objective, rows, space=space, what="train")
    batch = objective.prepare(rows)
    measured = e.weight_bytes + peak_bytes(lambda: pair_gradients(model, objective, batch, source="alternative", target="diff", space=space))
    assert 0.5 * e.peak_bytes < measured < e.peak_bytes


def long_and_short(long: int, short: int) -> pd.DataFrame:
    "Rows of about 120 and of at most 64 tokens."
    tail, rows = "The dogs barked because they were cold .", ROWS.iloc[[0, 1, 3] * (long + short)].head(long + short).reset_index(drop=True)
    return rows.assign(masked=[f"{text} {' '.join([tail] * (10 if i < long else 4))}" for i, text in enumerate(rows.masked)])


@pytest.fixture
def reader():
    "A model that reads long rows, its objective, and all its weights."
    tokenizer = copy.deepcopy(tiny_model("bert")[0])
    tokenizer.model_max_length = 160
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=160)).eval()
    return model, masked_lm(tokenizer, max_length=160), ParameterSpace.from_model(model)


@pytest.mark.parametrize("what", ["train", "encode", "store"])
def test_long_rows_need_no_more_memory_than_the_pass_they_are_in(reader, what):
    "However many there are in a batch; the estimate follows what the engine does, not the batch."
    model, objective, space = reader
    few, many = (estimate(model, objective, long_and_short(n, 0), space=space, what=what, batch_size=n) for n in (3, 32))
    tokens = objective.prepare(long_and_short(3, 0)).input_ids.numel()
    assert 256 < tokens <= 512 and many.activation_bytes <= 512 / tokens * few.activation_bytes
    assert many.activation_bytes < activation_bytes(model, objective, objective.prepare(long_and_short(32, 0)), space) / 2
    if what == "store": assert many.gradient_bytes <= 512 / tokens * few.gradient_bytes
    if what == "train": assert many.vector_bytes == 2 * few.vector_bytes  # the sums of earlier passes stay


def test_the_largest_batch_may_be_one_that_is_not_cut(reader):
    model, objective, space = reader
    short, mixed = long_and_short(0, 32), long_and_short(64, 32)
    assert 32 * 40 < objective.prepare(short).input_ids.numel() <= 32 * 64
    e, alone = (estimate(model, objective, rows, space=space, what="train", batch_size=32) for rows in (mixed, short))
    assert e.activation_bytes == alone.activation_bytes > activation_bytes(model, objective, objective.prepare(short), space)


@pytest.mark.parametrize("long", [0, 32])
def test_the_peak_of_training_on_long_rows_is_not_exceeded(reader, long):
    from .benchmarks.common import peak_bytes
    from gradiend.trainer.arguments import TrainingArguments
    from gradiend.trainer.batches import GradientStream

    model, objective, space = reader
    rows = long_and_short(long, 32 - long)
    stream = GradientStream(model, objective, rows, np.ones(32), space, TrainingArguments(train_batch_size=32))
    e = estimate(model, objective, rows, space=space, what="train")
    measured = e.weight_bytes + peak_bytes(lambda: stream.batch(range(32)))
    assert 0.4 * e.peak_bytes < measured < e.peak_bytes


def test_what_is_asked_for_must_exist():
    tokenizer, model = tiny_model("bert", dtype=torch.float32)
    space = ParameterSpace.from_model(model)
    with pytest.raises(InputError, match="did you mean 'train'"):
        estimate(model, masked_lm(tokenizer), ROWS, space=space, what="trains")
    with pytest.raises(InputError, match="0 rows"):
        estimate(model, masked_lm(tokenizer), ROWS.head(0), space=space)
    for name in ("batch_size", "directions"):
        for value in (0, -1, 1.5, "2", True):
            with pytest.raises(InputError, match=f"{name}={value!r} must be a whole number"):
                estimate(model, masked_lm(tokenizer), ROWS, space=space, what="encode", **{name: value})
