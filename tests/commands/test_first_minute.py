"""The first minute: no recipe, no options, nothing at all."""

import os
import re

import pytest

from defeat_cli.config import schema as recipes
from defeat_cli.engine.runs import RunFolder, newest_checkpoint
from defeat_cli.jobs import ablating


def test_defeat_alone_and_train_alone_say_in_five_lines_what_to_do(defeat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = defeat()
    steps = [line for line in alone.splitlines() if line.startswith("  ")]
    assert len(steps) == 5
    assert max(map(len, steps)) <= 80
    for command in re.findall(r"defeat (\w+)", "\n".join(steps)):
        assert "Usage" in defeat(command, "--help")
    output = defeat("train", code=2)
    assert all(step in output for step in steps)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chosen(defeat, teacher, shapes, tmp_path_factory):
    """A run whose recipe was chosen."""
    folder = tmp_path_factory.mktemp("chosen")
    before = os.getcwd()
    os.chdir(folder)
    output = defeat("train", "--teacher", teacher, "--data", shapes, "--set", "schedule.epochs=1")
    os.chdir(before)
    return folder, output


def test_train_without_a_recipe_chooses_one_says_why_and_keeps_it(chosen, shapes):
    folder, output = chosen
    name = "faster_rcnn_regnet_from_regnet_shapes"
    assert f"no --recipe, so one is chosen: {name}, for a" in output
    assert "12 training images of 64 x 64 pixels" in output
    assert "backbone regnet: the teacher's, with half its widths" in output
    assert "epochs" not in output[output.index("one is chosen") : output.index("student: 1 epoch,")]
    run = RunFolder(folder / "runs" / name)
    assert run.finished
    recipe = recipes.load(str(run / "recipe.yaml"))
    assert (recipe.student.widths, recipe.data.short_side, recipe.schedule.epochs) == ([8, 8, 8, 8], [64], 1)


def test_a_chosen_run_goes_on_by_the_recipe_that_it_has(chosen, defeat, monkeypatch, teacher, shapes):
    folder, _ = chosen
    monkeypatch.chdir(folder)
    run = "runs/faster_rcnn_regnet_from_regnet_shapes"
    assert "finished already" in defeat("train", "--resume", "-o", run)
    # Where the name has to be chosen first, and the epochs were said when it was begun.
    assert "finished already" in defeat("train", "--resume", "--teacher", teacher, "--data", shapes)


@pytest.mark.parametrize("names", [["fg-only", "bg-only"], ["fg-only/bg-only"]])
def test_ablate_without_a_recipe(defeat, teacher, shapes, tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    studies = []
    monkeypatch.setattr(ablating, "ablate", lambda study, **_: studies.append(study) or study.save() or {})
    defeat("ablate", *names, "--teacher", teacher, "--data", shapes, "--set", "run.device=cpu")
    (study,) = studies
    assert list(study.variants) == ["none", "fg-only", "bg-only"]
    assert study.folder.name == "ablate-faster_rcnn_regnet_from_regnet_shapes"
    weights = {run.variant: run.recipe.distillation.neck for run in study.runs()}
    assert (weights["fg-only"].alpha_bg, weights["bg-only"].alpha_fg, weights["none"]) == (0, 0, None)
    # The median box's size decides the anchors, and they the scale of the masks, in all variants alike.
    scale = 1.75 * study.recipe.student.anchor_sizes[0][0]
    assert weights["fg-only"].finest_scale == weights["bg-only"].finest_scale == scale


def test_init_writes_a_recipe_that_train_runs_unchanged(defeat, teacher, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = defeat("init", shapes, "--teacher", teacher, "--set", "schedule.epochs=1")
    assert "next: defeat check -r shapes.yaml" in output
    defeat("train", "-r", "shapes.yaml", "-o", "run", "--quiet")
    assert RunFolder(tmp_path / "run").finished
    before = (tmp_path / "shapes.yaml").read_bytes()
    assert "shapes.yaml: is there already" in defeat("init", shapes, code=2)
    assert (tmp_path / "shapes.yaml").read_bytes() == before


@pytest.mark.parametrize("command", ["train", "ablate", "check"])
def test_without_data_nothing_is_chosen(command, defeat, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["neck"] if command == "ablate" else []
    output = defeat(command, *names, "--teacher", teacher, code=2)
    assert "no data to choose a recipe for: add --data FOLDER" in output
    assert not list(tmp_path.iterdir())


def test_gradmap_takes_the_newest_finished_run_else_the_shipped_teacher(chosen, defeat, shapes, tmp_path, monkeypatch):
    folder, _ = chosen
    image = next((shapes / "images").iterdir())
    monkeypatch.chdir(folder)
    output = defeat("gradmap", image, "-o", tmp_path / "maps", "--samples", 1)
    assert "no --checkpoint: runs/faster_rcnn_regnet_from_regnet_shapes/best.pt is taken" in output
    assert (tmp_path / "maps" / "gradients.json").is_file()
    monkeypatch.chdir(tmp_path)
    output = defeat("gradmap", image, "-o", tmp_path / "shipped", "--samples", 1)
    assert "no --checkpoint: shipped:quickstart_teacher.pt is taken" in output


def test_the_newest_run_is_the_one_whose_results_are(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for time, run in enumerate(["b", "study/a-seed0", "c", "unfinished"], start=1):
        folder = tmp_path / run
        folder.mkdir(parents=True)
        for name in ("recipe.yaml", "best.pt", "student.pth", "results.json"):
            if (run, name) != ("unfinished", "student.pth"):
                (folder / name).write_text("{}")
                os.utime(folder / name, (time, time))
    os.utime(tmp_path / "study/a-seed0" / "results.json", (9, 9))
    assert newest_checkpoint(tmp_path) == tmp_path / "study/a-seed0" / "best.pt"
