from __future__ import annotations

import csv
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from defeat_cli.ablation import report
from defeat_cli.ablation.picture import draw_study
from defeat_cli.ablation.report import Outcome, summarize
from defeat_cli.engine.detection_errors import ERROR_TYPES
from defeat_cli.errors import RunError


def results(ap, background=100, seconds=60.0, teacher=None):
    """A run's results.json; there are no small objects."""
    student = {"AP": ap, "AP50": ap + 0.2, "AP75": ap, "APs": -1.0, "APm": ap, "APl": ap}
    student["errors"] = {
        "background_false_positives": {"score": 0.3, "count": background, "per_image": 1.0},
        "types": {name: {"count": 1, "dap": 0.01} for name in ERROR_TYPES},
    }
    return {"student": student, "training_seconds": seconds, **({"teacher": {"AP": teacher}} if teacher else {})}


def study():
    """Three seeds of none, neck (better by 2, 3 and 4 points) and full, one run of which is not finished."""
    none = [Outcome("none", s, results(0.30 + 0.01 * s, 200), ((1, 0.1), (2, 0.3))) for s in range(3)]
    neck = [
        Outcome("neck", s, results(0.32 + 0.02 * s, 90 + s, 90.0, teacher=0.5), ((1, 0.2), (2, 0.34))) for s in range(3)
    ]
    full = [
        Outcome("full", 0, results(0.28, 150, 70.0), ((1, 0.1),)),
        Outcome("full", 1, None, ((1, 0.2),)),
        Outcome("full", 2, results(0.30, 150, 70.0)),
    ]
    return none + full + neck


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


def test_unfinished_runs_are_counted_and_left_out():
    full = next(row for row in summarize(study()) if row.variant == "full")
    assert (full.finished, full.runs) == (2, 3)
    assert full.measured["AP"].values == {0: 0.28, 2: 0.30}
    assert full.measured["AP"].delta.mean == pytest.approx(-0.02)
    assert full.measured["AP"].delta.low is None


def test_figures_with_nothing_to_score_are_left_out():
    rows = summarize(study())
    assert all("APs" not in row.measured for row in rows)
    assert "APs" not in report.main_cells(rows)[0]


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
    header, cells = report.main_cells(summarize(study()))
    table = {line[0]: dict(zip(header, line, strict=True)) for line in cells}
    assert table["neck"]["AP"] == "34.0 ± 2.0"
    assert table["neck"]["Δ AP to none"] == "+3.0 [+0.5, +5.5]*"
    assert table["full"]["Δ AP to none"] == "-2.0"
    assert table["none"]["Δ AP to none"] == "-"
    assert table["neck"]["AP50"] == "54.0 ± 2.0"
    assert table["neck"]["time"] == "1:30"
    assert table["full"]["runs"] == "2 of 3"
    header, cells = report.error_cells(summarize(study()))
    assert dict(zip(header, cells[0], strict=True)) == {
        "variant": "neck", "bg false pos.": "91 ± 1", "Δ to none": "-109 [-111, -107]*",
        "cls": "1.0", "loc": "1.0", "both": "1.0", "dup": "1.0", "bg": "1.0", "miss": "1.0",
    }  # fmt: skip


def test_runs_without_error_reports_make_no_error_table():
    outcome = Outcome("none", 0, {"student": dict.fromkeys(report.FIGURES, 0.1), "training_seconds": 3700})
    rows = summarize([outcome])
    assert report.error_cells(rows)[1] == []
    assert report.main_cells(rows)[1] == [["none", "10.0", "-", "10.0", "10.0", "10.0", "10.0", "10.0", "1:01:40"]]
    assert report.legend([outcome]) == "AP in percent, at the best epoch, seed 0 alone."


@pytest.mark.parametrize(("width", "deviations"), [(140, True), (80, False)])
def test_tables_fit_the_terminal(width, deviations):
    console = Console(file=io.StringIO(), width=width)
    for table in report.tables(summarize(study()), "study", console):
        console.print(table)
    text = console.file.getvalue()
    assert "+3.0 [+0.5, +5.5]*" in text
    assert ("54.0 ± 2.0" in text) == deviations
    assert all(len(line) <= width for line in text.splitlines())


def test_the_legend_says_what_the_figures_are():
    text = report.legend(study())
    assert "over seeds 0, 1, 2" in text
    assert "from score 0.3" in text
    assert "the teacher has AP 50.0" in text


def test_csv_has_a_line_per_variant(tmp_path):
    report.write_csv(summarize(study()), tmp_path / "study.csv")
    with (tmp_path / "study.csv").open() as file:
        lines = {line["variant"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["neck", "none", "full"]
    assert lines["neck"]["seeds"] == "3"
    assert float(lines["neck"]["AP_mean"]) == pytest.approx(0.34)
    assert float(lines["neck"]["AP_delta_low"]) == pytest.approx(0.00516, abs=1e-5)
    assert lines["full"]["AP_delta_low"] == ""
    assert lines["neck"]["APs_mean"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["study.csv"]


def test_json_has_every_value_and_where_runs_stand(tmp_path):
    report.write_json_report(study(), summarize(study()), tmp_path / "study.json")
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["rows"][0]["measured"]["AP"]["values"] == {"0": 0.32, "1": 0.34, "2": 0.36}
    assert {"variant": "full", "seed": 1, "finished": False} in content["runs"]
    assert content["teacher_AP"] == 0.5


def test_markdown_has_tables_and_what_each_variant_is(tmp_path):
    summaries = {"none": "alone", "full": "all of it", "neck": "the neck"}
    report.write_markdown(study(), summarize(study()), "my study", summaries, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert "| neck | 34.0 ± 2.0 | +3.0 [+0.5, +5.5]* |" in text
    assert "- `full`: all of it" in text
    assert "![AP of each variant](study.png)" in text


@pytest.mark.parametrize("variants", [("none",), ("none", "full"), ("none", "full", "neck", "head")])
def test_a_picture_is_drawn_of_any_study(tmp_path, variants):
    outcomes = [o for o in [*study(), Outcome("head", 0)] if o.variant in variants]
    draw_study(outcomes, summarize(outcomes), "my study", tmp_path / "study.png")
    with Image.open(tmp_path / "study.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(2**24)}
    blue, grey = (0, 0x72, 0xB2), (0x8C, 0x8C, 0x8C)
    assert grey in colors
    assert (blue in colors) == ("full" in variants)


def test_an_outcome_is_read_from_a_run_folder(tmp_path):
    lines = [
        {"kind": "train", "step": 2, "epoch": 1},
        {"kind": "eval", "step": 3, "epoch": 1, "AP": 0.1},
        {"kind": "eval", "step": 6, "epoch": 2, "AP": 0.2},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "tra')  # cut short by a crash
    assert report.read_outcome("neck", 1, tmp_path) == Outcome("neck", 1, None, ((1, 0.1), (2, 0.2)))
    (tmp_path / "student.pth").touch()
    (tmp_path / "results.json").write_text(json.dumps(results(0.2)))
    assert report.read_outcome("neck", 1, tmp_path).results == results(0.2)
    assert report.read_outcome("neck", 1, tmp_path / "nowhere") == Outcome("neck", 1)
