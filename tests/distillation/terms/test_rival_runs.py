"""Rivals through the real command: every loss in the log, bit-exact resuming, refusals before training."""

import pytest
from runs import assert_resumes_bit_for_bit, setting
from tiny import options

TWO_STAGE = {"pkd", "cwd", "fgd", "mgd", "frs", "fitnets", "dist"}
LOGGED = {
    "pkd", "cwd", "mgd", "fitnets", "fgd_fg", "fgd_bg", "fgd_attention", "fgd_relation", "frs_features", "frs_classes",
    "dist_regions", "dist_classes",
}  # fmt: skip


def only(*terms):
    """Options that switch these terms on and DeFeat's off."""
    return setting(distillation__only=f"[{', '.join(sorted(terms))}]")


def resumed(defeat, arguments, folder):
    """The lines about steps of a run that resumes exactly after it died in its fifth step of six."""
    arguments += setting(schedule__epochs=1, data__batch_size=2, run__teacher_check_images=0)
    arguments += setting(run__log_every=1, run__save_every=2)
    return assert_resumes_bit_for_bit(defeat, arguments, folder, step=4).steps


def test_the_rivals_of_a_two_stage_pair(defeat, tiny, teacher, tmp_path):
    arguments = ["-r", tiny, "-t", teacher, *only(*TWO_STAGE)]
    lines = resumed(defeat, arguments, tmp_path)
    for line in lines:
        assert {name for name in line["weighted"] if not name.startswith("loss_")} == LOGGED
    # Past the warm-up the published weight of a two-stage student is what a loss is multiplied by.
    assert lines[-1]["weighted"]["pkd"] == pytest.approx(6 * lines[-1]["raw"]["pkd"])
    assert lines[-1]["raw"]["pkd"] == pytest.approx(sum(lines[-1]["raw"][f"pkd/P{n}"] for n in (2, 3, 4, 5)))
    # FRS warms up over 500 steps by itself.
    assert lines[-1]["weighted"]["frs_features"] == pytest.approx(0.002 * 5 / 500 * lines[-1]["raw"]["frs_features"])


def test_crosskd_with_pkd_on_retinanets(defeat, tiny, tmp_path):
    defeat(
        "train",
        "-r",
        tiny,
        "-o",
        tmp_path / "teacher",
        *options("retinanet"),
        *setting(schedule__epochs=1),
        "--seed",
        7,
    )
    arguments = ["-r", tiny, "-t", tmp_path / "teacher" / "best.pt", *options("retinanet"), *only("crosskd", "pkd")]
    lines = resumed(defeat, arguments, tmp_path)
    assert set(lines[-1]["weighted"]) == {
        "classification", "bbox_regression", "pkd", "crosskd_classes", "crosskd_boxes"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distillation.crosskd": "{}"}, "distillation.crosskd: the student has no class and box towers"),
        ({"distillation.ld": "{}"}, "distillation.ld: ld distils the distribution"),
        ({"distillation.pkd": "{temperature: 2}"}, "distillation.pkd.temperature: unknown key"),
        ({"distillation.mgd": "{hidden: 1.5}"}, "distillation.mgd.hidden"),
        ({"distillation.crosskd": "{beta: 0.5}"}, "distillation.crosskd.beta"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(given, message, defeat, tiny, teacher, tmp_path):
    output = defeat("train", "-r", tiny, "-t", teacher, "-o", tmp_path / "run", *setting(**given), code=2)
    assert message in output
    assert not (tmp_path / "run").exists()


def test_check_tells_of_the_rivals(defeat, tiny, teacher):
    output = defeat("check", "-r", tiny, "-t", teacher, *only("fgd", "frs", "mgd"))
    assert "fgd" in output
    assert "16x8x1x1" in output
