from __future__ import annotations

import io

import pytest
from rich.console import Console

from defeat_cli import console


@pytest.fixture
def narrow(monkeypatch):
    """What a terminal of 80 columns without colour shows."""
    output = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=output, width=80, color_system=None))
    return output


def metrics(ap):
    return {**dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), ap), "AR1": ap, "per_class": {}}


def test_results_are_whole_at_80_columns(narrow):
    results = {"student": metrics(1.0), "teacher": metrics(1.0), "plain": metrics(0.875), "training_seconds": 1.0}
    results["ms_per_image"] = {"teacher": 1234.5, "student": 12.34}
    console.show(console.results_sheet(results))
    title, header, _, *rows = (line.split("  ") for line in narrow.getvalue().splitlines() if line)
    assert title == ["COCO mAP on the validation images; ms: milliseconds an image"]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in (header, *rows)]
    assert cells == [
        ["AP", "AP50", "AP75", "APs", "APm", "APl", "Δ teacher", "Δ plain", "ms"],
        ["teacher", *["100.0"] * 6, "1234"],
        ["plain", *["87.5"] * 6, "-12.5", "-"],
        ["distilled", *["100.0"] * 6, "+0.0", "+12.5", "12.3"],
    ]
    assert max(map(len, narrow.getvalue().splitlines())) <= 80


def test_a_student_alone_is_no_distilled_one(narrow):
    console.show(console.results_sheet({"student": metrics(-1.0)}))
    assert "distilled" not in narrow.getvalue()
    assert narrow.getvalue().splitlines()[-2].split() == ["student", *["-"] * 6]


def test_names_fold_where_a_table_is_too_wide_and_figures_stay_whole(narrow):
    long = "name:" + "x" * 60
    console.show(console.new_table("t", ["variant", "a long header", "other"], [[long, "2.3214e-05", "[1, 2]" * 5]]))
    text = narrow.getvalue()
    assert all(part in text for part in ("a long header", "2.3214e-05", "[1, 2]" * 5))
    # 80 columns less 13 and 30 of the others and two gaps of 2 leave 33 to the name.
    assert "".join(line[:33].strip() for line in text.splitlines()[3:]) == long
    assert "…" not in text


def test_the_progress_of_a_run_shows_every_term_at_80_columns(monkeypatch):
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "console", terminal)
    terms = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "neck_fg", "neck_bg", "head_fg"]
    terms += ["head_bg", "backbone_fg", "backbone_bg", "crosskd"]
    reporter = console.Reporter("plain student")
    reporter.begin(0, 88_704, 12, "learning rate 0.02")
    entry = {"epoch": 9, "step": 66_000, "loss": 11.5, "images_per_second": 12.3, "weighted": dict.fromkeys(terms, 1.5)}
    reporter.logged(entry)
    reporter.stepped(66_000)
    with terminal.capture() as captured:
        terminal.print(reporter.display.get_renderable())
    reporter.end()
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "plain student epoch 9/12" in text
    assert "66000/88704" in text
    assert text.endswith(" ".join(f"{console.short_name(term)} 1.500" for term in terms))
    assert "…" not in text


def test_the_pace_is_told_in_words(narrow):
    reporter = console.Reporter("student")
    reporter.paced(1.55, 7392)  # 11457.6 s are 190.96 minutes
    reporter.paced(0.0123, 500)
    assert narrow.getvalue().splitlines() == [
        "student: about 3 h 11 min to go, an estimate at 1.55 s a step; evaluations add to it",
        "student: about 6 s to go, estimated anew at 12 ms a step; evaluations add to it",
    ]
