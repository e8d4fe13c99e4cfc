"""What a protocol asks, chooses and stretches; tests/jobs/test_following.py follows one."""

from __future__ import annotations

import pytest

from defeat_cli.ablation.choice import SweepPoint, choose
from defeat_cli.ablation.protocol import LONGER, as_long_as, at_the_edge, chosen, prepare, stretched
from defeat_cli.ablation.rows import Outcome, Row, Sweep
from defeat_cli.config import protocol as protocols
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Schedule
from defeat_cli.config.variants import VARIANTS, Variant
from defeat_cli.errors import RecipeError, RunError


@pytest.fixture
def base():
    return recipes.load(None, {"teacher.checkpoint": "teacher.pt", "schedule.epochs": 4})


def asked(folder, base, variants, **content):
    protocol = protocols.make({"variants": variants, **content}, "p.yaml")
    return prepare(folder, protocol, *choose(protocol.variants, VARIANTS, {}, base), base)


def test_of_a_sweep_the_chosen_value_is_reported_by_the_variants_name(tmp_path, base):
    study = asked(tmp_path / "s", base, ["neck:alpha_bg=1,4", "full", "none:optimizer.lr=0.1,0.2"])
    assert list(study.tuning().variants) == [
        "none", "neck:alpha_bg=1", "neck:alpha_bg=4", "none:optimizer.lr=0.1", "none:optimizer.lr=0.2",
    ]  # fmt: skip
    assert (study.tuning().seeds, study.foreseen().seeds) == ([0, 1], [10, 11, 12, 13, 14])
    best = {sweep: points[1] for sweep, points in study.sweeps.items()}
    final = study.final(best)
    assert list(final.variants) == ["none", "neck", "full"]
    assert final.variants["neck"].overrides["distillation.neck.alpha_bg"] == 4
    assert final.variants["none"].overrides["optimizer.lr"] == 0.2
    assert not any(isinstance(variant, SweepPoint) for variant in final.variants.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"variants": ["neck"], "seed": [1]}, r"p\.yaml cannot be used:\n  seed: unknown key \(did you mean seeds\?\)"),
        ({"variants": ["neck"], "seeds": ["a"]}, r"seeds\.0: should be a valid integer \(got 'a'\)"),
        ({"variants": ["neck:alpha_bg=1", 4]}, r"variants\.1: .*string \(got 4\); put each sweep on a line of its own"),
        ({"variants": ["neck"], "seeds": [1, 1]}, "seeds: give whole numbers from 0, each once"),
        ({"variants": ["neck:alpha_bg=1,4"], "tuning_seeds": [0, 1], "seeds": [1, 2]}, "both have 1: a seed that"),
        ({"variants": ["neck:alpha_bg=1,4"], "seeds": [1, 2]}, r"\[0, 1\] are the tuning seeds where none are given"),
        ({"variants": ["neck"], "tuning_seeds": [0]}, "tuning_seeds: nothing is swept"),
        ({"variants": ["neck"], "budget": 2}, "budget: nothing is swept"),
        ({"variants": ["neck:alpha_bg=1,4", "neck"]}, "neck stands for more than one variant"),
        ({"variants": ["neck:alpha_bg=1,4", "neck:alpha_fg=1,4"]}, "neck stands for more than one variant"),
        ({"variants": ["neck", "neck"]}, "named twice"),
        ({"variants": ["none"]}, "name one or more to compare with none"),
        ({"variants": ["neck"], "equal_time": "nec"}, r"equal_time: nec is not compared \(did you mean neck\?\)"),
    ],
)
def test_what_no_sound_study_can_come_of_is_refused(tmp_path, base, content, message):
    with pytest.raises(RecipeError, match=message):
        asked(tmp_path / "s", base, **content)
    assert not (tmp_path / "s").exists()


def test_patience_is_refused_for_budgets_are_to_be_equal(tmp_path, base):
    base.run.patience = 2
    with pytest.raises(RecipeError, match=r"run\.patience: a protocol compares at equal epochs"):
        asked(tmp_path / "s", base, ["neck"])


def test_a_folder_of_another_protocol_is_refused_and_one_with_fewer_seeds_grows(tmp_path, base):
    folder = tmp_path / "s"
    asked(folder, base, ["neck"], seeds=[3]).save()
    assert asked(folder, base, ["neck"], seeds=[4]).protocol.seeds == [3, 4]
    with pytest.raises(RunError, match=r"its study has variants \['neck'\], not \['full'\]; choose another --output"):
        asked(folder, base, ["full"], seeds=[3])
    base.schedule.epochs = 5
    with pytest.raises(RunError, match="another number of epochs"):
        asked(folder, base, ["neck"], seeds=[3])
    (tmp_path / "run").mkdir()
    recipes.save(base, tmp_path / "run" / "recipe.yaml")
    with pytest.raises(RunError, match="no study by a protocol"):
        asked(tmp_path / "run", base, ["neck"])


def sweep_of(*aps):
    """A sweep over 1, 4, 16 with these APs; None for a value that was not trained to the end."""
    points = [
        (SweepPoint("", {}, "neck", {"k.a": 4**i}), Row(f"w{4**i}", ap is not None, 1, {})) for i, ap in enumerate(aps)
    ]
    best = max(
        (pair for pair in zip(aps, points, strict=True) if pair[0] is not None), default=None, key=lambda p: p[0]
    )
    return Sweep("neck", ("k.a",), points, best and best[1][1])


def test_the_best_is_chosen_and_told_where_it_lies_at_the_edge():
    inside, outside = sweep_of(0.1, 0.3, 0.2), sweep_of(0.1, 0.2, 0.3)
    assert chosen([inside])[("neck", "k.a")].settings == {"k.a": 4}
    assert (at_the_edge(inside), at_the_edge(outside)) == ([], ["k.a"])
    assert at_the_edge(sweep_of(0.1, 0.2)) == []  # of two values every one is at an edge
    with pytest.raises(RunError, match=r"no value of k\.a of neck was trained to the end"):
        chosen([sweep_of(None, None)])


def test_a_schedule_is_stretched_in_its_shape():
    schedule = Schedule(epochs=12, warmup_steps=500, milestones=[8, 11])
    # 12 · 1.5 = 18; 8 · 1.5 = 12, 11 · 1.5 = 16.5 -> 17; 500 · 1.5 = 750.
    stretch = {"schedule.epochs": 18, "schedule.milestones": [12, 17], "schedule.warmup_steps": 750}
    assert stretched(schedule, {}, 1.5) == stretch
    assert stretched(schedule, {}, 0.5)["schedule.epochs"] == 12  # never shorter
    # 12 · 1.2 = 14.4 -> 14 epochs, by which the shape goes: 8 · 14/12 = 9.3, 11 · 14/12 = 12.8, 500 · 14/12 = 583.3.
    assert list(stretched(schedule, {}, 1.2).values()) == [14, [9, 13], 583]
    assert stretched(schedule, {"schedule.epochs": 4}, 2.0)["schedule.epochs"] == 8


def run(variant, seed, ap, seconds):
    return Outcome(variant, seed, ({"epoch": 1, "AP": ap},), {"training_seconds": seconds})


def test_a_plain_student_gets_the_time_of_the_best():
    # Ratios of neck 1.5, 2, 9: median 2. fgd is slower and no better.
    runs = [run("none", s, 0.1, 10.0) for s in range(3)]
    runs += [run("neck", s, 0.3, seconds) for s, seconds in enumerate((15.0, 20.0, 90.0))]
    runs += [run("fgd", s, 0.2, 40.0) for s in range(3)] + [run(LONGER, s, 0.9, 99.0) for s in range(3)]
    schedule, plain = Schedule(epochs=6, milestones=[4]), Variant("", {"optimizer.lr": 0.5})
    longer = as_long_as("best", runs, plain, schedule)
    assert longer.overrides["schedule.epochs"] == 12
    assert longer.overrides["optimizer.lr"] == 0.5
    assert longer.summary == "the student alone, for 12 epochs: as long as neck takes"
    assert as_long_as("fgd", runs, plain, schedule).overrides["schedule.epochs"] == 24
    assert as_long_as("head", runs, plain, schedule) is None  # not trained
    assert as_long_as("best", [run("none", 0, 0.1, 10.0), run("neck", 0, 0.2, 10.5)], plain, schedule) is None
