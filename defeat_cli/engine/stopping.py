"""How a process is asked to stop by signals, and what it does then.

The first one is never lost: in the middle of what must be completed (`stop_requested`) it is remembered, elsewhere
(`stoppable`) it ends the work where it stands, by `Interrupted`. The second ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from defeat_cli.errors import Interrupted

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 130, "SIGHUP": 130}
"""Signals that ask to stop, and the exit status after each. Batch systems send SIGUSR1 some time before they kill."""

_SIGNALS = {getattr(signal, name): code for name, code in EXIT_CODES.items() if hasattr(signal, name)}


class Asked:
    """What this process was asked. number: of the first signal; modes: of the contexts entered, outermost first, each
    what a stop is to say, or None where it must wait; patient: whether further signals change nothing."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.modes: list[Callable[[], str] | None] = []
        self.patient = False

    def __call__(self) -> bool:
        """Whether there was a signal."""
        return self.number is not None

    def interrupted(self, message: str) -> Interrupted:
        """What ends the work then."""
        return Interrupted(message, _SIGNALS[self.number])

    def obey(self) -> None:
        """Raise, where there was a signal and nothing has to be completed first."""
        if self.number is not None and self.modes and self.modes[-1] is not None:
            raise self.interrupted(self.modes[-1]())

    def receive(self, number: int, _: Any) -> None:
        """The handler of the signals."""
        if self.number is None:
            self.number = number
            self.obey()
        elif not self.patient:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)  # a third one does not ask this process any more
            raise KeyboardInterrupt


_asked = Asked()


@contextmanager
def stop_requested(patient: bool = False) -> Iterator[Asked]:
    """Within, a first signal is remembered; yields what to ask whether there was one.

    Args:
        patient: further signals change nothing, in all that is done within.

    Raises:
        Interrupted: at the end, where nobody asked and what is around can be stopped.
    """
    with _entered(None, patient):
        yield _asked
    _asked.obey()


@contextmanager
def stoppable(message: Callable[[], str]) -> Iterator[None]:
    """Within, a first signal raises `Interrupted` with the message; so does one that is remembered, at once."""
    with _entered(message):
        _asked.obey()
        yield


@contextmanager
def _entered(mode: Callable[[], str] | None, patient: bool = False) -> Iterator[None]:
    outermost = not _asked.modes
    replaced = _take_over(patient) if outermost else {}
    _asked.modes.append(mode)
    try:
        yield
    finally:
        _asked.modes.pop()
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if outermost:
            _asked.number, _asked.patient = None, False


def _take_over(patient: bool) -> dict[int, Any]:
    """Handle the signals; what handled them before."""
    _asked.patient = patient
    if threading.current_thread() is not threading.main_thread():
        return {}  # only a main thread can; the program around decides then
    # nohup asks that SIGHUP be ignored.
    left = {number for number in _SIGNALS if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN}
    return {number: signal.signal(number, _asked.receive) for number in _SIGNALS if number not in left}
