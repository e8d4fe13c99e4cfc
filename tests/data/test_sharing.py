"""Steps shared out over processes: each image once, by all counts that divide and that do not."""

import math
from itertools import chain

import pytest

from defeat_cli.data.loading import BatchOrder
from defeat_cli.data.sharing import StepOrder, pieces
from defeat_cli.errors import RecipeError

SIZES = [(10, 20)] * 13 + [(20, 10)] * 10
"""Six batches of four: three of landscape, two of portrait, and one of the three images that are left over."""


def shares(accumulate, size, epoch=1, start=0, batch_size=4):
    """The shares of all processes, step by step."""
    orders = [StepOrder(BatchOrder(SIZES, batch_size, seed=9), accumulate, rank, size) for rank in range(size)]
    for order in orders:
        order.set_epoch(epoch, start)
        assert list(order) == [part.keys for share in order.shares for part in share.parts]
        assert len(order) == len(list(order))
    assert {len(order.shares) for order in orders} == {orders[0].steps_per_epoch - start}
    return list(zip(*(order.shares for order in orders), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_every_image_counts_once_an_epoch_in_the_step_that_one_process_sees_it_in(accumulate, size):
    order = BatchOrder(SIZES, 4, seed=9)
    order.set_epoch(1)
    alone = list(order)
    steps = shares(accumulate, size)
    for number, step in enumerate(steps):
        batches = alone[number * accumulate : (number + 1) * accumulate]
        parts = [part for share in step for part in share.parts if part.counts]
        assert sorted(chain(*(part.keys for part in parts))) == sorted(chain(*batches))
        assert sorted(part.number for part in parts) == list(range(len(parts))) == list(range(step[0].total))
        # Every image of a batch weighs as much, and every batch.
        assert sum(1 / part.divisor for part in parts) == pytest.approx(1)
        for batch in batches:
            of_batch = [part for part in parts if part.keys[0] in batch]
            assert sum(1 / part.divisor for part in of_batch) == pytest.approx(1 / len(batches))
            assert {len(part.keys) * part.divisor for part in of_batch} == {len(batch) * len(batches)}
        assert [share.has_last for share in step].count(True) == 1
        # Whoever has nothing to do keeps the others company.
        assert all(share.parts and (share.parts[0].counts or len(share.parts) == 1) for share in step)


def test_a_process_alone_has_the_batches_as_they_are():
    (step, *_), *_ = shares(2, 1)
    order = BatchOrder(SIZES, 4, seed=9)
    order.set_epoch(1)
    assert [part.keys for part in step.parts] == list(order)[:2]
    assert [part.divisor for part in step.parts] == [2, 2]


def test_an_epoch_goes_on_after_its_first_steps():
    assert shares(2, 2, start=1) == shares(2, 2)[1:]
    assert shares(2, 3, start=3) == []


def test_who_has_no_part_of_a_smaller_step_repeats_one_that_does_not_count():
    # Six batches in steps of four: the second step has two, and four processes.
    company = [share.parts for share in shares(4, 4)[1]]
    assert [part.counts for (part,) in company] == [True, True, False, False]
    assert math.isinf(company[3][0].divisor)
    assert company[3][0].keys == company[1][0].keys


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "expected"),
    [(2, 8, 8, 1), (2, 8, 4, 1), (2, 8, 3, 1), (8, 1, 2, 2), (8, 1, 3, 3), (8, 3, 2, 2), (2, 1, 2, 2), (16, 1, 8, 8)],
)
def test_batches_are_cut_no_more_than_they_have_to(batch_size, accumulate, processes, expected):
    assert pieces(batch_size, accumulate, processes) == expected


def test_fewer_images_a_step_than_processes_are_refused():
    with pytest.raises(RecipeError, match=r"batch_size 2 x optimizer.accumulate 1 makes 2 images a step, fewer than"):
        pieces(2, 1, 3)
