"""Studies with small scripts in place of the processes that train."""

from __future__ import annotations

import csv
import json

import pytest
import small_worker
from runs import planned

from defeat_cli.ablation import processes, running
from defeat_cli.ablation.running import Calls, run_study, write_report
from defeat_cli.ablation.study import read_study
from defeat_cli.config import schema as recipes
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import DataError, RunError, TermError


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Pictures are not drawn."""
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    for draw in ("draw_study", "draw_sweeps"):
        monkeypatch.setattr(running, draw, lambda *arguments, **named: arguments[-1].touch())


@pytest.fixture
def base():
    return recipes.load(None, {"teacher.checkpoint": "teacher.pt", "schedule.epochs": 4, "run.device": "cpu"})


def run(study, check=lambda recipe: (12, []), obtain_teacher=lambda recipe: None, **options):
    """Why runs failed."""
    return run_study(study, Calls(check, obtain_teacher, small_worker.command), **{"quiet": True, **options})


def trained(folder):
    """What workers did since the last call, in order."""
    path = folder / "trained.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def test_every_run_is_made_and_reported(tmp_path, base):
    folder = tmp_path / "s"
    study = planned(folder, ["neck", "defeat+backbone"], base, seeds=(0, 1, 2))
    assert run(study, jobs=2) == {}
    assert sorted(trained(folder)) == sorted(f"{run.name}@4" for run in study.runs())
    for planned_run in study.runs():
        assert recipes.load(str(planned_run.folder / "recipe.yaml")) == planned_run.recipe
    with (folder / "study.csv").open() as file:
        assert [line["variant"] for line in csv.DictReader(file)] == ["defeat+backbone", "none", "neck"]
    assert {"study.json", "study.md", "study.png"} <= {path.name for path in folder.iterdir()}


def test_finished_runs_are_skipped_and_failed_ones_tried_again(tmp_path, base, capsys):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "break-neck-seed0").touch()
    study = planned(folder, ["neck", "full"], base, seeds=(0, 1))
    assert run(study, quiet=False) == {"neck-seed0": "RuntimeError: broken"}
    names = ["none-seed0", "neck-seed0", "full-seed0", "none-seed1", "neck-seed1", "full-seed1"]
    assert trained(folder) == [f"{name}@4" for name in names]
    assert "Traceback" in (folder / "neck-seed0" / "log.txt").read_text()
    output = capsys.readouterr().out
    assert "neck-seed0: failed, see" in output
    assert "[6/6] full-seed1: AP 10.0" in output
    content = json.loads((folder / "study.json").read_text())
    assert [run["variant"] for run in content["runs"] if not run["finished"]] == ["neck"]

    (folder / "break-neck-seed0").unlink()
    assert run(planned(folder, ["neck", "full"], base, seeds=(0, 1))) == {}
    assert trained(folder) == ["neck-seed0@4"]


def test_a_study_trains_what_it_has_grown_by(tmp_path, base):
    folder = tmp_path / "s"
    run(planned(folder, ["neck"], base))
    trained(folder)
    run(planned(folder, ["full"], base, seeds=(1,)))
    assert trained(folder) == ["full-seed0@4", "none-seed1@4", "neck-seed1@4", "full-seed1@4"]


def test_a_study_can_be_given_more_epochs(tmp_path, base):
    folder = tmp_path / "s"
    run(planned(folder, ["neck"], base))
    trained(folder)
    base.schedule.epochs = 6
    run(planned(folder, ["neck"], base))
    assert trained(folder) == ["none-seed0@6", "neck-seed0@6"]
    assert read_study(folder).recipe.schedule.epochs == 6


def test_a_run_that_stopped_early_is_finished_until_more_epochs_are_asked_for(tmp_path, base):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "impatient").touch()
    base.run.patience = 1
    assert run(planned(folder, ["neck"], base)) == {}
    assert trained(folder) == ["none-seed0@4", "neck-seed0@4"]
    assert run(planned(folder, ["neck"], base)) == {}
    assert trained(folder) == []
    (folder / "impatient").unlink()
    base.schedule.epochs = 6
    assert run(planned(folder, ["neck"], base)) == {}
    assert trained(folder) == ["none-seed0@6", "neck-seed0@6"]
    with pytest.raises(RunError, match=r"--budget and run\.patience both stop runs early"):
        planned(tmp_path / "t", ["neck:alpha_bg=1,4,16"], base, budget=2)


def test_within_a_budget_the_worse_half_of_a_sweep_stops(tmp_path, base, capsys):
    # 4 values and 4 epochs: halved twice, at 1 and 2, they cost 4 * 1/4 + 2 * 1/4 + 1 * 2/4 = 2 trainings of each seed.
    folder = tmp_path / "s"
    names = ["neck", "neck:alpha_bg=1,10,100,1000"]
    study = planned(folder, names, base, seeds=(0, 1), budget=2)
    assert run(study, quiet=False) == {}
    log = trained(folder)
    points = {v: [f"neck_alpha_bg={v}-seed{s}" for s in (0, 1)] for v in (1, 10, 100, 1000)}
    assert log[:12] == [run.name + ("@1" if "=" in run.name else "@4") for run in study.runs()]
    assert log[12:] == [f"{points[v][s]}@2" for s in (0, 1) for v in (100, 1000)] + [f"{p}@4" for p in points[1000]]
    said = "stopped early, as not in the better half: at epoch 1 neck:alpha_bg=1, neck:alpha_bg=10"
    assert f"{said}; at epoch 2 neck:alpha_bg=100\n" in capsys.readouterr().out

    text = (folder / "study.md").read_text()
    assert f"each sweep may cost 2 whole trainings with each seed; {said}; at epoch 2 neck:alpha_bg=100." in text
    assert "| neck:alpha_bg=1000 | 24.0 ± 0.0 |" in text
    assert "| 100 | 23.0 ± 0.0 | - | - | 2 |  |" in text
    assert json.loads((folder / "study.json").read_text())["sweeps"][0]["best"] == "neck:alpha_bg=1000"

    assert run(planned(folder, names, base, seeds=(0, 1), budget=2)) == {}
    assert trained(folder) == []
    # With a third seed all begin again; without a budget all go on to the end, from where they stand.
    run(planned(folder, names, base, seeds=(2,), budget=2))
    assert [name for name in trained(folder) if "seed2" not in name] == []
    run(planned(folder, names, base, seeds=(2,)))
    assert len(trained(folder)) == 9
    assert "stopped early" not in (folder / "study.md").read_text()


def test_a_halving_goes_on_where_it_was_stopped_and_without_values_that_fail(tmp_path, base):
    folder = tmp_path / "s"
    names = ["none:optimizer.lr=1,20,300,4000"]
    study = planned(folder, names, base, budget=2)
    folder.mkdir()
    for lr in (1, 20):  # two were trained up to the first stop when the study was stopped
        first = next(run for run in study.runs() if f"lr={lr}-" in run.name)
        RunFolder(first.folder).open(first.recipe)
        RunFolder(first.folder).log({"kind": "eval", "step": 3, "epoch": 1, "AP": lr / 1000})
    (folder / "break-none_optimizer.lr=4000-seed0").touch()
    assert list(run(study)) == ["none_optimizer.lr=4000-seed0"]
    assert trained(folder) == [
        "none-seed0@4", *(f"none_optimizer.lr={name}" for name in
        ("300-seed0@1", "4000-seed0@1", "20-seed0@2", "300-seed0@2", "300-seed0@4")),
    ]  # fmt: skip
    # The report made anew knows of no failure, and says the same.
    before = (folder / "study.md").read_text()
    assert "at epoch 1 none:optimizer.lr=1; at epoch 2 none:optimizer.lr=20." in before
    write_report(read_study(folder))
    assert (folder / "study.md").read_text() == before


def test_the_report_is_made_again_from_the_run_folders(tmp_path, base):
    folder = tmp_path / "s"
    run(planned(folder, ["neck"], base))
    before = {name: (folder / name).read_bytes() for name in ("study.csv", "study.json", "study.md")}
    for name in before:
        (folder / name).unlink()
    write_report(read_study(folder))
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_what_cannot_work_is_found_before_anything_is_written(tmp_path, base):
    def check(recipe):
        if recipe.distillation.terms:
            raise DataError("no images")
        return 12, []

    with pytest.raises(DataError, match="variant neck: no images"):
        run(planned(tmp_path / "s", ["neck"], base), check)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("names", "made"), [(["both"], ["none", "full"]), (["neck", "both"], None)])
def test_of_a_group_the_variants_that_a_pair_cannot_have_are_left_out(tmp_path, base, capsys, names, made):
    def check(recipe):
        if "neck" in recipe.distillation.terms and recipe.distillation.neck.mask == "boxes":
            raise TermError("no neck")
        return 12, []

    study = planned(tmp_path / "s", names, base, groups={"both": ("neck", "full")})
    if made is None:  # named as well: the user wants it
        with pytest.raises(TermError, match="variant neck: no neck"):
            run(study, check)
    else:
        assert run(study, check) == {}
        assert list(read_study(study.folder).variants) == made
        assert "warning: variant neck is left out: no neck" in capsys.readouterr().out


def test_a_teacher_that_the_recipe_trains_is_that_of_all_runs(tmp_path, base):
    base.teacher.checkpoint, base.teacher.recipe = None, "quickstart_teacher"
    study = planned(tmp_path / "s", ["neck"], base)
    run(study, obtain_teacher=lambda recipe: str(tmp_path / "s" / "teacher" / "best.pt"))
    found = [recipes.load(str(run.folder / "recipe.yaml")).teacher.checkpoint for run in study.runs()]
    assert found == [str(tmp_path / "s" / "teacher" / "best.pt")] * 2


def test_what_is_to_be_said_of_runs_is_said_once_with_their_variants(tmp_path, base, capsys):
    run(planned(tmp_path / "s", ["neck", "full"], base, seeds=(0, 1)), lambda recipe: (12, ["the data is odd"]))
    assert capsys.readouterr().out.count("warning: the data is odd (none, neck, full)") == 1


def test_an_unknown_sort_key_is_refused_before_anything_is_written(tmp_path, base):
    with pytest.raises(Exception, match="--sort backgrund: no such key"):
        run(planned(tmp_path / "s", ["neck"], base), sort="backgrund")
    assert not (tmp_path / "s").exists()
