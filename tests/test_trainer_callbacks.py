"Callbacks: what they get, what they may ask for, and that nothing is swallowed."
import json
import math
import sys
import types
from types import SimpleNamespace

import pytest

from gradiend.core import InputError, MissingExtraError
from gradiend.trainer import callbacks as module
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.callbacks import (
    HOOKS,
    CallbackList,
    EarlyStopping,
    TensorBoardCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    WandbCallback,
    as_callback,
    callbacks_for,
    eval_values,
    log_values,
    without_gain,
)
from gradiend.trainer.records import EvalPoint

ARGS = TrainingArguments()


def point(step, correlation, **facts):
    return EvalPoint(step, correlation, {"A": correlation, "B": -correlation}, {"A": 0.1, "B": 0.1}, 1.0, **facts)


def state(step=20, *histories, **facts):
    histories = histories or ((point(0, 0.1), point(step, 0.9)),)
    return TrainerState(step, 40, 1.0, tuple(range(len(histories))), histories, **facts)


def test_hooks_are_called_in_order_with_what_belongs_to_them():
    seen = []

    class Noting(TrainerCallback):
        def __init__(self, name): self.name = name
        def on_evaluate(self, args, state, control, metrics=None, **kwargs): seen.append((self.name, state.step, metrics["eval/correlation/seed_0"], kwargs))
        def on_log(self, args, state, control, logs=None, **kwargs): seen.append((self.name, logs))

    with CallbackList([Noting("a"), Noting("b")], ARGS, progress=False) as events:
        assert events.call("on_evaluate", state(), more=1) is events.control
        events.call("on_log", lambda: state(losses=(0.5,), learning_rates=(math.nan,)))
        events.call("on_step_end", lambda: 1 / 0)  # nobody listens, so no state is made
    assert seen == [("a", 20, 0.9, {"more": 1}), ("b", 20, 0.9, {"more": 1}), ("a", {"train/epoch": 1.0, "train/loss/seed_0": 0.5}), ("b", {"train/epoch": 1.0, "train/loss/seed_0": 0.5})]


def test_the_arguments_are_those_of_transformers():
    "A callback written against `transformers.TrainerCallback` finds its names here."
    from transformers import TrainerCallback as Theirs
    assert {hook for hook in HOOKS if not hasattr(Theirs, hook)} == set()
    class Ported(Theirs):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if state.global_step < state.max_steps: control.should_training_stop = True
    control = TrainerControl()
    Ported().on_evaluate(ARGS, state(), control, metrics={})
    assert control.should_stop


def test_requests_are_granted_once():
    class Asking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_save = control.should_evaluate = True
    events = CallbackList([Asking()], ARGS, progress=False)
    control = events.call("on_step_end", state())
    assert control.take("should_save") and not control.take("should_save") and control.take("should_evaluate") and not control.should_stop


@pytest.mark.parametrize("answer, stops", [(True, True), (1, False), (None, False), ("yes", False), (False, False)])
def test_a_plain_function_stops_only_with_true_and_never_at_step_0(answer, stops):
    asked = []
    def function(progress): return asked.append(progress) or answer
    events = CallbackList([function], ARGS, progress=False)
    events.call("on_evaluate", state(0, (point(0, 0.5),)))
    assert not asked
    assert events.call("on_evaluate", state(make_models=lambda: ("model",))).should_stop is stops
    assert asked[0].step == 20 and asked[0].points[0].correlation == 0.9 and asked[0].models == ("model",)


def test_an_error_goes_on_with_a_note_and_everything_is_closed():
    closed = []
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): raise KeyError("mine")
        def close(self): closed.append(self)
    with pytest.raises(KeyError, match="mine") as caught, CallbackList([Broken()], ARGS) as events:
        events.call("on_train_begin", state())
        events.call("on_step_end", state())
    assert len(closed) == 1 and caught.value.__notes__ == ["(in on_step_end of the callback Broken, at step 20)"]


def test_what_is_no_callback():
    class Typo(TrainerCallback):
        def on_epoch_ends(self, *_): pass
    for given, words in ((TrainerCallback, "is a class"), (Typo(), "did you mean on_epoch_end"), (7, "neither a function"), (None, "neither a function"), ("tensorboard", "neither a function")):
        with pytest.raises(TypeError, match=words): CallbackList([given], ARGS)
    class Duck:
        def on_save(self, args, state, control): self.saved = state.step
    CallbackList([duck := Duck()], ARGS, progress=False).call("on_save", state())
    assert duck.saved == 20 and as_callback(duck) is duck


def reference_without_gain(scores, threshold):
    "The counter of transformers' EarlyStoppingCallback, fed one evaluation at a time."
    best, count = None, 0
    for score in scores:
        if math.isfinite(score) and (best is None or score > best and abs(score - best) > threshold): best, count = score, 0
        else: count += 1
    return count


def test_patience_counts_like_transformers():
    import random
    rng = random.Random(0)
    for _ in range(300):
        scores = [rng.choice([math.nan, *[i / 10 for i in range(10)]]) for _ in range(rng.randrange(9))]
        threshold = rng.choice([0.0, 0.05, 0.25])
        history = [point(0, 0.99), *(point(i + 1, s) for i, s in enumerate(scores))]
        assert without_gain(history, threshold) == reference_without_gain(scores, threshold), (scores, threshold)


def test_patience_uses_the_score_of_the_selection():
    fixed = [point(10, -0.2, orientable=False), point(20, -0.9, orientable=False)]
    assert without_gain(fixed) == 1 and without_gain([point(10, -0.2), point(20, -0.9)]) == 0
    assert without_gain([point(10, 0.5, by="explained", explained=0.1), point(20, 0.4, by="explained", explained=0.2)]) == 0


def test_early_stopping_waits_for_every_seed_and_needs_no_memory():
    slow, done = (point(0, 0), point(10, 0.1), point(20, 0.2)), (point(0, 0), point(10, 0.9), point(20, 0.9))
    for histories, stops in (((done, done), True), ((done, slow), False), ((slow, slow), False)):
        EarlyStopping(1).on_evaluate(ARGS, state(20, *histories), control := TrainerControl())
        assert control.should_stop is stops
    events = CallbackList([], TrainingArguments(early_stopping_patience=1), progress=False)  # made anew, as after a resume
    assert events.call("on_evaluate", state(20, done, done)).should_stop


def test_values_have_names_and_are_finite():
    both = state(20, (point(20, 0.5),), (point(20, math.nan),), losses=(1.0, math.inf), learning_rates=(1e-3, 1e-3))
    assert eval_values(both) == {"eval/correlation/seed_0": 0.5, "eval/mean_A/seed_0": 0.5, "eval/mean_B/seed_0": -0.5}
    assert log_values(both) == {"train/epoch": 1.0, "train/loss/seed_0": 1.0, "train/learning_rate/seed_0": 1e-3, "train/learning_rate/seed_1": 1e-3}


def test_progress_bar(capsys):
    bar = module.ProgressBar()
    bar.close()  # before it began: after an early error
    bar.on_evaluate(ARGS, state(), None)
    bar.bar = module.progress_bar(total=10, disable=False)
    bar.bar.n = bar.bar.initial = 3
    bar.on_evaluate(ARGS, state(3, (point(3, -0.875),)), None)
    for step in (4, 5): bar.on_step_end(ARGS, state(step), None)
    bar.close()
    shown = capsys.readouterr().err
    assert "5/10" in shown and "correlation=0.875" in shown


def test_tensorboard_gets_every_number_once_also_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = TrainingArguments(report_to="tensorboard")
    for begin, steps in ((0, (10, 20, 30)), (20, (30, 40))):  # killed after step 30; the last state is that of step 20
        with CallbackList(callbacks_for(args, tmp_path), args, progress=False) as events:
            events.call("on_train_begin", state(begin))
            for step in steps:
                events.call("on_log", state(step, losses=(step / 10,)))
                events.call("on_evaluate", state(step, (point(step, step / 100),)))
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, round(e.value, 3)) for e in read.Scalars("eval/correlation/seed_0")] == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    assert [e.step for e in read.Scalars("train/loss/seed_0")] == [10, 20, 30, 40]


def test_tensorboard_needs_a_folder_and_the_package(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="set experiment_dir"): callbacks_for(TrainingArguments(report_to="tensorboard"))
    for name in ("torch.utils.tensorboard", "tensorboardX"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="pip install tensorboard"): TensorBoardCallback(tmp_path)


def fake_wandb(active=None):
    "A module with the three things that are used."
    fake = types.ModuleType("wandb")
    runs = []
    def init(**options):
        runs.append(run := SimpleNamespace(options=options, sent=[], finished=False))
        run.log = lambda values, step: run.sent.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        return run
    fake.run, fake.init, fake.runs = active, init, runs
    return fake


def test_wandb_gets_the_numbers_and_its_own_run_is_finished(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", fake := fake_wandb())
    args = TrainingArguments(report_to=["wandb"], learning_rate=1e-3)
    with pytest.raises(ZeroDivisionError), CallbackList(callbacks_for(args, tmp_path), args, progress=False) as events:
        events.call("on_train_begin", state(0))
        events.call("on_log", state(10, losses=(2.0,)))
        events.call("on_evaluate", state(10, (point(10, 0.5),)))
        raise ZeroDivisionError
    run, = fake.runs
    assert run.finished and run.options["config"]["learning_rate"] == 1e-3 and json.dumps(run.options["config"])
    assert run.sent[0] == (10, {"train/epoch": 1.0, "train/loss/seed_0": 2.0}) and run.sent[1][1]["eval/correlation/seed_0"] == 0.5


def test_a_wandb_run_of_the_user_stays_open(monkeypatch):
    mine = SimpleNamespace(sent=[], finish=lambda: 1 / 0)
    mine.log = lambda values, step: mine.sent.append(step)
    monkeypatch.setitem(sys.modules, "wandb", fake := fake_wandb(mine))
    with CallbackList([WandbCallback()], ARGS, progress=False) as events:
        events.call("on_train_begin", state())
        events.call("on_evaluate", state())
    assert mine.sent == [20] and not fake.runs
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install wandb"): WandbCallback()


def test_nothing_is_reported_unless_asked():
    assert callbacks_for(TrainingArguments()) == [] and callbacks_for(TrainingArguments(report_to=[])) == []
    with pytest.raises(InputError, match="did you mean 'tensorboard'"): TrainingArguments(report_to="tensorbord")
