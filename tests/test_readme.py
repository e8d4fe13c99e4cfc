"""The README says what is: its three lines load a student, its file map names every module, its recipes exist."""

import re
from pathlib import Path

import torch
import torchvision

import defeat_cli
from defeat_cli import session
from defeat_cli.config import schema as recipes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_three_lines_load_a_student_that_detects_the_same(tmp_path, monkeypatch):
    recipe = recipes.load("faster_rcnn_r18_from_r50_coco", {"student.backbone_weights": None})
    student = session.build_student(recipe, [f"class {i}" for i in range(80)]).eval()
    # A class that is almost always sure of itself, so that there are detections to compare.
    student.model.roi_heads.box_predictor.cls_score.bias.data[7] = 3.0
    folder = tmp_path / "runs" / "faster_rcnn_r18_from_r50_coco"
    folder.mkdir(parents=True)
    torch.save(student.model.state_dict(), folder / "student.pth")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) == 3
    names = {"torch": torch, "torchvision": torchvision}
    exec(code, names)
    image = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = student.detect([image])[0], names["model"].eval()([image])[0]
    assert len(ours["boxes"]) > 0
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_file_map_names_every_module():
    package = Path(defeat_cli.__file__).parent
    section = README[README.index("## How it is put together") :]
    named = set(re.findall(r"(\w+\.py)`", section))
    modules = {path.name for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert modules <= named
    assert named <= modules | {"benchmark_step.py"}


def test_recipes_that_the_readme_names_are_shipped():
    named = set(re.findall(r"--recipe (\w+)", README))
    assert named
    assert named <= set(recipes.shipped_recipes())
