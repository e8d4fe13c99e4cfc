"""Batches: their order, how an epoch is resumed and shared out, and errors from loader processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from defeat_cli.data.annotations import parse_annotations
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.loading import BatchOrder, evaluation_loader, training_loader
from defeat_cli.data.transforms import RandomFlip
from defeat_cli.errors import DataError

SIZES = [(10, 20)] * 13 + [(20, 10)] * 9


def indices(order: BatchOrder) -> list[int]:
    return [index for batch in order for _, index in batch]


def test_every_image_is_seen_once_in_batches_of_one_shape() -> None:
    order = BatchOrder(SIZES, batch_size=4, seed=1)
    order.set_epoch(5)
    batches = list(order)
    assert len(batches) == len(order) == order.batches_per_epoch == 6  # 22 images: 3 + 2 full ones, 1 + 1 left over
    assert sorted(indices(order)) == list(range(22))
    assert all(epoch == 5 for batch in batches for epoch, _ in batch)
    shapes = [{SIZES[index] for _, index in batch} for batch in batches]
    assert sorted(len(batch) for batch in batches) == [2, 4, 4, 4, 4, 4]
    assert [len(batch) for batch, shape in zip(batches, shapes, strict=True) if len(shape) > 1] == [2]


def test_few_images_are_not_lost() -> None:
    order = BatchOrder([(10, 20), (20, 10), (10, 10)], batch_size=8)
    assert [sorted(index for _, index in batch) for batch in order] == [[0, 1, 2]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def drawn(seed: int, epoch: int) -> list[int]:
        order = BatchOrder(SIZES, 4, seed)
        order.set_epoch(epoch)
        return indices(order)

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)


def test_start_leaves_out_what_is_done() -> None:
    order = BatchOrder(SIZES, 4)
    order.set_epoch(2)
    whole = list(order)
    order.set_epoch(2, start=4)
    assert list(order) == whole[4:]
    assert len(order) == 2
    assert order.batches_per_epoch == 6
    order.set_epoch(2, start=6)
    assert list(order) == []
    order.set_epoch(3)
    assert len(order) == 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for i in range(11):
        height, width = (8, 12) if i % 3 else (12, 8)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        boxes.append({"image_id": 100 + i, "category_id": 1, "bbox": [i % 5, 1, 3, 4]})
    content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": boxes}
    return DetectionDataset(parse_annotations(content, "a"), folder, True, [RandomFlip(0.5)], seed=2)


def epoch_of(loader: object, epoch: int, start: int = 0) -> list[tuple]:
    loader.batch_sampler.set_epoch(epoch, start)
    return [
        (ids, [image.tolist() for image in images], [target["boxes"].tolist() for target in targets])
        for images, targets, ids in loader
    ]


def test_batches_do_not_depend_on_workers_nor_on_what_was_read_before(data: DetectionDataset) -> None:
    alone = training_loader(data, 2, workers=0, seed=4)
    many = training_loader(data, 2, workers=2, seed=4)
    assert many.persistent_workers
    epochs = [epoch_of(many, epoch) for epoch in (0, 1)]
    assert epochs == [epoch_of(alone, epoch) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert epoch_of(many, 0, start=4) == epochs[0][4:]
    by_image = [
        {ids: boxes for batch in epoch for ids, boxes in zip(batch[0], batch[2], strict=True)} for epoch in epochs
    ]
    assert by_image[0] != by_image[1]  # the workers, which outlive an epoch, flip by the new one


def test_evaluation_keeps_the_order(data: DetectionDataset) -> None:
    batches = list(evaluation_loader(data, workers=0))
    assert [ids for _, _, ids in batches] == [[number] for number in range(1, 12)]
    images, targets, _ = batches[0]
    assert isinstance(images, list)
    assert images[0].dtype == torch.uint8
    assert set(targets[0]) == {"boxes", "labels"}
    few = evaluation_loader(Subset(data, [7, 2]), workers=0)
    assert [ids for _, _, ids in few] == [[8], [3]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_clear_message(tmp_path: Path, workers: int) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    images = [{"id": i, "file_name": f"{name}.png", "width": 8, "height": 8} for i, name in enumerate(("good", "bad"))]
    content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": []}
    data = DetectionDataset(parse_annotations(content, "a"), tmp_path, False)
    with pytest.raises(DataError) as caught:
        list(evaluation_loader(data, workers))
    assert str(caught.value) == f"{tmp_path / 'bad.png'}: is not an image that can be read"
