"""Data that is wrong, found before the first step; and images that are left out, with everything that depends on it."""

import json
import shutil

import pytest
from runs import assert_resumes_bit_for_bit, dying_at, metrics


@pytest.fixture
def folder(shapes, tmp_path):
    """A copy of the drawn data, to be spoiled."""
    return shutil.copytree(shapes, tmp_path / "set")


def image(folder, split, number):
    return folder / "images" / f"{split}_{number:05d}.png"


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(folder, split, change):
    content = json.loads((folder / f"{split}.json").read_text())
    change(content)
    (folder / f"{split}.json").write_text(json.dumps(content))


def other_classes(content):
    for category in content["categories"]:
        category["name"] = f"not {category['name']}"


def remove(content, names):
    content["images"] = [row for row in content["images"] if row["file_name"] not in names]
    ids = {row["id"] for row in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]


SPOILS = {
    "a validation image is cut short": (lambda f: cut_short(image(f, "val", 3)), "val_00003.png: cannot be read"),
    "a training image is cut short": (lambda f: cut_short(image(f, "train", 3)), "train_00003.png: cannot be read"),
    "an image is empty": (lambda f: image(f, "val", 2).write_bytes(b""), "val_00002.png: is an empty file"),
    "a validation image has another size": (
        lambda f: edit(f, "val", lambda c: c["images"][4].update(width=63)), "is 64x64, but its annotations say 63x64",
    ),
    "validation has other classes": (lambda f: edit(f, "val", other_classes), "shares no class with the training data"),
    "a name climbs out of the folder": (
        lambda f: edit(f, "val", lambda c: c["images"][4].update(file_name="../../x.png")), "lies outside of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS)
def test_it_is_found_before_anything_is_written(spoil, defeat, tiny, folder, tmp_path):
    change, told = SPOILS[spoil]
    change(folder)
    assert told in defeat("train", "-r", tiny, "-d", folder, "-o", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_headers_alone_find_wrong_sizes(defeat, tiny, folder, tmp_path):
    edit(folder, "val", lambda content: content["images"][4].update(width=63))
    options = ["-r", tiny, "-d", folder, "--set", "data.verify=headers"]
    assert "annotations say 63x64" in defeat("train", *options, "-o", tmp_path / "run", code=2)
    output = defeat("train", *options, "--set", "data.on_bad_image=skip", "-o", tmp_path / "run", code=2)
    assert "skip needs verify: full" in output


def test_check_and_train_tell_the_same_of_the_data(defeat, tiny, folder, tmp_path):
    shutil.copy(image(folder, "train", 0), image(folder, "val", 0))
    edit(folder, "val", lambda c: c.update(annotations=[a for a in c["annotations"] if a["category_id"] != 1]))
    outputs = [
        defeat("check", "-r", tiny, "-d", folder),
        defeat("train", "-r", tiny, "-d", folder, "-o", tmp_path / "run", "--set", "schedule.epochs=1"),
    ]
    notes = [output.splitlines()[: output.splitlines().index(next(
        line for line in output.splitlines() if line.startswith(("Detectors", "student:")))
    )] for output in outputs]  # fmt: skip
    assert notes[0] == notes[1]
    text = "\n".join(notes[0])
    assert "\ntraining: 12 images of 64x64" in text
    assert "validation: 6 images of 64x64" in text
    assert "warning: 1 of 6 validation images is a training image too (val_00000.png)" in text
    assert "class circle: has boxes in training and none in validation" in text


@pytest.fixture
def broken(folder):
    """Five images that cannot be used, four of them for training: a batch of four could be all of these."""
    for number in (1, 2):
        cut_short(image(folder, "train", number))
    image(folder, "train", 3).unlink()
    image(folder, "train", 4).write_bytes(b"")
    cut_short(image(folder, "val", 5))
    return folder


def test_images_are_left_out_counted_and_reported(defeat, tiny, broken, tmp_path):
    """The run is that of a data set without these images, to the last bit."""
    skip = ["--set", "data.on_bad_image=skip"]
    output = defeat("train", "-r", tiny, "-d", broken, "-o", tmp_path / "run", *skip)
    assert "warning: 4 of 12 training images are left out (data.on_bad_image: skip)" in output
    assert "warning: 1 of 6 validation images is left out" in output
    results = json.loads((tmp_path / "run/results.json").read_text())
    left_out = {"training": [image(broken, "train", i) for i in (3, 4, 1, 2)], "validation": [image(broken, "val", 5)]}
    assert {split: set(paths) for split, paths in results["left_out"].items()} == {
        split: set(map(str, paths)) for split, paths in left_out.items()
    }
    names = {split: [path.name for path in paths] for split, paths in left_out.items()}
    thinned = shutil.copytree(broken, tmp_path / "thinned")
    for split, gone in (("train", names["training"]), ("val", names["validation"])):
        edit(thinned, split, lambda content, gone=gone: remove(content, gone))
    defeat("train", "-r", tiny, "-d", thinned, "-o", tmp_path / "other")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "other")
    # The checkpoint remembers it: `eval` scores the same images to the same figure.
    defeat("eval", tmp_path / "run/best.pt", "--json", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())["AP"] == results["student"]["AP"]
    # Of other data it does not, and says how.
    output = defeat("eval", tmp_path / "other/best.pt", "--data", broken, code=2)
    assert "val_00005.png: cannot be read" in output
    assert "--set data.on_bad_image=skip" in output
    output = defeat("eval", tmp_path / "other/best.pt", "--data", broken, *skip)
    assert "1 of 6 validation images is left out" in output


def test_a_run_that_leaves_images_out_resumes_bit_for_bit(defeat, tiny, broken, tmp_path):
    arguments = ["-r", tiny, "-d", broken, "--set", "data.on_bad_image=skip", "--set", "run.save_every=1"]
    assert_resumes_bit_for_bit(defeat, arguments, tmp_path, step=3)


def test_nothing_left_to_learn_from_is_said(defeat, tiny, folder, tmp_path):
    for number in range(6):
        cut_short(image(folder, "val", number))
    output = defeat("train", "-r", tiny, "-d", folder, "--set", "data.on_bad_image=skip", "-o", tmp_path / "r", code=2)
    assert "the validation images have no boxes" in output


def test_a_broken_image_without_annotations_is_found_or_left_out(defeat, tiny, teacher, folder, tmp_path):
    extra = tmp_path / "extra"
    extra.mkdir()
    for number in range(4):
        shutil.copy(image(folder, "train", number), extra)
    cut_short(extra / "train_00002.png")
    (extra / "train_00003.png").write_bytes(b"")
    options = ["-r", tiny, "-t", teacher, "-d", folder, "--set", f"data.unlabelled={extra}"]
    assert "train_00003.png: is an empty file" in defeat("check", *options, code=2)
    (extra / "train_00003.png").unlink()
    assert "train_00002.png: cannot be read" in defeat("check", *options, code=2)
    output = defeat("check", *options, "--set", "data.on_bad_image=skip")
    assert "unlabelled: 2 images, 2 beside each batch" in output
    assert "warning: 1 of 3 unlabelled images is left out" in output


def test_a_run_that_left_images_out_notices_that_others_are(defeat, tiny, broken, tmp_path):
    run = ["train", "-r", tiny, "-d", broken, "-o", tmp_path / "run", "--set", "data.on_bad_image=skip"]
    with dying_at(3):  # of four: eight images, two epochs
        defeat(*run)
    cut_short(image(broken, "train", 7))
    output = defeat(*run, "--resume", code=2)
    assert "training images: 8 then, 7 now" in output
