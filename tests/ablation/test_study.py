"""What a study is made of, before anything is trained."""

from __future__ import annotations

import pytest
from runs import planned

from defeat_cli.ablation.study import read_study, run_name
from defeat_cli.config import schema as recipes
from defeat_cli.config.variants import VARIANTS, Variant
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import RecipeError, RunError


@pytest.fixture
def base():
    return recipes.load(None, {"teacher.checkpoint": "teacher.pt", "schedule.epochs": 8})


def test_seeds_come_one_after_the_other_and_nothing_is_written(tmp_path, base):
    study = planned(tmp_path / "s", ["neck", "full"], base, seeds=(0, 3))
    assert [run.name for run in study.runs()] == [
        "none-seed0", "neck-seed0", "full-seed0", "none-seed3", "neck-seed3", "full-seed3"
    ]  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_runs_differ_in_their_variant_and_seed_only(tmp_path, base):
    base.run.compare_plain = True
    none, head = planned(tmp_path / "s", ["head"], base, seeds=(2,)).runs()
    assert none.recipe.run.seed == head.recipe.run.seed == 2
    assert not head.recipe.run.compare_plain
    assert (list(none.recipe.distillation.terms), list(head.recipe.distillation.terms)) == ([], ["head"])
    for part in ("student", "teacher", "data", "optimizer", "schedule"):
        assert getattr(none.recipe, part) == getattr(head.recipe, part)


def test_a_variant_goes_before_what_all_runs_share(tmp_path, base):
    base.optimizer.lr = 7.0
    known = {**VARIANTS, "fast": Variant("", {**VARIANTS["neck"].overrides, "optimizer.lr": 9.0})}
    _, neck, fast, swept = planned(tmp_path / "s", ["neck", "fast", "neck:optimizer.lr=5"], base, known=known).runs()
    assert [run.recipe.optimizer.lr for run in (neck, fast, swept)] == [7.0, 9.0, 5.0]


@pytest.mark.parametrize(
    ("names", "seeds", "message"),
    [
        (["neck"], (), "whole numbers from 0"),
        (["neck"], (1, 1), "each once"),
        (["neck"], (-1,), "whole numbers from 0"),
        (["odd"], (0,), "variant odd.*\n.*optimizer.rl: unknown key"),
        (["seeded"], (0,), "variant seeded: a study sets run.seed itself; give --seeds"),
        (["none:run.seed=1,2"], (0,), "a study sets run.seed itself"),
        (["a/b", "a:b"], (0,), "would share a folder"),
    ],
)
def test_what_cannot_be_studied_is_refused(tmp_path, base, names, seeds, message):
    odd = {"odd": Variant("", {"optimizer.rl": 1.0}), "seeded": Variant("", {"run.seed": 1})}
    known = {**VARIANTS, **odd, "a/b": Variant(""), "a:b": Variant("")}
    with pytest.raises((RecipeError, RunError), match=message):
        planned(tmp_path / "s", names, base, seeds, known)


@pytest.mark.parametrize(
    ("names", "budget", "message"),
    [
        (["neck"], 2, "only sweeps are cut short"),
        (["none:optimizer.lr=1,2"], 1, r"at least 1\.5 whole trainings of 8 epochs"),
        (["none:schedule.epochs=1,2"], 2, "cannot be halved by epochs"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(tmp_path, base, names, budget, message):
    with pytest.raises(RunError, match=message):
        planned(tmp_path / "s", names, base, budget=budget)


def test_distillation_needs_a_teacher_and_the_student_alone_does_not(tmp_path):
    alone = recipes.load(None)
    with pytest.raises(RecipeError, match="--teacher"):
        planned(tmp_path / "s", ["neck"], alone)
    assert len(planned(tmp_path / "s", ["none:optimizer.lr=0.1,0.2"], alone).runs()) == 3
    assert len(planned(tmp_path / "s", ["none:teacher.checkpoint=a.pt"], alone).runs()) == 2


def test_a_run_is_no_study(tmp_path, base):
    RunFolder(tmp_path / "run").open(base)
    with pytest.raises(RunError, match="holds a run, not a study"):
        planned(tmp_path / "run", ["neck"], base)
    with pytest.raises(RunError, match="holds no study"):
        read_study(tmp_path / "run")


def test_names_are_safe_for_file_systems():
    assert run_name("defeat+backbone", 2) == "defeat+backbone-seed2"
    assert run_name("neck:alpha_bg=4", 2) == "neck_alpha_bg=4-seed2"
    assert run_name("../my variant: 1", 0) == ".._my_variant__1-seed0"


def test_a_study_grows_but_does_not_change(tmp_path, base):
    folder = tmp_path / "s"
    mine = Variant("mine", {"optimizer.lr": 0.1})
    first = planned(folder, ["neck:optimizer.lr=1,2,3", "mine"], base, known={**VARIANTS, "mine": mine}, budget=2.5)
    folder.mkdir()
    first.save()
    assert read_study(folder) == first
    grown = planned(folder, ["full"], base, seeds=(1,))
    assert list(grown.variants) == [*first.variants, "full"]
    assert (grown.seeds, grown.budget) == ([0, 1], None)

    other = Variant("mine", {"optimizer.lr": 0.2})
    with pytest.raises(RunError, match="variant mine is another one"):
        planned(folder, ["mine"], base, known={**VARIANTS, "mine": other})
    base.optimizer.lr = 0.5
    with pytest.raises(RunError, match=r"(?s)cannot be resumed with another recipe.*optimizer.lr: .* 0.5 here"):
        planned(folder, ["neck"], base)
