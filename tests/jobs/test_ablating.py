"""Studies whose runs really train."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest
import torch
from runs import dying_at, metrics, planned

from defeat_cli.ablation import running
from defeat_cli.config import schema as recipes
from defeat_cli.config.variants import VARIANTS, Variant
from defeat_cli.data.loading import training_loader
from defeat_cli.distillation import map_folder
from defeat_cli.distillation.map_folder import MapFolder
from defeat_cli.engine.locking import locked
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import CheckpointError, DataError, RunError
from defeat_cli.jobs import ablating, training, validating, worker
from defeat_cli.session import assemble


@pytest.fixture
def base(tiny, teacher):
    return recipes.load(str(tiny), {"teacher.checkpoint": str(teacher)})


def test_what_cannot_work_is_found_before_anything_is_trained(tmp_path, base):
    folder = tmp_path / "s"
    lost = {**VARIANTS, "lost": Variant("", {"teacher.checkpoint": str(tmp_path / "nowhere.pt")})}
    lost["lost"].overrides.update(VARIANTS["neck"].overrides)
    with pytest.raises(CheckpointError, match=r"variant lost: .*nowhere\.pt"):
        ablating.ablate(planned(folder, ["lost"], base, known=lost), quiet=True)
    base.run.device = "cuda:99"
    with pytest.raises(RunError, match="cuda:99"):
        ablating.ablate(planned(folder, ["neck"], base), quiet=True)
    base.run.device, base.data.path = "cpu", str(tmp_path / "no-data")
    with pytest.raises(DataError, match="no-data"):
        ablating.ablate(planned(folder, ["neck"], base), quiet=True)
    assert not folder.exists()


def test_runs_of_a_seed_start_from_one_student_and_see_the_same_images(tmp_path, base):
    names = [name for name in VARIANTS if name != "none" and "crosskd" not in name]  # that is for one-stage detectors
    runs = planned(tmp_path / "s", names, base, seeds=(4,)).runs()
    states, losses, orders = [], [], []
    session = None
    for run in runs:
        session = assemble(run.recipe, like=session)
        states.append({name: value.clone() for name, value in session.student.state_dict().items()})
        loader = training_loader(session.training_data, 4, 0, seed=run.recipe.run.seed)
        orders.append([image_ids for _, _, image_ids in loader])
        torch.manual_seed(9)  # the engine seeds every step
        images, targets, _ = next(iter(loader))
        terms = session.distiller.train()(images, targets, 1.0).raw
        losses.append({name: value.item() for name, value in terms.items() if not losses or name in losses[0]})
    assert len(runs) == len(names) + 1
    for state, order, loss in zip(states, orders, losses, strict=True):
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
        assert order == orders[0]
        # Sampling in the student's own losses is not disturbed by what the teacher draws.
        assert loss == losses[0]


def test_a_study_that_was_killed_and_halved_goes_on_to_the_same_end(tmp_path, base, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base.schedule.epochs = 4
    base.run.evaluate_every = 2
    base.run.log_every = 1
    names = ["defeat:optimizer.lr=0.01,1e-5"]
    straight = planned(tmp_path / "straight", ["defeat:optimizer.lr=0.01"], base)
    for run in straight.runs():
        training.train(run.recipe, run.folder, quiet=True)

    # A study's process is killed when its second run has begun. All that the run's own process can see of that is that
    # its stdin is closed: it saves and stops, and holds the study until then.
    study = planned(tmp_path / "killed", names, base, budget=1.5)
    shutil.copytree(straight.runs()[0].folder, study.runs()[0].folder)
    study.save()
    first = RunFolder(study.runs()[1].folder)
    first.open(study.runs()[1].recipe)
    with locked(study.folder) as lock:
        process = subprocess.Popen(ablating.command(first.path, 4), stdin=subprocess.PIPE, pass_fds=(lock,))
    while not first.metrics() and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(RunError, match="is at work in this folder"), locked(study.folder):
        pass
    process.stdin.close()
    assert process.wait() == worker.STOPPED
    assert 0 < first.metrics()[-1]["step"] < 12

    assert ablating.ablate(study, jobs=2, quiet=True) == {}
    for run in straight.runs():
        assert metrics(study.folder / run.name) == metrics(run.folder)
        ours, theirs = RunFolder(study.folder / run.name).results(), RunFolder(run.folder).results()
        assert (ours["student"], ours.get("teacher")) == (theirs["student"], theirs.get("teacher"))
    slow = RunFolder(study.runs()[2].folder)
    assert [line["epoch"] for line in slow.metrics() if line["kind"] == "eval"] == [2]
    assert not slow.finished


def test_the_teacher_is_scored_once(tmp_path, base, monkeypatch):
    neck, fine = planned(tmp_path / "s", ["neck", "full"], base).runs()[1:]
    RunFolder(neck.folder).open(neck.recipe)
    run = RunFolder(neck.folder)
    assert worker.known_teacher(fine.recipe, fine.folder) is None
    (run / "student.pth").touch()
    (run / "results.json").write_text('{"teacher": {"AP": 0.125}}')
    assert worker.known_teacher(fine.recipe, fine.folder) == {"AP": 0.125}
    other = fine.recipe.model_copy(deep=True)
    other.data.short_side = [96]
    assert worker.known_teacher(other, fine.folder) is None

    # Neither on a few images at the start nor on all at the end: what is scored is the student.
    scored = []
    evaluate = validating.evaluate

    def counted(detector, *rest, **named):
        scored.append(detector.levels[0].channels)
        return evaluate(detector, *rest, **named)

    monkeypatch.setattr(validating, "evaluate", counted)
    base.schedule.epochs = 1
    results = training.train(
        recipes.validate({**fine.recipe.model_dump()}, ""), fine.folder, quiet=True,
        known_teacher=lambda: worker.known_teacher(fine.recipe, fine.folder),
    )  # fmt: skip
    assert results["teacher"] == {"AP": 0.125}
    assert set(scored) == {base.student.fpn_channels}  # the teacher has twice as many


def test_runs_keep_the_teachers_features_for_each_other_and_are_as_by_themselves(tmp_path, base, defeat, monkeypatch):
    if shutil.disk_usage(tmp_path).free < 2 * map_folder.ROOM:
        pytest.skip("this disk has no room for what runs keep")
    base.teacher.cache_gib, base.schedule.epochs = 1.0, 1
    monkeypatch.setattr(running, "environments", lambda *_: [{"OMP_NUM_THREADS": "1"}])  # as this process
    study = planned(tmp_path / "s", ["neck", "full"], base)
    with monkeypatch.context() as kept:
        kept.setattr(map_folder, "remove", lambda home: None)
        assert ablating.ablate(study, quiet=True) == {}
    files = len(list((study.folder / "features").glob("*/*.pt")))
    assert 0 < files <= 2 * 12 + 1  # images as they are and mirrored, and padding
    neck = study.runs()[1]
    training.train(neck.recipe, tmp_path / "alone", quiet=True)
    assert metrics(neck.folder) == metrics(tmp_path / "alone")

    # Another one finds all, and counts the time that it was spared: say, 1000 seconds an image.
    computed, read = [], MapFolder.read

    def slow(folder, key):
        found = read(folder, key)
        folder._spared += 1000
        return found

    monkeypatch.setattr(MapFolder, "read", slow)
    monkeypatch.setattr(MapFolder, "write", lambda *_: computed.append(1))
    neck.recipe.run.save_every = 1
    with dying_at(2):
        training.train(neck.recipe, tmp_path / "another", quiet=True, features=study.folder / "features")
    results = training.train(
        neck.recipe, tmp_path / "another", quiet=True, resume=True, features=study.folder / "features"
    )
    assert metrics(tmp_path / "another") == metrics(neck.folder)
    assert computed == []
    state = torch.load(tmp_path / "another" / "last.pt", weights_only=True)["training"]
    assert results["training_seconds"] == round(state["seconds"] + state["spared"], 1)
    assert state["seconds"] < 1000 * 12 < state["spared"]  # of which the second process had four images
    assert ablating.ablate(study, quiet=True) == {}
    assert not (study.folder / "features").exists()


@pytest.mark.parametrize(("names", "shared"), [(["neck"], False), (["neck", "full"], True)])
def test_features_are_kept_where_another_run_can_find_them(tmp_path, base, monkeypatch, names, shared):
    begun = []
    monkeypatch.setattr(
        ablating, "run_study", lambda study, calls, **options: begun.append(calls.command(study.folder, 1)) or {}
    )
    ablating.ablate(planned(tmp_path / "s", names, base), quiet=True)
    assert (str(tmp_path / "s" / "features") in begun[0]) == shared


def test_a_teacher_of_two_studies_is_trained_in_one_place(tmp_path, base, monkeypatch):
    monkeypatch.setattr(training, "train_teacher", lambda recipe, folder, **options: str(folder / "teacher"))
    assert ablating.calls(tmp_path).obtain_teacher(base) is None  # there is one
    base.teacher.checkpoint, base.teacher.recipe = None, "quickstart_teacher"
    assert ablating.calls(tmp_path).obtain_teacher(base) == str(tmp_path / "teacher")
