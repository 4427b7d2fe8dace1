"A folder has one owner at a time, and who waits for it waits as long as something happens there."
import errno
import json
import logging
import os
import signal
import threading
import time

import pytest

from gradiend import locks
from gradiend.locks import LOCK, FolderInUseError, run_lock, waiting_lock


def test_only_one_owner_even_if_many_find_a_dead_lock(tmp_path):
    "Eight processes find the lock of a dead one at once; whoever gets in writes down when, and no two overlap."
    stale, log = locks._me(), tmp_path / "log"
    stale["pid"] = os.fork() or os._exit(0)
    os.waitpid(stale["pid"], 0)
    (tmp_path / LOCK).write_text(json.dumps(stale))
    start = time.time() + 0.2

    def enter():
        time.sleep(max(0, start - time.time()))
        for _ in range(30):
            try:
                with run_lock(tmp_path):
                    began = time.monotonic()
                    time.sleep(0.003)
                    with open(log, "a") as file: file.write(f"{began} {time.monotonic()}\n")
            except FolderInUseError: time.sleep(0.004)

    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try: enter()
            except BaseException: os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    spans = sorted(tuple(map(float, line.split())) for line in log.read_text().splitlines())
    assert len(spans) >= 8 and all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_killed_owner_is_replaced_and_a_live_one_is_named(tmp_path):
    reading, writing = os.pipe()

    def hold():
        with run_lock(tmp_path):
            os.write(writing, b"x")
            time.sleep(60)

    child = os.fork()
    if child == 0: hold()
    os.read(reading, 1)
    with pytest.raises(FolderInUseError, match=rf"process {child} on .* is at work in"):
        with run_lock(tmp_path): pass
    os.kill(child, signal.SIGKILL)
    deadline = time.time() + 10
    while time.time() < deadline:  # not waited for yet: it may be a zombie, which is dead as well
        try:
            with run_lock(tmp_path): break
        except FolderInUseError: time.sleep(0.01)
    else: raise AssertionError("a zombie still holds the folder")
    os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_gives_the_folder_back(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path): raise ZeroDivisionError
    with run_lock(tmp_path): pass


@pytest.mark.parametrize("content", ["", "{}", "null", "[1]", '{"pid": 1}'])
def test_an_unreadable_lock_is_not_thrown_away(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(FolderInUseError, match="does not say who made it"), run_lock(tmp_path): pass
    assert (tmp_path / LOCK).read_text() == content


def test_without_links_the_lock_works_too(tmp_path, monkeypatch):
    def no_links(*_): raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with run_lock(tmp_path) as path:
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(FolderInUseError), run_lock(tmp_path): pass
    assert list(tmp_path.iterdir()) == []


def in_fork(work):
    "Run `work` in a fork of this process; its number."
    child = os.fork()
    if child == 0:
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    return child


def test_those_who_wait_come_in_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.005)
    log, folder = tmp_path / "log", tmp_path / "folder"
    folder.mkdir()

    def work():
        with waiting_lock(folder, patience=30):
            began = time.monotonic()
            time.sleep(0.02)
            with open(log, "a") as file: file.write(f"{began} {time.monotonic()}\n")

    children = [in_fork(work) for _ in range(8)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    spans = sorted(tuple(map(float, line.split())) for line in log.read_text().splitlines())
    assert len(spans) == 8 and all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert list(folder.iterdir()) == []


def test_who_waits_for_a_killed_process_takes_its_place(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "PAUSE", 0.01)
    reading, writing = os.pipe()

    def hold():
        with run_lock(tmp_path):
            os.write(writing, b"x")
            time.sleep(60)

    child = in_fork(hold)
    os.read(reading, 1)
    threading.Timer(0.2, os.kill, (child, signal.SIGKILL)).start()
    with caplog.at_level(logging.WARNING), waiting_lock(tmp_path, patience=30): mark = json.loads((tmp_path / LOCK).read_text())
    os.waitpid(child, 0)
    assert mark["pid"] == os.getpid() and list(tmp_path.iterdir()) == []
    assert len(caplog.messages) == 1 and f"process {child} on " in caplog.text and "delete" in caplog.text


def test_patience_is_over_when_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.01)
    with run_lock(tmp_path) as lock: mark = json.loads(lock.read_text())
    lock.write_text(json.dumps(mark | {"host": "another-machine"}))  # of which nothing can be known
    kept = lock.read_text()
    (tmp_path / ".hidden").touch()
    start = time.monotonic()
    with pytest.raises(FolderInUseError, match="on another-machine is at work"), waiting_lock(tmp_path, patience=0.2): pass
    assert time.monotonic() - start >= 0.2 and lock.read_text() == kept
    threading.Timer(0.1, lock.unlink).start()  # its user knows better
    with waiting_lock(tmp_path, patience=30): assert json.loads(lock.read_text())["host"] == mark["host"]
    assert not lock.exists()


def test_an_error_inside_the_waiting_lock_is_not_taken_for_a_lock(tmp_path):
    with pytest.raises(FolderInUseError, match="of the block"), waiting_lock(tmp_path): raise FolderInUseError("of the block")
    assert list(tmp_path.iterdir()) == []
