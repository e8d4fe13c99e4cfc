"""`defeat ablate` through the real command."""

from __future__ import annotations

import pytest
import small_worker
from html_pages import Page

from defeat_cli.config.variants import GROUPS, VARIANTS
from defeat_cli.jobs import ablating


def test_a_study_is_run_and_shown_again(defeat, tiny, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(ablating, "command", small_worker.command)
    folder = tmp_path / "s"
    shown = defeat("ablate", "neck:alpha_bg=1,16", "-r", tiny, "-t", teacher, "-o", folder, "--jobs", 2)
    for name in ("study.csv", "study.json", "study.md", "study.html", "study.png", "sweeps.png"):
        assert (folder / name).is_file()
    for text in ("Δ AP to none", "neck over distillation", "3 of 3 runs to train", "teacher has AP 50.0", "sweeps.png"):
        assert text in shown
    page = Page((folder / "study.html").read_text())
    page.assert_stands_alone()
    assert len([source for source in page.resources if source.startswith("data:image/png")]) == 2
    assert {"variant", "none"} <= {row[0] for row in page.tables[0]}
    assert defeat("ablate", "--report-only", "-o", folder) in shown
    # 16 is the best of the sweep.
    swept = defeat("ablate", "--report-only", "-o", folder, "--against", "neck:alpha_bg=1")
    assert "Δ AP to neck:alpha_bg=1" in swept
    assert "neck:alpha_bg=1 " in swept.split("Δ AP to neck:alpha_bg=1")[1]
    assert "Δ AP to none" not in swept + (folder / "study.md").read_text()
    unknown = defeat("ablate", "--report-only", "-o", folder, "--against", "neck:alpha_bg=4", code=2)
    assert "--against neck:alpha_bg=4: no variant of this study (did you mean neck:alpha_bg=" in unknown

    (folder / "break-full-seed0").touch()
    failed = defeat("ablate", "full", "-r", tiny, "-t", teacher, "-o", folder, code=1)
    assert "full-seed0: failed, see" in failed
    assert "0 of 1" in failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neck", "fg-onyl"], "did you mean fg-only"),
        (["neck:alphabg=1,4"], "did you mean alpha_bg"),
        (["neck", "neck"], "named twice"),
        (["neck", "--budget", 2], "only sweeps are cut short"),
        (["neck", "--against", "neck"], "--against: is for a study that is there"),
        (["neck", "--seeds", "0;1"], "whole numbers separated by commas"),
        (["--report-only"], "has no use for --recipe, --teacher"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_written(
    defeat, tiny, teacher, tmp_path, arguments, message
):
    output = defeat("ablate", *arguments, "-r", tiny, "-t", teacher, "-o", tmp_path / "s", code=2)
    assert message in output
    assert not (tmp_path / "s").exists()


def test_variants_are_explained_those_of_a_file_too(defeat, tmp_path):
    (tmp_path / "mine.yaml").write_text("softer: {optimizer.lr: 4.0}\n")
    lines = defeat("ablate", "--list", "--variants", tmp_path / "mine.yaml").splitlines()
    assert [line.split()[0] for line in lines] == [*VARIANTS, "softer"]
    assert all(len(line.split()) > 1 for line in lines)


def test_groups_hold_known_variants():
    assert set(GROUPS) == {"--all-masks", "--all-methods"}
    assert all(name in VARIANTS for names in GROUPS.values() for name in names)
