"""The picture of what DeFeat keeps apart holds the masks, features, differences and regions that a step computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import build, distil

from defeat_cli.gradients.decoupling import draw_decoupling
from defeat_cli.gradients.pictures import COLORS

ROWS = ["mask", "teacher", "student", "difference"]


def views(family: str = "faster_rcnn", other: str | None = None):
    """Student's and teacher's look at an image of 64 x 96, and the neck term between them; its box, 32 pixels wide and
    high, is on the finest level."""
    student, teacher = build(family), build(other or family, seed=1)
    term = distil(student, teacher, ["neck"], finest_scale=56.0).eval()
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(3))
    target = {"boxes": torch.tensor([[16.0, 0, 48, 32]]), "labels": torch.tensor([1])}
    return *term.views([image], [target]), term.terms["neck"]


def shown(figure: Figure, row: str, column: int) -> np.ndarray:
    """[h, w, 3] of a panel, in [0, 1]."""
    pixels = figure.axes[6 * ROWS.index(row) + column].images[0].get_array()
    return np.asarray(pixels, dtype=float) / (255 if pixels.dtype == np.uint8 else 1)


def test_each_panel_shows_what_a_step_computes(tmp_path: Path, figures: list[Figure]):
    ours, theirs, term = views()
    draw_decoupling(ours, theirs, term, tmp_path / "x.png", heading="heading")
    (figure,) = figures
    assert [axes.get_ylabel() for axes in figure.axes[::6]] == ROWS
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["image, 1 box", "P2 · stride 4", "P3 · stride 8"]
    labels = theirs.regions.labels[0]
    found = [titles[6].split()[0], titles[12].split()[0]]
    assert found == [str(int((labels > 0).sum())), str(int((labels == 0).sum()))]
    assert (tmp_path / "x.png").stat().st_size > 10_000

    # The finest level has 16 x 24 cells of 4 pixels; the box covers the rows 0 to 7 and the columns 4 to 11.
    inside = np.zeros((16, 24), dtype=bool)
    inside[:8, 4:12] = True
    for row in ("mask", "difference"):
        panel = shown(figure, row, 1)
        rows, columns = (np.arange(n) * panel.shape[axis] // n + 1 for axis, n in enumerate((16, 24)))
        red, _, blue = np.moveaxis(panel[rows[:, None], columns], -1, 0)
        seen = np.maximum(red, blue) > 0.02  # where nothing differs there is nothing to see
        assert (red > blue)[seen].tolist() == inside[seen].tolist()
        panel = shown(figure, row, 3)  # no box is on this level
        assert (panel[..., 2] >= panel[..., 0]).all()

    # By hand: the adapted features less the teacher's, squared, over the channels.
    with torch.no_grad():
        adapted = term.adapters[0](ours.detector.features(ours.batch)[0])
        expected = (adapted - theirs.detector.features(theirs.batch)[0])[0].square().mean(dim=0).numpy()
    panel = shown(figure, "difference", 1)[2::4, 2::4].max(axis=2)
    full = np.where(inside, 0xED / 255, 1.0)  # the strongest part of either colour
    np.testing.assert_allclose(panel, full * np.sqrt(expected / expected.max()), atol=1e-3)
    inner, outer = (collection.get_offsets()[0, 1] for collection in figure.axes[18].collections[1:])
    assert inner == pytest.approx(expected[inside].mean(), rel=1e-4)
    assert outer == pytest.approx(expected[~inside].mean(), rel=1e-4)


def test_features_of_a_level_have_one_scale(tmp_path: Path, figures: list[Figure]):
    ours, theirs, term = views()
    with torch.no_grad():
        for adapter in term.adapters:
            adapter.conv.weight.zero_()
            adapter.conv.bias.zero_()
    draw_decoupling(ours, theirs, term, tmp_path / "x.png", heading="heading")
    np.testing.assert_allclose(shown(figures[0], "student", 1), np.broadcast_to(COLORS(0.0)[:3], (64, 96, 3)))
    assert shown(figures[0], "teacher", 1).max() > 0.9


def test_the_draw_of_regions_is_fixed_by_the_seed_and_leaves_no_trace(tmp_path: Path):
    for seed, name in enumerate(("a.png", "b.png")):
        looks = views()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        draw_decoupling(*looks, tmp_path / name, heading="heading", seed=5)
        assert torch.equal(before, torch.get_rng_state())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_detectors_whose_regions_are_all_points_show_some(tmp_path: Path, figures: list[Figure]):
    ours, theirs, term = views("fcos")
    draw_decoupling(ours, theirs, term, tmp_path / "x.png", heading="heading")
    background = figures[0].axes[12].get_title(loc="left")
    assert background == f"{int((theirs.regions.labels[0] == 0).sum()):,} background regions"


def test_no_regions_are_shown_that_only_one_of_the_heads_can_classify(tmp_path: Path, figures: list[Figure]):
    ours, theirs, term = views("faster_rcnn", "retinanet")
    draw_decoupling(ours, theirs, term, tmp_path / "x.png", heading="heading")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert not any("region" in title for title in titles)
    assert titles[:2] == ["image, 1 box", "P3 · stride 8"]
    said = " ".join(" ".join(text.get_text() for text in figures[0].texts).split())
    assert "which the neck term weighs." in said
    assert "Both heads" not in said
