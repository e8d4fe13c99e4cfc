"""The seam: a term of one's own, by one class and one table entry, is part of everything that a run does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_resumes_bit_for_bit, metrics

from defeat_cli.engine.curves import curves

TOY = '''
from dataclasses import field
from pydantic.dataclasses import dataclass
import torch
from defeat_cli.config.architecture import STRICT
from defeat_cli.config.terms import TermSettings
from defeat_cli.config.types import NonNegative
from defeat_cli.distillation.terms import TERMS, Loss, Term

@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToySettings(TermSettings):
    weight: NonNegative = 2.0

class Toy(Term):
    """Pulls the mean of the student's finest level, times a trained scale, to the teacher's."""
    Settings = ToySettings

    def __init__(self, student, teacher, **keywords):
        super().__init__(student, teacher, **keywords)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.notes.append("the toy term is on")

    @classmethod
    def obstacle(cls, student, teacher, *, class_map=None, **settings):
        return "toys are for students of six classes" if len(student.classes) != 6 else None

    def forward(self, student, teacher):
        difference = self.scale * student.features[0].mean() - teacher.features[0].mean()
        return {"": Loss(difference.square(), self.settings.weight, {"scale": self.scale.detach()})}

TERMS["toy"] = Toy
'''


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The toy term in this process, and in those that it starts."""
    from defeat_cli.distillation.terms import TERMS

    namespace = {"__name__": "toy"}
    before = dict(TERMS)
    exec(TOY, namespace)
    # A study's runs are processes of their own, which read this file as they start.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(TOY)
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(root), os.environ.get("PYTHONPATH", "")]))
    yield namespace["Toy"]
    TERMS.clear()
    TERMS.update(before)


def test_a_toy_term_is_trained_logged_drawn_told_saved_and_resumed(toy, defeat, tiny, teacher, tmp_path):
    options = ["-r", tiny, "-t", teacher, "--set", "distillation.toy.weight=3", "--set", "run.log_every=1"]
    told = defeat("check", *options)
    assert "the toy term is on" in told
    assert "toy, one image at full weight" in told

    _, steps, checkpoint = assert_resumes_bit_for_bit(defeat, options, tmp_path, step=4)
    last = steps[-1]
    assert last["weighted"]["toy"] == pytest.approx(3 * last["raw"]["toy"])
    scales = [step["raw"]["toy/scale"] for step in steps]
    assert scales[0] == 0.5
    assert len(set(scales)) > 1  # it is trained
    assert any(line.get_label() == "toy" for axis in curves(steps, ["toy"]).axes for line in axis.lines)
    assert checkpoint["training"]["terms"]["toy.scale"] != 0.5
    assert "toy" in (tmp_path / "whole" / "recipe.yaml").read_text()


def test_a_toy_term_is_ablated(toy, defeat, tiny, teacher, tmp_path):
    (tmp_path / "mine.yaml").write_text("toys: {distillation.only: [toy], distillation.toy.weight: 1.5}\n")
    options = ["-r", tiny, "-t", teacher, "--set", "schedule.epochs=1", "--set", "run.log_every=1"]
    defeat("ablate", "toys", "--variants", tmp_path / "mine.yaml", *options, "-o", tmp_path / "study")
    steps = metrics(tmp_path / "study" / "toys-seed0", "train")
    distilled = {name for name in steps[-1]["weighted"] if not name.startswith("loss_")}
    assert distilled == {"toy"}
    none = metrics(tmp_path / "study" / "none-seed0", "train")
    assert all(name.startswith("loss_") for name in none[-1]["weighted"])


def test_a_pair_that_cannot_have_a_term_is_told_why(toy, defeat, tiny, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "obstacle", classmethod(lambda *_, **__: "no toys today"))
    options = ["-r", tiny, "-t", teacher, "--set", "distillation.toy={}"]
    for command in (["check"], ["train", "-o", tmp_path / "run"]):
        assert "distillation.toy: no toys today" in defeat(*command, *options, code=2)
    assert not (tmp_path / "run").exists()


def test_a_wrong_setting_of_an_own_term_is_named(toy, defeat, tiny, teacher, tmp_path):
    options = ["-r", tiny, "-t", teacher, "-o", tmp_path / "run"]
    output = defeat("train", *options, "--set", "distillation.toy.wieght=3", code=2)
    assert "distillation.toy.wieght: unknown key (did you mean weight?)" in output


def test_importing_the_package_costs_nothing():
    code = "import sys, defeat_cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
