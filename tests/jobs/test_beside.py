"""The plain student of `run.plain_beside`; in place of its training process stand small scripts, but for one test."""

import json
import os
import signal
import sys

import pytest
import torch
from runs import metrics

from defeat_cli.config import schema as recipes
from defeat_cli.console import Reporter
from defeat_cli.engine import loop
from defeat_cli.engine.runs import RunFolder
from defeat_cli.jobs import beside
from defeat_cli.jobs.beside import Beside

BESIDE = ["--set", "run.plain_beside=true"]
SLEEP = "import time; time.sleep(60)"


@pytest.fixture(scope="module")
def arguments(tiny, teacher):
    return ["train", "-r", tiny, "-t", teacher, "--compare-plain", "--set", "schedule.epochs=1"]


@pytest.fixture(scope="module")
def afterwards(tmp_path_factory, defeat, arguments):
    """A run whose plain student is trained after it, with one thread."""
    folder = tmp_path_factory.mktemp("runs") / "afterwards"
    assert "afterwards" in defeat(*arguments, *BESIDE, "-o", folder)
    return folder


@pytest.fixture
def two_threads(monkeypatch):
    """Seems to have two threads, and computes with one throughout; gives what they were set to."""
    numbers = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1] if numbers else 2)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


@pytest.fixture
def worker(monkeypatch):
    """Gives what makes a script the worker, and the processes that were started."""
    started = []

    def patient(run, worker, threads, reporter):
        if worker is not None:
            started.append(worker.process)
        return Patient(run, worker, threads, reporter)

    monkeypatch.setattr(beside, "Beside", patient)
    return lambda script: monkeypatch.setattr(beside, "command", lambda *_: [sys.executable, "-c", script]), started


class Patient(Beside):
    """Does not ask for results before the process has ended, unless that sleeps."""

    def results(self):
        if SLEEP not in self.worker.process.args:
            self.worker.process.wait(120)
        return super().results()


def assert_same(folder, expected):
    """Distilled and plain students learnt the same, bit for bit, and were scored the same."""
    for found, known in ((folder, expected), (folder / "plain", expected / "plain")):
        assert metrics(found) == metrics(known)
        ours, theirs = (torch.load(run / "student.pth", weights_only=True) for run in (found, known))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (folder, expected))
    assert ours["plain"] == theirs["plain"]


def test_a_student_trained_beside_is_the_one_trained_afterwards(
    defeat, arguments, afterwards, two_threads, worker, tmp_path
):
    _, started = worker
    output = defeat(*arguments, *BESIDE, "-o", tmp_path / "run")
    assert "trained beside the student, with 1 CPU thread" in output
    assert "goes on in this process" not in output
    assert "plain student: 1 epoch" not in output
    assert [process.returncode for process in started] == [0]
    assert_same(tmp_path / "run", afterwards)
    assert two_threads == [1, 1, 2]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (SLEEP, "plain student: goes on in this process"),
        ("raise ValueError('no such thing')", "its process failed: ValueError: no such thing (see "),
    ],
)
def test_what_the_other_process_leaves_undone_is_done_here(
    defeat, arguments, afterwards, two_threads, worker, tmp_path, script, told
):
    become, started = worker
    become(script)
    assert told in defeat(*arguments, *BESIDE, "-o", tmp_path / "run")
    assert started[0].poll() is not None
    assert_same(tmp_path / "run", afterwards)


def test_both_stop_together_and_are_resumed(defeat, arguments, afterwards, two_threads, worker, tmp_path, monkeypatch):
    become, started = worker
    become(SLEEP)
    make_step = loop.train_step

    def step_then_stop(state, *positional, **named):
        made = make_step(state, *positional, **named)
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return made

    monkeypatch.setattr(loop, "train_step", step_then_stop)
    assert "--resume" in defeat(*arguments, *BESIDE, "-o", tmp_path / "run", code=130)
    assert [process.poll() for process in started] == [-signal.SIGTERM]
    monkeypatch.setattr(loop, "train_step", make_step)
    defeat(*arguments, *BESIDE, "-o", tmp_path / "run", "--resume")
    assert_same(tmp_path / "run", afterwards)


def test_of_an_odd_number_of_threads_the_plain_student_has_the_smaller_share_wherever_it_is_trained(
    two_threads, tmp_path
):
    two_threads.append(3)
    with beside.beside(RunFolder(tmp_path), None, 1, Reporter("student"), overwrite=False, lock=None) as other:
        assert two_threads == [3, 2]
        assert other.results() is None
        assert two_threads == [3, 2, 1]
    assert two_threads == [3, 2, 1, 3]


def test_the_worker_has_its_share_of_threads_whatever_the_user_set(two_threads, worker, tmp_path, monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "4")
    become, started = worker
    become("import torch; print('threads', torch.get_num_threads())")
    recipe = recipes.validate({"run": {"device": "cpu"}}, "tiny")
    with beside.beside(RunFolder(tmp_path), recipe, 1, Reporter("student"), overwrite=False, lock=None):
        started[0].wait(120)
    assert (tmp_path / "log.txt").read_text() == "threads 1\n"


def test_a_run_that_is_prolonged_is_left_to_this_process(two_threads, worker, tmp_path):
    """Which alone knows that its patience begins anew."""
    become, started = worker
    become("")
    short, longer = (recipes.validate({"schedule": {"epochs": epochs, "milestones": [1]}}, "tiny") for epochs in (2, 3))
    run = RunFolder(tmp_path)
    run.open(short, resume=False, overwrite=False)
    with beside.beside(run, longer, 1, Reporter("student"), overwrite=False, lock=None):
        assert started == []
    assert run.recipe.schedule.epochs == 2
    with beside.beside(run, short, 1, Reporter("student"), overwrite=False, lock=None):
        assert len(started) == 1


def test_there_is_nothing_to_train_beside_without_a_comparison(defeat, tiny, teacher, tmp_path):
    output = defeat("train", "-r", tiny, "-t", teacher, *BESIDE, "-o", tmp_path / "run", code=2)
    assert "run.plain_beside: without effect, as run.compare_plain is false" in output
    assert not (tmp_path / "run").exists()
