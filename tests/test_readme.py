"""The READMEs say what is: their code runs, the file map names every module, and their recipes exist."""

import re
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn

import defeat_cli
from defeat_cli import building
from defeat_cli.config import schema as recipes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(word: str) -> str:
    """The one block of Python in the README that has a word."""
    (code,) = [code for code in PYTHON if word in code]
    return code


def test_the_three_lines_load_a_student_that_detects_the_same(tmp_path, monkeypatch):
    recipe = recipes.load("faster_rcnn_r18_from_r50_coco", {"student.backbone_weights": None})
    student = building.build_student(recipe, [f"class {i}" for i in range(80)]).eval()
    # A class that is almost always sure of itself, so that there are detections to compare.
    student.model.roi_heads.box_predictor.cls_score.bias.data[7] = 3.0
    folder = tmp_path / "runs" / "faster_rcnn_r18_from_r50_coco"
    folder.mkdir(parents=True)
    torch.save(student.model.state_dict(), folder / "student.pth")
    monkeypatch.chdir(tmp_path)
    code = block("resnet_fpn_backbone")
    assert len(code.strip().splitlines()) == 3
    names = {"torch": torch, "torchvision": torchvision}
    exec(code, names)
    image = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = student.detect([image])[0], names["model"].eval()([image])[0]
    assert len(ours["boxes"]) > 0
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def in_a_folder_with_data_and_teacher(tmp_path, monkeypatch, shapes, teacher):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    (tmp_path / "my_data").symlink_to(shapes)
    (tmp_path / "runs" / "teacher" / "best.pt").symlink_to(teacher)
    monkeypatch.chdir(tmp_path)


def test_a_training_loop_of_ones_own_distils(tmp_path, monkeypatch, shapes, teacher, capsys):
    in_a_folder_with_data_and_teacher(tmp_path, monkeypatch, shapes, teacher)
    code = block("training_loader")
    assert len(code.strip().splitlines()) < 40
    torch.manual_seed(0)
    names = {}
    exec(code.replace("320", "64").replace("640", "64").replace("_64_", "_320_"), names)
    assert len(capsys.readouterr().out.split()) == 4  # the AP of two epochs
    losses = names["losses"]
    assert {"neck_fg", "neck_bg", "head_fg", "head_bg"} <= set(losses.weighted)
    saved = torch.load("student.pth", weights_only=True)
    names["model"].load_state_dict(saved)


def test_the_least_annotations_are_a_data_set(tmp_path):
    (annotations,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "images" / "cat_1.jpg")
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(annotations)
        data = defeat_cli.open_split(str(tmp_path), split, train=False)
        _, target, _ = data[0]
        assert data.classes == ["cat"]
        assert target["boxes"].tolist() == [[20, 30, 220, 180]]


class MyNet(nn.Module):
    """Maps of strides 4 and 8, and a loss that looks at the number of boxes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, pixels):
        fine = self.stem(pixels)
        return [fine, self.down(fine)]

    def loss(self, maps, targets):
        wanted = torch.tensor([float(len(target["boxes"])) for target in targets])
        return (maps[1].mean(dim=(1, 2, 3)) - wanted).square().mean()


def test_a_module_of_ones_own_distils(tmp_path, monkeypatch, shapes, teacher):
    in_a_folder_with_data_and_teacher(tmp_path, monkeypatch, shapes, teacher)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 48)]
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
    names = {"MyNet": MyNet, "images": images, "targets": targets}
    code = block("MyNet")
    assert len(code.strip().splitlines()) < 40
    exec(code, names)
    assert set(names["losses"].weighted) == {"detection", "pkd"}
    assert all(parameter.grad is not None for parameter in names["student"].model.parameters())


def test_the_file_map_names_every_module():
    package = Path(defeat_cli.__file__).parent
    design = (package / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(\w+\.py)`", design[design.index("## 6. File map") :]))
    modules = {path.name for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert modules <= named
    assert named <= modules


def test_recipes_that_the_readme_names_are_shipped():
    named = set(re.findall(r"--recipe (\w+)", README))
    assert named
    assert named <= set(recipes.shipped_recipes())


def test_every_term_and_command_is_in_the_readme():
    from defeat_cli.commands.app import app
    from defeat_cli.distillation.terms import TERMS

    commands = {command.name for command in app.registered_commands}
    assert all(f"defeat {name}" in README or f"`{name}`" in README for name in commands)
    assert all(f"`{name}`" in README for name in TERMS if name != "ld")
