"""Signals: remembered where something must be completed, obeyed at once elsewhere, and the second always."""

import os
import signal
import subprocess
import sys

import pytest

from defeat_cli.engine.stopping import stop_requested, stoppable
from defeat_cli.errors import Interrupted


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 130), (signal.SIGHUP, 130)]
)
def test_the_first_signal_is_remembered_and_the_second_leaves_at_once(number, code):
    before = signal.getsignal(number)
    with stop_requested() as stop:
        assert not stop()
        send(number)
        assert stop()
        assert stop.interrupted("saved").code == code
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert signal.getsignal(number) == signal.SIG_DFL  # a third one ends the process, whatever it is doing
    assert signal.getsignal(number) is before


def ended(work):
    """How a work ends that is asked to stop."""
    with pytest.raises(Interrupted) as caught:
        work()
    return str(caught.value), caught.value.code


def test_where_nothing_must_be_completed_a_signal_ends_the_work():
    def work():
        with stoppable(lambda: "nothing was begun"):
            send(signal.SIGTERM)
            pytest.fail("went on")

    assert ended(work) == ("nothing was begun", 143)
    with stop_requested() as stop:
        assert not stop()  # it is over: nothing of it is left


def test_what_was_remembered_ends_the_next_work_that_can_be_stopped():
    def work():
        with stoppable(lambda: "outer"), stop_requested():
            send(signal.SIGINT)
            with stoppable(lambda: "inner"):
                pytest.fail("went on")

    assert ended(work) == ("inner", 130)


def test_what_nobody_asked_for_is_not_lost():
    def work():
        with stoppable(lambda: "outer"):
            with stop_requested():
                send(signal.SIGUSR1)
            pytest.fail("went on")

    assert ended(work) == ("outer", 130)


def test_a_worker_takes_several_signals_for_one():
    def work():
        with stop_requested(patient=True), stoppable(lambda: "saved"), stop_requested():
            send(signal.SIGTERM)
            send(signal.SIGTERM)

    assert ended(work) == ("saved", 143)


def test_a_hangup_that_nohup_keeps_away_stays_away():
    code = (
        "import os, signal\n"
        "from defeat_cli.engine.stopping import stoppable\n"
        "with stoppable(str): os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    command = ["nohup", sys.executable, "-c", code]
    assert subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def test_an_interruption_is_no_error_that_could_be_caught():
    assert not issubclass(Interrupted, Exception)
