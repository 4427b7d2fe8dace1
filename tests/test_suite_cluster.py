"A real dask cluster on this machine: one of its two workers is killed in the middle of a child, and the suite finishes all the same."
import re
from functools import partial
from pathlib import Path

from dask.distributed import Client, LocalCluster

from gradiend.childwork import finished_facts
from gradiend.execution import run_tasks
from tests.suite_work import dies_in_training
from tests.test_suite import LOOP, base as base, quietly, suite, weights


def test_a_killed_worker_of_a_cluster(base, tmp_path):
    here, there = suite(base, tmp_path / "here", LOOP), suite(base, tmp_path / "there", LOOP)
    quietly(here.train)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, Client(cluster) as client:
        before = set(client.run(lambda dask_worker: dask_worker.id))
        outcomes = run_tasks(list(there.tasks.values()), client.get_executor(), work=partial(dies_in_training, child="he__they"))
        after = set(client.run(lambda dask_worker: dask_worker.id))
        report = there.train(client.get_executor())
    assert (tmp_path / "there/mark").exists() and len(before - after) == 1  # one worker is gone, and another took its place
    assert {o.status for o in outcomes} == {"done"} and weights(there) == weights(here)
    assert set(report.frame["status"]) == {"skipped"} and report.failed == ()
    assert all(finished_facts(task) for task in there.tasks.values())
    assert not [p for p in Path(tmp_path / "there").rglob("*") if re.search(r"run\.lock", p.name)]
