"""One process at a time in a folder, and none that is dead."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from defeat_cli.engine import locking
from defeat_cli.engine.locking import LOCK, locked, refuse_locked
from defeat_cli.errors import RunError

HOLD = """
import sys, pathlib, subprocess
from defeat_cli.engine.locking import locked
with locked(pathlib.Path(sys.argv[1])) as lock:
    heirs = [lock] if sys.argv[2] == "1" else []
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=heirs)
    print(child.pid, flush=True)
    input()
"""


def holder(folder, heirs):
    """A process that holds the folder, with a child that inherits that or not, which lives as long as its stdin."""
    command = [sys.executable, "-c", HOLD, str(folder), str(heirs)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    return process, child


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path):
    process, _ = holder(tmp_path, heirs=0)
    told = rf"process {process.pid} on {socket.gethostname()} is at work in this folder"
    with pytest.raises(RunError, match=told):
        refuse_locked(tmp_path)
    with pytest.raises(RunError, match=told), locked(tmp_path):
        pass
    process.communicate("\n")
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{socket.gethostname()} {os.getpid()}\n"
        with pytest.raises(RunError, match="is at work"), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    process, _ = holder(tmp_path, heirs=0)
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
    process.stdin.close()


def test_a_worker_that_outlives_its_killed_parent_keeps_the_lock(tmp_path):
    process, child = holder(tmp_path, heirs=1)
    process.kill()
    process.wait()
    with pytest.raises(RunError, match="is at work"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    for _ in range(200):
        try:
            refuse_locked(tmp_path)
        except RunError:
            time.sleep(0.05)  # a process that is killed takes a moment to be gone
            continue
        break
    with locked(tmp_path):
        pass


def test_a_forked_loader_process_does_not_hold_the_folder(tmp_path):
    with locked(tmp_path):
        (reading, writing), (ready, telling) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.write(telling, b".")
            os.read(reading, 1)
            os._exit(0)
        os.read(ready, 1)
        (tmp_path / LOCK).rename(tmp_path / "renamed")  # as if we were killed here: nothing of ours is cleaned up
    (tmp_path / "renamed").rename(tmp_path / LOCK)
    with locked(tmp_path):  # the child is alive still
        os.close(writing)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("host", "process", "refused"),
    [
        (socket.gethostname(), "another that lives", True),
        (socket.gethostname(), "one that is dead", False),
        ("elsewhere", "12", True),
        ("", "", False),
    ],
)
def test_on_a_disk_without_locks_the_file_tells(tmp_path, monkeypatch, host, process, refused):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", none)
    dead = subprocess.Popen(["true"])
    dead.wait()
    process = {"another that lives": str(os.getppid()), "one that is dead": str(dead.pid)}.get(process, process)
    (tmp_path / LOCK).write_text(f"{host} {process}\n")
    if refused:
        with pytest.raises(RunError, match=rf"process {process} on {host} is at work .* delete .*{LOCK}"):
            refuse_locked(tmp_path)
        assert (tmp_path / LOCK).exists()
    else:
        refuse_locked(tmp_path)


def test_a_lock_that_was_removed_between_opening_and_locking_is_made_anew(tmp_path, monkeypatch):
    """Else two processes hold a folder: one the file that is gone, the other the next one of that name."""
    gain, removed = locking._gain, []

    def late(file, path):
        if not removed:
            path.unlink()
            removed.append(path)
        gain(file, path)

    monkeypatch.setattr(locking, "_gain", late)
    with locked(tmp_path), pytest.raises(RunError, match="is at work"):
        refuse_locked(tmp_path)
