"Work for the workers of the suite tests: functions of a module, so that any process can import them."
import os
import signal
from pathlib import Path

from gradiend.childwork import Task, TaskOutcome, run_task


def said(task: Task, shared=None) -> TaskOutcome:
    "Work without torch."
    return TaskOutcome(task.child_id, task.folder, "done", {"pid": os.getpid()})


def dies(task: Task, shared=None, *, child: str, times: int, work=said) -> TaskOutcome:
    "Kills its process when it gets a certain child, so many times; otherwise it works."
    marks = Path(task.folder).parent / "marks"
    marks.mkdir(parents=True, exist_ok=True)
    if task.child_id == child and len(list(marks.iterdir())) < times:
        (marks / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return work(task)


def dies_in_training(task: Task, shared=None, *, child: str) -> TaskOutcome:
    "Kills its process after some steps of a child's first training."
    from gradiend.trainer.loop import Training

    mark, step = Path(task.folder).parent / "mark", Training.step
    if task.child_id == child and not mark.exists():
        def fatal(self, batch, total):
            step(self, batch, total)
            if self.done == 5:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        Training.step = fatal
    try: return run_task(task, shared=shared)
    finally: Training.step = step
