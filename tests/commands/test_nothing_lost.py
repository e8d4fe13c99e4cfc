"""Whatever ends a run, or damages what it leaves: it is said, and nothing more than a step is lost."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from runs import assert_same_run, dying_at, metrics, setting

from defeat_cli.checkpoints import native
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.engine import loop, saving
from defeat_cli.engine import step as step_of_training
from defeat_cli.engine.locking import locked
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import DataError
from defeat_cli.jobs import validating


@pytest.fixture(scope="module")
def options(seldom):
    """A plain run of two epochs of three steps, whose student's norms keep statistics, saved at every step."""
    return [*seldom, *setting(run__save_every=1)]


@pytest.fixture(scope="module")
def seldom(tiny):
    """The same, saved at the ends of epochs alone."""
    return ["train", "-r", tiny, *setting(run__log_every=1, optimizer__ema=0.5)]


@pytest.fixture(scope="module")
def whole(options, defeat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    defeat(*options, "-o", folder)
    return folder


@pytest.fixture
def stopped(options, tmp_path, stopped_once):
    """A run that was killed before its step 4, after an evaluation: last.pt is of step 4, previous.pt of step 3."""
    return shutil.copytree(stopped_once, tmp_path / "run")


@pytest.fixture(scope="module")
def stopped_once(options, defeat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with dying_at(4):
        defeat(*options, "-o", folder)
    return folder


def step_of(path):
    return torch.load(path, weights_only=True)["training"]["step"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_where_the_last_checkpoint_is_damaged_the_one_before_it_is_used(stopped, options, defeat, whole, damage):
    assert (step_of(stopped / "last.pt"), step_of(stopped / "previous.pt")) == (4, 3)
    damage(stopped / "last.pt")
    output = defeat(*options, "-o", stopped, "--resume")
    assert f"warning: {stopped / 'last.pt'}: " in output
    assert "The one before it, of step 3, takes its place" in output
    assert "from step 3" in output
    assert_same_run(stopped, whole)
    assert not (stopped / "previous.pt").exists()


def test_where_both_are_damaged_nothing_is_thrown_away(stopped, options, defeat):
    for name in ("last.pt", "previous.pt"):
        flip(stopped / name)
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    output = defeat(*options, "-o", stopped, "--resume", code=2)
    assert str(stopped / "last.pt") in output
    assert str(stopped / "previous.pt") in output
    assert "--overwrite begins anew" in output
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_where_no_state_is_left_it_is_said_that_the_run_begins_again(stopped, options, defeat, whole):
    for name in ("last.pt", "previous.pt"):
        (stopped / name).unlink()
    output = defeat(*options, "-o", stopped, "--resume")
    assert f"warning: {stopped}: no state of it is saved, so it begins again at step 0" in output
    assert_same_run(stopped, whole)


def test_a_recipe_that_is_damaged_is_taken_from_a_checkpoint(stopped, options, defeat, whole):
    (stopped / "recipe.yaml").write_bytes(b"\x00" * 100)
    assert "The recipe in last.pt takes its place" in defeat(*options, "-o", stopped, "--resume")
    assert (stopped / "recipe.yaml").read_text() == (whole / "recipe.yaml").read_text()
    assert_same_run(stopped, whole)


def test_a_checkpoint_without_its_recipe_is_not_thrown_away(stopped, options, defeat):
    (stopped / "recipe.yaml").unlink()
    assert "already holds an unfinished run" in defeat(*options, "-o", stopped, code=2)
    assert "cannot be resumed with another recipe" in defeat(
        *options, "-o", stopped, "--resume", *setting(optimizer__lr=0.5), code=2
    )


@pytest.mark.parametrize("line", [b'{"kind": "tr\xff', b"7", None])
def test_a_log_that_is_damaged_is_told_and_what_can_be_read_of_it_is_kept(stopped, options, defeat, whole, line):
    lines = (stopped / "metrics.jsonl").read_bytes().split(b"\n")
    if line is None:
        del lines[1]
    else:
        lines[1] = line
    (stopped / "metrics.jsonl").write_bytes(b"\n".join(lines))
    told = f"{stopped / 'metrics.jsonl'}: not what was written; the lines in it that can be read are kept"
    assert told in defeat(*options, "-o", stopped, "--resume")
    expected = metrics(whole)
    assert metrics(stopped) == [expected[0], *expected[2:]]


def test_a_best_checkpoint_that_is_damaged_is_replaced_by_the_best_from_then_on(stopped, options, defeat, whole):
    flip(stopped / "best.pt")
    output = defeat(*options, "-o", stopped, "--resume")
    assert f"{stopped / 'best.pt'}: a damaged PyTorch checkpoint" in output
    best = torch.load(stopped / "best.pt", weights_only=True)
    assert best["metrics"]["AP"] == metrics(whole, "eval")[1]["AP"]


@pytest.mark.parametrize("name", ["results.json", "student.pth", "best.pt"])
def test_a_finished_run_makes_anew_what_is_damaged(whole, options, defeat, tmp_path, name):
    folder = shutil.copytree(whole, tmp_path / "run")
    cut(folder / name)
    (folder / "load_student.py").unlink()
    if name == "best.pt":  # and what was made of it is gone
        (folder / "student.pth").unlink()
    output = defeat(*options, "-o", folder, "--resume")
    assert f"warning: {folder / name}: " in output
    assert (folder / "load_student.py").exists()
    expected = torch.load(folder / ("last.pt" if name == "best.pt" else "best.pt"), weights_only=True)
    results, student = json.loads((folder / "results.json").read_text()), torch.load(folder / "student.pth")
    assert results["student"] == expected["metrics"]
    assert all(torch.equal(student[key], value) for key, value in expected["student"].items())


def test_other_commands_name_a_damaged_file(whole, defeat, tmp_path, tiny):
    folder = shutil.copytree(whole, tmp_path / "run")
    for name in ("student.pth", "best.pt", "last.pt"):
        flip(folder / name)
        assert f"{folder / name}: a damaged PyTorch checkpoint" in defeat("eval", folder / name, "-r", tiny, code=2)


# --- what ends a run


def memory_runs_out(patch, step):
    """After the backward pass of step `step`, counted from 0; forward has changed the statistics of normalisation."""
    backward = step_of_training.backward

    def ending(state, *positional, **named):
        made = backward(state, *positional, **named)
        if state.step == step:
            patch.undo()
            raise MemoryError("no more memory")
        return made

    patch.setattr(step_of_training, "backward", ending)


def a_loader_dies(patch, step):
    """Before step `step`, counted from 0."""
    make_step = loop.train_step

    def ending(state, *positional, **named):
        if state.step == step:
            patch.undo()
            raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
        return make_step(state, *positional, **named)

    patch.setattr(loop, "train_step", ending)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (memory_runs_out, "out of memory: a training step on 4 images"),
        (a_loader_dies, "a process that loads images died (DataLoader worker (pid 12)"),
    ],
)
def test_an_error_within_a_step_leaves_the_state_before_it(seldom, defeat, whole, tmp_path, what, told):
    options = [*seldom, "-o", tmp_path / "run"]
    with pytest.MonkeyPatch.context() as patch:
        what(patch, step=4)
        assert told in defeat(*options, code=2)
    assert step_of(tmp_path / "run" / "last.pt") == 4
    defeat(*options, "--resume")
    assert_same_run(tmp_path / "run", whole)


def test_an_error_of_the_data_leaves_the_state_before_it(seldom, defeat, whole, tmp_path, monkeypatch):
    options = [*seldom, "-o", tmp_path / "run"]
    read, reads = DetectionDataset.__getitem__, []

    def broken(self, key):
        if isinstance(key, tuple) and key[0] == 1:
            reads.append(key)
            if len(reads) == 6:  # in the second batch of the second epoch
                raise DataError("00090.jpg: truncated")
        return read(self, key)

    monkeypatch.setattr(DetectionDataset, "__getitem__", broken)
    output = defeat(*options, code=2)
    assert "step 4 is saved; --resume goes on from there" in output
    assert "error: 00090.jpg: truncated" in output
    monkeypatch.undo()
    defeat(*options, "--resume")
    assert_same_run(tmp_path / "run", whole)


def test_a_step_that_was_half_taken_is_not_saved(seldom, defeat, whole, tmp_path, monkeypatch):
    options = [*seldom, "-o", tmp_path / "run"]
    update = torch.optim.swa_utils.AveragedModel.update_parameters

    def fail(self, model):
        if self.n_averaged == 3:
            raise MemoryError("no more memory")
        update(self, model)

    monkeypatch.setattr(torch.optim.swa_utils.AveragedModel, "update_parameters", fail)
    assert "Step 3 is saved" in defeat(*options, code=2)
    monkeypatch.undo()
    assert step_of(tmp_path / "run" / "last.pt") == 3
    defeat(*options, "--resume")
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_during_an_evaluation_ends_it_and_the_evaluation_is_made_later(
    seldom, defeat, whole, tmp_path, monkeypatch
):
    options = [*seldom, "-o", tmp_path / "run"]
    evaluate, images = validating.evaluate, []

    def interrupted(*positional, on_image, **named):
        def look(number):
            images.append(number)
            if len(images) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            on_image(number)

        return evaluate(*positional, on_image=look, **named)

    monkeypatch.setattr(validating, "evaluate", interrupted)
    assert "step 3 is saved; --resume goes on from there" in defeat(*options, code=143)
    assert len(images) == 2
    assert step_of(tmp_path / "run" / "last.pt") == 3
    monkeypatch.undo()
    defeat(*options, "--resume")
    assert_same_run(tmp_path / "run", whole)


def test_a_run_that_dies_after_an_evaluation_does_not_tell_it_twice(options, defeat, whole, tmp_path, monkeypatch):
    options = [*options, "-o", tmp_path / "run"]
    write, killed = saving.Saver.best, []

    def die(self):
        killed.append(self.training.step)
        raise SystemExit(9)  # as little caught as a kill

    monkeypatch.setattr(saving.Saver, "best", die)
    defeat(*options, code=9)
    monkeypatch.setattr(saving.Saver, "best", write)
    defeat(*options, "--resume")
    assert killed == [3]
    assert_same_run(tmp_path / "run", whole)


# --- a full disk


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full at these steps, as torch finds it when it writes a checkpoint."""
    write, steps = torch.save, set()

    def save(content, file):
        if content.get("training", {}).get("step") in steps and hasattr(file, "name"):  # not where it is measured
            file.write(b"half")
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662")
        write(content, file)

    monkeypatch.setattr(torch, "save", save)
    return steps


def test_on_a_full_disk_training_goes_on_and_the_checkpoint_before_stays(options, defeat, whole, tmp_path, full_disk):
    full_disk |= {2, 4, 5}
    with dying_at(5):
        defeat(*options, "-o", tmp_path / "run", "--quiet")
    assert step_of(tmp_path / "run" / "last.pt") == 3
    assert [path.name for path in (tmp_path / "run").iterdir() if "tmp" in path.name] == []
    full_disk.clear()
    defeat(*options, "-o", tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "run", whole)


def test_a_full_disk_is_told_with_what_is_needed(options, defeat, whole, tmp_path, full_disk):
    full_disk |= {2, 3}
    output = defeat(*options, "-o", tmp_path / "run")
    needed = native.mib((whole / "last.pt").stat().st_size)
    assert f"{tmp_path / 'run' / 'last.pt'}: No space left on device: {needed} are needed, " in output
    assert "last.pt is not saved; training goes on, and what was saved before stays" in output
    assert_same_run(tmp_path / "run", whole)


def test_a_stop_that_cannot_be_saved_says_so(options, defeat, tmp_path, full_disk, monkeypatch):
    full_disk |= {2, 3}
    stop = loop.train_step

    def step(state, *positional, **named):
        losses = stop(state, *positional, **named)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    monkeypatch.setattr(loop, "train_step", step)
    output = defeat(*options, "-o", tmp_path / "run", code=143)
    assert "step 2 could not be saved, step 1 is on the disk" in output


def test_lines_of_the_log_wait_until_there_is_room(options, defeat, whole, tmp_path, monkeypatch):
    log, calls = RunFolder.log, []

    def refused(self, *entries):
        calls.append(len(entries))
        if 2 <= len(calls) <= 6:
            self._unwritten += entries
            raise OSError(errno.ENOSPC, "No space left on device", str(self / "metrics.jsonl"))
        log(self, *entries)

    monkeypatch.setattr(RunFolder, "log", refused)
    output = defeat(*options, "-o", tmp_path / "run")
    assert output.count("lines of the log are kept until they can be written") == 1
    assert_same_run(tmp_path / "run", whole)


# --- what is refused


def test_a_second_process_in_a_run_is_refused_and_readers_are_not(stopped, options, defeat):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with locked(stopped):
        for more in ("--resume", "--overwrite"):
            assert f"process {os.getpid()} on " in defeat(*options, "-o", stopped, more, code=2)
        defeat("eval", stopped / "last.pt")
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_data_that_changed_is_named_and_can_be_accepted(stopped, options, defeat, shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    moved = [*options, "-o", stopped, "--resume", "-d", data]
    # The path is part of the recipe: the run that was begun is made one of the copy.
    recipe = yaml.safe_load((stopped / "recipe.yaml").read_text())
    recipe["data"]["path"] = str(data)
    (stopped / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["bbox"][2] -= 1
    gone = content["images"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != gone]
    (data / "train.json").write_text(json.dumps(content))
    output = defeat(*moved, code=2)
    for told in ("training images: 12 then, 11 now", "training annotations: not what they were", "--changed-data"):
        assert told in output
    assert "validation images:" not in output
    assert "validation annotations" not in output
    output = defeat(*moved, "--changed-data")
    assert "warning: the data changed: training images: 12 then, 11 now" in output
    assert metrics(stopped, "train")[-1]["step"] == 6
    assert "about a run that is resumed" in defeat(*options, "-o", tmp_path / "new", "--changed-data", code=2)


def test_a_run_is_saved_by_the_clock_where_that_is_asked_for(seldom, defeat, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(clock))
    saved = []
    last = saving.Saver.last
    monkeypatch.setattr(saving.Saver, "last", lambda self: (saved.append(self.training.step), last(self))[1])
    defeat(*seldom, "-o", tmp_path / "run", *setting(run__save_every="1m", schedule__epochs=1, data__batch_size=1))
    # 20 seconds pass whenever the clock is asked: once a step, and once when it is saved.
    assert saved == [3, 6, 9, 12, 12]
