"""`defeat ...` in a process of its own, forked from this one so that a kill meets the work and not the imports."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from conftest import TINY

from defeat_cli.checkpoints.reading import read
from defeat_cli.commands.app import app
from defeat_cli.data.formats.shapes import draw_shapes
from defeat_cli.errors import CheckpointError
from defeat_cli.jobs import training  # noqa: F401 - what the children need is imported once, here

torch.set_num_threads(1)

TRACEBACK = 70
"""Exit status of a command that ended with a traceback."""


def prepare(folder: Path) -> tuple[Path, Path]:
    """Draw data and train a teacher; returns the recipe of a small student and the teacher's checkpoint."""
    data = draw_shapes(folder / "shapes", train_images=12, val_images=6, size=64, seed=0)
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "path": str(data)}}))
    teacher = ["train", "-r", recipe, "-o", folder / "teacher", "--set", "student.fpn_channels=16", "--seed", 7]
    assert run(teacher, folder / "teacher.txt") == 0
    return recipe, folder / "teacher" / "best.pt"


def start(arguments: Sequence[object], log: Path) -> int:
    """Start a command that appends what it prints to a file; its process id."""
    child = os.fork()
    if child:
        return child
    status = TRACEBACK
    try:
        with log.open("ab", buffering=0) as file:
            os.setsid()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        app([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(
    arguments: Sequence[object], log: Path, kill_after: float | None = None, pick: Callable[[list[int]], int] = min
) -> int:
    """Run a command to its end, or kill one of its processes after so many seconds.

    Args:
        pick: which of the process ids of the command and what it has started is killed; its own is the least.

    Returns:
        The exit status of the command, -9 where one of its processes was killed and it did not succeed all the same.
        By then all that it started has ended.
    """
    child = start(arguments, log)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    killed, family = False, {child}
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() >= deadline:
            family = descendants(child)
            with suppress(ProcessLookupError):
                os.kill(pick(sorted(family)), signal.SIGKILL)
            deadline, killed = None, True
        time.sleep(0.001)
    end = time.monotonic() + 60
    while left := family & set(parents()):
        assert time.monotonic() < end, f"processes are left a minute after the command: {left}"
        time.sleep(0.05)
    status = os.waitstatus_to_exitcode(status)
    return -signal.SIGKILL if killed and status != 0 else status


def parents() -> dict[int, int]:
    """The parent of each process that has not ended, by id."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            head, _, rest = stat.read_text().rpartition(") ")
            state, parent = rest.split()[:2]
            if state != "Z":
                found[int(head.split()[0])] = int(parent)
    return found


def descendants(process: int) -> set[int]:
    """A process, what it has started, what that has started, and so on."""
    of, found = parents(), {process}
    while more := {child for child, parent in of.items() if parent in found} - found:
        found |= more
    return found


def same(run_folder: Path, whole: Path) -> list[str]:
    """What of two finished runs is not the same, bit for bit; the clock's figures aside."""
    different = []
    lines = []
    for folder in (run_folder, whole):
        try:
            entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
        except (OSError, ValueError):
            return ["metrics.jsonl"]
        lines.append([{k: v for k, v in e.items() if k not in ("images_per_second", "memory_gib")} for e in entries])
    if lines[0] != lines[1]:
        different.append("metrics.jsonl")
    for name, kept in (("last.pt", ("training", "student")), ("student.pth", None)):
        try:
            found, expected = (read(folder / name) for folder in (run_folder, whole))
        except CheckpointError:
            different.append(name)
            continue
        if kept is not None:
            found, expected = ({key: content[key] for key in kept} for content in (found, expected))
            del found["training"]["seconds"], expected["training"]["seconds"]
        try:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        except AssertionError:
            different.append(name)
    return different


def moment(rng: random.Random, longest: float) -> float:
    """When to kill, in seconds from the start."""
    return rng.uniform(0, longest)
