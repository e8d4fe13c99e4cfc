"""Several processes in a test, forked from the test's own, so that they are there at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from defeat_cli.commands.app import app
from defeat_cli.engine.distributed import joined

SECONDS = 120


class Outcome(NamedTuple):
    """How a process ended: what it gave, None where it could not, its exit code, and what it wrote."""

    value: Any
    code: int
    output: str
    errors: str


def forked(count: int, work: Callable[..., Any], *arguments: Any) -> list[Outcome]:
    """How `count` processes end that call `work(*arguments)` as torchrun might have started them, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(rank) for rank in range(count)]
        running = []
        for rank, folder in enumerate(folders):
            folder.mkdir()
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(fork.Process(target=_process, args=(environment, folder, work, arguments)))
            running[-1].start()
        outcomes = []
        for process, folder in zip(running, folders, strict=True):
            process.join(SECONDS)
            process.kill()
            value = (folder / "value").read_bytes() if (folder / "value").exists() else pickle.dumps(None)
            texts = [(folder / stream).read_text() for stream in ("stdout", "stderr")]
            outcomes.append(Outcome(pickle.loads(value), process.exitcode, *texts))  # noqa: S301 - our own
        return outcomes


def together(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(world, *arguments)` gives in each of `count` processes that train together, by rank."""

    def joining() -> Any:
        with joined() as world:
            return work(world, *arguments)

    outcomes = forked(count, joining)
    assert [outcome.code for outcome in outcomes] == [0] * count, outcomes
    return [outcome.value for outcome in outcomes]


def command(count: int, *arguments: object) -> list[Outcome]:
    """How `defeat …` ends in each process, started as `torchrun --nproc-per-node count` would."""
    return forked(count, app, [str(argument) for argument in arguments])


def _process(environment: dict[str, str], folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / stream, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        setattr(sys, stream, open(number, "w", closefd=False))  # noqa: SIM115 - as long as the process
    code = 1
    try:
        (folder / "value").write_bytes(pickle.dumps(work(*arguments)))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
