"""Spoiled data sets of every layout: each is read, or refused in words. More cases by hand:

PYTHONPATH=.:tests python -c 'from data.test_fuzz import run; run(range(2000, 10000))'
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from data.layouts import write_coco, write_images, write_voc, write_yolo
from PIL import Image

from defeat_cli.data.dataset import overlap
from defeat_cli.data.formats import FORMATS
from defeat_cli.data.opening import open_split
from defeat_cli.errors import DataError

CASES = 2000
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Removing folders is slow on many disks."""
Tree = dict[str, bytes | None]
"""Path -> content; None for a folder."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.0, 1.5, 2**53 + 1, 2**70, 10**400, 1e308, -1e308, math.nan, math.inf,
    "", " ", "1", "1.0", "-1", "NaN", "1e999", "x", "dog", "a.jpg", "../a.jpg", "/", ".", "..", "a\0b", "\ud800",
    "\u2028", "x" * 5000, "ä\n", "http://[", "?d=", "%00", "\\",
    [], {}, [[]], [1, 2, 3, 4], [0, 0, 0, 0], {"id": 1}, [None] * 4, ["1", "2", "3", "4"],
)  # fmt: skip
TOKENS = (*map(str, VALUES), "<object>", "</annotation>", "&x;", "{", ":", "- ")
ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1", "gbk")


@cache
def template(layout: str) -> Tree:
    """A small sound data set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if layout in ("coco", "roboflow"):
            annotations, images = ("{}.json", "images") if layout == "coco" else ("{}/_annotations.coco.json", "{}")
            for split in ("train", "val"):
                files = [f"{split}_{i}.jpg" for i in range(3)]
                write_images(folder / images.format(split), *files)
                write_coco(folder / annotations.format(split), *files)
        elif layout == "yolo":
            write_yolo(folder, train=["a", "b"], val=["c"])
        else:
            write_voc(folder, train=["a", "b"], val=["c"])
            if layout == "xml":
                shutil.rmtree(folder / "ImageSets")
        return {
            path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))
        }


def spoil_json(rng: random.Random, content: bytes) -> bytes:
    """One value, key or entry changed, at any depth."""
    root = {"": json.loads(content)}
    place, key = root, ""
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    action = rng.randrange(4)
    if action == 0 and isinstance(place, dict) and place is not root:
        del place[key]
    elif action == 1 and isinstance(place, list):
        place.append(place[key])
    elif action == 2 and isinstance(place, dict):
        place[rng.choice(["id", "x", *map(str, place)])] = place[key]
    else:
        place[key] = rng.choice(VALUES)
    return json.dumps(root[""], ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")


def spoil_words(rng: random.Random, content: bytes) -> bytes:
    """A word of a text changed, or a line repeated, dropped or moved."""
    lines = content.decode("utf-8", "replace").split("\n")
    row = rng.randrange(len(lines))
    action = rng.randrange(4)
    if action == 0:
        del lines[row]
    elif action == 1:
        lines.insert(rng.randrange(len(lines)), lines[row])
    else:
        gap = rng.choice([" ", ">", "<", ":", ","])
        words = lines[row].split(gap)
        words[rng.randrange(len(words))] = rng.choice(TOKENS)
        lines[row] = gap.join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def spoil_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut off, changed, put in, or written in another encoding."""
    at = rng.randrange(len(content) + 1)
    action = rng.randrange(5)
    if action == 0:
        return content[:at]
    if action == 1:
        return content[:at] + rng.randbytes(rng.randrange(1, 8)) + content[at:]
    if action == 2:
        return content[:at] + rng.randbytes(1) + content[at + 1 :]
    if action == 3:
        return content.decode("latin-1").encode(rng.choice(ENCODINGS), "replace")
    return content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\0", b"\n\n"]))


def spoil_tree(rng: random.Random, tree: Tree) -> None:
    """A file or folder gone, moved, doubled, emptied, or turned into the other kind."""
    name = rng.choice(list(tree))
    beneath = [path for path in tree if path == name or path.startswith(f"{name}/")]
    action = rng.randrange(5)
    if action < 2:
        moved = {path: tree.pop(path) for path in beneath}
        if action:
            new = rng.choice(
                [f"{name}.txt", name.upper(), "x", f"{name} ", "images", "train.json", "data.yaml", "a.xml"]
            )
            tree.update({new + path.removeprefix(name): content for path, content in moved.items()})
    elif action == 2:
        for path in beneath:
            del tree[path]
        tree[name] = rng.choice([b"", b"{}", b"[]", None])
    elif action == 3:
        tree[f"{name}.{rng.choice(['bak', 'json', 'png', 'xml', 'txt'])}"] = tree[name]
    else:
        image = io.BytesIO()
        Image.new("RGB", rng.choice([(1, 4000), (1, 1), (10, 20)])).save(image, "png")
        tree[f"{Path(name).stem}.{rng.choice(['png', 'jpg', 'webp'])}"] = image.getvalue()


def spoiled(seed: int) -> tuple[str, Tree, random.Random]:
    rng = random.Random(seed)
    layout = rng.choice(["coco", "coco", "roboflow", "voc", "xml", "yolo", "yolo"])
    tree = dict(template(layout))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        texts = [name for name, content in tree.items() if content is not None and not name.endswith(".jpg")]
        spoilers: list[Callable] = [spoil_bytes, spoil_words, spoil_words]
        if rng.random() < 0.2 or not texts:
            if tree:
                spoil_tree(rng, tree)
            continue
        name = rng.choice(texts)
        try:
            json.loads(tree[name])
            spoilers += [spoil_json] * 6
        except ValueError:
            pass
        tree[name] = rng.choice(spoilers)(rng, tree[name])
    return layout, tree, rng


def use(folder: Path, rng: random.Random) -> None:
    """Everything that the tool does with data."""
    split = rng.choice(["train", "val", "train", "val", "test"])
    options: dict[str, Any] = {"val_fraction": 0.3 if split != "test" and rng.random() < 0.6 else None}
    if rng.random() < 0.3:
        odd = {
            "format": list(FORMATS),
            "annotations": ["train", "data.yaml", "val.json", "x\0", ".", "../.."],
            "images": ["images", "x\0", "."],
            "classes": [["dog"], []],
        }
        name = rng.choice(list(odd))
        options[name] = rng.choice(odd[name])
    data = open_split(folder, split, train=split == "train", flip=0.5, **options)
    data.refuse_vanishing([64], 64)
    list(data)
    scored = [
        {"image_id": row["image_id"], "category_id": row["category_id"]} for row in data.coco.dataset["annotations"]
    ]
    assert len(data.in_own_ids(scored)) == len(data.annotations.labels)
    if split == "train":
        assert overlap(data, data) is not None


def run(seeds: Iterable[int]) -> Counter[str]:
    """How many were read and refused; the first of each kind of exception besides is shown."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        for seed in seeds:
            layout, tree, rng = spoiled(seed)
            folder = Path(name) / str(seed)
            folder.mkdir()
            for path, content in tree.items():
                try:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).mkdir(exist_ok=True) if content is None else (folder / path).write_bytes(content)
                except OSError:  # a file stands where a folder should
                    outcomes["not written"] += 1
            try:
                use(folder, rng)
                outcomes[f"{layout} read"] += 1
            except DataError as error:
                where_or_what = str(folder) in str(error) or "data." in str(error)
                outcomes[f"{layout} refused" if where_or_what else f"seed {seed}: {error}"] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}, {layout}: {type(error).__name__}: {error}") from error
            shutil.rmtree(folder)
    return outcomes


def test_spoiled_data_is_read_or_refused_in_words() -> None:
    outcomes = run(range(CASES))
    for layout in ("coco", "roboflow", "voc", "xml", "yolo"):
        assert outcomes[f"{layout} read"] > 15
        assert outcomes[f"{layout} refused"] > 15
    assert not [outcome for outcome in outcomes if outcome.startswith("seed")]  # messages that name nothing


@pytest.mark.parametrize("layout", ["coco", "roboflow", "voc", "xml", "yolo"])
def test_what_is_not_spoiled_is_read(layout: str, tmp_path: Path) -> None:
    for path, content in template(layout).items():
        (tmp_path / path).mkdir(exist_ok=True) if content is None else (tmp_path / path).write_bytes(content)
    fraction = 0.4 if layout == "xml" else None
    assert len(open_split(tmp_path, "val", train=False, val_fraction=fraction)) >= 1
