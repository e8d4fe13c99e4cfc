"""Images without annotations: what a folder gives, and which of them go with which batch."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defeat_cli.data.loading import BatchOrder
from defeat_cli.data.opening import open_split
from defeat_cli.data.transforms import RandomFlip
from defeat_cli.data.unlabelled import ImageFolder, MixedOrder, mixed_loader
from defeat_cli.errors import DataError


def draw(path: Path, height: int = 8, width: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, height in (("b.png", 8), ("a.PNG", 16), ("deep/er/c.bmp", 8), (".hidden/d.png", 8), (".e.png", 8)):
        draw(tmp_path / "more" / name, height)
    (tmp_path / "more" / "deep" / "notes.txt").write_text("nothing")
    return tmp_path / "more"


def test_a_folder_gives_its_images_and_those_of_its_subfolders(folder):
    (folder / "deep" / "up").symlink_to(folder)
    images = ImageFolder(folder)
    assert images.names == ["a.PNG", "b.png", "deep/er/c.bmp"]
    assert images.sizes == [(16, 12), (8, 12), (8, 12)]
    assert images.others == 1
    image, target, name = images[0, 0]
    assert image.tolist() == np.array(Image.open(folder / "a.PNG")).transpose(2, 0, 1).tolist()
    assert target is None
    assert name == "a.PNG"


def test_flips_depend_on_seed_pass_and_index_alone(folder):
    plain = ImageFolder(folder)
    keys = [(number, index) for number in range(8) for index in range(3)]

    def flips(seed: int) -> list[bool]:
        images = ImageFolder(folder, [RandomFlip(0.5)], seed)
        drawn = [images[key].image for key in reversed(keys)][::-1]
        for key, image in zip(keys, drawn, strict=True):
            assert torch.equal(image, plain[key].image) or torch.equal(image, plain[key].image.flip(-1))
        return [not torch.equal(image, plain[key].image) for key, image in zip(keys, drawn, strict=True)]

    assert flips(0) == flips(0) != flips(1)
    assert 4 < sum(flips(0)) < 20
    assert all(torch.equal(ImageFolder(folder, [RandomFlip(1.0)])[k].image, plain[k].image.flip(-1)) for k in keys[:3])


def test_what_cannot_be_used_is_named(folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        ImageFolder(folder / "nowhere")
    with pytest.raises(DataError, match=r"b\.png: no such folder"):
        ImageFolder(folder / "b.png")
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").touch()
    with pytest.raises(DataError, match=r"empty: no images in this folder; files ending in \.bmp, .* count"):
        ImageFolder(folder / "empty")
    for name in "wxyz":
        (folder / f"{name}.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        ImageFolder(folder)
    first = ", ".join(f"{folder / name}.jpg: is not an image that can be read" for name in "wxy")
    assert str(caught.value) == f"data.unlabelled: {first} and 1 more. Mend them, or move them elsewhere"


def test_an_image_cut_short_is_named_when_it_is_read(folder):
    draw(folder / "f.jpg", 80, 120)
    content = (folder / "f.jpg").read_bytes()
    (folder / "f.jpg").write_bytes(content[: len(content) // 2])
    images = ImageFolder(folder)
    with pytest.raises(DataError, match=r"f\.jpg: cannot be read"):
        images[0, 3]


def test_an_image_of_which_resizing_leaves_nothing_is_named(folder):
    draw(folder / "line.png", 1, 40)
    images = ImageFolder(folder)
    images.refuse_vanishing([8], 40)
    with pytest.raises(DataError, match=r"line\.png: is 40x1 \(width x height\); resized to a long side of 30"):
        images.refuse_vanishing([8], 30)


def test_images_that_are_annotated_too_are_counted_as_files_and_not_by_name(shapes, tmp_path):
    data = open_split(shapes, "train", train=True)
    known = [shapes / "images" / data.file_name(i) for i in range(3)]
    os.symlink(known[0], tmp_path / known[0].name)
    (tmp_path / "deep").mkdir()
    os.link(known[1], tmp_path / "deep" / known[1].name)
    shutil.copy(known[2], tmp_path / known[2].name)
    assert ImageFolder(tmp_path).shared_with(data) == 2
    # The folder holds the images of both splits.
    assert ImageFolder(shapes / "images").shared_with(data) == len(data) == 12


SIZES, MORE = [(10, 20)] * 5, [(10, 20)] * 4
"""Three batches of two an epoch; passes of a batch of three and one of one image."""


def epoch_of(order: BatchOrder, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    order.set_epoch(epoch, start)
    return list(order)


def test_unlabelled_images_cycle_beside_the_labelled_batches():
    order, alone = MixedOrder(SIZES, 2, MORE, 3, seed=1), BatchOrder(SIZES, 2, seed=1)
    beside = []
    for epoch in range(4):
        for batch, labelled in zip(epoch_of(order, epoch), epoch_of(alone, epoch), strict=True):
            assert batch[: len(labelled)] == labelled
            beside.append(batch[len(labelled) :])
    # Twelve batches take six passes, each over all four images, which are behind the five labelled ones.
    assert sorted(map(len, beside)) == [1] * 6 + [3] * 6
    for number in range(6):
        of_pass = list(chain(*beside[2 * number : 2 * number + 2]))
        assert sorted(of_pass) == [(number, index) for index in range(5, 9)]
    assert len({str([index for _, index in chain(*beside[2 * n : 2 * n + 2])]) for n in range(6)}) > 1


def test_a_resumed_epoch_goes_on_with_the_same_images():
    order = MixedOrder(SIZES, 2, MORE, 3, seed=1)
    for epoch in range(3):
        whole = epoch_of(order, epoch)
        assert len(order) == 3
        for start in range(4):
            assert epoch_of(MixedOrder(SIZES, 2, MORE, 3, seed=1), epoch, start) == whole[start:]


def test_a_folder_smaller_than_a_batch_gives_all_its_images_each_time():
    order = MixedOrder(SIZES, 2, MORE[:2], 8)
    assert [sorted(index for _, index in batch if index >= 5) for batch in order] == [[5, 6]] * 3


def test_pieces_of_a_batch_have_labelled_images_and_their_part_of_the_others():
    order = MixedOrder([(10, 20)] * 7, 4, [(10, 20)] * 5, 3)
    whole, last = sorted(order, key=lambda batch: -order.images_of(batch))
    assert [order.images_of(batch) for batch in (whole, last)] == [4, 3]
    for batch in (whole, last):
        cut = order.cut(batch, 2)
        assert sorted(chain(*cut)) == sorted(batch)
        assert [order.images_of(keys) for keys in cut] == [2, order.images_of(batch) - 2]
        assert max(map(len, cut)) - min(map(len, cut)) <= 2
    assert [order.images_of(keys) for keys in order.cut(last, 8)] == [1, 1, 1]


def test_batches_do_not_depend_on_loader_processes(shapes, folder):
    data = open_split(shapes, "train", train=True, flip=0.5, seed=3)

    def batches(workers: int) -> list:
        loader = mixed_loader(data, ImageFolder(folder, [RandomFlip(0.5)], 3), 4, 2, workers, seed=3)
        found = []
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)
            found += [
                (ids, [i.tolist() for i in images], [t is None for t in targets]) for images, targets, ids in loader
            ]
        return found

    alone = batches(0)
    assert batches(1) == alone
    for _, _, unlabelled in alone:
        assert unlabelled[:4] == [False] * 4
        assert unlabelled[4:] in ([True], [True] * 2)
    # Six batches take three passes over the three images.
    assert Counter(chain(*(ids[4:] for ids, _, _ in alone))) == {"a.PNG": 3, "b.png": 3, "deep/er/c.bmp": 3}
