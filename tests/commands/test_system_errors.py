"""What the system refuses is one line and exit code 2, and is found before the work whose result is to be written."""

import os

import pytest
from runs import setting

from defeat_cli.checkpoints import reading
from defeat_cli.config import schema as recipes


@pytest.fixture(scope="module")
def trained(teacher):
    return teacher.parent


@pytest.fixture
def worked(monkeypatch):
    """Fails the test where weights are read or data is opened: the work has begun by then."""

    def begun(*_, **__):
        pytest.fail("the work was begun")

    from defeat_cli import session
    from defeat_cli.checkpoints import loading
    from defeat_cli.gradients import report
    from defeat_cli.jobs import opening

    monkeypatch.setattr(session, "open_data", begun)
    monkeypatch.setattr(session, "build_student", begun)
    monkeypatch.setattr(loading, "read", begun)
    monkeypatch.setattr(opening, "load_detector", begun)
    monkeypatch.setattr(report, "run_gradient_maps", begun)


COMMANDS = {
    "eval --json": ["eval", "CHECKPOINT", "--json", "FOLDER"],
    "eval --save-detections": ["eval", "CHECKPOINT", "--save-detections", "FILE/detections.json"],
    "check --json": ["check", "-r", "TINY", "--json", "FOLDER"],
    "check --sheet": ["check", "-d", "SHAPES", "--sheet", "FILE/sheet.png"],
    "predict": ["predict", "CHECKPOINT", "IMAGE", "-o", "FILE/out"],
    "predict --save-coco": ["predict", "CHECKPOINT", "IMAGE", "-o", "HELD", "--overwrite", "--save-coco"],
    "predict --save-yolo": ["predict", "CHECKPOINT", "IMAGE", "-o", "HELD", "--overwrite", "--save-yolo"],
    "predict --crop": ["predict", "CHECKPOINT", "IMAGE", "-o", "HELD", "--overwrite", "--crop"],
    "export": ["export", "CHECKPOINT", "FOLDER/x.onnx", "--overwrite"],
    "convert": ["convert", "CHECKPOINT", "FOLDER/x.pth", "--overwrite"],
    "convert, its recipe": ["convert", "CHECKPOINT", "HELD/x.pth", "--overwrite"],
    "gradmap": ["gradmap", "IMAGE", "-c", "CHECKPOINT", "-o", "FILE"],
    "gradmap, its figures": ["gradmap", "IMAGE", "-c", "CHECKPOINT", "-o", "HELD"],
    "train": ["train", "-r", "TINY", "-o", "FILE/run"],
    "train, its log": ["train", "-r", "TINY", "-o", "HELD"],
    "ablate": ["ablate", "neck", "-r", "TINY", "-t", "CHECKPOINT", "-o", "FILE/study"],
    "ablate, its report": ["ablate", "neck", "-r", "TINY", "-t", "CHECKPOINT", "-o", "HELD"],
    "ablate --show-masks": ["ablate", "-r", "TINY", "--show-masks", "IMAGE", "-o", "FILE/masks"],
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_a_folder_or_a_file_in_the_way_is_found_before_the_work(case, defeat, tiny, trained, shapes, tmp_path, worked):
    """FOLDER holds folders where files are to be, HELD too, under each command's own names; FILE is a file."""
    (tmp_path / "file").write_text("x")
    for folder, names in {
        "folder": ["x.onnx", "x.pth"],
        "held": ["predictions.json", "classes.txt", "x.yaml", "gradients.json", "metrics.jsonl", "study.md"],
    }.items():
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
    (tmp_path / "held" / "crops").write_text("x")
    places = {
        "CHECKPOINT": trained / "best.pt", "IMAGE": next((shapes / "images").iterdir()), "TINY": tiny,
        "SHAPES": shapes, "FOLDER": tmp_path / "folder", "HELD": tmp_path / "held", "FILE": tmp_path / "file",
    }  # fmt: skip
    arguments = []
    for word in COMMANDS[case]:
        first, _, rest = word.partition("/")
        arguments.append(places[first] / rest if first in places and rest else places.get(first, word))
    before = sorted(tmp_path.rglob("*"))
    output = defeat(*arguments, code=2)
    assert output.count("\n") == 1
    assert (
        "is a folder; name a file" in output
        or "is no folder, so nothing can be written there" in output
        or ("is a file; --output must name a folder" in output)
    )
    assert str(tmp_path) in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is refused to root")
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(defeat, trained, tiny, tmp_path, worked):
    (tmp_path / "kept").mkdir(mode=0o500)
    for arguments in (["train", "-r", tiny, "-o"], ["eval", trained / "best.pt", "--json"]):
        assert "cannot be written to" in defeat(*arguments, tmp_path / "kept" / "x", code=2)


def test_what_the_system_says_is_one_line(defeat, trained, tmp_path, monkeypatch):
    from defeat_cli.jobs import scoring

    def refused(*_):
        raise OSError(28, "No space left on device", "figures.json")

    monkeypatch.setattr(scoring, "write_json", refused)
    output = defeat("eval", trained / "best.pt", "--json", tmp_path / "x.json", "--quiet", code=2)
    assert output == "error: figures.json: No space left on device\n"


def test_a_file_without_permission_is_one_line(defeat, tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(reading, "_read_zip", refused)
    assert f"error: {tmp_path / 'x.pt'}: cannot be read: Permission denied" in defeat("eval", tmp_path / "x.pt", code=2)


SEEDS = ["run.seed", "data.split_seed", "data.shapes.seed"]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 10**40])
def test_a_seed_that_is_too_large_or_negative_is_refused(defeat, tiny, seed, tmp_path):
    for key in SEEDS:
        output = defeat("train", "-r", tiny, "-o", tmp_path / "run", *setting(**{key: seed}), code=2)
        assert f"{key}: should be" in output
        assert str(seed) in output
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_is_taken(defeat, tiny, tmp_path):
    defeat("train", "-r", tiny, "-o", tmp_path / "run", "--seed", 2**32 - 1, *setting(schedule__epochs=1))


@pytest.mark.parametrize(
    ("value", "taken"),
    [(500, True), ("30m", True), ("2h", True), ("90s", True), ("1d", True)]
    + [(value, False) for value in (0, -1, "0m", "m", "1.5h", "2 h", "soon", "true", "null", 1.5)],
)
def test_how_often_a_run_is_saved_is_steps_or_a_time(value, taken):
    from defeat_cli.config.yaml import parse_assignments
    from defeat_cli.errors import RecipeError

    said = parse_assignments([f"run.save_every={value}"])
    if taken:
        assert recipes.load(None, said).run.save_every == value
    else:
        with pytest.raises(RecipeError, match=r"run\.save_every: should be a number of steps, e\.g\. 500, or a time"):
            recipes.load(None, said)


def test_a_recipe_with_the_old_key_is_told_the_new_one(defeat, tiny):
    output = defeat("train", "-r", tiny, "--set", "run.checkpoint_every=5", code=2)
    assert "run.checkpoint_every: is run.save_every now" in output


def test_names_are_shown_as_they_are(defeat, shapes, tmp_path):
    """rich reads `:x:` as a picture and `[/b]` as an end of bold: neither is what a file's name means."""
    assert f"{tmp_path}/:x:.pt: no such file" in defeat("eval", tmp_path / ":x:.pt", code=2)
    recipe = tmp_path / "of [/b] :x:.yaml"
    assert f"written: {recipe}\n" in defeat("init", shapes, "-o", recipe)
