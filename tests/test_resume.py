"""Killed without warning at many moments, resumed, and compared bit by bit with a training that was never disturbed.

One process with one thread is started; for every case it forks a child that is killed, and a child that resumes."""
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradiend.core import InputError
from gradiend.model import GradiendConfig
from gradiend.trainer import checkpoints, seeds
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.callbacks import TrainerCallback
from gradiend.locks import LOCK, FolderInUseError as FolderInUseError
from gradiend.trainer.checkpoints import NAME, read_checkpoint
from gradiend.trainer.seeds import GRADIENTS, SEEDS, SeedReport, train_seeds
from tests.test_trainer_loop import PAIR, examples, setting

ARGS = TrainingArguments(train_batch_size=4, max_steps=30, eval_steps=5, learning_rate=1e-2, max_seeds=2, convergent_mean_by_class_threshold=None, convergent_score_threshold=0.0,
                         lr_scheduler_type="linear", max_grad_norm=1.0, cache_gradients=False)


def train(folder=None, args=ARGS, callbacks=(), rows=None, **options):
    model, objective, space, _ = setting()
    return train_seeds(model, objective, rows or examples(96), space, GradiendConfig(pair=PAIR), args, callbacks=callbacks, progress=False, folder=folder, **options)


def everything(report: SeedReport) -> dict:
    "All numbers of a report, exactly."
    weights = [[p.detach().double().flatten().tolist() for p in model.parameters()] for model in report.models]
    return json.loads(json.dumps({"weights": weights, "runs": [[r.seed, r.best_step, r.correlation, r.converged, r.reason, repr(r.history), r.losses, r.gradient_scale] for r in report.runs],
                                  "best": report.best, "stability": report.stability.to_dict("records"), "complete": report.complete}))


CHILD = '''
import json, os, signal, sys
from pathlib import Path
from tests import test_resume as t

def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)

class Die(t.TrainerCallback):
    "Kills the process at the nth call of a hook."
    def __init__(self, hook, n):
        self.n = n
        setattr(self, hook, self.count)
    def count(self, args, state, control, **kwargs):
        self.n -= 1
        if self.n == 0: die()
    def on_step_end(self, args, state, control, **kwargs): pass
    def on_step_begin(self, args, state, control, **kwargs): pass
    def on_evaluate(self, args, state, control, **kwargs): pass
    def on_save(self, args, state, control, **kwargs): pass
    def on_train_end(self, args, state, control, **kwargs): pass

def nth(n, then):
    "A function that works n - 1 times as `before` and then does something else."
    def wrap(before):
        left = [n]
        def call(*args, **kwargs):
            left[0] -= 1
            return then(before, *args, **kwargs) if left[0] == 0 else before(*args, **kwargs)
        return call
    return wrap

def half_a_file(before, tensors, path, metadata=None):
    Path(path).write_bytes(b"\\x40\\0\\0\\0 half a file")
    die()

def after(before, *args, **kwargs):
    before(*args, **kwargs)
    die()

def patch(owner, name, wrap): setattr(owner, name, wrap(getattr(owner, name)))

CASES = {
    "before the first step": lambda: [Die("on_step_begin", 1)],
    "before the first state": lambda: [Die("on_step_end", 3)],
    "in an evaluation": lambda: [Die("on_evaluate", 3)],
    "in the third step after a state": lambda: [Die("on_step_end", 13)],
    "right after a state": lambda: [Die("on_save", 3)],
    "half a state written": lambda: patch(t.checkpoints, "save_file", nth(3, half_a_file)),
    "a state written, not yet renamed": lambda: patch(t.checkpoints, "save_file", nth(2, after)),
    "at the very end": lambda: [Die("on_train_end", 1)],
    "half the report written": lambda: patch(t.seeds.SeedReport, "save", lambda before: lambda self, folder: (patch(type(self.models[0]), "save_pretrained", nth(2, lambda *a: die())), before(self, folder))),
    "the report written, the state still there": lambda: patch(t.seeds.SeedReport, "save", nth(1, after)),
}

def fork(work):
    child = os.fork()
    if child == 0:
        try: work()
        except BaseException as error: print(repr(error), file=sys.stderr, flush=True)
        else: os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def killed(folder, name): t.train(folder, t.ARGS, CASES[name]() or [])

def resumed(folder, out):
    steps = []
    report = t.train(folder, t.ARGS, [lambda progress: steps.append(progress.step)], resume=True)
    out.write_text(json.dumps({"result": t.everything(report), "evaluated": steps, "files": sorted(p.name for p in folder.iterdir())}))

class Second(t.TrainerCallback):
    "Lets a second process try the same folder after step 12."
    def __init__(self, folder): self.folder = folder
    def on_step_end(self, args, state, control, **kwargs):
        if state.step == 12: self.refused = fork(self.intrude)
    def intrude(self):
        try: t.train(self.folder, resume=True)
        except t.FolderInUseError as error: (self.folder.parent / "message").write_text(str(error))

def two_at_once(base):
    second = Second(base / "two")
    report = t.train(base / "two", callbacks=[second])
    (base / "two.json").write_text(json.dumps({"pid": os.getpid(), "refused": second.refused, "message": (base / "message").read_text(), "result": t.everything(report),
                                               "files": sorted(p.name for p in (base / "two").iterdir())}))

base = Path(sys.argv[1])
assert fork(lambda: two_at_once(base)) == 0
for i, name in enumerate(CASES):
    folder, found = base / str(i), {"name": name, "killed by": fork(lambda: killed(base / str(i), name))}
    found["left"] = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if name == "in an evaluation": found["killed again by"] = fork(lambda: t.train(folder, t.ARGS, [Die("on_step_end", 8)], resume=True))
    found["resumed"] = fork(lambda: resumed(folder, base / f"{i}.json")) if name != "right after a state" else None
    (base / f"{i}.case.json").write_text(json.dumps(found))
'''


@pytest.fixture(scope="module")
def reference():
    "The training that nobody disturbs."
    return everything(train())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The folder with all cases, after the children have run."
    base = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD, str(base)], env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return base, [json.loads(path.read_text()) for path in sorted(base.glob("*.case.json"), key=lambda p: int(p.name.split(".")[0]))], done.stderr


def test_resuming_gives_the_same_bits_wherever_it_was_killed(killed, reference):
    base, cases, errors = killed
    assert len(cases) == 10 and all(case["killed by"] == -9 for case in cases), (cases, errors[-2000:])
    for i, case in enumerate(cases):
        if case["resumed"] is None: continue
        assert case["resumed"] == 0, (case, errors[-2000:])
        found = json.loads((base / f"{i}.json").read_text())
        assert found["result"] == reference, case["name"]
        assert found["files"] == [SEEDS], (case["name"], found["files"])  # no state, no lock, no half file


def test_it_goes_on_where_it_was_and_not_from_the_beginning(killed):
    base, cases, _ = killed
    evaluated = {case["name"]: json.loads((base / f"{i}.json").read_text())["evaluated"] for i, case in enumerate(cases) if case["resumed"] == 0}
    assert evaluated["before the first state"] == [5, 10, 15, 20, 25, 30]
    assert evaluated["in the third step after a state"] == [15, 20, 25, 30]
    assert evaluated["half a state written"] == [15, 20, 25, 30]  # states of steps 0 and 5, or 5 and 10, were complete
    assert evaluated["in an evaluation"] == [15, 20, 25, 30]  # killed at step 10, resumed at 5, killed at 13
    assert evaluated["at the very end"] == evaluated["half the report written"] == [] == evaluated["the report written, the state still there"]


def test_another_process_resumes_too(killed, reference):
    base, cases, _ = killed
    number = [case["name"] for case in cases].index("right after a state")
    assert LOCK in cases[number]["left"] and NAME in cases[number]["left"]
    assert everything(train(base / str(number), resume=True)) == reference


def test_gradients_from_a_store_change_nothing_about_it(tmp_path):
    args = replace(ARGS, cache_gradients=True, max_steps=12, eval_steps=4)
    whole = everything(train(tmp_path / "whole", args))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.step == 6: raise MemoryError

    with pytest.raises(MemoryError): train(tmp_path / "broken", args, [Stop()])
    assert everything(train(tmp_path / "broken", args, resume=True)) == whole and any((tmp_path / "broken" / GRADIENTS).iterdir())


@pytest.mark.parametrize("asked, stays", [("auto", False), (True, True)])
def test_kept_gradients_go_with_the_finished_run_unless_asked_for(tmp_path, asked, stays):
    there = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): there.append((tmp_path / GRADIENTS).is_dir())

    report = train(tmp_path, replace(ARGS, cache_gradients=asked), [Look()])
    assert report.complete and all(there) and (tmp_path / GRADIENTS).exists() == stays


def test_ctrl_c_returns_what_there_is_and_can_be_resumed(tmp_path, reference):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.step == 13: raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after step 13"): report = train(tmp_path, callbacks=[Interrupt()])
    assert not report.complete and all(run.interrupted for run in report.runs) and report.run.best_step <= 10 and "not trained to the end" in repr(report)
    assert not SeedReport.load(tmp_path / SEEDS).complete and read_checkpoint(tmp_path).step == 13
    assert everything(train(tmp_path, resume=True)) == reference
    assert not (tmp_path / NAME).exists() and SeedReport.load(tmp_path / SEEDS).complete


def test_an_interrupted_run_is_no_cache(tmp_path, reference):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.step == 7: raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tmp_path, callbacks=[Interrupt()])
    with pytest.warns(UserWarning) as caught: report = train(tmp_path, replace(ARGS, use_cache=True))
    told = [str(w.message) for w in caught]
    assert any("stopped after 7 steps, resume=True goes on" in text for text in told) and any("unfinished run" in text for text in told)
    assert everything(report) == reference and len(report.run.losses) == 30


def test_a_callback_that_stops_for_now_can_be_resumed(tmp_path, reference):
    report = train(tmp_path, callbacks=[lambda progress: progress.step >= 15])
    assert not report.complete and len(report.run.losses) == 15 and not report.run.interrupted
    assert everything(train(tmp_path, resume=True)) == reference


def test_early_stopping_is_an_end(tmp_path):
    args = replace(ARGS, early_stopping_patience=1, early_stopping_threshold=0.5)
    report = train(tmp_path, args)
    steps = len(report.run.losses)
    assert report.complete and steps < 30 and not (tmp_path / NAME).exists()
    again = train(tmp_path, args, callbacks=[lambda progress: 1 / 0], resume=True)
    assert everything(again) == everything(report) == everything(train(args=args))


def test_early_stopping_killed_between_its_last_state_and_the_report(tmp_path, monkeypatch):
    args = replace(ARGS, early_stopping_patience=1, early_stopping_threshold=0.5)
    whole = everything(train(args=args))

    def fails(self, folder): raise OSError("no space")

    with monkeypatch.context() as broken:
        broken.setattr(SeedReport, "save", fails)
        with pytest.raises(OSError, match="no space"): train(tmp_path, args)
    assert everything(train(tmp_path, args, resume=True)) == whole


def test_an_error_in_an_evaluation_keeps_the_state(tmp_path, monkeypatch, reference):
    before, calls = seeds.validation_encoder, []

    def breaking(*args, **options):
        encoder = before(*args, **options)

        def evaluate(models):
            calls.append(1)
            if len(calls) == 4: raise MemoryError("out of memory")
            return encoder(models)

        return evaluate

    with monkeypatch.context() as broken:
        broken.setattr(seeds, "validation_encoder", breaking)
        with pytest.raises(MemoryError, match="out of memory"): train(tmp_path)
    assert read_checkpoint(tmp_path).step == 15 and not (tmp_path / SEEDS).exists() and not (tmp_path / LOCK).exists()
    assert everything(train(tmp_path, resume=True)) == reference


def test_a_second_process_gets_an_error_and_disturbs_nothing(killed, reference):
    base, _, errors = killed
    found = json.loads((base / "two.json").read_text())
    assert found["refused"] == 0 and f"process {found['pid']} on " in found["message"] and "is at work in" in found["message"], (found, errors[-2000:])
    assert found["result"] == reference and found["files"] == [SEEDS]


@pytest.mark.parametrize("strategy, steps, states", [("steps", 4, [4, 8, 12]), ("epoch", 500, [6, 12]), ("best", 500, [0, 5, 10, 12])])
def test_states_are_written_when_the_strategy_says(tmp_path, monkeypatch, strategy, steps, states):
    written = []
    monkeypatch.setattr(seeds, "write_checkpoint", lambda folder, state: written.append(state.step))
    train(tmp_path, replace(ARGS, max_steps=12, save_strategy=strategy, save_steps=steps, train_batch_size=8))
    assert [s for s in written if s] == [s for s in states if s]


def test_without_states_nothing_is_written_but_the_report(tmp_path):
    train(tmp_path, replace(ARGS, max_steps=6, save_strategy="no"), callbacks=[lambda progress: (tmp_path / NAME).exists() and 1 / 0])
    assert [p.name for p in tmp_path.iterdir()] == [SEEDS]


def test_resuming_another_run_is_an_error_that_names_the_difference(tmp_path):
    def stop(progress): return progress.step >= 5
    train(tmp_path, callbacks=[stop])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for args, words in ((replace(ARGS, weight_decay=0.5), "arguments.weight_decay was 0.01 and is now 0.5"), (replace(ARGS, max_seeds=3), "arguments.max_seeds was 2 and is now 3")):
        with pytest.raises(InputError, match=words): train(tmp_path, args, resume=True)
    with pytest.raises(InputError, match="data.fingerprint"): train(tmp_path, rows=examples(94), resume=True)
    model, objective, space, _ = setting()
    with torch.no_grad(): next(model.parameters()).mul_(1.01)
    with pytest.raises(InputError, match="base_model.fingerprint"):
        train_seeds(model, objective, examples(96), space, GradiendConfig(pair=PAIR), ARGS, folder=tmp_path, resume=True, progress=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_damaged_state_is_named_and_left_alone(tmp_path):
    train(tmp_path, callbacks=[lambda progress: progress.step >= 5])
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[:-100])
    with pytest.raises(InputError, match=rf"{NAME}.*cut off"): train(tmp_path, resume=True)
    assert (tmp_path / NAME).read_bytes() == content[:-100]
    (tmp_path / NAME).write_bytes(content)
    assert train(tmp_path, resume=True).complete


def test_an_unfinished_run_is_not_replaced_in_silence(tmp_path):
    train(tmp_path, callbacks=[lambda progress: progress.step >= 5])
    state = (tmp_path / NAME).read_bytes()

    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs): raise ZeroDivisionError

    with pytest.warns(UserWarning, match="resume=True would go on with it"), pytest.raises(ZeroDivisionError): train(tmp_path, replace(ARGS, save_strategy="no"), [Stop()])
    assert (tmp_path / NAME).read_bytes() == state


def test_resume_with_nothing_there_begins(tmp_path, reference):
    assert everything(train(tmp_path / "new", resume=True)) == reference
    with pytest.raises(InputError, match="resume=True needs a folder"): train(resume=True)
    with pytest.raises(InputError, match="use_cache=True needs a folder"): train(args=replace(ARGS, use_cache=True))


def test_a_full_disk_and_foreign_files_are_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "mine" / SEEDS).mkdir(parents=True)
    (tmp_path / "mine" / SEEDS / "thesis.txt").write_text("years of work")

    def never(*_, **__): raise AssertionError("training began")

    monkeypatch.setattr(seeds, "fit", never)
    with pytest.raises(InputError, match="thesis.txt"): train(tmp_path / "mine")
    assert (tmp_path / "mine" / SEEDS / "thesis.txt").read_text() == "years of work"
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="0.0 GB free"): train(tmp_path / "full")


def test_a_disk_that_fills_up_while_training_can_be_resumed(tmp_path, monkeypatch, reference):
    before, calls = checkpoints.save_file, []

    def full(tensors, path, metadata):
        calls.append(1)
        if len(calls) >= 3: raise OSError(28, "No space left on device")
        before(tensors, path, metadata)

    with monkeypatch.context() as broken:
        broken.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="No space left on device") as caught: train(tmp_path)
    assert "resume=True" in str(caught.value) and read_checkpoint(tmp_path) is not None
    assert everything(train(tmp_path, resume=True)) == reference


def test_files_of_the_user_stay(tmp_path, reference):
    for name in ("notes.txt", "model/weights.bin", "checkpoint-500/state.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    train(tmp_path)
    train(tmp_path, replace(ARGS, max_steps=5))
    for name in ("notes.txt", "model/weights.bin", "checkpoint-500/state.pt"): assert (tmp_path / name).read_text() == name


def test_the_cache_is_used_for_the_same_run_only(tmp_path, reference):
    first, cached = train(tmp_path), replace(ARGS, use_cache=True)
    boom = [lambda progress: 1 / 0]
    assert everything(train(tmp_path, cached, boom)) == everything(first) == reference
    assert everything(train(tmp_path, replace(cached, experiment_dir=str(tmp_path), lms_ratio=0.5, min_convergent_seeds=2), boom)) == reference  # nothing that changes a number
    with pytest.warns(UserWarning, match="use_cache: the run in .* is not used, arguments.seed was 0 and is now 1"): other = train(tmp_path, replace(cached, seed=1))
    assert other.runs[0].seed == 1 and SeedReport.load(tmp_path / SEEDS).runs[0].seed == 1 and sorted(p.name for p in (tmp_path / SEEDS).glob("seed_*")) == ["seed_1", "seed_2", "seed_report.json"]
    with pytest.warns(UserWarning, match="data.fingerprint"): train(tmp_path, replace(cached, seed=1), rows=examples(94))
    with pytest.raises(RuntimeError, match="0 of 2 seeds converged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tmp_path / "strict", replace(cached, convergent_score_threshold=1.0, fail_on_non_convergence=True))
    with pytest.raises(RuntimeError, match="0 of 2 seeds converged"):  # from the cache as well
        train(tmp_path / "strict", replace(cached, convergent_score_threshold=1.0, fail_on_non_convergence=True), boom)


def test_a_folder_does_not_change_the_numbers(tmp_path, reference):
    assert everything(train(tmp_path)) == reference == everything(train(tmp_path, replace(ARGS, save_strategy="no")))
