"""The processes that train one student together: the one place that knows about ranks.

A process alone is a world of one, and every call here then does nothing but hand its argument back: the code that
trains is the same. Gradients go through `DistributedDataParallel`, over NCCL on GPUs; all else, figures and flags,
through the CPU over gloo.
"""

from __future__ import annotations

import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from defeat_cli.engine.watch import SERVED_BY_LAUNCHER, Silent, Watch
from defeat_cli.errors import DefeatError, Ended, Interrupted, RunError
from defeat_cli.text import counted

Value = TypeVar("Value")

TIMEOUT = timedelta(hours=2)
"""How long a process waits for another at most. Who has stopped for good is found far sooner, by the watch."""

CONNECTING = timedelta(seconds=15)
"""How long a process tries to reach the launcher that has started it."""

VERDICT_SECONDS = 10.0
"""How long a process that lost its connection waits to learn which other one is to blame."""


NOBODY_ELSE = Silent()


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    rank: which of `size` processes this is, 0 being the main one, which alone writes and speaks.
    local_rank, local_size: the same among the processes of this machine.
    watch: what ends all processes where one has stopped.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    watch: Watch | Silent = NOBODY_ELSE

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes; of flags, whether some process has set them."""
        if self.size == 1:
            return list(numbers)
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes by rank, on the main one; nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def on_main(self, compute: Callable[[], Value]) -> Value:
        """What the main process computes, on all of them; the others wait. An error there ends them too."""
        values = [compute() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def on_all(self, value: Value) -> Value:
        """The main process's value, on all of them."""
        return self.on_main(lambda: value)

    def main_first(self, compute: Callable[[], Value]) -> Value:
        """What each process computes for itself, the main one before the others: they find what it downloads, draws
        or keeps on disk."""
        if not self.is_main:
            self.wait()
        value = compute()
        if self.is_main:
            self.wait()
        return value

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.most(0)

    def average(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Put the weighted mean over all processes in place of floating-point tensors of equal dtype."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors] + [tensors[0].new_ones(1)]) * weight
        dist.all_reduce(flat)
        means = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def take(self, tensors: Sequence[Tensor], owner: bool) -> None:
        """Put the tensors of the process that says it is the owner, and only one does, in place of all others'."""
        if self.size == 1:
            return
        for tensor in tensors:
            if not owner:
                tensor.zero_()
            dist.all_reduce(tensor)

    def parallel(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over all processes in its backward pass.

        Every process has built it alike, so nothing is sent at the start, nor buffers later: `average` does that where
        they change. A teacher in it does not train and is never sent. Terms that are off in a step have parameters
        without a gradient, so unused ones are looked for; that also keeps the order of additions the same from the
        first step on, after resuming too.
        """
        if self.size == 1:
            return module
        with warnings.catch_warnings():
            # The option that is to take the place of `broadcast_buffers` would send them at the start.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                _Replica(module), init_sync=False, broadcast_buffers=False, find_unused_parameters=True
            )

    def keeping_gradients(self, module: nn.Module, keep: bool) -> AbstractContextManager[None]:
        """Where `keep`, backward passes of `parallel`'s module send no gradients; the first one after does."""
        return module.no_sync() if keep and self.size > 1 else nullcontext()

    def check_device(self, device: torch.device) -> None:
        """Refuse a device that these processes cannot share.

        Raises:
            RunError: one GPU for all of them, or more processes than GPUs on this machine.
        """
        if self.size == 1 or device.type != "cuda":
            return
        if device.index is not None:
            raise RunError(f"run.device: {device} is one GPU, and there are {self.size} processes; use cuda or auto")
        if self.local_size > torch.cuda.device_count():
            raise RunError(
                f"{self.local_size} processes on {platform.node()}, which has "
                f"{counted(torch.cuda.device_count(), 'GPU')}; start one process a GPU"
            )


class _Replica(nn.Module):
    """A module, and a parameter that it does not use: torch warns where it looks for one and there is none."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.unused = nn.Parameter(torch.zeros((), device=next(module.parameters()).device))

    def forward(self, *positional: Any, **named: Any) -> Any:
        return self.module(*positional, **named)


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The world that this process was started in, by `launching.launch` or torchrun, for as long as it takes part.

    Where another process fails, is killed, hangs or cannot be reached, this one is ended within a minute, wherever it
    is; where this one fails the others are. The first to know says which process it was and why.

    Raises:
        Ended: another process failed, and has said so.
        DefeatError: as it was raised inside, naming the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size, watch = _found()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    with_gpus = torch.cuda.is_available()
    if with_gpus:
        torch.cuda.set_device(local % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
    world = World(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", str(size))), watch)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        yield world
        world.wait()
    except Ended:
        time.sleep(VERDICT_SECONDS)  # the watch ends this process once the other has spoken
        watch.leave()
        raise
    except (Interrupted, SystemExit):
        watch.stopped()
        raise
    except BaseException as error:
        if _lost_connection(error) and watch.others_stopped:
            watch.stopped()
            raise Interrupted("another process was asked to stop; --resume goes on") from None
        if _lost_connection(error):
            # Asked to stop now, by a launcher that ends the survivors, we would not learn why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            watch.suspect()
            time.sleep(VERDICT_SECONDS)
            error = RunError(f"lost the connection to another process: {error}")
        name = f"process {rank} of {size}"
        if not watch.tell(f"{name}: {type(error).__name__}: {error}"):
            raise Ended from None
        if isinstance(error, DefeatError):
            error.args = (f"{name}: {error}",)
            raise error from None
        raise
    watch.leave()
    dist.destroy_process_group()


def _found() -> tuple[dist.Store, int, int, Watch]:
    """The store by which the processes of this run find each other, this one's rank, how many there are, its watch.

    Raises:
        RunError: nobody serves the store; Ended where another process of this machine says so.
    """
    # A launcher serves it before it starts us. Without one the first process does, whenever that is started.
    served = SERVED_BY_LAUNCHER in os.environ
    try:
        store, rank, size = next(rendezvous("env://", timeout=CONNECTING if served else TIMEOUT))
        watch = Watch(rank, size)
    except dist.DistError:
        if served and os.environ.get("LOCAL_RANK", "0") != "0":
            raise Ended from None
        raise RunError(
            f"nobody answers at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: the process that started this "
            "run is gone"
        ) from None
    store.set_timeout(TIMEOUT)
    return store, rank, size, watch


def _lost_connection(error: BaseException) -> bool:
    """Whether an error of torch's says that another process is gone; gloo's have no type of their own."""
    signs = ("gloo", "nccl", "connection", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )
