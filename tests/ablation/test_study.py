"""Studies with small scripts in place of workers, and at the end one with real ones."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import pytest
import torch

from defeat_cli import session
from defeat_cli.ablation import processes
from defeat_cli.ablation import study as ablation
from defeat_cli.ablation.worker import STOPPED
from defeat_cli.config import schema as recipes
from defeat_cli.config.terms import NeckSettings
from defeat_cli.config.variants import VARIANTS, Variant
from defeat_cli.data.loading import training_loader
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import CheckpointError, DataError, RecipeError, RunError
from defeat_cli.jobs import training

WORKER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
if (folder.parent / f"break-{folder.name}").exists():
    raise RuntimeError("broken")
ap = len(folder.name) / 100
(folder / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 6, "epoch": 2, "AP": ap}) + "\\n")
(folder / "student.pth").touch()
student = {name: ap for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
(folder / "results.json").write_text(json.dumps({"student": student, "training_seconds": 1.0}))
(folder.parent / "trained.txt").open("a").write(folder.name + "\\n")
"""


@pytest.fixture
def small_workers(monkeypatch):
    """Workers that write results at once; one fails while STUDY/break-RUN is there. Pictures are not drawn."""
    monkeypatch.setattr(processes, "WORKER", (sys.executable, "-c", WORKER))
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(ablation, "draw_study", lambda outcomes, rows, title, path: path.touch())


@pytest.fixture
def base(tiny, teacher):
    return recipes.load(str(tiny), {"teacher.checkpoint": str(teacher)})


def plan(folder, names, base, seeds=(0,), known=VARIANTS):
    return ablation.plan(folder, names, known, list(seeds), base)


def trained(folder):
    """Runs that workers finished since the last call, in order."""
    path = folder / "trained.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def test_none_is_always_part_and_seeds_come_one_after_the_other(tmp_path, base):
    study = plan(tmp_path / "s", ["neck", "none", "full"], base, seeds=(0, 3))
    assert [run.name for run in study.runs()] == [
        "none-seed0", "neck-seed0", "full-seed0", "none-seed3", "neck-seed3", "full-seed3"
    ]  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_runs_differ_in_their_variant_and_seed_only(tmp_path, base):
    base.run.compare_plain = True
    none, head = plan(tmp_path / "s", ["head"], base, seeds=(2,)).runs()
    assert none.recipe.run.seed == head.recipe.run.seed == 2
    assert not head.recipe.run.compare_plain
    assert (list(none.recipe.distillation.terms), list(head.recipe.distillation.terms)) == ([], ["head"])
    for part in ("student", "teacher", "data", "optimizer", "schedule"):
        assert getattr(none.recipe, part) == getattr(head.recipe, part)


def test_a_variant_goes_before_what_all_runs_share(tmp_path, base):
    base.distillation.neck = NeckSettings(alpha_bg=7.0)
    _, fg_only, neck = plan(tmp_path / "s", ["fg-only", "neck"], base).runs()
    assert (fg_only.recipe.distillation.neck.alpha_bg, neck.recipe.distillation.neck.alpha_bg) == (0.0, 7.0)


@pytest.mark.parametrize(
    ("names", "seeds", "message"),
    [
        (["fg-onyl"], (0,), "did you mean fg-only"),
        (["neck"], (), "whole numbers from 0"),
        (["neck"], (1, 1), "each once"),
        (["neck"], (-1,), "whole numbers from 0"),
        (["odd"], (0,), "variant odd.*\n.*distillation.neck.alpha_gb: unknown key"),
        (["a/b", "a:b"], (0,), "would share a folder"),
    ],
)
def test_what_cannot_be_studied_is_refused(tmp_path, base, names, seeds, message):
    known = {
        **VARIANTS,
        "odd": Variant("", {"distillation.neck.alpha_gb": 1.0}),
        "a/b": Variant(""),
        "a:b": Variant(""),
    }
    with pytest.raises((RecipeError, RunError), match=message):
        plan(tmp_path / "s", names, base, seeds, known)


def test_a_study_needs_a_teacher(tmp_path, tiny):
    with pytest.raises(RecipeError, match="--teacher"):
        plan(tmp_path / "s", ["neck"], recipes.load(str(tiny)))


def test_a_run_is_no_study(tmp_path, base):
    RunFolder(tmp_path / "run").open(base)
    with pytest.raises(RunError, match="holds a run, not a study"):
        plan(tmp_path / "run", ["neck"], base)
    with pytest.raises(RunError, match="holds no study"):
        ablation.read_study(tmp_path / "run")


def test_names_are_safe_for_file_systems():
    assert ablation.run_name("defeat+backbone", 2) == "defeat+backbone-seed2"
    assert ablation.run_name("../my variant: 1", 0) == ".._my_variant__1-seed0"


def test_every_run_is_made_and_reported(tmp_path, base, small_workers):
    folder = tmp_path / "s"
    study = plan(folder, ["neck", "defeat+backbone"], base, seeds=(0, 1, 2))
    assert ablation.run_study(study, jobs=2, quiet=True) == {}
    assert sorted(trained(folder)) == sorted(run.name for run in study.runs())
    for run in study.runs():
        assert recipes.load(str(run.folder / "recipe.yaml")) == run.recipe
    with (folder / "study.csv").open() as file:
        assert [line["variant"] for line in csv.DictReader(file)] == ["defeat+backbone", "none", "neck"]
    assert {"study.json", "study.md", "study.png"} <= {path.name for path in folder.iterdir()}


def test_finished_runs_are_skipped_and_failed_ones_tried_again(tmp_path, base, small_workers, capsys):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "break-neck-seed0").touch()
    study = plan(folder, ["neck", "full"], base, seeds=(0, 1))
    assert ablation.run_study(study) == {"neck-seed0": "RuntimeError: broken"}
    assert trained(folder) == ["none-seed0", "full-seed0", "none-seed1", "neck-seed1", "full-seed1"]
    assert "Traceback" in (folder / "neck-seed0" / "log.txt").read_text()
    output = capsys.readouterr().out
    assert "neck-seed0: failed, see" in output
    assert "[6/6] full-seed1: AP 10.0" in output
    content = json.loads((folder / "study.json").read_text())
    assert [run for run in content["runs"] if not run["finished"]] == [
        {"variant": "neck", "seed": 0, "finished": False}
    ]

    (folder / "break-neck-seed0").unlink()
    assert ablation.run_study(plan(folder, ["neck", "full"], base, seeds=(0, 1)), quiet=True) == {}
    assert trained(folder) == ["neck-seed0"]


def test_a_study_grows_but_does_not_change(tmp_path, base, small_workers):
    folder = tmp_path / "s"
    mine = Variant("mine", {"distillation.neck.alpha_bg": 1.0})
    ablation.run_study(plan(folder, ["neck", "mine"], base, known={**VARIANTS, "mine": mine}), quiet=True)
    trained(folder)
    grown = plan(folder, ["full"], base, seeds=(1,))
    assert (list(grown.variants), grown.seeds) == (["none", "neck", "mine", "full"], [0, 1])
    ablation.run_study(grown, quiet=True)
    assert set(trained(folder)) == {run.name for run in grown.runs()} - {"none-seed0", "neck-seed0", "mine-seed0"}
    assert ablation.read_study(folder) == grown

    other = Variant("mine", {"distillation.neck.alpha_bg": 2.0})
    with pytest.raises(RunError, match="variant mine is another one"):
        plan(folder, ["mine"], base, known={**VARIANTS, "mine": other})
    base.optimizer.lr = 0.5
    with pytest.raises(
        RunError, match=r"(?s)cannot be resumed with another recipe.*optimizer.lr: 0.01 there, 0.5 here"
    ):
        plan(folder, ["neck"], base)


def test_the_report_is_made_again_from_the_run_folders(tmp_path, base, small_workers, capsys):
    folder = tmp_path / "s"
    ablation.run_study(plan(folder, ["neck"], base), quiet=True)
    before = {name: (folder / name).read_bytes() for name in ("study.csv", "study.json", "study.md")}
    for name in before:
        (folder / name).unlink()
    ablation.show(ablation.read_study(folder))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "neck" in capsys.readouterr().out


def test_what_cannot_work_is_found_before_anything_is_trained(tmp_path, base, small_workers):
    folder = tmp_path / "s"
    lost = Variant("", {"teacher.checkpoint": str(tmp_path / "nowhere.pt")})
    with pytest.raises(CheckpointError, match=r"variant lost: .*nowhere\.pt"):
        ablation.run_study(plan(folder, ["lost"], base, known={"none": VARIANTS["none"], "lost": lost}), quiet=True)
    base.data.path = str(tmp_path / "no-data")
    with pytest.raises(DataError, match="no-data"):
        ablation.run_study(plan(folder, ["neck"], base), quiet=True)
    assert not folder.exists()


def test_the_command_refuses_a_misspelt_variant_before_anything_is_written(defeat, tiny, teacher, tmp_path):
    output = defeat("ablate", "neck", "fg-onyl", "-r", tiny, "-t", teacher, "-o", tmp_path / "s", code=2)
    assert "did you mean fg-only" in output
    assert not (tmp_path / "s").exists()


def test_the_command_explains_shipped_variants_and_those_of_a_file(defeat, tmp_path):
    (tmp_path / "mine.yaml").write_text("softer: {distillation.head.temperature_fg: 4.0}\n")
    lines = defeat("ablate", "--list", "--variants", tmp_path / "mine.yaml").splitlines()
    assert [line.split()[0] for line in lines] == [*VARIANTS, "softer"]
    assert all(len(line.split()) > 1 for line in lines)


def test_the_command_shows_the_table_and_ends_with_1_after_a_failure(defeat, tiny, teacher, tmp_path, small_workers):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "break-neck-seed2").touch()
    arguments = ("ablate", "neck", "-r", tiny, "-t", teacher, "-o", folder, "--seeds", "1,2")
    output = defeat(*arguments, code=1)
    assert "neck-seed2: failed" in output
    assert "1 of 2" in output
    (folder / "break-neck-seed2").unlink()
    assert "failed" not in defeat(*arguments)
    shown = defeat("ablate", "--report-only", "-o", folder)
    assert "Δ AP to none" in shown
    assert "over seeds 1, 2" in shown


def test_runs_of_a_seed_start_from_one_student_and_see_the_same_images(tmp_path, base):
    runs = plan(tmp_path / "s", list(VARIANTS), base, seeds=(4,)).runs()
    data = session.open_data(base.data, "train", train=True)
    teacher = session.load_detector(base.teacher.checkpoint).detector
    states, losses, orders = [], [], []
    for run in runs:
        student = session.build_student(run.recipe, data.classes)
        sections = run.recipe.distillation.terms
        terms = session.build_terms(sections, student, teacher)[0] if sections else {}
        distiller = Distiller(student, teacher, terms).train()
        states.append({name: value.clone() for name, value in student.state_dict().items()})
        loader = training_loader(
            session.open_data(base.data, "train", train=True, seed=4), 4, 0, seed=run.recipe.run.seed
        )
        orders.append([image_ids for _, _, image_ids in loader])
        torch.manual_seed(9)  # the engine seeds every step
        images, targets, _ = next(iter(loader))
        terms = distiller(images, targets, 1.0).raw
        losses.append({name: value.item() for name, value in terms.items() if name in losses[0]} if losses else {
            name: value.item() for name, value in terms.items()
        })  # fmt: skip
    assert len(runs) == 13
    for state, order, loss in zip(states, orders, losses, strict=True):
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
        assert order == orders[0]
        # Sampling in the student's own losses is not disturbed by what the teacher draws.
        assert loss == losses[0]


def metrics(folder):
    """A run's metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in RunFolder(folder).metrics()]


def test_a_study_that_was_killed_goes_on_to_the_same_end(tmp_path, base, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base.schedule.epochs = base.run.evaluate_every = 4
    base.run.log_every = 1
    straight = plan(tmp_path / "straight", ["defeat"], base)
    for run in straight.runs():
        training.train(run.recipe, run.folder, quiet=True)

    # A study's process is killed when its first run has begun. All that the run's own process can see of that is that
    # its stdin is closed: it saves and stops, and holds the study until then.
    study = plan(tmp_path / "killed", ["defeat"], base)
    first = RunFolder(study.runs()[0].folder)
    study.folder.mkdir()
    study.save()
    first.open(study.runs()[0].recipe)
    with processes.locked(study.folder) as lock:
        worker = subprocess.Popen([*processes.WORKER, str(first.path)], stdin=subprocess.PIPE, pass_fds=(lock,))
    while not first.metrics() and worker.poll() is None:
        time.sleep(0.01)
    with pytest.raises(RunError, match="another process is working"), processes.locked(study.folder):
        pass
    worker.stdin.close()
    assert worker.wait() == STOPPED
    assert 0 < first.metrics()[-1]["step"] < 12

    assert ablation.run_study(study, jobs=2, quiet=True) == {}
    for run in study.runs():
        assert metrics(run.folder) == metrics(straight.folder / run.name)
        ours, theirs = RunFolder(run.folder).results(), RunFolder(straight.folder / run.name).results()
        assert ours["student"] == theirs["student"]
