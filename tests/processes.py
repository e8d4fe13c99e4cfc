"""Several processes in a test, as torchrun would start them, forked from a server that has torch loaded.

They come from a server and not from the test's own process, for one that has run a backward pass cannot always be
forked. So what they are to do is named by functions that can be imported; see `ranks`.
"""

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

SECONDS = 120
PRELOADED = ["torch", "torch.distributed", "torchvision", "pycocotools.cocoeval", "pydantic", "matplotlib.pyplot"]


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
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(rank) for rank in range(count)]
        running = []
        for rank, folder in enumerate(folders):
            folder.mkdir()
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(server.Process(target=_process, args=(environment, folder, work, arguments)))
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
    outcomes = forked(count, _joined, work, *arguments)
    assert [outcome.code for outcome in outcomes] == [0] * count, outcomes
    return [outcome.value for outcome in outcomes]


def command(count: int, *arguments: object, fault: tuple[Any, ...] = ()) -> list[Outcome]:
    """How `defeat …` ends in each process, started as `torchrun --nproc-per-node count` would.

    Args:
        fault: what `ranks.fault` is to make of a step of one of them.
    """
    return forked(count, _command, [str(argument) for argument in arguments], fault)


def _joined(work: Callable[..., Any], *arguments: Any) -> Any:
    from defeat_cli.engine.distributed import joined

    with joined() as world:
        return work(world, *arguments)


def _command(arguments: list[str], fault: tuple[Any, ...]) -> None:
    import ranks

    from defeat_cli.commands.app import app

    if fault:
        ranks.fault(*fault)
    app(arguments)


def _process(environment: dict[str, str], folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(environment)
    import torch

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
