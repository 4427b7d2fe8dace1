"The training loop against plain references: order of batches, AdamW by hand, gradients row by row."
import copy
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.gradients.engine import row_gradients
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.trainer.arguments import TrainingArguments
from gradiend.core import pearson
from gradiend.trainer.loop import GradientBatch, class_batches, fit, folded, gradient_stream, validation_encoder

PAIR = ("3SG", "3PL")
WORDS = ["he", "she", "they"]


class Bigram(nn.Module):
    "A language model as small as they get: one context word decides the next."

    def __init__(self, contexts: int = 12, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        inside = torch.randn(contexts, width, generator=generator)
        inside[:, 0] = 3.0  # what all contexts share: here the class of the next word can be read from its gradient
        self.inside = nn.Parameter(inside)
        self.outside = nn.Parameter(torch.randn(len(WORDS), width, generator=generator))

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return (self.inside[context] @ self.outside.T).log_softmax(-1)


class NextWord:
    "An objective: the text names a context, the two words are looked up."
    name = "next_word"

    def prepare(self, frame: pd.DataFrame) -> torch.Tensor:
        context = [int(text.split()[0]) for text in frame["masked"]]
        return torch.tensor([context, *([WORDS.index(w) for w in frame[c]] for c in ("factual", "alternative"))])

    def losses(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = -model(batch[0])
        return scores.gather(1, batch[1][:, None])[:, 0], scores.gather(1, batch[2][:, None])[:, 0]


def examples(n: int = 48, other: int = 0) -> Examples:
    "Rows of both classes in all splits, and `other` rows whose source word belongs to neither class."
    rng, rows = np.random.default_rng(3), []
    for i in range(n):
        singular = i % 2 == 0
        words = (str(rng.choice(WORDS[:2])), "they") if singular else ("they", str(rng.choice(WORDS[:2])))
        classes = PAIR if singular else PAIR[::-1]
        split = ("train", "train", "train", "validation", "validation", "test")[i // 2 % 6]
        rows.append((f"{rng.integers(12)} [MASK]", *words, *classes, split))
    for i in range(other): rows.append((f"{i % 12} [MASK]", "he", "she", "OTHER", "OTHER", ("train", "validation")[i % 2]))
    frame = pd.DataFrame(rows, columns=["masked", "factual", "alternative", "factual_class", "alternative_class", "split"])
    frame["transition"] = frame.factual_class + "->" + frame.alternative_class
    frame["text"] = [m.replace("[MASK]", w) for m, w in zip(frame.masked, frame.factual)]
    return Examples(frame, PAIR)


def setting(seeds: int = 2, **config):
    "A language model, an objective, its space and some untrained models."
    model = Bigram()
    space = ParameterSpace.from_model(model)
    return model, NextWord(), space, [GradiendModel.create(space, GradiendConfig(pair=PAIR, **config), seed=s) for s in range(seeds)]


def made_up(n: int, steps: int, size: float = 1e-3) -> list[GradientBatch]:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(n, generator=generator)
    noise = torch.randn(steps, 2, n, generator=generator)
    return [GradientBatch(size * (s * direction + e[0]), size * (-2 * s * direction + e[1]), float(s)) for i, e in enumerate(noise) for s in [1 - 2 * (i % 2)]]


def encoder_on(batches: list[GradientBatch]):
    sources, labels = torch.stack([b.source for b in batches]), np.array([b.label for b in batches])
    return lambda models: [(m.encode(sources).detach().numpy(), labels) for m in models]


@pytest.mark.parametrize("trial", range(12))
def test_batches_hold_one_class_every_row_once_and_take_turns(trial):
    rng = np.random.default_rng(trial)
    labels, size = rng.choice([1.0, -1.0, 0.0], int(rng.integers(1, 90))), int(rng.integers(1, 12))
    batches = class_batches(labels, size, seed=trial, epoch=1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(labels)))
    kinds = [set(labels[b]) for b in batches]
    assert all(len(k) == 1 for k in kinds) and all(0 < len(b) <= size for b in batches)
    counts = Counter(next(iter(k)) for k in kinds)
    assert counts == {v: -(-int((labels == v).sum()) // size) for v in set(labels)}
    for value, total in counts.items():  # spread evenly: after any part of the epoch, that part of each class is done
        done = np.cumsum([k == {value} for k in kinds])
        share = np.arange(1, len(batches) + 1) / len(batches)
        assert np.abs(done - share * total).max() <= len(counts)


def test_batches_are_new_each_epoch_and_the_same_for_the_same_seed():
    labels = np.repeat([1.0, -1.0], 20)
    order = lambda **kw: [b.tolist() for b in class_batches(labels, 4, **kw)]
    assert order(seed=0, epoch=0) == order(seed=0, epoch=0) != order(seed=0, epoch=1) != order(seed=1, epoch=1)


def adamw_by_hand(model: GradiendModel, batches: list[GradientBatch], args: TrainingArguments, scale: float) -> dict[str, torch.Tensor]:
    "Decoupled AdamW written out, one model, one step at a time."
    p = {k: v.detach().double().clone() for k, v in model.named_parameters()}
    m, v = ({k: torch.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, batch in enumerate(batches, 1):
        x, y = batch.source.double() * scale, batch.target.double() * scale
        live = {k: q.clone().requires_grad_() for k, q in p.items()}
        h = torch.tanh(live["encoder_weight"] @ x + live["encoder_bias"])
        loss = ((live["decoder_weight"] @ h + live["decoder_bias"] - y) ** 2).sum() / len(y)
        loss.backward()
        for k in p:
            g = live[k].grad
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g * g
            step = (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.999**t)).sqrt() + args.adam_epsilon)
            p[k] = p[k] * (1 - args.learning_rate * args.weight_decay) - args.learning_rate * step
    return {"encoder_weight": p["encoder_weight"] * scale, "encoder_bias": p["encoder_bias"],
            "decoder_weight": p["decoder_weight"] / scale, "decoder_bias": p["decoder_bias"] / scale}


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_fit_is_adamw_by_hand_for_every_seed(scale):
    _, _, space, models = setting(seeds=3)
    batches = made_up(space.n, 25)
    args = TrainingArguments(learning_rate=3e-3, max_steps=25, eval_steps=100, gradient_scale=scale)
    for start, (model, run) in zip(models, fit(models, batches, encoder_on(batches), args, progress=False)):
        expected = adamw_by_hand(start, batches, args, scale)
        sign = 1 if F.cosine_similarity(expected["decoder_weight"], model.decoder_weight.double(), dim=0) > 0 else -1
        for name in ("encoder_weight", "encoder_bias", "decoder_weight"): expected[name] = sign * expected[name]
        for name, value in model.named_parameters():
            assert torch.allclose(value.double(), expected[name], rtol=2e-3, atol=1e-5 * float(expected[name].abs().max())), name
        assert run.best_step == 25 and run.gradient_scale == scale


def test_history_is_in_the_sign_of_the_returned_model():
    _, _, space, models = setting(seeds=1)
    turned = copy.deepcopy(models[0])
    turned.orient(-1)
    batches = made_up(space.n, 60)
    args = TrainingArguments(learning_rate=3e-3, max_steps=60, eval_steps=20)
    (a, run_a), (b, run_b) = fit([models[0], turned], batches, encoder_on(batches), args, progress=False)
    assert run_a.correlation > 0.9 and run_b.correlation == pytest.approx(run_a.correlation)
    assert torch.allclose(a.encoder_weight, b.encoder_weight, rtol=1e-4, atol=1e-6) and torch.allclose(a.decoder_bias, b.decoder_bias, atol=1e-7)
    for p, q in zip(run_a.history, run_b.history):
        assert p.correlation == pytest.approx(q.correlation, abs=1e-5) and p.mean_by_class == pytest.approx(q.mean_by_class, abs=1e-5)
    encodings, labels = encoder_on(batches)([b])[0]
    assert pearson(encodings[:, 0], labels) == pytest.approx(run_b.correlation) and run_b.mean_by_class["3SG"] > 0 > run_b.mean_by_class["3PL"]


def test_step_zero_never_wins_and_the_best_weights_are_returned():
    _, _, space, models = setting(seeds=1)
    script = iter([0.999, 0.5, -0.8, 0.7])
    labels = np.array([1.0, 1.0, -1.0, -1.0])
    seen = []

    def scripted(current):
        c = next(script)
        seen.append(current[0].decoder_weight.clone())
        noise = np.array([1.0, -1.0, 1.0, -1.0]) * math.sqrt(1 - c * c)
        return [(c * labels + noise, labels)]

    model, run = fit(models, made_up(space.n, 30), scripted, TrainingArguments(max_steps=30, eval_steps=10, learning_rate=1e-2), progress=False)[0]
    assert run.best_step == 20 and run.correlation == pytest.approx(0.8)
    assert torch.equal(model.decoder_weight, -seen[2])


def test_a_failing_evaluation_is_not_swallowed():
    _, _, space, models = setting()
    def broken(current): raise ZeroDivisionError("bug")
    with pytest.raises(ZeroDivisionError, match="bug"): fit(models, made_up(space.n, 3), broken, TrainingArguments(), progress=False)


def test_a_seed_that_diverges_does_not_disturb_the_others():
    _, _, space, models = setting(seeds=2)
    batches = made_up(space.n, 30)
    args = TrainingArguments(learning_rate=3e-3, max_steps=30, eval_steps=10)
    healthy = fit(models[:1], batches, encoder_on(batches), args, progress=False)[0]
    with torch.no_grad(): models[1].encoder_weight.fill_(math.nan)
    both = fit(models, batches, encoder_on(batches), args, progress=False)
    assert torch.equal(both[0][0].encoder_weight, healthy[0].encoder_weight)
    assert both[1][1].best_step == 0 and not both[1][1].converged and "not finite" in both[1][1].reason


def test_no_global_random_state_is_touched_and_bits_repeat():
    _, _, space, models = setting()
    batches = made_up(space.n, 20)
    args = TrainingArguments(learning_rate=3e-3, max_steps=20, eval_steps=10)
    states = torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()
    first, second = (fit(models, batches, encoder_on(batches), args, progress=False) for _ in range(2))
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
    for (a, _), (b, _) in zip(first, second): assert torch.equal(a.decoder_weight, b.decoder_weight)
    assert all(torch.equal(p, q) for m, n in zip(models, setting()[3]) for p, q in zip(m.parameters(), n.parameters()))


def test_two_latent_values_no_decoder_bias_and_relu():
    _, _, space, models = setting(seeds=1, latent_dim=2, bias_decoder=False, activation_decoder="relu")
    batches = made_up(space.n, 60)
    args = TrainingArguments(learning_rate=3e-3, max_steps=60, eval_steps=30, latent_dim=2, bias_decoder=False, activation_decoder="relu")
    model, run = fit(models, batches, encoder_on(batches), args, progress=False)[0]
    assert model.decoder_bias is None and model.encoder_weight.shape == (2, space.n) and run.correlation > 0.9
    g = batches[0].source[None]
    assert torch.allclose(folded(models[0], 50.0)(g), models[0](50.0 * g) / 50.0, rtol=1e-4, atol=1e-9)


def test_an_encoder_that_cannot_be_turned_keeps_the_sign_of_its_correlation():
    _, _, space, models = setting(seeds=1, activation_encoder="relu")
    labels = np.array([1.0, 1.0, -1.0, -1.0])
    args = TrainingArguments(max_steps=4, eval_steps=2, activation_encoder="relu")
    _, run = fit(models, made_up(space.n, 4), lambda current: [(np.array([0.0, 0.1, 0.9, 1.0]), labels)], args, progress=False)[0]
    assert run.correlation < -0.9 and not run.converged and run.mean_by_class["3PL"] > run.mean_by_class["3SG"] >= 0


def test_stream_gives_the_mean_of_the_row_gradients():
    model, objective, space, _ = setting()
    rows = examples(other=6).select("train")
    args = TrainingArguments(train_batch_size=5, num_train_epochs=2)
    stream = gradient_stream(model, objective, rows, space, args)
    got = list(stream)
    pair_rows = rows.take(np.flatnonzero(rows.labels("alternative")))
    assert len(got) == len(stream) == 2 * len(class_batches(pair_rows.labels("alternative"), 5, seed=0, epoch=0))
    used = [position for _, position in zip(got, stream.positions())]
    for batch, positions in zip(got, used):
        chosen = pair_rows.frame.iloc[positions]
        assert set(np.where(chosen.alternative_class == "3SG", 1.0, -1.0)) == {batch.label}
        for value, kind in ((batch.source, "alternative"), (batch.target, "diff")):
            assert torch.allclose(value, row_gradients(model, objective, chosen, space=space, kind=kind).mean(0), atol=1e-6)
        factual, _ = objective.losses(model, objective.prepare(chosen))
        assert float(batch.loss_factual) == pytest.approx(float(factual.detach().mean()), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_validation_encodes_the_gradients_of_all_models_and_keeps_other_rows():
    model, objective, space, models = setting(seeds=3)
    rows = examples(other=8).select("validation")
    evaluate = validation_encoder(model, objective, rows, TrainingArguments(eval_batch_size=3))
    for source_model, (encodings, labels) in zip(models, evaluate(models)):
        expected = source_model.encode(row_gradients(model, objective, rows.frame, space=space, kind="alternative"))
        assert np.allclose(encodings, expected.detach().numpy(), atol=1e-5)
        assert Counter(labels.tolist())[0.0] == 4 and (labels == rows.labels("alternative")).all()
    capped = validation_encoder(model, objective, rows, TrainingArguments(eval_max_size=2))(models)[0][1]
    assert sorted(capped.tolist()) == [-1, -1, 0, 0, 1, 1]


def test_one_class_only_is_refused():
    model, objective, space, _ = setting()
    rows = examples()
    one = rows.take(np.flatnonzero(rows.frame.factual_class == "3SG"))
    with pytest.raises(InputError, match="training rows hold none.*'3SG'"): gradient_stream(model, objective, one, space, TrainingArguments())
    with pytest.raises(InputError, match="validation rows hold none.*'3PL'"): validation_encoder(model, objective, one, replace(TrainingArguments(), source="factual"))


def test_among_equal_correlations_the_later_step_wins():
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 200)
    args = TrainingArguments(learning_rate=3e-3, max_steps=200, eval_steps=20)
    _, run = fit(models, batches, encoder_on(batches), args, progress=False)[0]
    top = max(round(p.correlation, 3) for p in run.history if p.step)
    assert run.best_step == max(p.step for p in run.history if p.step and round(p.correlation, 3) == top)
