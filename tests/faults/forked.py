"""`defeat ...` in a process of its own, forked from this one so that a kill meets the work and not the imports."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
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


def run(arguments: Sequence[object], log: Path, kill_after: float | None = None) -> int:
    """Run a command to its end, or kill it after so many seconds; its exit status, negative where a signal ended it."""
    child = start(arguments, log)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)


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
