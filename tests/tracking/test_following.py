"""What trackers are told of a run: each line of metrics.jsonl once, whatever happens to the run and to them."""

from typing import ClassVar

import pytest
import torch
from runs import dying_at, metrics, setting

from defeat_cli.tracking import TRACKERS
from defeat_cli.tracking.following import Tracking, scalars


class Fake:
    """Remembers what it is told, by the folder of its run; `failing_at` is a step whose line it does not take."""

    package = "json"
    told: ClassVar[dict] = {}
    failing_at = None

    def __init__(self, folder, name, recipe, id):
        new = {"name": name, "ids": [], "lines": [], "pictures": [], "ends": []}
        self.begun = Fake.told.setdefault(folder.name, new)
        self.begun["ids"].append(id)
        self.id = id or f"run {len(Fake.told)}"

    def log(self, scalars, step):
        if step == Fake.failing_at:
            raise ConnectionError("the server is away")
        self.begun["lines"].append((step, scalars))

    def show(self, pictures, step):
        self.begun["pictures"].append((step, {title: picture.size for title, picture in pictures.items()}))

    def close(self, finished):
        self.begun["ends"].append(finished)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(TRACKERS, "mlflow", Fake)
    monkeypatch.setattr(Fake, "told", {})
    return Fake


TRACKED = setting(run__track="[mlflow]", run__log_every=1)


def test_a_line_becomes_numbers_by_name():
    line = {"kind": "train", "step": 4, "loss": 2.5, "weighted": {"neck_fg": 1.0}, "raw": {"neck_fg/P3": 0.5}}
    line |= {"gradient": {"norm": 3.0, "largest": "a.weight"}, "strength": {"neck": None}}
    expected = {"train/loss": 2.5, "weighted/neck_fg": 1.0, "raw/neck_fg.P3": 0.5, "gradient/norm": 3.0}
    assert scalars(line) == expected
    # A class without boxes has the AP -1, which is none.
    line = {"kind": "eval", "step": 4, "AP": 0.5, "APs": -1.0, "per_class": {"cat": 0.25, "dog": -1.0}}
    assert scalars(line) == {"eval/AP": 0.5, "eval/per_class/cat": 0.25}


def test_each_line_is_sent_once_though_the_run_died_and_the_run_is_what_it_is_without(
    fake, defeat, tiny, teacher, tmp_path
):
    arguments = ["train", "-r", tiny, "-t", teacher, *setting(run__log_every=1)]
    defeat(*arguments, "-o", tmp_path / "alone")
    with dying_at(5):
        defeat(*arguments, *TRACKED[:2], "-o", tmp_path / "run")
    sent = [step for step, _ in fake.told["run"]["lines"]]
    assert sent == [1, 2, 3, 3, 4, 5]  # the second 3 is the evaluation; step 5 is sent, and lost with the process
    defeat(*arguments, *TRACKED[:2], "-o", tmp_path / "run", "--resume")
    told = fake.told["run"]
    expected = [(line["step"], scalars(line)) for line in metrics(tmp_path / "run")]
    for _, values in told["lines"]:
        values.pop("train/images_per_second", None)
    assert told["lines"] == expected
    assert told["ids"] == [None, "run 1"]
    assert told["ends"] == [False, True]
    assert told["name"] == f"{tmp_path.name}/run"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")
    ours, theirs = (torch.load(tmp_path / name / "student.pth", weights_only=True) for name in ("run", "alone"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # Four of the six validation images, enlarged to be read, at each evaluation.
    assert [step for step, _ in told["pictures"]] == [3, 6]
    for _, pictures in told["pictures"]:
        assert len(pictures) == 4
        assert {*pictures.values()} == {(512, 512)}


def test_a_tracker_that_fails_does_not_end_the_run_and_gets_what_it_missed(fake, defeat, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "failing_at", 2)
    arguments = ["train", "-r", tiny, "-o", tmp_path / "run", *TRACKED]
    output = defeat(*arguments, *setting(schedule__epochs=1))
    assert "mlflow is left out from step 2 on: the server is away" in output
    assert [step for step, _ in fake.told["run"]["lines"]] == [1]
    monkeypatch.setattr(fake, "failing_at", None)
    defeat(*arguments, "--resume")  # to the second epoch
    assert [step for step, _ in fake.told["run"]["lines"]] == [line["step"] for line in metrics(tmp_path / "run")]


def test_a_tracker_that_cannot_be_begun_is_said_before_anything_is_trained(fake, defeat, tiny, tmp_path, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no such server")

    monkeypatch.setattr(fake, "__init__", refuse)
    output = defeat("train", "-r", tiny, "-o", tmp_path / "run", *TRACKED, code=2)
    assert "run.track: mlflow cannot be begun: no such server" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    defeat("train", "-r", tiny, "-o", tmp_path / "run", "--resume", *setting(schedule__epochs=2, run__log_every=1))


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    fake, defeat, tiny, tmp_path, monkeypatch, command
):
    (tmp_path / "no_such_tracker").mkdir()  # a folder of the package's name is no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fake, "package", "no_such_tracker")
    output = defeat(command, "-r", tiny, *TRACKED, code=2)
    assert "run.track: mlflow: not installed; pip install 'defeat-cli[track]', or no_such_tracker alone" in output
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_begun_again_forgets_its_trackers(fake, defeat, tiny, tmp_path):
    for options in ([], ["--overwrite"]):
        defeat("train", "-r", tiny, "-o", tmp_path / "run", *TRACKED, *setting(schedule__epochs=1), *options)
    assert fake.told["run"]["ids"] == [None, None]


@pytest.mark.parametrize("content", ["", "[]", '{"mlflow": 3}', '{"mlflow": {"id": "a"}}'])
def test_a_damaged_state_begins_anew(fake, tmp_path, content):
    (tmp_path / "tracking.json").write_text(content)
    Tracking(["mlflow"], tmp_path, "a/b", {}, print).take({"kind": "train", "step": 1, "loss": 1.0})
    assert fake.told[tmp_path.name]["ids"] == [None]
    assert fake.told[tmp_path.name]["lines"] == [(1, {"train/loss": 1.0})]
