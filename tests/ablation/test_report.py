"""Rows, tables, files and pictures of a small study whose figures are written down here."""

from __future__ import annotations

import csv
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from defeat_cli import console
from defeat_cli.ablation.choice import SweepPoint
from defeat_cli.ablation.picture import draw_study
from defeat_cli.ablation.report import Report
from defeat_cli.ablation.rows import APS, Outcome, read_outcome, summarize
from defeat_cli.ablation.sweep_picture import draw_sweeps
from defeat_cli.config.variants import Variant
from defeat_cli.engine.detection_errors import ERROR_TYPES
from defeat_cli.errors import RunError


def evaluation(epoch, ap, background=100):
    """A line of metrics.jsonl; there are no small objects."""
    figures = {"AP": ap, "AP50": ap + 0.2, "AP75": ap, "APs": -1.0, "APm": ap, "APl": ap}
    errors = {
        "background_false_positives": {"score": 0.3, "count": background, "per_image": 1.0},
        "types": {name: {"count": 1, "dap": 0.01} for name in ERROR_TYPES},
    }
    return {"kind": "eval", "step": 3 * epoch, "epoch": epoch, **figures, "errors": errors}


def finished(variant, seed, ap, background=100, seconds=60.0, teacher=None, best=None):
    """A run of two epochs, the first of which may be better than the last."""
    evaluations = (evaluation(1, best or ap / 2), evaluation(2, ap, background))
    figures = {"teacher": {"AP": teacher}} if teacher else {}
    return Outcome(variant, seed, evaluations, {"training_seconds": seconds, **figures})


def study():
    """Three seeds of none, neck (better by 2, 3 and 4 points) and full, one run of which is not finished."""
    none = [finished("none", s, 0.30 + 0.01 * s, 200) for s in range(3)]
    neck = [finished("neck", s, 0.32 + 0.02 * s, 90 + s, 90.0, teacher=0.5, best=0.4) for s in range(3)]
    full = [
        finished("full", 0, 0.28, 150, 70.0),
        Outcome("full", 1, (evaluation(1, 0.2),)),
        finished("full", 2, 0.30, 150, 70.0),
    ]
    return none + full + neck


def swept():
    """The same, and the neck over three weights: one is stopped at epoch 1, of the others 4 is better than 16."""
    points = {value: SweepPoint("weight", {}, "neck", {"distillation.alpha_bg": value}) for value in (16, 4, 1)}
    outcomes = [finished("w16", s, 0.33) for s in range(3)] + [finished("w4", s, 0.34 + 0.01 * s) for s in range(3)]
    outcomes += [Outcome("w1", s, (evaluation(1, 0.10 + 0.01 * s),)) for s in range(3)]
    return {f"w{value}": point for value, point in points.items()}, study() + outcomes


def report(outcomes=None, variants=None, against="none"):
    outcomes = outcomes or study()
    summaries = {"none": Variant("alone"), "full": Variant("all of it"), "neck": Variant("the neck")}
    rows = summarize(outcomes, against=against)
    return Report("my study", {**summaries, **(variants or {})}, outcomes, rows, against=against)


def sheet(found, column):
    """The cells of the table that has a column: row name -> column -> cell."""
    table = next(table for table in found.sheets() if column in table.header)
    return {line[0]: dict(zip(table.header, line, strict=True)) for line in table.cells}


def test_rows_hold_mean_deviation_and_paired_difference():
    rows = {row.variant: row for row in summarize(study())}
    neck = rows["neck"].measured["AP"]
    assert neck.values == {0: 0.32, 1: 0.34, 2: 0.36}
    assert neck.mean == pytest.approx(0.34)
    assert neck.deviation == pytest.approx(0.02)
    # Differences 0.02, 0.03, 0.04: mean 0.03, deviation 0.01, half width 4.3027 * 0.01 / sqrt(3) = 0.02484.
    assert neck.delta.mean == pytest.approx(0.03)
    assert (neck.delta.low, neck.delta.high) == pytest.approx((0.00516, 0.05484), abs=1e-5)
    assert rows["none"].measured["AP"].delta is None
    assert rows["neck"].measured["background_false_positives"].mean == 91
    assert rows["neck"].measured["dap_background"].mean == pytest.approx(0.01)
    assert (rows["neck"].epoch, rows["full"].epoch) == (2, 1)
    assert rows["neck"].measured["best_AP"].values == {0: 0.4, 1: 0.4, 2: 0.4}
    assert rows["none"].measured["best_AP"].values == rows["none"].measured["AP"].values


def test_differences_may_be_to_any_variant(tmp_path):
    none = [with_recalls(finished("none", s, 0.3), 1, 5) for s in range(3)]
    neck = [with_recalls(finished("neck", s, 0.31 + 0.01 * s, 90), 0, 2 + s) for s in range(3)]
    found = report([*none, *neck], against="neck")
    # AP -1, -2, -3, background +10: what is to `none` otherwise, with the sign turned.
    for table in found.sheets():
        assert not any("to none" in name for name in table.header)
    assert sheet(found, "Δ AP to neck")["none"]["Δ AP to neck"] == "-2.0 [-4.5, +0.5] "
    assert sheet(found, "Δ AP to neck")["neck"]["Δ AP to neck"] == "-"
    assert sheet(found, "Δ to neck")["none"]["Δ to neck"] == "+10 [+10, +10]*"
    whole = next(table for table in found.sheets() if "an equal recall, of 10%" in table.title)
    assert whole.cells == [["neck", "3 ± 1", "-"], ["none", "5 ± 0", "+2 [+0, +4] "]]
    found.write(tmp_path)
    assert json.loads((tmp_path / "study.json").read_text())["against"] == "neck"
    with (tmp_path / "study.csv").open(encoding="utf-8") as file:
        assert {line["against"] for line in csv.DictReader(file)} == {"neck"}


def test_a_value_of_a_sweep_that_others_are_compared_with_is_shown_though_it_is_not_the_best():
    variants, outcomes = swept()
    assert {row.variant for row in report(outcomes, variants).main_rows} == {"none", "neck", "full", "w4"}
    found = report(outcomes, variants, against="w16")
    assert {row.variant for row in found.main_rows} == {"none", "neck", "full", "w4", "w16"}
    assert sheet(found, "Δ AP to w16")["w4"]["Δ AP to w16"] == "+2.0 [-0.5, +4.5] "


def test_unfinished_runs_are_counted_and_left_out():
    full = next(row for row in summarize(study()) if row.variant == "full")
    assert (full.finished, full.runs) == (2, 3)
    assert full.measured["AP"].values == {0: 0.28, 2: 0.30}
    assert full.measured["AP"].delta.mean == pytest.approx(-0.02)
    assert full.measured["AP"].delta.low is None


def test_figures_with_nothing_to_score_are_left_out():
    assert all("APs" not in row.measured for row in summarize(study()))
    assert "APs" not in sheet(report(), "AP50")["neck"]


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("AP", ["neck", "none", "full"]),
        ("background", ["neck", "full", "none"]),
        ("time", ["none", "full", "neck"]),
        ("given", ["none", "full", "neck"]),
    ],
)
def test_rows_are_sorted_as_asked(key, order):
    assert [row.variant for row in summarize(study(), key)] == order


def test_variants_without_a_finished_run_come_last():
    rows = summarize([Outcome("head", 0), *study()])
    assert [row.variant for row in rows] == ["neck", "none", "full", "head"]
    assert rows[-1].measured == {}


def test_an_unknown_sort_key_is_refused_with_the_nearest():
    with pytest.raises(RunError, match="did you mean background"):
        summarize(study(), "backgrund")


def test_cells():
    table = sheet(report(), "AP")
    assert table["neck"] == {
        "variant": "neck", "AP": "34.0 ± 2.0", "Δ AP to none": "+3.0 [+0.5, +5.5]*", "at best": "40.0 ± 0.0",
        "time": "1:30", "runs": "3 of 3",
    }  # fmt: skip
    assert (table["full"]["Δ AP to none"], table["full"]["runs"]) == ("-2.0", "2 of 3")
    assert table["none"]["Δ AP to none"] == "-"
    assert sheet(report(), "AP50")["neck"]["AP50"] == "54.0 ± 2.0"
    assert sheet(report(), "number")["neck"] == {
        "variant": "neck", "number": "91 ± 1", "Δ to none": "-109 [-111, -107]*"
    }  # fmt: skip
    assert sheet(report(), "missed")["neck"] == {"variant": "neck"} | dict.fromkeys(
        ("class", "location", "both", "duplicate", "background", "missed"), "1.0"
    )


def test_runs_without_error_reports_make_no_error_tables():
    figures = {"kind": "eval", "epoch": 1, **dict.fromkeys(APS, 0.1)}
    found = report([Outcome("none", 0, (figures,), {"training_seconds": 3700})])
    assert [table.cells for table in found.sheets()] == [
        [["none", "10.0", "-", "10.0", "1:01:40"]],
        [["none", *["10.0"] * 5]],
    ]
    assert "seed 0 alone" in found.legend()
    assert "score" not in found.legend()


def test_of_a_sweep_each_value_is_shown_and_the_best_stands_among_the_variants():
    variants, outcomes = swept()
    found = report(outcomes, variants)
    assert set(sheet(found, "time")) == {"none", "full", "neck", "w4"}
    table = next(table for table in found.sheets() if "alpha_bg" in table.header)
    assert table.title == "neck over distillation.alpha_bg"
    assert table.header == ["alpha_bg", "AP", "Δ AP to none", "at best", "epochs", ""]
    assert table.cells == [
        ["1", "11.0 ± 1.0", "-", "-", "1", ""],
        ["4", "35.0 ± 1.0", "+4.0 [+4.0, +4.0]*", "35.0 ± 1.0", "2", "best"],
        ["16", "33.0 ± 0.0", "+2.0 [-0.5, +4.5] ", "33.0 ± 0.0", "2", ""],
    ]


def test_a_value_with_an_unfinished_run_is_not_best():
    variants, outcomes = swept()
    assert report([*outcomes, Outcome("w4", 3)], variants).sweeps[0].best.variant == "w16"


@pytest.mark.parametrize("name", ["neck", "a/very:long=name,of=27,chars"])
def test_tables_are_whole_at_80_columns(name, monkeypatch):
    # The widest figures that there are: AP of 100 with wide intervals, thousands of false positives.
    outcomes = [finished("none", s, 0.9 * (s % 2), 1000 * s, 40000.0) for s in range(3)]
    outcomes += [finished(name, s, 1.0 - 0.9 * (s % 2), 5000, 40000.0) for s in range(3)]
    outcomes += [Outcome(name, 3)]
    output = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=output, width=80, color_system=None))
    found = Report("t", {"none": Variant(""), name: Variant("")}, outcomes, summarize(outcomes))
    found.show()
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for cell in [cell for table in found.sheets() for line in [table.header, *table.cells] for cell in line[1:]]:
        assert any(cell in line for line in lines), cell
    assert "…" not in output.getvalue()


def test_the_legend_says_what_the_figures_are():
    text = report().legend()
    assert "over seeds 0, 1, 2" in text
    assert "from score 0.3" in text
    assert "the teacher has AP 50.0" in text
    assert "at the last epoch" in text


def test_files_hold_every_value(tmp_path):
    variants, outcomes = swept()
    report(outcomes, variants).write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"study.csv", "study.json", "study.md"}
    with (tmp_path / "study.csv").open() as file:
        lines = {line["variant"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["w4", "neck", "w16", "none", "full", "w1"]
    assert lines["neck"]["seeds"] == "3"
    assert float(lines["neck"]["AP_mean"]) == pytest.approx(0.34)
    assert float(lines["neck"]["best_AP_mean"]) == pytest.approx(0.4)
    assert float(lines["neck"]["AP_delta_low"]) == pytest.approx(0.00516, abs=1e-5)
    assert lines["full"]["AP_delta_low"] == lines["neck"]["APs_mean"] == ""

    content = json.loads((tmp_path / "study.json").read_text())
    row = next(row for row in content["rows"] if row["variant"] == "neck")
    assert row["measured"]["AP"]["values"] == {"0": 0.32, "1": 0.34, "2": 0.36}
    assert row["measured"]["best_AP"]["mean"] == pytest.approx(0.4)
    assert {"variant": "full", "seed": 1, "epoch": 1, "finished": False} in content["runs"]
    assert content["teacher_AP"] == 0.5
    assert content["sweeps"][0]["best"] == "w4"
    assert content["sweeps"][0]["points"][0] == {"variant": "w1", "settings": {"distillation.alpha_bg": 1}}

    text = (tmp_path / "study.md").read_text()
    assert "| neck | 34.0 ± 2.0 | +3.0 [+0.5, +5.5]* | 40.0 ± 0.0 |" in text
    assert "| 4 | 35.0 ± 1.0 | +4.0 [+4.0, +4.0]* | 35.0 ± 1.0 | 2 | best |" in text
    assert "- `full`: all of it" in text
    assert "(study.png)" in text
    assert "(sweeps.png)" in text


def colors(path):
    with Image.open(path) as image:
        return {color for _, color in image.convert("RGB").getcolors(2**24)}


BLUE, GREY = (0, 0x72, 0xB2), (0x8C, 0x8C, 0x8C)


@pytest.mark.parametrize("variants", [("none",), ("none", "full", "neck", "head")])
def test_a_picture_is_drawn_of_any_study(tmp_path, variants):
    outcomes = [o for o in [*study(), Outcome("head", 0)] if o.variant in variants]
    draw_study(outcomes, summarize(outcomes), "my study", tmp_path / "study.png")
    assert GREY in colors(tmp_path / "study.png")
    assert (BLUE in colors(tmp_path / "study.png")) == ("full" in variants)


@pytest.mark.parametrize(
    "settings",
    [
        [{"k.a": 0}, {"k.a": 4}, {"k.a": 16}],
        [{"k.a": "boxes"}, {"k.a": "full"}, {"k.a": [1, 2]}],
        [{"k.a": 1, "k.b": 1e-4}, {"k.a": 1, "k.b": 0.1}, {"k.a": 2, "k.b": 0.1}],
    ],
)
def test_a_picture_is_drawn_of_any_sweep(tmp_path, settings):
    _, outcomes = swept()
    variants = {name: SweepPoint("", {}, "neck", s) for name, s in zip(("w1", "w4", "w16"), settings, strict=True)}
    found = report(outcomes, variants)
    draw_sweeps(found.sweeps, found.rows[0].measured["AP"], tmp_path / "sweeps.png")
    assert (BLUE in colors(tmp_path / "sweeps.png")) == ("k.b" not in settings[0])


def test_an_outcome_is_read_from_a_run_folder(tmp_path):
    lines = [{"kind": "train", "step": 2, "epoch": 1}, evaluation(1, 0.1), evaluation(2, 0.2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "tra')  # cut short by a crash
    assert read_outcome("neck", 1, tmp_path) == Outcome("neck", 1, tuple(lines[1:]))
    assert read_outcome("neck", 1, tmp_path).curve == {1: 0.1, 2: 0.2}
    (tmp_path / "student.pth").touch()
    (tmp_path / "results.json").write_text('{"training_seconds": 2.0}')
    assert read_outcome("neck", 1, tmp_path).results == {"training_seconds": 2.0}
    assert read_outcome("neck", 1, tmp_path / "nowhere") == Outcome("neck", 1)


def with_recalls(outcome, *counts):
    """Background false positives at recalls of 5%, 10%, … as the last evaluation has them."""
    entries = [{"recall": 5 * (i + 1) / 100, "score": 0.5, "count": c, "per_image": c} for i, c in enumerate(counts)]
    outcome.evaluations[-1]["errors"]["background_at_recall"] = entries
    return outcome


def test_background_is_counted_at_a_recall_that_all_reach():
    none = [with_recalls(finished("none", s, 0.3), 1, 5, 9) for s in range(3)]
    neck = [with_recalls(finished("neck", s, 0.4), 0, 2 + s, *[7] * s) for s in range(3)]  # seed 0 ends at 10%
    half, whole = (table for table in report([*none, *neck]).sheets() if "an equal recall" in table.title)
    assert "10% of the objects" in whole.title
    # Differences -3, -2, -1: mean -2, half width 4.3027 / sqrt(3) = 2.48.
    assert whole.cells == [["neck", "3 ± 1", "-2 [-4, +0] "], ["none", "5 ± 0", "-"]]
    assert "5% of the objects" in half.title
    assert half.cells == [["neck", "0 ± 0", "-1 [-1, -1]*"], ["none", "1 ± 0", "-"]]


def test_runs_that_were_scored_without_recalls_have_no_such_table():
    assert not [table for table in report().sheets() if "equal recall" in table.title]


def test_the_seeds_that_a_difference_needs():
    # Δ 3 with deviation 1: an effect of 3. Four pairs: λ = 6, t(3) = 3.18; three have a chance of less than 80%.
    table = next(table for table in report().sheets() if "Seeds needed" in table.title)
    assert table.cells == [["neck", "+3.0 [+0.5, +5.5]*", "1.0", "4"]]
