"""`defeat bench` through the real command: a step's parts, detectors side by side, and what is refused."""

import gzip
import json

import pytest
import torch
from rich.console import Console
from runs import setting

from defeat_cli.benchmark.step import TERMS as TOGETHER
from defeat_cli.detectors.loading import load_detector
from defeat_cli.jobs import benching


def test_a_step_is_the_sum_of_its_parts_and_something(defeat, tiny, teacher, tmp_path):
    arguments = ["-r", tiny, "-t", teacher, "--rounds", 2, "-q"]
    output = defeat("bench", *arguments, "--json", tmp_path / "a" / "b.json", "--profile", tmp_path / "trace.json.gz")
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    names = ["student's step", "forward", "backward", "teacher", "neck", "head", TOGETHER, "whole step"]
    assert list(found["parts_ms"]) == names
    assert [line.strip().split("  ")[0] for line in output.splitlines()[3:11]] == names
    assert all(0 < part["min"] <= part["median"] <= part["p95"] for part in found["parts_ms"].values())
    assert found["images_a_batch"] == 4
    assert found["pixels"] == [64, 64]
    assert found["recipe"]["data"]["batch_size"] == 4
    assert found["images_per_second"] == pytest.approx(4000 / found["parts_ms"]["whole step"]["median"], rel=1e-3)
    weights = load_detector(str(teacher)).detector.state_dict().values()
    memory = found["memory_mib"]
    assert memory["teacher"] == pytest.approx(sum(w.numel() * w.element_size() for w in weights) / 2**20, abs=0.06)
    assert memory["teacher"] < memory["without_terms"] < memory["whole"]
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::convolution" for event in trace["traceEvents"])


def test_a_plain_step_is_its_own_one_part(defeat, tiny, tmp_path):
    defeat("bench", "-r", tiny, "--rounds", 1, "-q", "--json", tmp_path / "plain.json")
    found = json.loads((tmp_path / "plain.json").read_text())
    assert list(found["parts_ms"]) == ["student's step", "forward", "backward", "whole step"]
    assert found["ratio"] == pytest.approx(found["parts_ms"]["whole step"]["median"] / found["necessary_ms"], rel=1e-3)
    assert found["memory_mib"]["teacher"] == 0


def test_unlabelled_images_are_a_part(defeat, tiny, teacher, shapes, tmp_path):
    more = setting(data__unlabelled=shapes / "images")
    defeat("bench", "-r", tiny, "-t", teacher, "--rounds", 1, "-q", "--json", tmp_path / "u.json", *more)
    found = json.loads((tmp_path / "u.json").read_text())
    assert found["images_a_batch"] == 8
    assert "student, unlabelled" in found["parts_ms"]


def test_detectors_side_by_side(defeat, teacher, shapes, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    exported = tmp_path / "teacher.onnx"
    defeat("export", teacher, exported, "-q", "--no-check")
    defeat("eval", teacher, "-d", shapes, "--json", tmp_path / "eval.json", "-q")
    output = defeat(
        "bench", teacher, exported, "-d", shapes, "--rounds", 2, "--batch-size", 3, "--image-size", 64,
        "--json", tmp_path / "d.json", "--picture", tmp_path / "pictures" / "d.png",
    )  # fmt: skip
    found = json.loads((tmp_path / "d.json").read_text())
    ours, file = found["detectors"]
    ap = json.loads((tmp_path / "eval.json").read_text())["AP"]
    assert ours["metrics"]["AP"] == ap
    assert file["metrics"]["AP"] == pytest.approx(ap, abs=0.01)
    assert f"{100 * ap:.1f}" in output
    detector = load_detector(str(teacher)).detector
    assert ours["parameters"] == sum(p.numel() for p in detector.parameters())
    assert ours["memory_mib"] > 4 * ours["parameters"] / 2**20
    assert ours["gflops"] > 0
    assert (file["parameters"], file["gflops"], file["memory_mib"]) == (None, None, None)
    for entry in (ours, file):
        assert (entry["short_side"], entry["long_side"]) == (64, 64)
        assert 0 < entry["latency_ms"]["min"] <= entry["latency_ms"]["p95"]
        assert entry["batch_latency_ms"]["median"] > entry["latency_ms"]["median"]
    assert (tmp_path / "pictures" / "d.png").read_bytes().startswith(b"\x89PNG")
    message = defeat("bench", exported, "--image-size", 96, code=2)
    assert "exported for a short side of 64" in message


def test_an_image_size_is_what_detectors_see(defeat, teacher, tmp_path):
    flops = []
    for size in (64, 128):
        defeat("bench", teacher, "--rounds", 1, "--image-size", size, "--batch-size", 1, "--json", tmp_path / "s.json")
        flops.append(json.loads((tmp_path / "s.json").read_text())["detectors"][0])
    assert [(entry["short_side"], entry["long_side"]) for entry in flops] == [(64, 64), (128, 128)]
    assert flops[1]["gflops"] > 1.5 * flops[0]["gflops"]  # four times the cells, the same regions


REFUSED = {
    "nothing to measure": [[], "name checkpoints to compare, or give --recipe"],
    "a recipe beside checkpoints": [["x.pt", "-r", "TINY"], "--recipe: without effect"],
    "a size of a step": [["-r", "TINY", "--image-size", 320], "--image-size: without effect"],
    "a picture without AP": [["TEACHER", "--picture", "p.png"], "--picture: AP is known with --data only"],
    "a setting of data that is not read": [["TEACHER", "--set", "data.val_fraction=0.5"], "data.val_fraction: without"],
    "several without effect": [["x.pt", "-r", "TINY", "--variant", "neck"], "--recipe, --variant: without effect"],
    "no such checkpoint": [["nowhere.pt"], "nowhere.pt: no such file"],
    "no such data": [["TEACHER", "-d", "nowhere"], "nowhere"],
    "no such device": [["TEACHER", "--device", "cuda:99"], "cuda:99"],
    "a trace that cannot be written": [["-r", "TINY", "--profile", "TINY/t.json"], "nothing can be written there"],
    "a setting without effect": [["TEACHER", "--set", "optimizer.lr=1"], "optimizer.lr"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case, defeat, tiny, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[case]
    assert message in defeat(
        "bench",
        *(str(argument).replace("TINY", str(tiny)).replace("TEACHER", str(teacher)) for argument in arguments),
        code=2,
    )
    assert not list(tmp_path.iterdir())


def test_the_table_of_detectors_is_whole_at_80_columns():
    spread = {"min": 12345.678, "median": 12345.678, "p95": 12345.678}
    entry = {
        "checkpoint": "runs/a_rather_long_name_of_a_run/student/best.pt", "short_side": 800, "long_side": 1333,
        "parameters": 123_456_789, "gflops": 1234.5, "memory_mib": 12345.6, "latency_ms": spread,
        "batch_latency_ms": {"median": 98765.4}, "metrics": {"AP": 1.0},
    }  # fmt: skip
    machine = {"name": "Some Processor", "device": "cpu", "threads": 128, "torch": torch.__version__}
    table = benching._detectors_table(
        {"detectors": [entry], "batch_size": 8, "rounds": 20, "data": "coco", "machine": machine}
    )
    table.title = None
    console = Console(width=80, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for figure in ("GFLOPs", "800-1333", "123.46", "1234.50", "12346", "12345.7", "100.0"):
        assert any(figure in line for line in lines), figure
