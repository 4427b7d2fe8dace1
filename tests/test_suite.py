"Suites: the same bits with and without executors, nothing lost, nothing done twice, nothing of another suite touched."
import json
import logging
import multiprocessing
import pickle
import os
import re
import shutil
import time
import warnings
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers.utils.logging import is_progress_bar_enabled

from gradiend.children import SHARED, PairDefinition
from gradiend.childtask import Shared, trainer_of
from gradiend.childwork import RECORD, lock_holder, run_task
from gradiend.core import InputError
from gradiend.data.examples import make_examples
from gradiend.execution import LaunchExecutor, SuiteError, run_tasks
from gradiend.gradients import store
from gradiend.locks import LOCK, run_lock
from gradiend.pruning import PostPruneConfig, PrePruneConfig
from gradiend.suite import PositiveTrainerSuite, SymmetricTrainerSuite, TrainerCollection, TrainerSuite
from gradiend.trainer import preparation
from gradiend.trainer.arguments import TrainingArguments
from gradiend.trainer.loop import Training
from gradiend.trainer.text import TextPredictionTrainer
from tests.suite_work import dies, said
from tests.tiny import masked_model

WORDS = {"he": "he", "she": "she", "they": "they"}
ENDS = ("lost the beat", "missed the bus", "checked the engine", "had the keys", "took off", "forgot the crowd", "barked", "arrived late", "was tired", "whistled", "watched the dogs", "had the bus")
DIRECT = TrainingArguments(solver="mean_difference", train_batch_size=4, cache_gradients=False)
LOOP = TrainingArguments(train_batch_size=4, max_steps=8, eval_steps=4, learning_rate=1e-3, max_seeds=1, cache_gradients=False, convergent_score_threshold=0.0, convergent_mean_by_class_threshold=None)


def rows(name: str, word: str, n: int = 20) -> pd.DataFrame:
    texts = [f"{'Anna said that' if i % 2 else 'When the twins arrived ,'} [MASK] {ENDS[i % 12]} {'again' if i > 11 else 'there'} ." for i in range(n)]
    return pd.DataFrame({"masked": texts, "factual": word, "factual_class": name})


DATA = {name: rows(name, word) for name, word in WORDS.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    "A tiny masked language model on disk."
    folder = tmp_path_factory.mktemp("base")
    tokenizer, model = masked_model("bert", dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def suite(base, folder, args=DIRECT, kind=SymmetricTrainerSuite, **options):
    return kind(base, DATA, args=replace(args, experiment_dir=str(folder)), **options)


def weights(one: TrainerSuite) -> dict[str, bytes]:
    return {name: (Path(task.folder) / "model" / "model.safetensors").read_bytes() for name, task in one.tasks.items()}


def quietly(action):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@pytest.mark.parametrize("args", [DIRECT, LOOP], ids=["mean_difference", "adamw"])
def test_a_child_is_what_a_trainer_alone_would_be(base, tmp_path, args):
    one = suite(base, tmp_path / "suite", args)
    report = quietly(one.train)
    assert list(report.frame.index) == ["he__she", "he__they", "she__they"] and set(report.frame["status"]) == {"done"}
    alone = TextPredictionTrainer(base, DATA, args=replace(args, experiment_dir=str(tmp_path / "alone")), target_classes=("she", "they"))
    quietly(alone.train)
    assert alone.examples.fingerprint == one["she__they"].examples.fingerprint
    assert (tmp_path / "alone/model/model.safetensors").read_bytes() == weights(one)["she__they"]
    assert report.frame.loc["she__they", "correlation"] == pytest.approx(alone.report.run.correlation, abs=0)


def test_a_rerun_skips_and_a_new_start_does_not(base, tmp_path):
    first = suite(base, tmp_path)
    first.train()
    (Path(first.tasks["he__they"].folder) / "model" / "model.safetensors").unlink()  # untouched by a rerun: it is not read
    again = suite(base, tmp_path)
    assert set(again.train().frame["status"]) == {"skipped"}
    assert set(again.train(resume=False, children=["he__they"]).frame["status"]) == {"done"}
    assert len(weights(again)) == 3 and again.frame["correlation"].notna().all()


def test_pools_of_processes_give_the_same_bits(base, tmp_path, capfd):
    here, there = suite(base, tmp_path / "here", LOOP), suite(base, tmp_path / "there", LOOP)
    quietly(here.train)
    assert "Loading weights" in capfd.readouterr().err and is_progress_bar_enabled()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        report = there.train(pool)
        encoded = there.evaluate_encoder(pool, bootstrap=0)
    assert "Loading weights" not in capfd.readouterr().err  # of workers
    assert set(report.frame["status"]) == {"done"} and weights(here) == weights(there)
    for name, result in here.evaluate_encoder(bootstrap=0).items(): pd.testing.assert_frame_equal(result.frame, encoded[name].frame)


def test_threads_take_turns_and_give_the_same_bits(base, tmp_path):
    here, there = suite(base, tmp_path / "here"), suite(base, tmp_path / "there")
    here.train()
    with ThreadPoolExecutor(3) as pool: there.train(pool)
    assert weights(here) == weights(there)


def test_a_loaded_model_is_saved_once_and_is_the_same(tmp_path):
    tokenizer, model = masked_model("bert", dtype=torch.float64)
    with torch.no_grad(): next(model.parameters()).add_(0.125)
    one = SymmetricTrainerSuite(model, DATA, tokenizer=tokenizer, args=replace(DIRECT, experiment_dir=str(tmp_path / "suite")), target_classes=["they", "he"])
    one.train()
    alone = TextPredictionTrainer(model, DATA, tokenizer=tokenizer, args=replace(DIRECT, experiment_dir=str(tmp_path / "alone")), target_classes=("they", "he"))
    alone.train()
    assert one["they__he"].base_model.dtype == torch.float64
    assert (tmp_path / "alone/model/model.safetensors").read_bytes() == weights(one)["they__he"]
    assert len(list((tmp_path / "suite/_shared").glob("base-*"))) == 1 and (one.tasks["they__he"].model.startswith(str(tmp_path)))


def test_one_child_fails_the_others_do_not(base, tmp_path):
    data = {**DATA, "it": rows("it", "it", 2)}  # two rows cannot be divided
    one = SymmetricTrainerSuite(base, data, args=replace(DIRECT, experiment_dir=str(tmp_path)), target_classes=["he", "it", "they"])
    with pytest.warns(UserWarning, match="2 of 3 children failed") as told: report = one.train()
    assert report.failed == ("he__it", "it__they") and report.frame.loc["he__they", "status"] == "done"
    assert any("classes too small for the splits" in str(w.message) for w in told) and "InputError" in report.frame.loc["he__it", "error"]
    with pytest.raises(SuiteError, match="he__it") as error: one.train(on_error="raise")
    assert [o.status for o in error.value.outcomes] == ["failed", "skipped", "failed"]
    assert one.frame["status"].tolist() == ["not trained", "done", "not trained"]
    with pytest.raises(InputError, match=r"2 of 3 children are not trained: he__it, it__they; .*children=\['he__they'\]"): one.similarity()
    assert list(one.get_models(["he__they"])) == ["he__they"]
    with pytest.warns(UserWarning, match="not trained yet") as told: results = one.evaluate_encoder(bootstrap=0)
    said_last = str(told[-1].message)
    assert "the results of the others are in what this call returned" in said_last and "same call again" not in said_last and list(results) == ["he__they"]
    with pytest.raises(SuiteError, match="in the outcomes of this error") as error: one.evaluate_encoder(bootstrap=0, on_error="raise")
    assert error.value.outcomes[1].result.correlation == results["he__they"].correlation
    with pytest.warns(UserWarning, match="the results of the others are in what this call returned"): TrainerCollection(one).evaluate_encoder(bootstrap=0)
    with pytest.raises(KeyError, match="not trained yet"): results["he__it"]


def test_ctrl_c_keeps_what_is_finished_and_goes_on_later(base, tmp_path, monkeypatch):
    whole, broken = suite(base, tmp_path / "whole", LOOP), suite(base, tmp_path / "broken", LOOP)
    quietly(whole.train)
    step, count = Training.step, [0]
    def interrupted(self, batch, total):
        count[0] += 1
        if count[0] == 8 + 6: raise KeyboardInterrupt
        step(self, batch, total)
    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="he__they was interrupted after 5 steps; its state is saved. 1 of 3 children had ended, and she__they had not begun; what they wrote is kept"): quietly(broken.train)
    monkeypatch.setattr(Training, "step", step)
    assert broken.frame["status"].tolist() == ["done", "unfinished", "not trained"]
    report = quietly(broken.train)
    assert report.frame["status"].tolist() == ["skipped", "done", "done"] and weights(broken) == weights(whole)


class Interrupted(Executor):
    "Finishes one task; Ctrl-C reaches the worker of the second."
    taken = 0
    def submit(self, function, task):
        self.taken += 1
        future = Future()
        if self.taken == 1: future.set_result(function(task))
        elif self.taken == 2: future.set_exception(KeyboardInterrupt("a worker was interrupted"))
        return future


def test_an_interrupted_executor_says_what_is_kept(base, tmp_path):
    tasks = tasks_of(base, tmp_path, 4)
    with pytest.raises(KeyboardInterrupt, match=r"a worker was interrupted\. [01] of 4 children had ended; what they wrote is kept"): run_tasks(tasks, Interrupted(), work=said)
    with pytest.raises(KeyboardInterrupt, match="their results are not stored"): run_tasks(tasks, Interrupted(), work=said, kept=False)


# --- what is not ours -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "told"), [
    ({"args": replace(DIRECT, source="diff")}, "arguments.source was 'alternative' and is now 'diff'"),
    ({"class_merge_map": {"he": ["he", "they"]}, "target_classes": ["he", "she"]}, "options.class_merge_map"),
    ({"max_per_class": 12}, "options.max_per_class"),
])
def test_a_folder_of_another_suite_is_not_touched(base, tmp_path, change, told):
    suite(base, tmp_path).train()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "_shared" not in p.parts}
    with pytest.raises(InputError, match=re.escape(told)): suite(base, tmp_path, **change).train()
    assert {p: p.read_bytes() for p in before} == before


def test_a_changed_base_model_or_table_is_noticed(base, tmp_path):
    import shutil
    copy = shutil.copytree(base, tmp_path / "copy")
    suite(str(copy), tmp_path / "run").train()
    assert set(suite(base, tmp_path / "run").train().frame["status"]) == {"skipped"}  # the same files in another place
    tokenizer, model = masked_model("bert", dtype=torch.float32, seed=1)
    model.save_pretrained(copy)
    with pytest.raises(InputError, match="is not the one it was trained with: its files or its revision have changed"): suite(str(copy), tmp_path / "run").train()
    def again(data): return SymmetricTrainerSuite(base, data, args=replace(DIRECT, experiment_dir=str(tmp_path / "run")))
    other_words = DATA["he"].assign(masked=[text.replace("Anna", "Ben") for text in DATA["he"]["masked"]])
    for changed, told in ((rows("he", "he", 19), "class 'he' had 20 rows and has 19"), (other_words, "10 of 60 rows are others, such as 'Ben said that"), (DATA["he"].assign(note=1), "the column 'note' is new")):
        with pytest.raises(InputError, match=f"the data are not those it was trained on: {re.escape(told)}.*Give the same again"): again({**DATA, "he": changed}).train()
    for table in (tmp_path / "run" / SHARED).glob("data-*.json"): table.unlink()
    with pytest.raises(InputError, match=r"there are 59 rows now \(19 of 'he', 20 of 'she', 20 of 'they'\), and the table it was trained on is gone"): again({**DATA, "he": rows("he", "he", 19)}).train()


def test_a_damaged_record_is_an_error(base, tmp_path):
    one = suite(base, tmp_path)
    one.train()
    (tmp_path / "he__she" / RECORD).write_text("[]")
    with pytest.raises(InputError, match="no record of a child"): one.train()
    for text in ("[]", '{"identity": ', '{"identity": 3}'):
        (tmp_path / "he__she" / RECORD).write_text(text)
        with pytest.raises(InputError, match="no record of a child.*move the folder away, and train"): one.train()
    (tmp_path / "he__she").rename(tmp_path / "away")  # what the message says
    assert one.train().frame["status"].tolist() == ["done", "skipped", "skipped"]


def test_a_damaged_model_is_an_error_that_says_how_to_make_it_anew(base, tmp_path):
    suite(base, tmp_path).train()
    one, before = suite(base, tmp_path), weights(suite(base, tmp_path))
    (tmp_path / "he__she/model/model.safetensors").write_bytes(b"cut off")
    remedy = re.escape("train(resume=False, children=['he__she'])")
    with pytest.raises(InputError, match=remedy): one.get_models()
    with pytest.raises(InputError, match=remedy): one.trainer("he__she")
    with pytest.warns(UserWarning, match=remedy): one.evaluate_encoder(bootstrap=0)
    one.train(resume=False, children=["he__she"])
    assert weights(one) == before and len(one.get_models()) == 3


@pytest.mark.parametrize(("left", "told"), [("model", "holds 'model' and nothing that says how it was trained"), ("seeds", "arguments.source was 'diff' and is now 'alternative'"), ("checkpoint.safetensors", "checkpoint")])
def test_a_trainer_alone_in_the_folder_is_not_overwritten(base, tmp_path, left, told):
    import shutil
    alone = TextPredictionTrainer(base, DATA, args=replace(DIRECT, source="diff", experiment_dir=str(tmp_path)), target_classes=("he", "she"), run_id="he__she")
    alone.train()
    folder = tmp_path / "he__she"
    for path in list(folder.iterdir()):  # one sign of a training is enough
        if path.name != left: shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "checkpoint.safetensors": (folder / left).write_bytes(b"the state of an unfinished run")
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    one = suite(base, tmp_path)
    message = re.escape(f"the folder {str(folder)!r} holds a training that this suite did not make: ") + f".*{told}.*another run_id, or move the folder away"
    for resume in (True, False):
        with pytest.raises(InputError, match=message): one.train(resume=resume)
        assert re.search(message, run_task(one.tasks["he__she"], resume=resume).error)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == kept and not (tmp_path / "he__they").exists()
    folder.rename(tmp_path / "away")
    assert set(one.train().frame["status"]) == {"done"}


PRUNED = replace(LOOP, pre_prune_config=PrePruneConfig(n_samples=4, topk=0.2), post_prune_config=PostPruneConfig(topk=0.5))


@pytest.mark.parametrize("args", [DIRECT, PRUNED, replace(LOOP, learning_rate="tune", max_steps=4)], ids=["mean_difference", "pruned", "tuned"])
def test_a_child_that_its_own_trainer_trained_is_recognised(base, tmp_path, args):
    one, whole = (suite(base, tmp_path / name, args, kind=TrainerSuite, target_pairs=[("he", "she")]) for name in ("one", "whole"))
    quietly(one["he__she"].train)
    assert one.frame.loc["he__she", "status"] == "done" and (tmp_path / "one/he__she" / RECORD).is_file()
    quietly(whole.train)
    assert one.train().frame["status"].tolist() == ["skipped"] and weights(one) == weights(whole)
    assert one.frame.drop(columns="folder").equals(whole.frame.drop(columns="folder"))


def test_what_its_own_trainer_trained_is_refused_if_it_differs(base, tmp_path):
    one = suite(base, tmp_path, LOOP, kind=TrainerSuite, target_pairs=[("he", "she")])
    quietly(one.train)
    mine = one["he__she"]
    mine.args = replace(mine.args, learning_rate=1e-2)
    quietly(mine.train)  # over the child that was done
    with pytest.raises(InputError, match="arguments.learning_rate was 0.01 and is now 0.001"): one.train()
    mine.args = replace(mine.args, learning_rate=1e-3)
    quietly(mine.train)
    assert one.train().frame["status"].tolist() == ["skipped"]
    (tmp_path / "he__she" / RECORD).unlink()
    mine.post_prune(PostPruneConfig(topk=0.1))
    with pytest.raises(InputError, match="its model is not the one of its report"): one.train()
    fewer = {**DATA, "he": rows("he", "he", 18)}
    with pytest.raises(InputError, match="data.rows was 40 and is now 38"): SymmetricTrainerSuite(base, fewer, args=replace(LOOP, experiment_dir=str(tmp_path)), target_classes=["he", "she"]).train()
    others = {**DATA, "he": DATA["he"].assign(masked=[text.replace("Anna", "Ben") for text in DATA["he"]["masked"]])}
    with pytest.raises(InputError, match="trained on other rows, though as many"): SymmetricTrainerSuite(base, others, args=replace(LOOP, experiment_dir=str(tmp_path)), target_classes=["he", "she"]).train()


def interrupting(monkeypatch, at: int) -> None:
    "Let Ctrl-C be pressed in a certain step."
    step, count = Training.step, [0]
    def interrupted(self, batch, total):
        count[0] += 1
        if count[0] == at: raise KeyboardInterrupt
        step(self, batch, total)
    monkeypatch.setattr(Training, "step", interrupted)


def test_a_child_that_its_own_trainer_began_is_finished(base, tmp_path, monkeypatch):
    one, whole = (suite(base, tmp_path / name, LOOP, kind=TrainerSuite, target_pairs=[("he", "she")]) for name in ("one", "whole"))
    with monkeypatch.context() as patched:
        interrupting(patched, 6)
        quietly(one["he__she"].train)
    assert one.frame["status"].tolist() == ["unfinished"]
    quietly(whole.train)
    assert quietly(one.train).frame["status"].tolist() == ["done"] and weights(one) == weights(whole)


@pytest.mark.parametrize("kept", [True, False], ids=["folder", "memory"])
def test_an_interrupted_trainer_of_a_collection_is_not_done(base, tmp_path, monkeypatch, kept):
    def alone(*pair):
        return TextPredictionTrainer(base, DATA, args=replace(LOOP, experiment_dir=str(tmp_path / "_".join(pair)) if kept else None), target_classes=pair)
    family = TrainerCollection(suite(base, tmp_path / "suite", kind=TrainerSuite, target_pairs=[("he", "she")]), alone("he", "they"), alone("she", "they"), last=alone("they", "he"))
    with monkeypatch.context() as patched:
        interrupting(patched, 8 + 6)
        rest = "its state is saved" if kept else "without an experiment folder its next training begins anew"
        with pytest.raises(KeyboardInterrupt, match=f"child she__they was interrupted after 5 steps; {rest}. 2 of 4 children had ended, and last had not begun"): quietly(family.train)
    assert family.frame["status"].tolist() == ["done", "done", "unfinished", "not trained"]
    with pytest.raises(InputError, match="2 of 4 children are not trained: she__they, last"): family.get_models()
    assert quietly(family.train).frame["status"].tolist() == ["skipped", "skipped", "done", "done"]
    fresh = alone("she", "they")
    fresh.args = replace(fresh.args, experiment_dir=None)
    fresh.folder = None
    quietly(fresh.train)
    assert all(torch.equal(a, b) for a, b in zip(fresh.get_model().state_dict().values(), family["she__they"].get_model().state_dict().values(), strict=True))
    family["she__they"].report = replace(family["she__they"].report, complete=False)
    family["she__they"].use_model(fresh.get_model())  # another model than that of the interrupted training
    assert family.frame["status"].tolist() == ["done"] * 4


def test_a_lock_of_another_machine_says_who_when_and_where(base, tmp_path):
    one = suite(base, tmp_path, LOOP, kind=TrainerSuite, target_pairs=[("he", "she"), ("he", "they")])
    folder = tmp_path / "he__she"
    folder.mkdir()
    with run_lock(folder) as lock: mark = json.loads(lock.read_text())
    assert lock_holder(folder) is None
    lock.write_text(json.dumps(mark | {"pid": 77, "host": "node7", "machine": "another"}))
    os.utime(lock, (1.7e9, 1.7e9))
    (folder / "gradients").symlink_to("elsewhere")  # in use by the process that holds the lock
    with pytest.warns(UserWarning, match=r"locked by process 77 on node7, since 2023-11-1\d \d\d:\d\d: wait for it.*delete the file '.*he__she/run.lock' and call again; the training goes on from its last saved state, if there is one"): report = one.train()
    with pytest.warns(UserWarning, match="and call again; the training begins anew"): one.train(resume=False, children=["he__she"])
    assert report.frame["status"].tolist() == ["failed", "done"] and sorted(p.name for p in folder.iterdir()) == ["gradients", LOCK]
    assert os.readlink(folder / "gradients") == "elsewhere" and one.frame["status"].tolist() == ["not trained", "done"]
    lock.write_text("[]")
    assert lock_holder(folder) is None and "does not say who made it" in quietly(one.train).frame.loc["he__she", "error"]
    lock.unlink()
    assert quietly(one.train).frame["status"].tolist() == ["done", "skipped"]


# --- executors ---------------------------------------------------------------------------------------------------

@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tasks_of(base, folder, n=5):
    one = suite(base, folder)
    task = one.tasks["he__she"]
    return [replace(task, child_id=f"child{i}", folder=str(folder / f"child{i}")) for i in range(n)]


fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")


@fork
@pytest.mark.parametrize(("times", "failed"), [(1, []), (2, ["child2"])])
def test_a_killed_worker_costs_at_most_the_child_that_kills(base, tmp_path, one_thread, times, failed):
    tasks = tasks_of(base, tmp_path)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        outcomes = run_tasks(tasks, pool, work=partial(dies, child="child2", times=times), on_error="return")
    assert [o.child_id for o in outcomes] == [t.child_id for t in tasks]
    assert [o.child_id for o in outcomes if o.status == "failed"] == failed
    assert len(list((tmp_path / "marks").iterdir())) == times


@fork
def test_retries_are_counted(base, tmp_path, one_thread):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        outcomes = run_tasks(tasks_of(base, tmp_path, 3), pool, work=partial(dies, child="child0", times=9), retries=0, on_error="return")
    assert "failed" in {o.status for o in outcomes} and outcomes[0].status == "failed"
    assert len(list((tmp_path / "marks").iterdir())) == 1


@fork
def test_a_pool_of_forked_processes_with_threads_is_refused(base, tmp_path, one_thread):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        torch.set_num_threads(2)
        with pytest.raises(InputError, match="forked"): run_tasks(tasks_of(base, tmp_path), pool, work=said)


class Broken(Executor):
    "Takes two tasks, finishes one and breaks."
    taken = 0
    def submit(self, function, task):
        self.taken += 1
        if self.taken > 2: raise BrokenExecutor("no more")
        future = Future()
        if self.taken == 1: future.set_result(function(task))
        else: future.set_exception(BrokenExecutor("gone"))
        return future


def test_an_executor_that_breaks_for_good(base, tmp_path):
    outcomes = run_tasks(tasks_of(base, tmp_path), Broken(), work=said, on_error="return")
    assert [o.status for o in outcomes] == ["done", "failed", "failed", "failed", "failed"] and "lost" in outcomes[4].error


def test_executors_that_take_no_work(base, tmp_path):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(InputError, match="shut down"): suite(base, tmp_path).train(pool)
    with pytest.raises(TypeError, match="get_executor"): suite(base, tmp_path).train(object())
    launcher = LaunchExecutor(lambda f, *a, **k: f(*a, **k), jobs=2)
    assert [o.status for o in run_tasks(tasks_of(base, tmp_path / "x", 3), launcher, work=said)] == ["done"] * 3
    launcher.shutdown()
    with pytest.raises(InputError, match="takes no work"): run_tasks(tasks_of(base, tmp_path / "x", 3), launcher, work=said)


def test_tasks_are_small_and_plain(base, tmp_path):
    one = suite(base, tmp_path, eval_neutral_data=["The kettle was empty.", "Anna had the keys."])
    for task in one.tasks.values():
        assert len(pickle.dumps(task)) < 6000 and pickle.loads(pickle.dumps(task)) == task
        assert json.loads(json.dumps(task.identity)) == task.identity and all(Path(p).is_absolute() for p in (task.folder, task.data, task.model, task.neutral))


# --- children ---------------------------------------------------------------------------------------------------

def test_classes_joined_for_one_child(base, tmp_path):
    number = PairDefinition(child_id="number", label="number", class_merge_map={"SG": ["he", "she"], "PL": ["they"]})
    one = suite(base, tmp_path, kind=TrainerSuite, pair_definitions=[number], target_pairs=[("he", "she")])
    report = one.train()
    assert one["number"].examples.pair == ("SG", "PL") and set(one["number"].examples.frame["raw_factual_class"]) == {"he", "she", "they"}
    assert one["he__she"].examples.pair == ("he", "she") and one.labels["number"] == "number" and not report.failed
    alone = make_examples(DATA, class_merge_map={"SG": ["he", "she"], "PL": ["they"]})
    assert alone.fingerprint == one["number"].examples.fingerprint


def test_one_against_the_rest(base, tmp_path):
    one = suite(base, tmp_path, kind=PositiveTrainerSuite)
    assert list(one) == ["he__non_he", "she__non_she", "they__non_they"]
    joined = suite(base, tmp_path, kind=PositiveTrainerSuite, class_merge_map={"SG": ["he", "she"], "PL": ["they"]})
    assert list(joined) == ["SG__non_SG", "PL__non_PL"] and set(joined["PL__non_PL"].examples.frame["factual_class"]) == {"PL", "non_PL"}
    examples = one["she__non_she"].examples
    assert examples.pair == ("she", "non_she") and (examples.frame["factual_class"] == "non_she").sum() == 40


def test_data_of_other_forms(base, tmp_path):
    for name, table in DATA.items(): table.assign(**{"split": None}).drop(columns=["split", "factual_class"]).to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(InputError, match="target_classes: these data know their classes by names of files"): SymmetricTrainerSuite(base, tmp_path, args=DIRECT)
    named = SymmetricTrainerSuite(base, tmp_path, args=DIRECT, target_classes=["they", "he"])
    alone = make_examples(tmp_path, pair=("they", "he"))
    assert named["they__he"].examples.fingerprint == alone.fingerprint
    table = make_examples(DATA, pair=("he", "they"))
    again = TrainerSuite(base, table, args=DIRECT, target_pairs=[("he", "they")])
    assert again["he__they"].examples.fingerprint == table.fingerprint


def test_bad_input(base, tmp_path):
    with pytest.raises(InputError, match="no children"): suite(base, tmp_path, kind=TrainerSuite)
    with pytest.raises(InputError, match="used twice"): suite(base, tmp_path, kind=TrainerSuite, target_pairs=[("he", "she"), ("he", "she")])
    with pytest.raises(InputError, match="did you mean 'they'"): suite(base, tmp_path, kind=TrainerSuite, target_pairs=[("he", "thy")])
    with pytest.raises(TypeError, match="max_pr_class"): suite(base, tmp_path, max_pr_class=3)
    with pytest.raises(InputError, match="tokenizer"): suite(base, tmp_path, tokenizer=masked_model("bert")[0])
    with pytest.raises(InputError, match="a loaded model needs its tokenizer"): SymmetricTrainerSuite(masked_model("bert")[1], DATA, args=DIRECT)
    with pytest.raises(InputError, match="pair_filter"): suite(base, tmp_path, kind=TrainerSuite, target_pairs=[("he", "she")], pair_filter=lambda a, b: True)
    with pytest.raises(InputError, match="run_id"): SymmetricTrainerSuite(base, DATA, args=DIRECT, run_id="x")
    with pytest.raises(InputError, match="children='x'"): suite(base, tmp_path).train(children=["x"])
    for action in ("train", "evaluate_encoder", "evaluate_decoder", "get_models", "similarity", "cross_encode", "topk_overlap", "plot_similarity"):
        with pytest.raises(InputError, match="names none"): getattr(suite(base, tmp_path), action)(children=[])
    with pytest.raises(InputError, match="neither embedded"): SymmetricTrainerSuite("no/such-model-anywhere", DATA, args=DIRECT).train()
    odd = {name: table.assign(when=pd.Timestamp(0)) for name, table in DATA.items()}
    with pytest.raises(InputError, match="the column 'when'"): SymmetricTrainerSuite(base, odd, args=DIRECT).train()


# --- sharing and collections ------------------------------------------------------------------------------------

def computed(caplog) -> int:
    "Rows whose gradients were written to a store."
    return sum(r.args[0] for r in caplog.records if r.msg.startswith("write_store"))


def test_children_with_equal_rows_share_kept_gradients(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, "gradiend.gradients.store")
    kept = replace(LOOP, cache_gradients=True)
    def both(folder):
        one, two = (suite(base, tmp_path / folder / str(rate), replace(kept, learning_rate=rate), kind=TrainerSuite, target_pairs=[("he", "they")]) for rate in (1e-3, 1e-2))
        return TrainerCollection(slow=one, fast=two)
    caplog.clear()
    shared = both("shared")
    quietly(shared.train)
    with_sharing = computed(caplog)
    caplog.clear()
    apart = both("apart")
    for name in apart: quietly(lambda name=name: run_tasks([apart._members[name][0].tasks["he__they"]], shared=Shared()))
    without = computed(caplog)
    assert 0 < with_sharing == without / 2
    for name in apart: assert weights(apart._members[name][0]) == weights(shared._members[name][0])
    elsewhere, link = shared._members["slow/he__they"][0].tasks["he__they"], tmp_path / "shared/0.001/he__they/gradients"
    assert not link.is_symlink()
    link.symlink_to(tmp_path / "gone")  # of a process that was killed
    assert run_task(elsewhere, resume=False).status == "done" and link.is_dir() and not link.is_symlink()


def passes(base: str, runs) -> list[int]:
    "Forward passes of the language model in each run of (task, shared)."
    found = []
    for task, shared in runs:
        count = []
        hook = shared.base(task, TrainingArguments.from_dict(dict(task.arguments)))[1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        assert quietly(lambda task=task, shared=shared: run_task(task, shared=shared)).status == "done"
        hook.remove()
        found.append(len(count))
    return found


def test_variants_of_a_child_need_no_pass_of_their_own(base, tmp_path):
    args = replace(PRUNED, cache_gradients=True)
    changes = ({}, {"learning_rate": 1e-2, "max_seeds": 2}, {"source": "diff", "target": "alternative"}, {"seed": 5}, {"pre_prune_config": PrePruneConfig(n_samples=4, topk=0.1)})
    def tasks(place):
        one = suite(base, tmp_path / place, args, kind=TrainerSuite, target_pairs=[("he", "they"), ("he", "she")])
        task, other = one.tasks.values()
        variants = [replace(task, child_id=str(i), folder=str(tmp_path / place / str(i)), arguments=replace(args, **change).to_dict()) for i, change in enumerate(changes)]
        return [*variants, replace(other, folder=str(tmp_path / place / "other"))]
    common = Shared(tmp_path / "kept")
    together, apart = (passes(base, [(task, common if place == "together" else Shared()) for task in tasks(place)]) for place in ("together", "apart"))
    assert together[0] == apart[0] > 0 and together[1:3] == [0, 0] and together[3:] == apart[3:]  # another division of the rows, another space, another pair
    for i in range(len(changes)):
        files = [tmp_path / place / str(i) / "model/model.safetensors" for place in ("together", "apart")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_collections(base, tmp_path):
    one = suite(base, tmp_path, run_id="one", kind=TrainerSuite, target_pairs=[("he", "she"), ("he", "they")])
    alone = TextPredictionTrainer(base, DATA, args=DIRECT, target_classes=("she", "they"))
    family = TrainerCollection(one, alone)
    assert family.frame["status"].tolist() == ["not trained"] * 3
    report = family.train()
    assert list(family) == ["he__she", "he__they", "she__they"] and set(report.frame["status"]) == {"done"}
    assert set(family.train().frame["status"]) == {"skipped"} and family["she__they"] is alone
    with pytest.raises(InputError, match="two children are called 'he__she'"): TrainerCollection(one, one)
    more = family.merge(again=one)
    assert list(more)[3:] == ["again/he__she", "again/he__they"] and more.labels["again/he__she"] == "again: he vs she"
    with pytest.raises(TypeError, match="no member"): TrainerCollection("suite")
    with pytest.raises(InputError, match="no members"): TrainerCollection()
    assert set(family.similarity().names) == set(family) and set(family.cross_encode().matrix().index) == set(family)
    assert len(family.evaluate_encoder(bootstrap=0).frame) == 3
    decoded = family.evaluate_decoder(children=["he__she"], lrs=[1e-3], max_size=4, target_class="he", lms_texts=["Anna had the keys .", "The dogs barked ."])
    sent = pickle.loads(pickle.dumps(decoded["he__she"]))
    pd.testing.assert_frame_equal(sent.frame, decoded["he__she"].frame)


def test_a_suite_without_a_folder_leaves_nothing(base):
    one = TrainerSuite(base, DATA, args=DIRECT, target_pairs=[("he", "they")])
    one.train()
    folder, models = one.folder, one.get_models()
    assert folder.is_dir() and list(models) == ["he__they"]
    one._temporary.cleanup()
    assert not folder.exists()


def test_kept_gradients_go_when_the_suite_is_through_unless_asked_for(base, tmp_path):
    for asked, stays in (("auto", False), (False, False), (True, True)):
        family = suite(base, tmp_path / str(asked), replace(PRUNED, cache_gradients=asked, num_train_epochs=4), kind=TrainerSuite, target_pairs=[("he", "they")])
        assert set(family.train(progress=False).frame["status"]) == {"done"}
        assert (tmp_path / str(asked) / SHARED / "gradients").exists() == stays
        assert sorted(p.name for p in (tmp_path / str(asked) / SHARED).iterdir() if p.is_dir()) == ["gradients"] * stays
        assert not list(tmp_path.rglob("*__*/gradients"))


# `copytree` of a child and the training by its own trainer both failed while its link led nowhere
@pytest.mark.parametrize("asked", ["auto", True])
def test_no_link_outlives_a_training(base, tmp_path, caplog, monkeypatch, asked):
    caplog.set_level(logging.INFO, "gradiend.gradients.store")
    args = replace(PRUNED, cache_gradients=asked, num_train_epochs=4)
    one, two = (suite(base, tmp_path / name, replace(args, learning_rate=rate), kind=TrainerSuite, target_pairs=[("he", "they")]) for name, rate in (("one", 1e-3), ("two", 1e-2)))
    with monkeypatch.context() as patched:
        interrupting(patched, 8 + 6)
        with pytest.raises(KeyboardInterrupt, match="its state is saved"): quietly(TrainerCollection(one=one, two=two).train)
    for name in ("one", "two"): assert not (tmp_path / name / "he__they/gradients").is_symlink()
    assert [p.name for p in (tmp_path / "one" / SHARED).glob("gradients*")] == ["gradients"] * (asked is True)
    caplog.clear()
    assert quietly(one.train).frame["status"].tolist() == ["skipped"] and quietly(lambda: one.train(resume=False)).frame["status"].tolist() == ["done"]
    assert (computed(caplog) == 0) == (asked is True)  # what was asked to stay is used again
    shutil.copytree(tmp_path / "one/he__they", tmp_path / "copy")
    shutil.rmtree(tmp_path / "one" / SHARED)
    for trainer in (one["he__they"], two["he__they"]): quietly(lambda trainer=trainer: trainer.train(progress=False))


@pytest.mark.parametrize("how", ["train", "resume", "evaluate", "own evaluation"])
def test_a_link_of_a_killed_suite_is_in_nobodys_way(base, tmp_path, how):
    "A child that is trained or evaluated by itself removes a link that leads nowhere, and goes on."
    args = replace(PRUNED, cache_gradients="auto", num_train_epochs=4)
    one = suite(base, tmp_path, args, kind=TrainerSuite, target_pairs=[("he", "they")])
    if how != "train": assert quietly(one.train).frame["status"].tolist() == ["done"]
    link = tmp_path / "he__they/gradients"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("../shared/gradients-of-a-dead-process")
    alone = trainer_of(one.tasks["he__they"])
    if how == "evaluate": assert not one.evaluate_encoder(bootstrap=0).frame.empty
    elif how == "own evaluation": assert alone.use_model(link.parent / "model") and len(alone.evaluate_encoder(bootstrap=0).frame)
    else:
        report = quietly(lambda: alone.train(resume=how == "resume", progress=False))
        whole = suite(base, tmp_path / "whole", args, kind=TrainerSuite, target_pairs=[("he", "they")])
        assert report.complete and quietly(whole.train).frame["status"].tolist() == ["done"] and weights(whole) == weights(one)
    assert link.is_symlink() == (how == "own evaluation")  # which only reads
    shutil.rmtree(link.parent)


def test_two_suites_in_two_processes_share_one_folder_of_gradients(base, tmp_path, monkeypatch):
    "With `cache_gradients=True` the folder stays, and whoever comes second waits and reads."
    args = replace(PRUNED, cache_gradients=True, num_train_epochs=4)
    def made(name): return suite(base, tmp_path / name, args, kind=TrainerSuite, target_pairs=[("he", "they")])
    alone, (one, two) = made("alone"), (made("one"), made("two"))
    quietly(alone.train)
    seen, before = tmp_path / "seen", (store.both_row_gradients, preparation.prune_space)
    def told(what, how, seconds=0.0):
        def doing(*given, **options):
            with open(seen, "a") as file: file.write(f"{what} ")
            time.sleep(seconds)
            return how(*given, **options)
        return doing
    monkeypatch.setattr(store, "both_row_gradients", told("rows", before[0], 0.2))
    monkeypatch.setattr(preparation, "prune_space", told("space", before[1], 0.5))
    (tmp_path / "common").mkdir()
    def train(one):
        with one.shared.keeping_gradients(tmp_path / "common", stay=True): return run_task(one.tasks["he__they"], shared=one.shared).status
    child = os.fork()
    if child == 0:
        try: os._exit(0 if train(one) == "done" else 1)
        finally: os._exit(2)
    assert train(two) == "done" and os.waitpid(child, 0)[1] == 0
    assert sorted(seen.read_text().split()) == ["rows"] * 2 + ["space"]  # training and validation rows, once
    assert weights(one) == weights(two) == weights(alone)


def test_processes_do_not_remove_the_gradients_of_each_other(base, tmp_path, monkeypatch):
    args = replace(PRUNED, cache_gradients="auto", num_train_epochs=4)
    one, two = (suite(base, tmp_path, args, kind=TrainerSuite, target_pairs=[("he", other)]) for other in ("they", "she"))
    step, seen = Training.step, []
    def between(self, batch, total):
        step(self, batch, total)
        if not seen:
            seen.append(own := list((tmp_path / SHARED).glob("gradients-*")))
            quietly(two.train)
            two.evaluate_encoder(bootstrap=0)
            assert len(own) == 1 and list((tmp_path / SHARED).glob("gradients-*")) == own and (tmp_path / "he__they/gradients").is_dir()
    monkeypatch.setattr(Training, "step", between)
    dead = tmp_path / SHARED / "gradients-dead"
    dead.mkdir(parents=True)
    with run_lock(dead) as lock: mark = lock.read_text()
    lock.write_text(json.dumps(json.loads(mark) | {"boot": "before"}))
    assert quietly(one.train).frame["status"].tolist() == ["done"] and len(seen) == 1
    assert not list((tmp_path / SHARED).glob("gradients*"))  # neither ours nor what a dead process left
    assert {"done"} == set(one.frame["status"]) | set(two.frame["status"])


def test_an_interruption_says_whether_a_state_was_saved(base, tmp_path, monkeypatch):
    for strategy, told in (("no", "no state of it was saved, so its next training begins anew"), ("best", "its state is saved")):
        one = suite(base, tmp_path / strategy, replace(LOOP, save_strategy=strategy), kind=TrainerSuite, target_pairs=[("he", "they")])
        with monkeypatch.context() as patched:
            interrupting(patched, 6)
            with pytest.raises(KeyboardInterrupt, match=f"after 5 steps; {told}"): quietly(one.train)


def test_a_damaged_shared_space_is_computed_anew(base, tmp_path):
    one = suite(base, tmp_path, replace(PRUNED, cache_gradients=True), kind=TrainerSuite, target_pairs=[("he", "they")])
    one.train()
    before = weights(one)
    space = next((tmp_path / SHARED / "gradients").glob("space-*/space/space.safetensors"))
    whole = space.read_bytes()
    for damaged in (b"x", whole[:-8], None):
        if damaged is None: (space.parent / "space.json").unlink()
        else: space.write_bytes(damaged)
        assert one.train(resume=False, on_error="raise").frame["status"].tolist() == ["done"] and weights(one) == before
        assert space.read_bytes() == whole


def test_children_of_other_evaluation_batches_share_nothing_that_depends_on_them(base, tmp_path):
    def both(*sizes):
        made = {f"b{n}": suite(base, tmp_path / str(sizes) / str(n), replace(LOOP, cache_gradients=True, eval_batch_size=n), kind=TrainerSuite, target_pairs=[("he", "they")]) for n in sizes}
        quietly(TrainerCollection(**made).train)
        return {name: weights(one) for name, one in made.items()}
    assert both(16, 3, 32) == both(32, 3, 16)
    assert sorted(p.name for p in (tmp_path / "(16, 3, 32)/16" / SHARED / "gradients").iterdir()) == ["passes-of-16", "passes-of-3"]


def test_a_model_that_was_cut_down_by_hand_is_noticed(base, tmp_path):
    one = suite(base, tmp_path, kind=TrainerSuite, target_pairs=[("he", "they")])
    one.train()
    os.utime(tmp_path / "he__they/model/model.safetensors", (1.7e9, 1.7e9))  # as after a copy
    assert one.train().frame["status"].tolist() == ["skipped"]
    one["he__they"].post_prune(PostPruneConfig(topk=20))
    with pytest.raises(InputError, match="its model is not the one of its report"): suite(base, tmp_path, kind=TrainerSuite, target_pairs=[("he", "they")]).train()


def test_figures_take_options_of_the_comparison_and_of_the_drawing(base, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from gradiend import family
    one, drawn = suite(base, tmp_path, kind=TrainerSuite, target_pairs=[("he", "she"), ("he", "they")]), {}
    one.train()
    def watched(name):
        draw = getattr(family, name)
        def drawing(result, **options):
            drawn[name] = result
            return draw(result, **options)
        monkeypatch.setattr(family, name, drawing)
    for name in ("plot_similarity_heatmap", "plot_cross_encoding", "plot_topk_overlap"): watched(name)
    alike, crossed, shared = {"part": "decoder-weight", "topk": 40, "measure": "cosine_signed"}, {"split": "train", "max_size": 6}, {"topk": 30, "by": "layer"}
    one.plot_similarity(**alike, title="alike", annot=False)
    one.plot_cross_encoding(**crossed, title="crossed", metric="positive_minus_negative")
    one.plot_topk_overlap(**shared, kind="heatmap", column="jaccard", group="bert.encoder.layer.1")
    pd.testing.assert_frame_equal(drawn["plot_similarity_heatmap"].frame, one.similarity(**alike).frame)
    pd.testing.assert_frame_equal(drawn["plot_cross_encoding"].matrix(), one.cross_encode(**crossed).matrix())
    pd.testing.assert_frame_equal(drawn["plot_topk_overlap"].frame, one.topk_overlap(**shared).frame)
    assert (tmp_path / SHARED / "figures/similarity.png").is_file()
    for plot, result, given in ((one.plot_similarity, one.similarity(), alike), (one.plot_cross_encoding, one.cross_encode(), crossed), (one.plot_topk_overlap, one.topk_overlap(topk=30), shared)):
        plot(result, title="given") if plot != one.plot_topk_overlap else plot(result)
        for name, value in {**given, "children": ["he__she"]}.items():
            with pytest.raises(InputError, match=f"^{name}: the result holds a comparison already"): plot(result, **{name: value})
    with pytest.raises((InputError, TypeError), match="colour"): one.plot_similarity(colour="red")


def test_encoders_of_other_gradients_are_not_compared(base):
    same, shorter = (TrainerSuite(base, DATA, args=replace(DIRECT, experiment_dir=None, **options), target_pairs=[("he", "they")]) for options in ({}, {"max_length": 6}))
    family = TrainerCollection(one=same, two=shorter)
    family.train(progress=False)
    with pytest.raises(InputError, match="children: 'two/he__they' reads its rows in another way than 'one/he__they'"): family.cross_encode(split="all")
    assert len(family.cross_encode(split="all", children=["one/he__they"]).matrix()) == 1
