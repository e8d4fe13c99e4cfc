"""Several processes of one command on this machine: `defeat train --gpus N`, without torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from defeat_cli.engine.watch import SERVED_BY_LAUNCHER, tell
from defeat_cli.errors import RunError
from defeat_cli.text import counted

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""How long the processes that are left have to end by themselves once one has failed."""

FORWARDED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
WELL = {0, *(128 + getattr(signal, name) for name in FORWARDED if hasattr(signal, name))}
"""Exit codes of a process that came to its end, or was asked to stop."""


def started_by_another() -> bool:
    """Whether torchrun, or `launch`, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_count(count: int, device: str, option: str = "--gpus") -> None:
    """Refuse processes that have no GPU each, unless the CPU was asked for.

    Raises:
        RunError: says how many there are.
    """
    if count < 1:
        raise RunError(f"{option} {count}: give 1 or more")
    if started_by_another():
        raise RunError(f"{option}: torchrun has started several processes already; give one of the two")
    if count > 1 and device.startswith("cuda:"):
        raise RunError(f"{option} {count}: run.device {device} names one GPU; leave it out")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and count > max(1, found):
        raise RunError(
            f"{option} {count}: this machine has {counted(found, 'CUDA device')}; with --device cpu it is {count} "
            "processes on the CPU instead"
        )


def threads_each(processes: int) -> dict[str, str]:
    """The environment by which processes side by side share the CPU cores; nothing where the user has said."""
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // processes))}


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m` with these arguments as `count` processes that find each other; see `distributed.joined`.

    Signals go on to all of them. Where one ends badly the others are ended, and it is said which and why, unless it
    has said so itself.

    Returns:
        Exit code: 0, that of an interrupted command, or of the failure.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        SERVED_BY_LAUNCHER: "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **threads_each(count),
    }
    processes: list[subprocess.Popen] = []
    with _forwarding(processes) as forwarded:
        try:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *arguments],
                        env={**os.environ, **shared, **own},
                        stdin=subprocess.DEVNULL,
                        # Ctrl-C in a terminal goes to a whole group; they are to be told once, by us.
                        start_new_session=True,
                    )
                )
            _wait(processes, dist.PrefixStore("defeat/0", store), forwarded)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    codes = {_code(process, forwarded) for process in processes}
    return max(code if code >= 0 else 1 for code in codes)


def _code(process: subprocess.Popen, forwarded: Sequence[int]) -> int | None:
    """A process's exit code; that of an interrupted command where a signal that we have passed on ended it."""
    code = process.poll()
    return 128 - code if code is not None and -code in forwarded else code


def _wait(processes: Sequence[subprocess.Popen], store: dist.Store, forwarded: Sequence[int]) -> None:
    """Wait until all have ended well, or the first badly and the others as well as they can."""
    deadline = None
    while True:
        codes = [_code(process, forwarded) for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code is not None and code not in WELL]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
            _say(failed[0], processes, store)
        if None not in codes or (deadline is not None and time.monotonic() > deadline):
            return
        time.sleep(POLL_SECONDS)


def _say(rank: int, processes: Sequence[subprocess.Popen], store: dist.Store) -> None:
    code = processes[rank].returncode
    name = f"process {rank} of {len(processes)} (pid {processes[rank].pid})"
    if code == -signal.SIGKILL:
        reason = "was killed (SIGKILL; a system that runs out of memory does that)"
    elif code < 0:
        reason = f"was ended by {signal.Signals(-code).name}"
    else:
        reason = f"ended with exit code {code}"
    message = f"{name} {reason}"
    if tell(store, message):
        print(f"error: {message}. All processes end; --resume goes on", file=sys.stderr, flush=True)


@contextmanager
def _forwarding(processes: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Within, signals that ask for an end go to the processes instead; yields those that did."""
    forwarded: list[int] = []

    def forward(number: int, _: Any) -> None:
        forwarded.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    numbers = [getattr(signal, name) for name in FORWARDED if hasattr(signal, name)]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
