"""Workers here are small scripts in place of real runs; the folder's name says how each behaves."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from defeat_cli.ablation import processes
from defeat_cli.ablation.processes import environments, run_in_processes
from defeat_cli.errors import Interrupted, RunError

WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
kind = folder.name.split("-")[0]
if kind == "bad":
    raise ValueError("no such thing\\n  of this kind")
if kind == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "slow":
    def stop(*_):
        (folder / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    time.sleep(60)
if kind == "pair":  # ends only where another one runs beside it
    (folder / "here").touch()
    others = [f for f in folder.parent.iterdir() if f.name.startswith("pair")]
    while not all((f / "here").exists() for f in others):
        time.sleep(0.01)
(folder / "environment").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
"""


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch):
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def work(paths, slots=({},), started=lambda folder: None, polled=lambda: None):
    """Run the folders; returns what was told of each at its end, in order."""
    ends = {}
    commands = {path: (sys.executable, "-c", WORKER, str(path)) for path in paths}
    run_in_processes(
        commands, slots, None, started=started, polled=polled,
        ended=lambda folder, failure: ends.update({folder.name: failure}),
    )  # fmt: skip
    return ends


def test_a_failure_is_told_and_stops_nothing(tmp_path):
    ends = work(folders(tmp_path, "bad", "die", "good"))
    assert ends == {"bad": "ValueError: no such thing", "die": "ended by signal 9", "good": None}
    assert list(ends) == ["bad", "die", "good"]
    assert "Traceback" in (tmp_path / "bad" / "log.txt").read_text()


def test_as_many_run_at_a_time_as_there_are_slots(tmp_path):
    slots = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert work(folders(tmp_path, "pair-1", "pair-2"), slots) == {"pair-1": None, "pair-2": None}
    assert {(tmp_path / name / "environment").read_text() for name in ("pair-1", "pair-2")} == {"0", "5"}


def test_a_stop_lets_workers_save_and_starts_no_other(tmp_path):
    paths = folders(tmp_path, "slow", "good")

    def stop_when_ready():
        if (tmp_path / "slow" / "ready").exists():
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="the same command goes on"):
        work(paths, polled=stop_when_ready)
    assert (tmp_path / "slow" / "saved").exists()
    assert not (tmp_path / "good" / "log.txt").exists()


def test_workers_end_with_an_error_of_ours(tmp_path):
    begun = time.monotonic()

    def fail_when_ready():
        if (tmp_path / "slow" / "ready").exists():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(folders(tmp_path, "slow"), polled=fail_when_ready)
    assert time.monotonic() - begun < 30
    assert not (tmp_path / "slow" / "saved").exists()


@pytest.mark.parametrize(
    ("device", "jobs", "gpus", "visible", "expected"),
    [
        ("auto", None, 2, "", ["0", "1"]),
        ("cuda", None, 2, "4,7", ["4", "7"]),
        ("auto", 3, 2, "", ["0", "1", "0"]),
        ("cuda:1", 2, 2, "", [None, None]),
        ("auto", None, 1, "", [None]),
        ("cpu", None, 2, "", [None]),
    ],
)
def test_each_process_sees_one_of_several_gpus(monkeypatch, device, jobs, gpus, visible, expected):
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in environments(device, jobs)] == expected


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert environments("cpu", 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments("cpu", 20) == [{"OMP_NUM_THREADS": "1"}] * 20
    assert environments("cpu", 1) == [{}]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments("cpu", 2) == [{}, {}]


def test_no_jobs_are_refused():
    with pytest.raises(RunError, match="--jobs 0"):
        environments("cpu", 0)
