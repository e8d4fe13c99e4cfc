"""Every image read once: what is found, what is remembered, and that nothing else is touched by it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data.layouts import write_coco
from PIL import Image

from defeat_cli.data import verification
from defeat_cli.data.faults import IMAGE_RULES, Faults
from defeat_cli.data.opening import open_split
from defeat_cli.data.verification import Verifier, verified
from defeat_cli.errors import DataError

NAMES = [f"{i}.png" for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images of noise."""
    (tmp_path / "set/images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(tmp_path / "set/images" / name)
    write_coco(tmp_path / "set/train.json", *NAMES)
    return tmp_path / "set"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of images that were decoded since the list was cleared, in this process."""
    names: list[str] = []
    original = verification.read_image

    def noted(path, size):
        names.append(path.name)
        return original(path, size)

    monkeypatch.setattr(verification, "read_image", noted)
    return names


def opened(folder: Path):
    return open_split(folder, "train", train=True)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_found_and_left_out(folder: Path, workers: int) -> None:
    for name in ("3.png", "20.png"):
        cut_short(folder / "images" / name)
    done: list[int] = []
    with pytest.raises(DataError) as caught:
        verified(opened(folder), Faults(), Verifier(workers=workers))
    message = str(caught.value).splitlines()
    assert message[0] == f"{folder}/train.json: 2 of its 40 images cannot be used"
    assert [line.split("/")[-1].split(":")[0] for line in message[1:]] == ["3.png", "20.png"]
    data = verified(opened(folder), Faults(IMAGE_RULES), Verifier(workers=workers, on_image=done.append))
    assert [data.file_name(i) for i in range(len(data))] == [name for name in NAMES if name not in ("3.png", "20.png")]
    assert [(fault.rule, fault.image.name) for fault in data.left_out] == [
        ("truncated", "3.png"),
        ("truncated", "20.png"),
    ]
    assert sum(done) == 40
    assert len(np.unique(data.digests)) == 38
    # Boxes and ground truth are those of the images that are left.
    assert [len(data[i].target["boxes"]) for i in (0, 37)] == [1, 1]
    assert len(data.coco.dataset["images"]) == 38


def test_sound_images_are_remembered_until_their_files_change(folder: Path, tmp_path: Path, read: list[str]) -> None:
    reader = Verifier(cache=tmp_path / "cache")
    first = verified(opened(folder), Faults(), reader)
    assert read == NAMES
    read.clear()
    assert verified(opened(folder), Faults(), reader).digests.tolist() == first.digests.tolist()
    assert read == []
    os.utime(folder / "images/5.png", ns=(0, 7))
    cut_short(folder / "images/6.png")
    for _ in range(2):  # what is broken is not remembered
        data = verified(opened(folder), Faults(IMAGE_RULES), reader)
        assert [fault.image.name for fault in data.left_out] == ["6.png"]
    assert read == ["5.png", "6.png", "6.png"]
    read.clear()
    shutil.copy(folder / "images/7.png", folder / "images/6.png")
    write_coco(folder / "train.json", *NAMES[:10])
    data = verified(opened(folder), Faults(), reader)
    assert read == ["6.png"]
    assert data.digests[6] == data.digests[7]
    assert list((tmp_path / "cache/images").iterdir()) == [next((tmp_path / "cache/images").glob("*.npz"))]


def test_another_annotated_size_is_looked_at_anew(folder: Path, tmp_path: Path) -> None:
    reader = Verifier(cache=tmp_path / "cache")
    verified(opened(folder), Faults(), reader)
    rows = [{"id": 1, "file_name": NAMES[0], "width": 21, "height": 10}]
    write_coco(folder / "train.json", NAMES[0], images=rows)
    for full in (True, False):
        with pytest.raises(DataError, match=r"is 20x10, but its annotations say 21x10"):
            verified(opened(folder), Faults(), reader._replace(full=full))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", None])
def test_a_damaged_memory_does_no_harm(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    reader = Verifier(cache=tmp_path / "cache")
    expected = verified(opened(folder), Faults(), reader).digests.tolist()
    (memory,) = (tmp_path / "cache/images").iterdir()
    memory.write_bytes(memory.read_bytes()[:-300] if content is None else content)
    assert verified(opened(folder), Faults(), reader).digests.tolist() == expected
    memory.unlink()
    memory.parent.rmdir()
    memory.parent.write_text("a file where a folder should be")
    assert verified(opened(folder), Faults(), reader).digests.tolist() == expected


@pytest.mark.parametrize(("offset", "value"), [(10, 97), (8, 1)], ids=["compression", "encryption"])
def test_a_memory_whose_zip_says_nonsense_does_no_harm(folder: Path, tmp_path: Path, offset: int, value: int) -> None:
    """An entry of a zip's directory has its flags at 8 and its method at 10."""
    reader = Verifier(cache=tmp_path / "cache")
    expected = verified(opened(folder), Faults(), reader).digests.tolist()
    (memory,) = (tmp_path / "cache/images").iterdir()
    content = bytearray(memory.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value
    memory.write_bytes(content)
    assert verified(opened(folder), Faults(), reader).digests.tolist() == expected


def test_headers_alone_do_not_tell_that_an_image_is_cut_short(folder: Path, read: list[str]) -> None:
    cut_short(folder / "images/3.png")
    data = verified(opened(folder), Faults(), Verifier(full=False))
    assert (len(data), data.digests, read) == (40, None, [])


def test_training_draws_as_if_nothing_had_been_read(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    verified(opened(folder), Faults(), Verifier(workers=2))
    assert torch.equal(torch.rand(2), expected)
