"""What TensorBoard, Weights & Biases and MLflow have of a run, read back from their own files."""

import math
import struct
import time

import pytest
from PIL import Image
from runs import setting

from defeat_cli.engine.runs import RunFolder
from defeat_cli.tracking import tracked
from defeat_cli.tracking.following import scalars
from defeat_cli.tracking.mlflow import allowed
from defeat_cli.tracking.wandb import has_key

ENTRIES = [
    {"kind": "train", "step": 2, "epoch": 1, "loss": 3.25, "weighted": {"neck_fg": 0.5}, "raw": {"neck_fg/P3": 0.125}},
    {"kind": "eval", "step": 3, "epoch": 1, "AP": 0.25, "per_class": {"ünï, (b)": 0.75}},
    {"kind": "train", "step": 4, "epoch": 2, "loss": 1.5, "weighted": {"neck_fg": 0.25}, "raw": {"neck_fg/P3": 0.0625}},
]
EXPECTED = {
    (name, entry["step"]): value for entry in ENTRIES for name, value in scalars(entry).items()
}  # fmt: skip


def watch(kind, folder):
    """Two lines and a picture, a stop, and after it the second line again and the third."""
    recipe = {"optimizer": {"lr": 0.01}, "student": {"widths": [8, 16]}}
    folder.mkdir(exist_ok=True)
    for entries in (ENTRIES[:2], ENTRIES):
        with tracked([kind], folder, "runs/student", recipe, pytest.fail) as tracking:
            for entry in entries:
                if entry["kind"] == "eval":
                    tracking.pictures = {"detections/a b.jpg": Image.new("RGB", (6, 4), "red")}
                tracking.take(entry)


def test_tensorboard_has_every_value_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert found == EXPECTED
    assert sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"]) == len(EXPECTED)
    (picture,) = events.Images("detections/a b.jpg")
    assert (picture.step, picture.width, picture.height) == (3, 6, 4)
    assert b"lr: 0.01" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def records_of(path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        if size == kind == 0:
            break
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or last of several
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def all_records_of(path):
    """The records of a run that was closed, which W&B's own process goes on writing for a moment."""
    for _ in range(100):
        records = list(records_of(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.2)
    return pytest.fail(f"{path}: its end is not there")


def test_wandb_has_every_value_once_offline_where_there_is_no_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    import json

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    watch("wandb", tmp_path / "run")
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # one run, gone on with
    found, pictures = {}, []
    for file in files:
        for record in all_records_of(file):
            values = {"/".join([*item.nested_key] or [item.key]): item.value_json for item in record.history.item}
            values = {name: json.loads(value) for name, value in values.items() if not name.startswith("_")}
            picture = {name: values.pop(name) for name in [*values] if name.startswith("detections/a b.jpg/")}
            pictures += [(values["step"], *picture.values())] if picture else []
            for name in values.keys() - {"step"}:
                assert (name, values["step"]) not in found
                found[name, values["step"]] = values[name]
    assert found == EXPECTED
    assert len(pictures) == 1
    assert {3, "image-file", 6, 4} <= {*pictures[0]}


def test_mlflow_has_every_value_once(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    watch("mlflow", tmp_path / "run")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("defeat")
    (run,) = client.search_runs([experiment.experiment_id])
    names = {allowed(name): name for name, _ in EXPECTED}
    history = [metric for name in run.data.metrics for metric in client.get_metric_history(run.info.run_id, name)]
    assert {(names[metric.key], metric.step): metric.value for metric in history} == EXPECTED
    assert len(history) == len(EXPECTED)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.01", "student.widths": "[8, 16]"}
    assert run.info.run_name == "runs/student"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["images"]


def test_a_real_run_is_in_tensorboard(defeat, tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    defeat("train", "-r", tiny, "-o", tmp_path / "run", *setting(run__track="[tensorboard]", schedule__epochs=1))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for entry in RunFolder(tmp_path / "run").metrics():
        for name, value in scalars(entry).items():
            (found,) = (event.value for event in events.Scalars(name) if event.step == entry["step"])
            assert math.isclose(found, value, rel_tol=1e-6)  # TensorBoard keeps float32
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("detections/")]) == 4


@pytest.mark.parametrize(("content", "there"), [("machine api.wandb.ai login user password k", True), ("", False)])
def test_a_key_of_wandb_is_found_where_its_login_leaves_it(tmp_path, monkeypatch, content, there):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    (tmp_path / "netrc").write_text(content)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_key() is there
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert has_key()
