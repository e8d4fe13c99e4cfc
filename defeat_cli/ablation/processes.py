"""The runs of a study in processes of their own, several at a time: one that breaks takes nothing down with it."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from defeat_cli.engine.launching import check_count, threads_each
from defeat_cli.engine.stopping import stop_requested
from defeat_cli.errors import RunError

LOG = "log.txt"
POLL_SECONDS = 0.5


def environments(device: str, jobs: int | None, gpus_per_run: int = 1) -> list[dict[str, str]]:
    """What each of the runs that are worked on side by side gets in its environment.

    With several GPUs each run sees as many of them as it is to have, and there are as many runs as that leaves GPUs for
    unless `jobs` says otherwise. Elsewhere there is one, or `jobs`, which share the CPU cores.

    Args:
        device: the recipe's; where it names one GPU all runs use that.

    Raises:
        RunError: no jobs, or more GPUs a run than there are.
    """
    if jobs is not None and jobs < 1:
        raise RunError(f"--jobs {jobs}: give 1 or more")
    check_count(gpus_per_run, device, "--gpus-per-run")
    gpus = _visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) > 1:
        ends = range(gpus_per_run, len(gpus) + 1, gpus_per_run)
        groups = [",".join(gpus[end - gpus_per_run : end]) for end in ends]
        return [{"CUDA_VISIBLE_DEVICES": groups[i % len(groups)]} for i in range(jobs or len(groups))]
    count = jobs or 1
    return [threads_each(count * gpus_per_run)] * count


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


class Worker:
    """A running process that trains a run, its output in the run folder's log.

    We hold the other end of its stdin: when that closes, whatever the reason, it must stop.
    """

    def __init__(self, folder: Path, command: Sequence[str], environment: dict[str, str], lock: int | None) -> None:
        self.folder = folder
        self.log = folder / LOG
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=() if lock is None else (lock,),
                # Ctrl-C in a terminal goes to a whole group; workers are to be told once, by us.
                start_new_session=True,
            )

    @property
    def failure(self) -> str | None:
        """Why an ended process failed: the last thing that it wrote, or what ended it; None where it did not."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"ended by signal {-code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        # A traceback ends with the error; what follows it indented belongs to its message.
        return next((line for line in reversed(lines) if line[:1].strip()), f"exit status {code}")


def run_in_processes(
    commands: Mapping[Path, Sequence[str]],
    slots: Sequence[dict[str, str]],
    lock: int | None,
    *,
    started: Callable[[Path], None],
    ended: Callable[[Path, str | None], None],
    polled: Callable[[], None],
) -> None:
    """Work through the commands of run folders, as many at a time as there are slots.

    Args:
        slots: the environments of processes side by side.
        lock: what `locking.locked` gave.
        started: told of a run's folder.
        ended: told of a run's folder, and why the run failed, None where it did not.
        polled: called every half second.

    Raises:
        Interrupted: asked to stop by a signal; the workers have saved and ended. A second one kills them.
    """
    waiting = deque(commands.items())
    free = list(range(len(slots)))[::-1]
    active: dict[int, Worker] = {}
    with stop_requested() as stop:
        try:
            while (waiting or active) and not stop():
                while waiting and free:
                    slot, (folder, command) = free.pop(), waiting.popleft()
                    active[slot] = Worker(folder, command, slots[slot], lock)
                    started(folder)
                for slot in [slot for slot, worker in active.items() if worker.process.poll() is not None]:
                    worker = active.pop(slot)
                    free.append(slot)
                    ended(worker.folder, worker.failure)
                polled()
                time.sleep(POLL_SECONDS)
            for worker in active.values():
                worker.process.terminate()
            for worker in active.values():
                worker.process.wait()
        finally:
            for worker in active.values():
                worker.process.kill()
                worker.process.wait()
        if stop():
            raise stop.interrupted("the study is stopped; the same command goes on with it")
