"""Run notebooks through nbdev's own tester, each in a process of its own.

    python tests/tools/run_notebooks.py [--workers 2] [nbs/10_data.filters.ipynb ...]

`nbdev_test` runs many notebooks in one process, and IPython keeps the variables of all of them until that process
ends: gigabytes for a whole book. Here every notebook starts in a fresh copy of a process that has the heavy libraries
loaded already, so it costs no second import, owes nothing to the notebooks before it, and leaves nothing behind.
"""
import argparse
import multiprocessing
import os
import resource
from multiprocessing.connection import wait
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbglob

LOADED = ["nbdev.test", "matplotlib.pyplot", "pandas", "torch._dynamo", "gradiend.cli",
          *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "modernbert", "t5"))]


def run_one(path: Path, flags: list[str], folder: Path) -> None:
    "Run one notebook as `nbdev_test` does, and end the process with 1 if it fails."
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=flags, basepath=folder)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds, memory = sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used) // 1024
    print(f"- {'Completed' if passed else 'FAILED'} {path} ({seconds:.1f} s of processor time, {memory} MB)", flush=True)
    raise SystemExit(not passed)


def run_all(paths: list[Path], workers: int) -> list[Path]:
    "Run notebooks in `workers` processes at a time; those that failed, or whose process died, are returned."
    flags, folder = get_config().tst_flags.split(), get_config().config_path
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(LOADED)
    waiting, running, failed = list(paths), dict[int, tuple[multiprocessing.Process, Path]](), list[Path]()
    while waiting or running:
        while waiting and len(running) < workers:
            path = waiting.pop(0)
            process = context.Process(target=run_one, args=(path, flags, folder))
            process.start()
            running[process.sentinel] = process, path
        for sentinel in wait(list(running)):
            process, path = running.pop(sentinel)
            process.join()
            if process.exitcode: failed.append(path)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run notebooks through nbdev's own tester, each in a process of its own.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="which; all if none is named")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    chosen = [path.absolute() for path in options.notebooks or sorted(nbglob(as_path=True))]
    os.chdir(get_config().nbs_path)
    bad = run_all(chosen, options.workers)
    print(*(f"failed: {path}" for path in bad), sep="\n")
    raise SystemExit(bool(bad))
