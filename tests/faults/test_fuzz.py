"""Whatever a user hands to the tool is used, or refused in words: no traceback, no hang, no half file.

A small share runs with the tests. More by hand, N cases of each kind:

    DEFEAT_FUZZ=N python -m pytest tests/faults/test_fuzz.py -q

Spoiled folders of data are in tests/data/test_fuzz.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.spoiling import OBJECTS, TOKENS, VALUES, spoiled_bytes, spoiled_text, spoiled_tree
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from tiny import COMMON, OWN, save_run
from typer.testing import CliRunner

from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.commands.app import app
from defeat_cli.config import schema as recipes
from defeat_cli.data.annotations import read_annotations
from defeat_cli.data.transforms import image_size, read_image
from defeat_cli.errors import DefeatError
from defeat_cli.jobs import bad_step

CASES = int(os.environ.get("DEFEAT_FUZZ", "12"))
SECONDS = 20
"""No case takes nearly as long, on a busy machine either; one that does hangs."""
FUZZ = settings(
    max_examples=CASES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # whoever mends a fault may add Phase.shrink, which takes minutes
    suppress_health_check=list(HealthCheck),
)


@contextmanager
def no_hang() -> Iterator[None]:
    """Raises where what is inside takes too long."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def tried(use: Callable[[Path], Any], path: Path) -> Any:
    """What using a file gives; None where it is refused, by its name."""
    with no_hang():
        try:
            return use(path)
        except DefeatError as error:
            refusal = str(error)
    assert path.name in refusal
    return None


def run(*arguments: object) -> str:
    """The command, which succeeds, or refuses with one message and exit code 2; what it printed."""
    with no_hang():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 2), result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the cases are written, one over the other."""
    return tmp_path_factory.mktemp("fuzz")


# --- recipes and --set

RECIPES = {name: path.read_text(encoding="utf-8") for name, path in recipes.shipped_recipes().items()}
WHOLE = recipes.Recipe().model_dump()
KEYS = [
    f"{section}.{key}"
    for section, keys in WHOLE.items()
    for key in (*keys, *(f"neck.{inner}" for inner in WHOLE["distillation"]["neck"] if section == "distillation"))
] + ["distillation.only", "x", "student", "", ".", "a.b.c", "student.backbone.x", "data..path"]


def use_recipe(path: Path) -> None:
    """Read a recipe; one that can be used is written, and read again the same."""
    recipe = tried(lambda path: recipes.load(str(path)), path)
    if recipe is not None:
        again = path.with_name("again.yaml")
        recipes.save(recipe, again)
        assert recipes.load(str(again)).model_dump() == recipe.model_dump()


@FUZZ
@given(st.data())
def test_recipes_as_bytes(folder, data):
    path = folder / "recipe.yaml"
    path.write_bytes(data.draw(spoiled_bytes(RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))].encode())))
    use_recipe(path)


@FUZZ
@given(st.data())
def test_recipes_as_text(folder, data):
    path = folder / "recipe.yaml"
    text = data.draw(spoiled_text(RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))]))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    use_recipe(path)


@FUZZ
@given(spoiled_tree(WHOLE))
def test_recipes_as_values(folder, content):
    path = folder / "recipe.yaml"
    try:
        text = yaml.safe_dump(content)
    except yaml.YAMLError:
        return
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    use_recipe(path)


SETTINGS = st.builds(
    lambda key, mark, value: f"{key}{mark}{value}",
    st.sampled_from(KEYS) | st.text(max_size=10),
    st.sampled_from(["=", "=", "=", "", "=="]),
    st.sampled_from([*TOKENS, *(json.dumps(value) for value in VALUES)]) | st.text(max_size=15),
)


@FUZZ
@given(st.lists(SETTINGS, min_size=1, max_size=3))
def test_set_on_the_command_line(folder, assignments):
    """Through the real command, which in the end finds no data."""
    output = run("check", "-r", "finetune_small", *[f"--set={text}" for text in assignments], "-d", folder / "nowhere")
    assert output.startswith("error: ")
    assert not (folder / "nowhere").exists()


# --- annotations and images

COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(3)],
    "categories": [{"id": 1, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [
        {
            "id": i,
            "image_id": i % 3,
            "category_id": 1 + 4 * (i % 2),
            "bbox": [i, 2, 20, 10.5],
            "area": 210,
            "iscrowd": 0,
        }
        for i in range(5)
    ],
}


NAMES = st.sampled_from(["images", "annotations", "categories", "id", "bbox"])


@FUZZ
@given(
    spoiled_tree(COCO)
    | st.recursive(st.sampled_from(VALUES), lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner))
)
def test_annotations(folder, content):
    path = folder / "train.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    read = tried(read_annotations, path)
    if read is not None:
        assert len(read.boxes) == len(read.labels) == len(read.images)
        assert ((read.labels >= 1) & (read.labels <= len(read.classes))).all()


def encoded(form: str, mode: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((31, 17)).convert(mode).save(file, form, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6
IMAGES = [
    encoded("jpeg", "RGB"),
    encoded("jpeg", "RGB", exif=TURNED),
    encoded("jpeg", "L", progressive=True),
    encoded("jpeg", "CMYK"),
    encoded("png", "RGBA"),
    encoded("png", "P"),
    encoded("png", "I;16"),
    encoded("webp", "RGB"),
    encoded("bmp", "RGB"),
    encoded("tiff", "RGB", compression="tiff_lzw"),
    encoded("gif", "P"),
]


@FUZZ
@given(st.sampled_from(IMAGES).flatmap(spoiled_bytes))
def test_images(folder, content):
    path = folder / "image.jpg"
    path.write_bytes(content)
    size, image = tried(image_size, path), tried(read_image, path)
    if size is not None and image is not None:
        assert image.shape == (3, *size)


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One of our own, of a tiny detector."""
    student = {"detector": "faster_rcnn", **COMMON, **OWN["faster_rcnn"], "widths": [2, 2, 2, 2], "fpn_channels": 2}
    data = {"short_side": [64], "long_side": 64}
    return save_run(tmp_path_factory.mktemp("run"), ["a", "b"], {**student, "head_channels": 4}, data)


def written(content: Any, form: str) -> bytes:
    """A checkpoint file as the libraries write it."""
    file = io.BytesIO()
    if form == "pickle":
        pickle.dump(content, file)
    elif form == "safetensors":
        from safetensors.torch import save

        return save({name: value.contiguous() for name, value in content["student"].items()})
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


@FUZZ
@given(data=st.data())
def test_checkpoints_as_bytes(folder, checkpoint, data):
    form = data.draw(st.sampled_from(["zip", "legacy", "pickle", "safetensors"]))
    path = folder / ("spoiled.safetensors" if form == "safetensors" else "spoiled.pt")
    whole = torch.load(checkpoint, weights_only=True)
    path.write_bytes(data.draw(spoiled_bytes(written(whole, form))))
    weights = tried(load_weights, path)
    assert weights is None or weights.state_dict


@FUZZ
@given(data=st.data())
def test_checkpoints_as_values(folder, checkpoint, data):
    path = folder / "spoiled.pt"
    whole = torch.load(checkpoint, weights_only=True)
    content = data.draw(spoiled_tree(whole, (*VALUES, *OBJECTS)))
    path.write_bytes(written(content, data.draw(st.sampled_from(["zip", "legacy", "pickle"]))))
    weights = tried(load_weights, path)
    assert weights is None or weights.state_dict


@FUZZ
@given(data=st.data())
def test_conversion_leaves_whole_files_or_none(folder, checkpoint, data):
    """Through the real command."""
    source, target = folder / "source.pt", folder / "target.pth"
    for path in folder.glob("target*"):
        path.unlink()
    whole = torch.load(checkpoint, weights_only=True)
    content = data.draw(spoiled_tree(whole, (*VALUES, *OBJECTS)))
    source.write_bytes(written(content, "zip"))
    output = run("convert", source, target)
    assert target.exists() is ("error" not in output)
    if target.exists():
        assert load_weights(target).state_dict


@pytest.fixture(scope="module")
def bad(tmp_path_factory, defeat, tiny) -> dict[str, Any]:
    """The content of a bad_step.pt."""
    folder = tmp_path_factory.mktemp("bad")
    rate = ["--set", "optimizer.lr=1e25", "--set", "optimizer.clip_norm=null", "--set", "schedule.warmup_steps=0"]
    defeat("train", "-r", tiny, "-o", folder / "run", *rate, code=2)
    return torch.load(folder / "run" / "bad_step.pt", weights_only=True)


@FUZZ
@given(data=st.data())
def test_bad_steps(folder, bad, data):
    path = folder / "bad_step.pt"
    torch.save(data.draw(spoiled_tree(bad, (*VALUES, *OBJECTS))), path)
    tried(bad_step.load, path)
