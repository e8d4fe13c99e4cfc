"""report.html and model_card.md of real runs: what they say, that they stand alone, and how a browser shows them."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from html_pages import Page
from PIL import Image
from runs import setting

from defeat_cli.jobs.examples import write_detections
from defeat_cli.pages.examples import Boxes, Example
from defeat_cli.pages.report import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory, defeat, tiny, teacher):
    folder = tmp_path_factory.mktemp("runs") / "a <run> & more"
    options = setting(schedule__epochs=1, run__log_every=1)
    defeat("train", "-r", tiny, "-t", teacher, "-o", folder, "--compare-plain", *options)
    return folder


def test_the_tables_are_those_of_the_results(run):
    page = Page((run / "report.html").read_text())
    results = json.loads((run / "results.json").read_text())
    figures, classes, errors = page.tables
    rows = {row[0]: dict(zip(figures[0], row, strict=True)) for row in figures[1:]}
    called = {"teacher": "teacher", "plain": "plain", "student": "distilled"}
    assert list(rows) == list(called.values())
    for who, name in called.items():
        assert rows[name]["AP50"] == f"{100 * results[who]['AP50']:.1f}"
    assert rows["distilled"]["Δ teacher"] == f"{100 * (results['student']['AP'] - results['teacher']['AP']):+.1f}"
    assert float(rows["distilled"]["ms"]) == pytest.approx(results["ms_per_image"]["student"], rel=0.01)
    assert classes[0] == ["class", "teacher", "plain", "distilled", "Δ plain"]
    assert [row[0] for row in classes[1:]] == list(results["student"]["per_class"])
    kinds = results["plain"]["errors"]["types"]
    assert [row[4] for row in errors[1:]] == [f"{kind['count']:,}" for kind in kinds.values()]


def test_the_page_stands_alone_and_shows_the_same_images_with_everyones_boxes(run, shapes):
    text = (run / "report.html").read_text()
    page = Page(text)
    page.assert_stands_alone()
    annotated = json.loads((shapes / "val.json").read_text())
    with_objects = {one["image_id"] for one in annotated["annotations"]}
    assert page.tags["image"] == len(with_objects) == 5
    assert page.tags["use"] == 5 * 4  # annotated, teacher, plain, distilled
    pictures = re.findall(r'<svg class="picture".*?</svg>', text, re.DOTALL)
    truth = [picture for picture in pictures if "boxes of annotated" in picture]
    assert sum(picture.count("<rect") for picture in truth) == len(annotated["annotations"])
    first = base64.b64decode(re.search(r"data:image/jpeg;base64,([^\"]*)", text)[1])
    assert Image.open(io.BytesIO(first)).size == (64, 64)
    assert "a &lt;run&gt; &amp; more" in text
    assert (run / "recipe.yaml").read_text() == html.unescape(re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)[1])


def test_a_run_without_a_teacher_has_its_page_too(teacher):
    text = (teacher.parent / "report.html").read_text()
    page = Page(text)
    page.assert_stands_alone()
    assert [row[0] for row in page.tables[0]] == ["", "student"]
    assert page.tables[1][0] == ["class", "student"]
    assert "distill" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)


def test_report_writes_the_same_pages_again(run, defeat):
    before = {name: (run / name).read_bytes() for name in ("report.html", "model_card.md", "detections.png")}
    for name in before:
        (run / name).unlink()
    output = defeat("report", run)
    assert str(run / "report.html") in output
    assert {name: (run / name).read_bytes() for name in before} == before


def test_the_picture_has_a_row_for_each_image_and_a_column_for_each_detector(tmp_path):
    """Wide images are shown smaller, small ones larger; a box is where it belongs in either."""
    box = torch.tensor([[100.0, 60, 900, 260]])
    wide = Example("wide", torch.zeros(3, 300, 960, dtype=torch.uint8), Boxes(box, ["a"]))
    small = Example("small", torch.zeros(3, 120, 160, dtype=torch.uint8), Boxes(torch.empty(0, 4), []))
    seen = [Boxes(box, ["b"], torch.tensor([0.5])), Boxes(torch.empty(0, 4), [])]
    write_detections(tmp_path / "d.png", [wide, small], {"teacher": seen, "student": seen})
    with Image.open(tmp_path / "d.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    lit = (pixels.max(2) > 0) & (pixels.min(2) < 250)
    assert pixels.shape[1] == 3 * 480 + 2 * 4
    head = int(12 * 1.8)
    for column in range(3):  # the box's lower edge, at half its size: 260 / 2 below the title
        left = column * 484
        assert lit[head + 130, left + 50 : left + 450].all()
        assert not lit[head + 135, left + 50 : left + 450].any()
    assert pixels.shape[0] == 2 * head + 150 + 14 + 360  # a hundredth of the width between rows


def test_report_says_what_is_missing(run, defeat, tmp_path):
    assert "holds no finished run" in defeat("report", tmp_path, code=2)
    assert str(tmp_path / "gone") in defeat("report", run, "--data", tmp_path / "gone", code=2)


def test_nothing_in_names_becomes_markup(tmp_path):
    evil = '<script>alert("x")</script>'
    figures = {"AP": 0.5, "AP50": 0.75, "per_class": {evil: 0.5}}
    entry = {"kind": "train", "step": 1, "weighted": {evil: 1.0}, "raw": {}}
    write_report(
        tmp_path / "report.html",
        evil,
        {"student": figures, "training_seconds": 1},
        metrics=[entry],
        terms=[],
        facts={evil: evil},
        recipe=evil,
        examples=[],
        found={},
    )
    page = Page((tmp_path / "report.html").read_text())
    page.assert_stands_alone()
    assert page.tables[1][1] == [evil, "50.0"]


def test_the_model_card_says_what_there_is_and_its_lines_load_the_student(run, shapes, monkeypatch):
    text = (run / "model_card.md").read_text()
    results = json.loads((run / "results.json").read_text())
    assert "12 training and 6 validation images, 6 classes" in text
    assert f"| distilled | {100 * results['student']['AP']:.1f} |" in text
    assert "faster_rcnn on regnet, 0." in text
    assert "Licence of the teacher's weights" in text
    # As in a shell of the run's folder.
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"image": torch.rand(3, 40, 60)}
    exec(code, names)
    assert len(names["names"]) == len(names["found"]["labels"]) > 0
    assert {*names["names"]} <= {*results["student"]["per_class"]}


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "chrome"))), None)
MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement, box = e => e.getBoundingClientRect();
  parent.document.title = JSON.stringify({
    width: innerWidth,
    needed: root.scrollWidth,
    page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    pictures: [...document.querySelectorAll(".picture")].map(p => [box(p).width, box(p).height]),
    charts: [...document.querySelectorAll(".chart")].map(p => box(p).width),
  });
});</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)])
def test_a_browser_shows_the_page_at_phone_and_desktop_width_light_and_dark(run, tmp_path, width, dark):
    text = (run / "report.html").read_text().replace("</body>", MEASURE)
    frame = f'<iframe width="{width}" height="800" style="border:0" srcdoc="{html.escape(text)}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{frame}")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [*scheme, "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown)[1]))
    assert found["width"] == width
    assert found["needed"] <= width  # nothing makes the page scroll sideways
    light = [sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("page", "ink")]
    assert (light[0] < light[1]) is dark
    assert len(found["pictures"]) == 5 * 4
    for wide, high in found["pictures"]:
        assert 120 < wide <= width
        assert high == pytest.approx(wide, rel=0.01)  # square, as the images are
    assert all(200 < wide <= width for wide in found["charts"])
