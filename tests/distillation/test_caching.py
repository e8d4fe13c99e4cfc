"""A teacher's features that are kept from one epoch to the next: the same ones, each computed once, within a limit."""

import pytest
import torch
from runs import assert_resumes_bit_for_bit, metrics, setting
from tiny import batch, build, distil

from defeat_cli.detectors.contract import Level
from defeat_cli.distillation.caching import FeatureCache, bytes_of_maps
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import TERMS

ROOM = 2**30


@pytest.fixture
def wide():
    return build(seed=1, fpn_channels=16).eval().requires_grad_(False)


@pytest.fixture
def looks(wide, monkeypatch):
    """How many images the teacher has looked at, one entry a forward pass."""
    seen, real = [], wide.features
    monkeypatch.setattr(wide, "features", lambda batch: seen.append(len(batch.pixels)) or real(batch))
    return seen


def test_features_are_the_detectors_own_and_computed_once_an_image(wide, looks):
    cache = FeatureCache(ROOM)
    prepared = wide.prepare(batch()[0])  # three images, two of them padded
    expected = wide.features(prepared)
    looks.clear()
    first = cache.maps(wide, prepared)
    torch.testing.assert_close(first, expected)
    assert looks == [1, 1, 1]
    images = batch()[0]
    turned = cache.maps(wide, wide.prepare(images[::-1]))
    for level, again in zip(first, turned, strict=True):
        assert torch.equal(level.flip(0), again)
    assert looks == [1, 1, 1]
    assert cache.bytes == sum(level.nbytes for level in first)


def test_another_picture_is_a_mirrored_one_and_one_in_other_padding(wide, looks):
    cache = FeatureCache(ROOM)
    image = batch()[0][0]  # 64 x 64
    for images, more in (([image], 1), ([image.flip(-1)], 1), ([image, torch.zeros(3, 64, 90)], 2), ([image], 0)):
        prepared = wide.prepare(images)
        expected = wide.features(prepared)
        looks.clear()
        torch.testing.assert_close(cache.maps(wide, prepared), expected)
        assert len(looks) == more


def test_black_images_of_other_sizes_in_the_same_padding_are_told_apart(wide, looks):
    # The pixels are the same; where the image ends is not, and outside it is 0 after normalisation.
    cache = FeatureCache(ROOM)
    prepared = wide.prepare([torch.zeros(3, 64, 64), torch.zeros(3, 64, 90)])
    assert torch.equal(*prepared.pixels)
    torch.testing.assert_close(cache.maps(wide, prepared), wide.features(prepared))


def test_what_is_beyond_the_limit_is_computed_each_time_with_the_same_bits(wide, looks):
    prepared = wide.prepare(batch()[0])
    whole = FeatureCache(ROOM)
    expected = whole.maps(wide, prepared)
    for limit, again in ((0, 3), (whole.bytes // 3, 2), (whole.bytes - 1, 1), (whole.bytes, 0)):
        small = FeatureCache(limit)
        small.maps(wide, prepared)
        looks.clear()
        found = small.maps(wide, prepared)
        assert len(looks) == again
        assert small.bytes == whole.bytes * (3 - again) // 3
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_under_autocast_an_element_takes_two_bytes_and_nothing_is_lost(wide):
    prepared = wide.prepare(batch()[0][:1])
    plain, cache = FeatureCache(ROOM), FeatureCache(ROOM)
    plain.maps(wide, prepared)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = cache.maps(wide, prepared)
            assert all(torch.equal(a, b) for a, b in zip(found, wide.features(prepared), strict=True))
    assert found[0].dtype == torch.float32
    assert cache.bytes == plain.bytes // 2
    torch.testing.assert_close(cache.maps(wide, prepared), wide.features(prepared))  # in float32 anew
    assert cache.bytes == plain.bytes * 3 // 2


@pytest.mark.parametrize("own_size", [False, True])
@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_losses_and_gradients_are_those_without_it(detector, own_size):
    names = [name for name in ("neck", "fgd", "pkd", "mgd", "cwd", "fitnets") if name in TERMS]
    names += ["head"] if detector == "faster_rcnn" else [] if own_size else ["head", "crosskd"]
    student, teacher = build(detector), build(detector, seed=1, fpn_channels=16, short_side=96 if own_size else 64)
    plain = distil(student, teacher, names, own_size)
    kept = Distiller(student, teacher, dict(plain.terms), own_size=own_size, cache_bytes=ROOM).train()
    images, targets = batch()
    images, targets = [*images, torch.rand(3, 64, 72)], [*targets, None]
    found = []
    for distiller in (plain, kept, kept):  # the last finds everything there
        torch.manual_seed(0)
        losses = distiller(images, targets)
        sum(losses.weighted.values()).backward()
        gradients = [p.grad.clone() for p in distiller.parameters() if p.grad is not None]
        distiller.zero_grad()
        found.append((losses.raw, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=0)


def test_stages_are_kept_where_a_term_works_on_them(wide, monkeypatch):
    student, calls, real = build(), [], wide.stages
    plain = distil(student, wide, ["neck", "backbone"])
    kept = Distiller(student, wide, dict(plain.terms), cache_bytes=ROOM).train()
    expected = plain(*batch()).raw
    monkeypatch.setattr(wide, "stages", lambda batch: calls.append(len(batch.pixels)) or real(batch))
    for _ in range(2):
        torch.manual_seed(0)
        found = kept(*batch()).raw
        assert calls == [1, 1, 1]
    del expected["loss_classifier"], expected["loss_box_reg"], expected["loss_objectness"], expected["loss_rpn_box_reg"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_the_estimate_counts_the_cells_of_all_levels():
    # 64 x 96 pixels have 16 x 24 cells of stride 4 and 2 x 3 of stride 32: 8 * 384 + 16 * 6 numbers; twice of it.
    levels = [Level(4, 8), Level(32, 16)]
    assert bytes_of_maps(levels, [(64, 96), (96, 64)], None) == 2 * (8 * 384 + 16 * 6) * 4
    assert bytes_of_maps(levels, [(64, 96)], torch.bfloat16) == (8 * 384 + 16 * 6) * 2


class TestTrain:
    def test_a_run_equals_one_without_it_and_resumes_bit_for_bit(self, defeat, tiny, teacher, tmp_path):
        arguments = ["-r", tiny, "-t", teacher, "-q"]
        kept = assert_resumes_bit_for_bit(defeat, [*arguments, *setting(teacher__cache_gib=1)], tmp_path, step=4)
        defeat("train", *arguments, "-o", tmp_path / "plain")
        for ours, theirs in zip(kept.steps, metrics(tmp_path / "plain", "train"), strict=True):
            assert ours["raw"] == pytest.approx(theirs["raw"], rel=1e-3)

    def test_check_tells_what_it_takes_and_where_it_is_too_small(self, defeat, tiny, teacher):
        output = defeat("check", "-r", tiny, "-t", teacher, *setting(teacher__cache_gib=1))
        assert "teacher: its features of 12 images, as they are and mirrored, take about 0.0 GiB" in output
        output = defeat("check", "-r", tiny, "-t", teacher, *setting(teacher__cache_gib=1e-6, data__flip=0))
        assert "of 12 images take about 0.0 GiB; teacher.cache_gib is 1e-06, and the rest is computed" in output

    def test_it_is_of_no_use_without_a_teacher(self, defeat, tiny, tmp_path):
        output = defeat("train", "-r", tiny, *setting(teacher__cache_gib=1), "-o", tmp_path / "run", code=2)
        assert "teacher.cache_gib: without effect, as there is no teacher" in output
        assert list(tmp_path.iterdir()) == []
