"""Processes that train together end together: each tells how far it is, and one that has stopped ends all.

They wait for each other in calls that nothing interrupts, so a thread of each process watches, through the key-value
store by which they found each other. Every second a process writes where it stands there. The main one judges the
others, and the others judge the main one; whoever finds a fault writes the verdict, and all leave at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 1.0
SILENT_SECONDS = 40.0
"""A process that has written nothing for so long is gone, or stopped."""

SUSPECT_SECONDS = 3.0
"""The same where a connection was lost already."""

HANG_SECONDS = 40.0
"""A process that stays at one place of a step for so long hangs, unless steps are that slow."""

SLOWER = 5.0
"""How many times the longest time at one place, so far, it may take."""

FAILED, TOLD, STOPPED = "failed", "told", "stopped"

SERVED_BY_LAUNCHER = "TORCHELASTIC_USE_AGENT_STORE"
"""Torch's word for it in the environment: the store is served by what started the processes, not by the first."""

LOADING, COMPUTED, EVALUATING, REST = range(4)
"""Places of a step in their order: its images are awaited; its losses are there, and gradients are to be added up; an
image is evaluated; between all that, where a process may save, score or wait for as long as it likes, if only it is
alive."""


class Silent:
    """The watch of a process alone, which has nobody to watch."""

    def at(self, place: int, step: int | None = None) -> None:
        """The main thread has come to a place of a step, counted from 1; of the same step where none is given."""


class Watch(Silent):
    """The watch of one process among several; begins at once."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.store = connected()
        self.since = time.monotonic()
        self.step, self.place, self.longest, self.steps = 0, REST, 0.0, 0
        self.seen: dict[int, tuple[bytes, float]] = {}
        self.silent_seconds = SILENT_SECONDS
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def at(self, place: int, step: int | None = None) -> None:
        now = time.monotonic()
        if self.place != REST:
            self.longest = max(self.longest, now - self.since)
        if place == REST and self.place == COMPUTED:
            self.steps += 1
        self.step = self.step if step is None else step
        self.place, self.since = place, now

    def tell(self, message: str) -> bool:
        """End the others. Whether this process is the first to fail, which then has to say what `message` says."""
        self.leave()
        return self._spread(message)

    def stopped(self) -> None:
        """This process was asked to stop; the others may wait for it, and are to stop too."""
        with contextlib.suppress(dist.DistError):
            self.store.set(STOPPED, "")
        self.leave()

    @property
    def others_stopped(self) -> bool:
        """Whether some process was asked to stop."""
        with contextlib.suppress(dist.DistError):
            return self.store.check([STOPPED])
        return False

    def suspect(self) -> None:
        """A connection was lost: look closely."""
        self.silent_seconds = SUSPECT_SECONDS
        self.at(REST)

    def leave(self) -> None:
        """This process needs nobody any more."""
        self.done.set()
        self.thread.join()
        with contextlib.suppress(dist.DistError):  # whoever serves the store may have left before
            self.store.set(f"left/{self.rank}", "")

    def _watch(self) -> None:
        while not self.done.wait(BEAT_SECONDS):
            try:
                self._beat()
                if self.store.check([FAILED]):
                    os._exit(1)
                verdict = self._verdict()
            except dist.DistError:
                # The store is the launcher's, or where there is none the main process's. Without it nobody can tell
                # who has said so already: one process of each machine does.
                if os.environ.get("LOCAL_RANK", "0") != "0" and SERVED_BY_LAUNCHER in os.environ:
                    os._exit(1)
                self._end(f"process {self.rank} of {self.size}: the process that started this run is gone")
            else:
                if verdict is not None and self._spread(verdict):
                    self._end(verdict)

    def _beat(self) -> None:
        # Nothing is known of how long a step takes until the first is done, in which much is set up.
        limit = max(HANG_SECONDS, SLOWER * self.longest) if self.steps else float("inf")
        state = {
            "name": f"process {self.rank} of {self.size} ({platform.node()}, pid {os.getpid()})",
            "step": self.step,
            "place": self.place,
            "hangs": self.place != REST and time.monotonic() - self.since > limit,
            "seconds": time.monotonic() - self.since,
            "beat": time.monotonic(),
        }
        self.store.set(f"beat/{self.rank}", json.dumps(state))

    def _verdict(self) -> str | None:
        """What is wrong with the others, if anything."""
        now = time.monotonic()
        states: list[dict[str, Any]] = []
        for rank in range(self.size) if self.rank == 0 else (0, self.rank):
            if self.store.check([f"left/{rank}"]) or not self.store.check([f"beat/{rank}"]):
                continue
            written = self.store.get(f"beat/{rank}")
            if self.seen.get(rank, (b"", 0.0))[0] != written:
                self.seen[rank] = (written, now)
            state = json.loads(written)
            silent = now - self.seen[rank][1]
            if rank != self.rank and silent > self.silent_seconds:
                return f"{state['name']} is gone: nothing was heard of it for {silent:.0f} s"
            states.append(state)
        # Those who wait are further on than the one that they wait for.
        last = min(((state["step"], state["place"]) for state in states), default=None)
        behind = [state for state in states if (state["step"], state["place"]) == last]
        if self.rank == 0 and behind and all(state["hangs"] for state in behind):
            names = " and ".join(state["name"] for state in behind)
            return f"{names}: no progress for {behind[0]['seconds']:.0f} s, in step {behind[0]['step']}"
        return None

    def _spread(self, message: str) -> bool:
        """`tell`, and let the others hear it: where no launcher does, the main process serves the store."""
        first = tell(self.store, message)
        if first and self.rank == 0:
            time.sleep(2 * BEAT_SECONDS)
        return first

    def _end(self, message: str) -> None:
        print(f"error: {message}. All processes end; --resume goes on", file=sys.stderr, flush=True)
        os._exit(1)


def connected() -> dist.Store:
    """A connection of our own to the store by which the processes of this run found each other."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=15))
    return dist.PrefixStore(f"defeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def tell(store: dist.Store, message: str) -> bool:
    """Write why a run fails, which ends all its processes. Whether this is the first failure."""
    first = store.add(TOLD, 1) == 1
    if first:
        store.set(FAILED, message)
    return first
