"""How the batches of an optimizer step are shared out over the processes that train together.

A step is `accumulate` batches of `batch_size` images on however many processes: the recipe decides what a step sees,
and the number of processes only who computes it. So a learning rate means the same on any number of processes, and a
run can go on with another number at any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Sampler

from defeat_cli.data.loading import BatchOrder, Keys
from defeat_cli.errors import RecipeError
from defeat_cli.text import counted


@dataclass(frozen=True)
class Part:
    """A batch, or a piece of one, that one process computes in one go.

    number: its place among the parts of the step, which its randomness depends on.
    divisor: what its loss is divided by in the step's; infinite where it only keeps a process company.
    """

    number: int
    divisor: float
    keys: Keys

    @property
    def counts(self) -> bool:
        """Whether it is one of the step's, not a repeated one."""
        return math.isfinite(self.divisor)


@dataclass(frozen=True)
class Share:
    """One process's parts of one step, at least one; total: parts of all processes."""

    parts: list[Part]
    total: int

    @property
    def counts(self) -> bool:
        """Whether it has a part that counts; all of them do then."""
        return self.parts[0].counts

    @property
    def has_last(self) -> bool:
        """Whether the step's last part is among them, the one on which pulls are measured."""
        return any(part.counts and part.number == self.total - 1 for part in self.parts)


def pieces(batch_size: int, accumulate: int, processes: int) -> int:
    """How many pieces each batch is cut into so that all processes have something to do.

    The fewest with which a step's pieces divide by the processes, or else with which each process gets one.

    Raises:
        RecipeError: a step has fewer images than there are processes.
    """
    if batch_size * accumulate < processes:
        raise RecipeError(
            f"data.batch_size {batch_size} x optimizer.accumulate {accumulate} makes "
            f"{counted(batch_size * accumulate, 'image')} a step, fewer than the {processes} processes; raise one of "
            "them, and optimizer.lr in proportion"
        )
    cuts = range(1, batch_size + 1)
    even = next((cut for cut in cuts if accumulate * cut % processes == 0), None)
    return even or next(cut for cut in cuts if accumulate * cut >= processes)


class StepOrder(Sampler[Keys]):
    """The parts of one process, step after step, in the order that it computes them.

    Part k of a step goes to process k modulo `size`. A process for which an epoch's last, smaller step has no part
    repeats one that does not count, for all processes have to add up their gradients together. So every image counts
    once an epoch.

    Args:
        order: the batches of an epoch.
        accumulate: batches a step.
        rank, size: which of how many processes this is.

    Raises:
        RecipeError: a step has fewer images than there are processes.
    """

    def __init__(self, order: BatchOrder, accumulate: int = 1, rank: int = 0, size: int = 1) -> None:
        self.order, self.accumulate, self.rank, self.size = order, accumulate, rank, size
        self.cut = pieces(order.batch_size, accumulate, size)
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch, the same on any number of processes."""
        return math.ceil(self.order.batches_per_epoch / self.accumulate)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, counted from 0, and how many of its steps are done already and not to be loaded again."""
        self.order.set_epoch(epoch, start * self.accumulate)
        self._shares: list[Share] | None = None

    @property
    def shares(self) -> list[Share]:
        """This process's share of each step that is left of the epoch."""
        if self._shares is None:
            batches = list(self.order)
            groups = [batches[i : i + self.accumulate] for i in range(0, len(batches), self.accumulate)]
            self._shares = [self._share(group) for group in groups]
        return self._shares

    def _share(self, group: Sequence[Keys]) -> Share:
        every: list[Part] = []
        for batch in group:
            for keys in self.order.cut(batch, self.cut):
                # A batch counts as much as another, and within it an image.
                images = self.order.images_of(batch) / self.order.images_of(keys)
                every.append(Part(len(every), len(group) * images, keys))
        mine = every[self.rank :: self.size] or [Part(every[-1].number, math.inf, every[-1].keys)]
        return Share(mine, len(every))

    def __len__(self) -> int:
        return sum(len(share.parts) for share in self.shares)

    def __iter__(self) -> Iterator[Keys]:
        return (part.keys for share in self.shares for part in share.parts)
