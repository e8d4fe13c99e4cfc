"""`defeat export` through the real command, and its files run by themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from defeat_cli.data.transforms import read_image
from defeat_cli.export import parity
from defeat_cli.jobs.opening import open_detector

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory, defeat, teacher):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("exported") / "deep" / "teacher.onnx"
    output = defeat("export", teacher, path, "--input", "uint8")
    assert "DIFFERS" not in output
    assert f"written: {path}" in output
    return path


@pytest.fixture(scope="module")
def float_file(onnx_file, defeat, teacher, shapes):
    """The file, and what was said of it."""
    path = onnx_file.with_name("float.onnx")
    return path, defeat("export", teacher, path, "-d", shapes)


def test_the_table_has_images_of_several_sizes_and_a_blank_one(float_file):
    _, output = float_file
    assert {line.split()[1] for line in output.splitlines() if line.startswith(("val_", "blank"))} == {
        "64x64", "38x38", "45x64", "90x90", "58x32", "65x64"
    }  # fmt: skip
    assert output.count(" same") == 6


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_the_lines_of_the_readme_detect_the_same_without_this_tool(
    onnx_file, float_file, teacher, shapes, tmp_path, kind
):
    picture = next((shapes / "images").iterdir())
    (code,) = [code for code in README.read_text(encoding="utf-8").split("```") if "onnxruntime.Inf" in code]
    lines = code.removeprefix("python").replace("score >= 0.5", "score >= 0.1").splitlines()
    if kind == "uint8":
        lines = [line for line in lines if "not for a file of --input uint8" not in line]
    script = "\n".join(lines).replace("photo.jpg", str(picture))
    script = script.replace("student.onnx", str(float_file[0] if kind == "float" else onnx_file))
    assert "torch" not in script
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.splitlines()
    detector = open_detector(str(teacher), None, {"run.device": "cpu"}, "export").detector
    with torch.no_grad():
        (found,) = detector.detect([read_image(picture)])
    sure = [
        (detector.classes[label - 1], score, *box)
        for box, score, label in zip(
            found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
        )
        if score >= 0.1
    ]
    assert len(printed) == len(sure) > 0
    for line, (name, *numbers) in zip(printed, sure, strict=True):
        assert line.split()[0] == name
        assert [float(word) for word in line.split()[1:]] == pytest.approx(numbers, abs=0.06)


def test_a_file_that_differs_is_not_written(defeat, teacher, tmp_path, monkeypatch):
    """A file of other weights, as a faulty exporter would write it."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from defeat_cli.export import graph
    from defeat_cli.jobs import exporting

    def of_other_weights(exported):
        for value in exported.model.roi_heads.box_predictor.cls_score.parameters():
            value.data += 0.5 * torch.arange(len(value)).view(-1, *[1] * (value.ndim - 1))
        content = graph.to_onnx(exported)
        exported.model.roi_heads.box_predictor.cls_score.bias.data.zero_()
        return content

    monkeypatch.setitem(exporting.FORMATS, "onnx", of_other_weights)
    (tmp_path / "there.onnx").write_bytes(b"before")
    output = defeat("export", teacher, tmp_path / "there.onnx", "--overwrite", code=1)
    assert "DIFFERS" in output
    assert "not written" in output
    assert (tmp_path / "there.onnx").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1
    defeat("export", teacher, tmp_path / "there.onnx", "--overwrite", "--no-check")
    assert (tmp_path / "there.onnx").read_bytes() != b"before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not know where its data is; give a folder with --data"),
        (["-d", "{shapes}", "-r", "quickstart"], "cannot be changed; leave --recipe out"),
        (["-d", "{shapes}", "--set", "student.nms_threshold=0.3"], "leave student.nms_threshold out"),
        (["-d", "{shapes}", "--set", "optimizer.lr=1"], "optimizer.lr: without effect in `defeat eval`"),
        (["-d", "{shapes}", "--set", "data.split_seed=1"], "data.split_seed: without effect"),
        (["-d", "{shapes}", "--device", "cuda"], "run on the CPU"),
    ],
)
def test_eval_refuses_what_a_file_cannot_have(defeat, onnx_file, shapes, arguments, message):
    assert message in defeat("eval", onnx_file, *[argument.format(shapes=shapes) for argument in arguments], code=2)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(defeat, teacher, tmp_path):
    target = tmp_path / "teacher.torchscript"
    assert defeat("export", teacher, target, "--format", "torchscript").count(" same") == 6
    extra = {"defeat": ""}
    module = torch.jit.load(target, _extra_files=extra)
    assert json.loads(extra["defeat"])["classes"][0] == "circle"
    boxes, scores, labels = module(torch.rand(3, 50, 60))
    assert boxes.shape == (len(scores), 4)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt", "x.onnx"], "nowhere.pt"),
        (["{teacher}", "x.pt"], "rename it, or add --format torchscript"),
        (["{teacher}", "x.onnx", "--format", "tflite"], "expected onnx or torchscript"),
        (["{teacher}", "x.onnx", "--input", "int8"], "expected float or uint8"),
        (["{teacher}", "there.onnx"], "add --overwrite"),
        (["{teacher}", "x.onnx", "--images", "nowhere"], "nowhere"),
        (["{teacher}", "x.onnx", "--no-check", "--images", "."], "no use for --images"),
        (["{teacher}", "x.onnx", "--half", "--int8"], "give one"),
        (["{teacher}", "x.pt", "--format", "torchscript", "--half"], "leave --format torchscript out"),
        (["{teacher}", "x.onnx", "--int8", "-d", "nowhere"], "nowhere: no such folder"),
        (["{bare}", "x.onnx", "--int8"], "give a folder with --data"),
        (["{teacher}", "x.onnx", "--no-check", "-d", "."], "--data: without effect, as nothing is compared"),
        (["{teacher}", "x.onnx", "--images", "x", "-d", "."], "--data: without effect, as --images"),
        (["{teacher}", "x.onnx", "--set", "run.device=cuda"], "run.device"),
    ],
)
def test_bad_input_writes_nothing(defeat, teacher, tmp_path, monkeypatch, arguments, message):
    bare = "shipped:quickstart_teacher.pt"  # whose data is yet to be drawn
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").write_bytes(b"")
    output = defeat("export", *[a.format(teacher=teacher, bare=bare) for a in arguments], code=2)
    assert message in output
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_what_to_install(defeat, teacher, tmp_path, monkeypatch, package):
    if package == "onnxruntime":
        pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, package, None)
    output = defeat("export", teacher, tmp_path / "x.onnx", code=2)
    assert f"needs the package {package}: pip install 'defeat-cli[export]'" in output
    assert not list(tmp_path.iterdir())


def test_the_tolerances_are_those_that_are_promised():
    assert (parity.SCORE_TOLERANCE, parity.BOX_TOLERANCE) == (1e-3, 0.5)
