"""The drawn data set: the same everywhere, with tight boxes, on disk whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defeat_cli.data.formats import shapes
from defeat_cli.data.formats.shapes import CLASSES, draw_scene, draw_shapes
from defeat_cli.data.opening import open_split
from defeat_cli.errors import DataError


def drawn(folder: Path, **settings: int) -> Path:
    return draw_shapes(folder, **{"train_images": 12, "val_images": 5, "size": 64, **settings})


def fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted((folder / "images").iterdir()):
        digest.update(file.name.encode() + Image.open(file).tobytes())
    for split in ("train", "val"):
        digest.update((folder / f"{split}.json").read_bytes())
    return digest.hexdigest()


def test_is_a_data_set_in_the_simple_layout(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "new" / "shapes")
    assert sorted(path.name for path in folder.iterdir()) == ["images", "shapes.json", "train.json", "val.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["shapes"]
    train = open_split(folder, "train", train=True)
    val = open_split(folder, "val", train=False)
    assert (len(train), len(val)) == (12, 5)
    assert train.classes == val.classes == list(CLASSES)
    assert train[0].image.shape == (3, 64, 64)
    assert not any("without area" in note or "beyond" in note for note in train.notes)


def test_depends_on_the_seed_alone(tmp_path: Path) -> None:
    first = fingerprint(drawn(tmp_path / "a"))
    assert fingerprint(drawn(tmp_path / "b")) == first
    assert fingerprint(drawn(tmp_path / "c", seed=1)) != first
    more = drawn(tmp_path / "d", train_images=14)
    assert (more / "images/train_00003.png").read_bytes() == (tmp_path / "a/images/train_00003.png").read_bytes()
    assert (more / "images/val_00003.png").read_bytes() == (tmp_path / "a/images/val_00003.png").read_bytes()
    assert (more / "images/val_00003.png").read_bytes() != (more / "images/train_00003.png").read_bytes()


def test_boxes_are_tight_around_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in flat colours, one for each object, the pixels of a colour end where the object's box does."""
    monkeypatch.setattr(shapes._Scene, "_background", lambda s: Image.new("RGB", (s.side, s.side), (0, 0, 255)))
    monkeypatch.setattr(
        shapes._Scene, "_fill", lambda s, size, hue: Image.new("RGB", size, (255, 20 * len(s.kinds), 0))
    )
    monkeypatch.setattr(shapes._Scene, "_cast_shadow", lambda *_: None)
    monkeypatch.setattr(shapes._Scene, "add_clutter", lambda s: None)
    monkeypatch.setattr(shapes._Scene, "photograph", lambda s: s.canvas)
    boxes_seen = 0
    for seed in range(40):
        canvas, objects = draw_scene(np.random.default_rng(seed), 96)
        pixels = np.asarray(canvas)
        extents = set()
        for green in np.unique(pixels[pixels[..., 0] == 255][:, 1]):
            rows, columns = np.nonzero((pixels[..., 0] == 255) & (pixels[..., 1] == green))
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            extents.add(tuple(corner / shapes.FINE for corner in corners))
        boxes = {box for _, box in objects}
        assert boxes <= extents
        boxes_seen += len(boxes)
    assert boxes_seen > 80


def test_scenes_vary() -> None:
    scenes = [draw_scene(np.random.default_rng(seed), 128)[1] for seed in range(120)]
    counts = [len(objects) for objects in scenes]
    assert 0 in counts
    assert max(counts) == shapes.MAX_OBJECTS
    boxes = np.array([box for objects in scenes for _, box in objects])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert {kind for objects in scenes for kind, _ in objects} == set(range(len(CLASSES)))
    shares = [(areas < 32**2).mean(), ((areas >= 32**2) & (areas < 96**2)).mean(), (areas >= 96**2).mean()]
    assert shares[0] > 0.3
    assert shares[1] > 0.3
    assert shares[2] > 0.005


def test_a_hidden_object_is_not_annotated() -> None:
    scene = shapes._Scene(np.random.default_rng(0), 64)
    scene.add_object(20.0)
    assert len(scene.visible_objects()) == 1
    scene._paint([np.array([[-10.0, -10.0], [400.0, -10.0], [400.0, 400.0], [-10.0, 400.0]])], owner=0)
    assert scene.visible_objects() == []


def test_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = drawn(tmp_path / "shapes")
    monkeypatch.setattr(shapes, "_draw_split", lambda *_: pytest.fail("drawn again"))
    assert drawn(folder) == folder


def test_other_settings_and_other_content_are_refused(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "shapes")
    with pytest.raises(DataError, match=r"shapes: holds shapes drawn with other settings \(size 64 instead of 32\)"):
        drawn(folder, size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(DataError, match=r"mine: holds something other than drawn shapes.*train --data \S+mine$"):
        drawn(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert json.loads((drawn(tmp_path / "empty") / "train.json").read_text())["images"]


def test_nothing_is_left_of_a_drawing_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_draw_split", fail)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []
