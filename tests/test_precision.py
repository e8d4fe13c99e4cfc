"""Which precision a device computes in, what `auto` stands for, and that bf16 runs are exact repetitions too."""

import pytest
import torch
import yaml
from runs import assert_resumes_bit_for_bit, metrics, setting

from defeat_cli import precision
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import recipes_folder
from defeat_cli.data.opening import open_split
from defeat_cli.detectors.loading import load_detector
from defeat_cli.detectors.modes import lay_out
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import RunError
from defeat_cli.precision import choose_precision
from defeat_cli.session import settled

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(
    choose_precision("auto", CPU) != "bf16", reason="needs a CPU with AVX512-BF16 or AMX instructions"
)


@pytest.fixture
def instructions(monkeypatch):
    """Says what the CPU has."""

    def say(avx512_bf16, amx):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return say


@pytest.mark.parametrize(("avx512_bf16", "amx", "auto"), [(1, 0, "bf16"), (0, 1, "bf16"), (0, 0, "fp32")])
def test_auto_is_bf16_on_cpus_that_have_it(instructions, avx512_bf16, amx, auto):
    instructions(avx512_bf16, amx)
    assert choose_precision("auto", CPU) == auto
    assert choose_precision("fp32", CPU) == "fp32"
    if auto == "bf16":
        assert choose_precision("bf16", CPU) == "bf16"
    else:
        with pytest.raises(RunError, match="AVX512-BF16 or AMX"):
            choose_precision("bf16", CPU)
    with pytest.raises(RunError, match="fp16 needs a CUDA device"):
        choose_precision("fp16", CPU)


@pytest.mark.parametrize(("capability", "auto"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_on_gpus_from_ampere_on(monkeypatch, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) == auto
    assert choose_precision("fp16", torch.device("cuda")) == "fp16"


def test_a_run_is_gone_on_with_in_its_own_precision(instructions):
    instructions(True, False)
    asked = recipes.validate({"run": {"device": "cpu"}}, "test")
    assert asked.run.precision == "auto"
    assert settled(asked).run.precision == "bf16"
    begun = recipes.validate({"run": {"device": "cpu", "precision": "fp32"}}, "test")
    assert settled(asked, begun).run.precision == "fp32"
    assert asked.run.precision == "auto"
    instructions(False, False)
    begun.run.precision = "bf16"
    with pytest.raises(RunError, match="the run was begun in bf16: go on with it on such a device"):
        settled(asked, begun)


def test_the_folder_of_a_run_says_what_auto_was(defeat, tiny, tmp_path, instructions):
    instructions(False, False)
    arguments = ["-r", tiny, "-o", tmp_path / "run", *setting(schedule__epochs=1)]
    auto = setting(run__precision="auto")
    defeat("train", *arguments, *auto)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["run"]["precision"] == "fp32"
    instructions(True, False)
    assert "is finished already" in defeat("train", *arguments, *auto, "--resume")
    output = defeat("train", *arguments, "--resume", *setting(run__precision="bf16"), code=2)
    assert "run.precision: 'fp32' there, 'bf16' here" in output


@needs_bf16
def test_a_bf16_run_resumes_bit_for_bit_and_evaluates_as_it_trained(defeat, tiny, teacher, tmp_path):
    options = ["-r", tiny, "-t", teacher, *setting(run__precision="bf16")]
    whole = assert_resumes_bit_for_bit(defeat, options, tmp_path, step=4)
    assert {"neck_fg", "neck_bg", "head_fg", "head_bg"} <= set(whole.steps[-1]["weighted"])
    plain = tmp_path / "fp32"
    defeat("train", "-r", tiny, "-t", teacher, "-o", plain)
    first, theirs = whole.steps[0]["raw"], metrics(plain, "train")[0]["raw"]
    assert first != theirs
    for name, value in first.items():
        assert value == pytest.approx(theirs[name], rel=0.1, abs=0.02), name
    saved = torch.load(tmp_path / "whole" / "student.pth", weights_only=True)
    assert all(value.dtype != torch.bfloat16 for value in saved.values())
    scored = defeat("eval", tmp_path / "whole" / "best.pt", "--json", tmp_path / "figures.json")
    assert "evaluated in" not in scored
    assert ", in bf16" in " ".join(scored.split())
    assert "in bf16" not in defeat("eval", tmp_path / "whole" / "best.pt", *setting(run__precision="fp32"))
    assert RunFolder(tmp_path / "whole").results()["student"]["AP"] == pytest.approx(
        yaml.safe_load((tmp_path / "figures.json").read_text())["AP"], abs=1e-12
    )


def test_every_precision_of_a_recipe_but_auto_has_a_dtype():
    assert {*precision.AUTOCAST, "auto"} == set(recipes.Run.model_fields["precision"].annotation.__args__)


def test_a_checkpoint_in_half_precision_detects_what_it_did_in_its_run(shapes):
    """In a run it has lain with the channels side by side since the start, and sums are rounded accordingly."""
    data = open_split(shapes, "val", train=False)
    found = []
    for laid_out_before in (True, False):
        detector = load_detector(str(recipes_folder() / "quickstart_teacher.pt")).detector
        if laid_out_before:
            lay_out(detector, torch.bfloat16)
        found.append([])
        evaluate(detector, data, autocast=torch.bfloat16, keep_detections=found[-1])
    assert found[0]
    assert found[0] == found[1]
