"The training loop against plain references: order of batches, AdamW by hand, gradients row by row."
import copy
import math
import random
import os
import signal
import threading
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.trainer.arguments import TrainingArguments
from gradiend.core import pearson
from gradiend.trainer.callbacks import TrainerCallback
from gradiend.trainer.checkpoints import read_checkpoint, write_checkpoint
from gradiend.trainer.loop import GradientBatch, Training, finishing_first, fit, folded, gradient_stream, validation_encoder

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
    world = torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ), signal.getsignal(signal.SIGINT), torch.are_deterministic_algorithms_enabled()
    first, second = (fit(models, batches, encoder_on(batches), args, progress=False) for _ in range(2))
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
    assert world == (torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ), signal.getsignal(signal.SIGINT), torch.are_deterministic_algorithms_enabled())
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


def test_among_equal_correlations_the_later_step_wins():
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 200)
    args = TrainingArguments(learning_rate=3e-3, max_steps=200, eval_steps=20)
    _, run = fit(models, batches, encoder_on(batches), args, progress=False)[0]
    top = max(round(p.correlation, 3) for p in run.history if p.step)
    assert run.best_step == max(p.step for p in run.history if p.step and round(p.correlation, 3) == top)


def bits(one, other):
    "Whether two results of `fit` agree to the last bit, weights and stories."
    same = all(torch.equal(p, q) for (a, _), (b, _) in zip(one, other, strict=True) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    return same and all(a.history[1:] == b.history[1:] and a.losses == b.losses and a.reason == b.reason and a.best_step == b.best_step for (_, a), (_, b) in zip(one, other, strict=True))


SETTINGS = {
    "plain": {}, "sgd": {"optim": "sgd", "learning_rate": 30.0}, "adam": {"optim": "adam"}, "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 1e-3},
    "latent": {"latent_dim": 2, "bias_decoder": False}, "encoder": {"supervised_encoder": True}, "decoder": {"supervised_decoder": True}, "relu": {"activation_encoder": "relu"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_at_any_step_the_bits_are_those_of_the_undisturbed_run(name, tmp_path):
    options = {"learning_rate": 3e-3, "max_steps": 12, "eval_steps": 4, "save_strategy": "steps", "save_steps": 1, **SETTINGS[name]}
    args = TrainingArguments(**options)
    config = {k: options[k] for k in ("latent_dim", "bias_decoder", "activation_encoder") if k in options}
    _, _, space, models = setting(seeds=2, **config)
    batches, states = made_up(space.n, 12), []
    whole = fit(models, batches, encoder_on(batches), args, progress=False, save=lambda c: states.append(read_checkpoint(write_checkpoint(tmp_path, c).parent)))
    assert [s.step for s in states] == list(range(1, 13))
    for state in states: assert bits(whole, fit(models, batches, encoder_on(batches), args, progress=False, start=state)), state.step


def test_five_seeds_on_a_language_model_are_five_single_runs():
    model, objective, space, models = setting(seeds=5)
    args = TrainingArguments(train_batch_size=5, num_train_epochs=2, eval_steps=4, learning_rate=3e-3)
    rows = examples()
    def run(chosen, seeds, cache):
        own = replace(args, cache_gradients=cache)
        stream = gradient_stream(model, objective, rows.select("train"), space, own)
        return fit(chosen, stream, validation_encoder(model, objective, rows.select("validation"), own), own, seeds=seeds, progress=False)

    for cache in ("auto", False):
        together = run(models, range(5), cache)
        for i in range(5):
            (alone, story), (among, told) = run(models[i:i + 1], [i], cache)[0], together[i]
            assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), among.parameters())) and story.losses == told.losses and story.best_step == told.best_step
            if cache: assert story.history[1:] == told.history[1:]


def test_learning_rates_side_by_side_are_single_runs():
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 20)
    args = TrainingArguments(max_steps=20, eval_steps=10)
    rates = [1e-4, 3e-3, 1e-2]
    together = fit(models * 3, batches, encoder_on(batches), args, seeds=[0] * 3, learning_rates=rates, progress=False)
    for rate, one in zip(rates, together):
        assert bits([one], fit(models, batches, encoder_on(batches), replace(args, learning_rate=rate), progress=False)) and one[1].learning_rate == rate
    with pytest.raises(InputError, match="2 rates for 3 models"): fit(models * 3, batches, encoder_on(batches), args, learning_rates=rates[:2], progress=False)


def test_in_a_search_a_divergence_is_a_result():
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 20)
    args = TrainingArguments(max_steps=20, eval_steps=10, optim="sgd", gradient_scale=1e3)
    runs = [run for _, run in fit(models * 2, batches, encoder_on(batches), args, seeds=[0, 0], learning_rates=[1e-3, 1e30], progress=False)]
    assert "not finite from step" in runs[1].reason and not runs[1].converged and math.isfinite(runs[0].losses[-1])
    everything = fit(models * 2, batches, encoder_on(batches), args, seeds=[0, 0], learning_rates=[1e29, 1e30], progress=False)
    assert all("not finite from step" in run.reason for _, run in everything)
    with pytest.raises(FloatingPointError, match="seed 0 from step"): fit(models, batches, encoder_on(batches), replace(args, learning_rate=1e30), progress=False)


def test_two_batches_per_step_are_the_mean_of_two_losses_by_hand():
    _, _, space, models = setting(seeds=1)
    a, b = made_up(space.n, 2)
    both = GradientBatch(torch.stack([a.source, b.source]), torch.stack([a.target, b.target]), torch.tensor([1.0, -1.0]), weight=torch.tensor([0.5, 1.5]))
    args = TrainingArguments(max_steps=1, do_eval=False, optim="sgd", learning_rate=7.0, weight_decay=0.0, gradient_scale=100.0)
    trained, run = fit(models, [both], None, args, progress=False)[0]
    live = {k: p.detach().clone().requires_grad_() for k, p in models[0].named_parameters()}
    def loss(batch):
        h = torch.tanh(live["encoder_weight"] @ (100 * batch.source) + live["encoder_bias"])
        return ((live["decoder_weight"] @ h + live["decoder_bias"] - 100 * batch.target) ** 2).mean()

    (0.5 * (0.5 * loss(a) + 1.5 * loss(b))).backward()
    expected = folded(models[0], 1.0)
    with torch.no_grad():
        for k, p in expected.named_parameters(): p -= 7.0 * live[k].grad
    for p, q in zip(trained.parameters(), folded(expected, 100.0).parameters()): assert torch.allclose(p, q, rtol=1e-4, atol=1e-8)
    assert run.losses[0] == pytest.approx(float(loss(a).detach() + loss(b).detach()) / 2 / 100**2, rel=1e-4)


def test_a_schedule_gives_every_step_its_rate():
    _, _, space, models = setting(seeds=1)
    seen = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs): seen.append(state.step)
        def on_step_end(self, args, state, control, **kwargs): seen[-1] = (seen[-1], state.learning_rates[0])

    args = TrainingArguments(max_steps=8, do_eval=False, lr_scheduler_type="linear", warmup_steps=2, learning_rate=1e-2)
    fit(models, made_up(space.n, 8), None, args, callbacks=[Rates()], progress=False)
    assert seen == [(i, pytest.approx(1e-2 * args.scheduler_factor(i, 8))) for i in range(8)]


@pytest.mark.parametrize("options,steps", [({"eval_strategy": "epoch"}, [0, 5, 10, 12]), ({"eval_strategy": "steps", "eval_steps": 100}, [0, 12]), ({"eval_strategy": "no"}, []), ({"do_eval": False}, [])])
def test_evaluations_happen_when_they_are_due(options, steps):
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 12)

    class Stream(list):
        epoch_length = 5

    model, run = fit(models, Stream(batches), encoder_on(batches), TrainingArguments(max_steps=12, learning_rate=3e-3, **options), progress=False)[0]
    assert [p.step for p in run.history] == steps and len(run.losses) == 12
    last = fit(models, batches, None, TrainingArguments(max_steps=12, learning_rate=3e-3, do_eval=False), progress=False)[0]
    if not steps: assert torch.equal(model.encoder_weight, last[0].encoder_weight) and run.best_step == 12 and not run.converged


@pytest.fixture
def ctrl_c():
    "Ctrl-C as at a terminal; a shell switches it off for what it runs in the background."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(list):
    "A stream that gets a signal in the middle of computing a batch."
    def __init__(self, batches, at): super().__init__(batches); self.at = at
    def from_step(self, start):
        for i in range(start, len(self)):
            if i == self.at:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
            yield self[i]


def test_ctrl_c_saves_warns_and_returns_and_the_rest_gives_the_same_bits(ctrl_c):
    _, _, space, models = setting(seeds=2)
    batches, states = made_up(space.n, 30), []
    args = TrainingArguments(learning_rate=3e-3, max_steps=30, eval_steps=10)
    with pytest.warns(UserWarning, match="interrupted after step 17: .*resume=True"):
        part = fit(models, Interrupting(batches, 17), encoder_on(batches), args, progress=False, save=states.append)
    assert [s.step for s in states] == [10, 17] and all(run.interrupted and run.best_step == 10 for _, run in part)
    whole = fit(models, batches, encoder_on(batches), args, progress=False)
    assert bits(whole, fit(models, batches, encoder_on(batches), args, progress=False, start=states[-1]))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt): fit(models, Interrupting(batches, 0), encoder_on(batches), args, progress=False)


def test_ctrl_c_before_the_first_evaluation_returns_the_last_step(ctrl_c):
    _, _, space, models = setting(seeds=1)
    with pytest.warns(UserWarning, match="interrupted after step 11"):
        _, run = fit(models, Interrupting(made_up(space.n, 30), 11), encoder_on(made_up(space.n, 30)), TrainingArguments(max_steps=30), progress=False)[0]
    assert run.best_step == 11 and "stopped before the first evaluation" in run.reason and len(run.losses) == 11


def test_a_signal_during_a_step_waits_for_its_end(ctrl_c):
    _, _, space, models = setting(seeds=3)
    args = TrainingArguments(max_steps=3, learning_rate=3e-3)
    training = Training(models, 1.0, args, [0, 1, 2], None, torch.device("cpu"))
    step = training.optimizer.step
    training.optimizer.step = lambda: (os.kill(os.getpid(), signal.SIGINT), step())[1]
    with pytest.raises(KeyboardInterrupt):
        with finishing_first(): training.step(made_up(space.n, 1)[0], 3)
    assert training.done == 1 and not training.torn and len(training.pending) == 1


def test_training_works_outside_the_main_thread():
    _, _, space, models = setting(seeds=1)
    batches, found = made_up(space.n, 6), []
    thread = threading.Thread(target=lambda: found.append(fit(models, batches, encoder_on(batches), TrainingArguments(max_steps=6, eval_steps=3), progress=False)))
    thread.start()
    thread.join()
    assert bits(found[0], fit(models, batches, encoder_on(batches), TrainingArguments(max_steps=6, eval_steps=3), progress=False))


@pytest.mark.parametrize("hook", ["on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save"])
def test_an_error_in_a_callback_stops_the_run_and_the_state_is_kept(hook):
    _, _, space, models = setting(seeds=1)
    batches, states = made_up(space.n, 30), []
    def fail(self, args, state, control, **kwargs):
        if state.step >= 20 or hook == "on_train_begin": raise ZeroDivisionError(hook)

    callback = type("Failing", (TrainerCallback,), {hook: fail})()
    args = TrainingArguments(learning_rate=3e-3, max_steps=30, eval_steps=10)
    with pytest.raises(ZeroDivisionError, match=hook): fit(models, batches, encoder_on(batches), args, callbacks=[callback], progress=False, save=states.append)
    assert [s.step for s in states[-1:]] == [20 if hook != "on_train_begin" else 0]
    if hook != "on_train_begin": assert bits(fit(models, batches, encoder_on(batches), args, progress=False), fit(models, batches, encoder_on(batches), args, progress=False, start=states[-1]))


def test_a_state_that_cannot_be_saved_does_not_hide_the_first_error():
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 9)
    def broken(current): raise ZeroDivisionError("the evaluation")
    def full(checkpoint): raise OSError("disk full")
    with pytest.raises(ZeroDivisionError, match="the evaluation") as caught: fit(models, batches, broken, TrainingArguments(max_steps=9), progress=False, save=full)
    assert any("disk full" in note for note in caught.value.__notes__)


def test_a_diverged_state_is_not_saved():
    _, _, space, models = setting(seeds=1)
    batches, states = made_up(space.n, 12), []
    batches[7] = replace(batches[7], target=batches[7].target * math.inf)
    with pytest.raises(FloatingPointError, match="seed 0 from step 8 on"):
        fit(models, batches, encoder_on(batches), TrainingArguments(max_steps=12, eval_steps=5), progress=False, save=states.append)
    assert [s.step for s in states] == [5]


def test_callbacks_can_ask_for_an_evaluation_and_a_save():
    _, _, space, models = setting(seeds=1)
    batches, states = made_up(space.n, 9), []

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_evaluate, control.should_save = state.step == 2, state.step == 4

    args = TrainingArguments(max_steps=9, eval_steps=100, save_strategy="no")
    _, run = fit(models, batches, encoder_on(batches), args, callbacks=[Asks()], progress=False, save=states.append)[0]
    assert [p.step for p in run.history] == [0, 2, 9] and [s.step for s in states] == [4]


def test_early_stopping_is_the_same_after_a_resume():
    _, _, space, models = setting(seeds=1)
    batches, states = made_up(space.n, 200), []
    args = TrainingArguments(max_steps=200, eval_steps=5, learning_rate=3e-3, early_stopping_patience=4, early_stopping_threshold=0.01)
    whole = fit(models, batches, encoder_on(batches), args, progress=False, save=states.append)
    assert len(whole[0][1].losses) < 200
    for state in states[::3] + states[-1:]: assert bits(whole, fit(models, batches, encoder_on(batches), args, progress=False, start=state))


def test_a_checkpoint_of_another_training_is_refused():
    _, _, space, models = setting(seeds=2)
    batches, states = made_up(space.n, 4), []
    args = TrainingArguments(max_steps=4, eval_steps=2)
    fit(models, batches, encoder_on(batches), args, progress=False, save=states.append)
    with pytest.raises(InputError, match=r"its seeds are \[0, 1\], this training has \[4, 5\]"): fit(models, batches, encoder_on(batches), args, seeds=[4, 5], progress=False, start=states[-1])
    with pytest.raises(InputError, match="learning_rates"): fit(models, batches, encoder_on(batches), replace(args, learning_rate=1e-3), progress=False, start=states[-1])
    other = setting(seeds=2, latent_dim=2)[3]
    with pytest.raises(InputError, match="another model or parameter space"): fit(other, batches, encoder_on(batches), args, progress=False, start=states[-1])


def test_supervised_parts_learn_what_they_are_told_and_leave_the_rest():
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 150)
    args = TrainingArguments(learning_rate=1e-2, max_steps=150, eval_steps=50)
    encoder, run = fit(models, batches, encoder_on(batches), replace(args, supervised_encoder=True), progress=False)[0]
    assert run.converged and run.mean_by_class["3SG"] > 0.8 and run.mean_by_class["3PL"] < -0.8
    sign = 1 if torch.allclose(encoder.decoder_weight * run.gradient_scale, models[0].decoder_weight, rtol=1e-5) else -1
    assert torch.allclose(sign * encoder.decoder_weight * run.gradient_scale, models[0].decoder_weight, rtol=1e-5)
    assert run.losses[-1] < 0.2 and run.best.explained > 0.5  # in units of labels
    decoder, run = fit(models, batches, encoder_on(batches), replace(args, supervised_decoder=True), progress=False)[0]
    difference = torch.stack([b.target * b.label for b in batches]).mean(0)
    assert run.score == run.best.explained > 0.3 and "explains" in run.reason
    assert F.cosine_similarity(decoder.decode(1.0)[0] - decoder.decode(-1.0)[0], difference, dim=0).abs() > 0.9


def test_no_number_travels_to_the_cpu_in_a_step(monkeypatch):
    _, _, space, models = setting(seeds=2)
    training = Training(models, 1.0, TrainingArguments(max_steps=3), [0, 1], None, torch.device("cpu"))
    for name in ("item", "cpu", "tolist", "numpy", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name, **k: pytest.fail(f"{name} in a step"))
    for batch in made_up(space.n, 3): training.step(batch, 3)


def test_without_warnings_in_an_ordinary_run():
    _, _, space, models = setting(seeds=1)
    batches = made_up(space.n, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(models, batches, encoder_on(batches), TrainingArguments(max_steps=10, eval_steps=5), progress=False)
