"""A teacher's features that are kept from one epoch to the next: the same ones, each computed once, within a limit."""

from types import SimpleNamespace

import pytest
import simulated_device
import torch
from runs import assert_resumes_bit_for_bit, metrics, setting
from tiny import batch, build, distil

from defeat_cli.benchmark.memory import size_of
from defeat_cli.benchmark.step import measure_step
from defeat_cli.benchmark.timing import Stopwatch
from defeat_cli.config import schema as recipes
from defeat_cli.detectors.contract import Batch, FeatureDetector, Level
from defeat_cli.distillation.caching import FeatureCache, bytes_of_maps
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import TERMS
from defeat_cli.engine.checkpoint import begin
from defeat_cli.jobs import bad_step
from defeat_cli.jobs.estimate import of_training
from defeat_cli.jobs.validating import count_pseudo_labels
from defeat_cli.session import assemble

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


def alone_in_padding(detector, prepared):
    """The features of each image by itself, put into those of a batch of nothing but padding."""
    _, _, height, width = prepared.pixels.shape
    expected = detector.features(Batch(torch.zeros(len(prepared.sizes), 3, height, width), [(0, 0)] * 3))
    for i, (h, w) in enumerate(prepared.sizes):
        own = Batch(prepared.pixels[i : i + 1, :, :h, : (w + 31) // 32 * 32], [(h, w)])
        for level, of_image in zip(expected, detector.features(own), strict=True):
            level[i, :, : of_image.shape[-2], : of_image.shape[-1]] = of_image[0]
    return expected


def test_features_are_those_of_each_image_alone_and_computed_once(wide, looks):
    cache = FeatureCache(ROOM)
    images = batch()[0]  # 64 x 64, 64 x 90 and 64 x 70
    prepared = wide.prepare(images)
    expected = alone_in_padding(wide, prepared)
    looks.clear()
    first = cache.maps(wide, prepared)
    torch.testing.assert_close(first, expected)
    assert looks == [1, 1, 1, 1]  # the last is padding
    turned = cache.maps(wide, wide.prepare(images[::-1]))
    for level, again in zip(first, turned, strict=True):
        assert torch.equal(level.flip(0), again)
    assert looks == [1, 1, 1, 1]
    sides = [(64, 64), (64, 96), (64, 96), (64, 96)]
    assert cache.bytes == bytes_of_maps(wide.levels, sides, 32, None)


def test_images_of_one_size_have_the_features_that_the_detector_gives_their_batch(wide):
    prepared = wide.prepare([image[:, :, :64] for image in batch()[0]])
    torch.testing.assert_close(FeatureCache(ROOM).maps(wide, prepared), wide.features(prepared))


def test_an_image_is_found_again_in_other_padding_and_a_mirrored_one_is_another(wide, looks):
    cache = FeatureCache(ROOM)
    image = batch()[0][0]  # 64 x 64
    tall = torch.zeros(3, 80, 64)
    for images, more in (([image], 2), ([image.flip(-1)], 1), ([image, tall], 2), ([tall, image], 0), ([image], 0)):
        looks.clear()
        found = cache.maps(wide, wide.prepare(images))
        assert len(looks) == more  # with the padding of each shape
        assert len(found[0]) == len(images)


def test_black_images_of_other_sizes_in_the_same_padding_are_told_apart(wide, looks):
    # The pixels are the same; where the image ends is not, and outside it is 0 after normalisation.
    cache = FeatureCache(ROOM)
    prepared = wide.prepare([torch.zeros(3, 64, 70), torch.zeros(3, 64, 90)])
    assert torch.equal(*prepared.pixels)
    found = cache.maps(wide, prepared)
    torch.testing.assert_close(found, wide.features(prepared))
    assert not torch.equal(found[0][0], found[0][1])


def test_what_is_beyond_the_limit_is_computed_each_time_with_the_same_bits(wide, looks):
    prepared = wide.prepare([image[:, :, :64] for image in batch()[0]])  # one shape: three images and the padding
    whole = FeatureCache(ROOM)
    expected = whole.maps(wide, prepared)
    for limit, again in ((0, 4), (whole.bytes // 4, 3), (whole.bytes - 1, 1), (whole.bytes, 0)):
        small = FeatureCache(limit)
        small.maps(wide, prepared)
        looks.clear()
        found = small.maps(wide, prepared)
        assert len(looks) == again
        assert small.bytes == whole.bytes * (4 - again) // 4
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
    images, targets = [*(image[:, :, :64] for image in images), torch.rand(3, 64, 64)], [*targets, None]
    targets[1] = {"boxes": torch.tensor([[5.0, 10, 60, 50]]), "labels": torch.tensor([1])}
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
    images, targets = [image[:, :, :64] for image in batch()[0]], batch()[1]
    targets[1]["boxes"] = targets[1]["boxes"] - 30
    expected = plain(images, targets).raw
    monkeypatch.setattr(wide, "stages", lambda batch: calls.append(len(batch.pixels)) or real(batch))
    for _ in range(2):
        torch.manual_seed(0)
        found = kept(images, targets).raw
        assert calls == [1, 1, 1, 1]
    del expected["loss_classifier"], expected["loss_box_reg"], expected["loss_objectness"], expected["loss_rpn_box_reg"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_the_estimate_counts_the_cells_of_all_levels():
    # 64 x 96 pixels have 16 x 24 cells of stride 4 and 1 x 2 of stride 64: 8 * 384 + 16 * 2 numbers.
    levels = [Level(4, 8), Level(64, 16)]
    assert bytes_of_maps(levels, [(64, 96), (96, 64)], 32, None) == 2 * (8 * 384 + 16 * 2) * 4
    assert bytes_of_maps(levels, [(33, 65)], 32, torch.bfloat16) == (8 * 384 + 16 * 2) * 2


def test_a_map_that_is_part_of_a_larger_tensor_is_kept_without_it():
    def features(model, batch):
        both = model(batch.pixels)
        return [both[:, :2], both[:, 2:, ::2, ::2]]

    detector, cache = FeatureDetector(torch.nn.Conv2d(3, 8, 1, bias=False), ["a"], features).eval(), FeatureCache(ROOM)
    prepared = detector.prepare([torch.rand(3, 32, 32)])
    torch.testing.assert_close(cache.maps(detector, prepared), detector.features(prepared))
    kept = [level for levels in cache._kept.values() for level in levels]
    assert size_of(kept) == cache.bytes == 2 * 4 * (2 * 32 * 32 + 6 * 16 * 16)  # the image, and padding


def test_pixels_may_be_of_any_kind(wide):
    for dtype in (torch.float64, torch.bfloat16):
        wide.to(dtype)
        prepared = wide.prepare(batch()[0][:1]).to(dtype)
        found = FeatureCache(ROOM).maps(wide, prepared)
        torch.testing.assert_close([m.to(dtype) for m in wide.features(prepared)], found)


@pytest.mark.skipif(not simulated_device.supported(), reason="this torch has no devices made in Python")
def test_a_gpu_is_waited_for_once_a_batch(wide):
    with simulated_device.installed() as meter:
        wide.to(simulated_device.DEVICE)
        prepared, cache = wide.prepare([image.to(simulated_device.DEVICE) for image in batch()[0]]), FeatureCache(ROOM)
        for _ in range(2):
            meter.reset()
            cache.maps(wide, prepared)
            assert sum(meter.waits.values()) == 1


def test_a_look_at_unlabelled_images_before_training_keeps_nothing():
    """It is without autocast: what it kept would take room, and never be found."""
    teacher = build(seed=1, fpn_channels=16)
    distiller = Distiller(build(), teacher, dict(distil(build(), teacher, ["neck"]).terms), cache_bytes=ROOM)
    run = SimpleNamespace(teacher_check_images=2)
    session = SimpleNamespace(
        recipe=SimpleNamespace(run=run, data=SimpleNamespace(unlabelled_threshold=0.5)),
        unlabelled={(0, i): (torch.rand(3, 64, 64), None, "") for i in range(2)}, distiller=distiller,
        device=torch.device("cpu"),
    )  # fmt: skip
    told = []
    count_pseudo_labels(session, SimpleNamespace(note=told.append, warn=told.append))
    assert "boxes an image, on 2 of them" in told[0]
    assert distiller.cache.bytes == 0


def test_where_memory_runs_out_what_is_kept_is_told_and_let_go(defeat, tiny, teacher):
    session = assemble(recipes.load(str(tiny), {"teacher.checkpoint": str(teacher), "teacher.cache_gib": 1.0}))
    image, target, _ = session.training_data[0]
    session.distiller([image], [target])
    assert session.distiller.cache.bytes > 0
    text = of_training(session)
    assert "by the estimate of `defeat check`, beside 1 MiB of the teacher's features; " in text
    assert "teacher.cache_gib, data.short_side" in text


def test_what_is_timed_is_a_step_that_finds_all_features(wide, looks, monkeypatch):
    student = build()
    distiller = Distiller(student, wide, dict(distil(student, wide, ["neck"]).terms), cache_bytes=ROOM)
    training = begin(recipes.load(None, {"run.precision": "fp32"}), distiller, torch.device("cpu"))
    batches = [([torch.rand(3, 64, 64)], [batch()[1][0]], [i]) for i in range(4)]
    before, forget = [], Stopwatch.forget
    monkeypatch.setattr(Stopwatch, "forget", lambda self: before.append(len(looks)) or forget(self))
    measure_step(training, batches, 1, settings={"clip_norm": None, "autocast": None})
    assert before == [len(looks)] == [5]  # with that of padding


class TestTrain:
    def test_a_run_equals_one_without_it_and_resumes_bit_for_bit(self, defeat, tiny, teacher, tmp_path):
        arguments = ["-r", tiny, "-t", teacher, "-q"]
        kept = assert_resumes_bit_for_bit(defeat, [*arguments, *setting(teacher__cache_gib=1)], tmp_path, step=4)
        defeat("train", *arguments, "-o", tmp_path / "plain")
        for ours, theirs in zip(kept.steps, metrics(tmp_path / "plain", "train"), strict=True):
            assert ours["raw"] == pytest.approx(theirs["raw"], rel=1e-3)

    def test_check_tells_what_it_takes_and_that_too_little_keeps_nothing(self, defeat, tiny, teacher, tmp_path):
        check = ["check", "-r", tiny, "-t", teacher]
        output = defeat(*check, *setting(teacher__cache_gib=1))
        assert "its features of 12 images, as they are and mirrored, take 1 MiB and are kept" in output
        little = setting(teacher__cache_gib=1e-6, data__flip=0)
        told = "its features of 12 images take 1 MiB: more than teacher.cache_gib 1e-06, so none is kept"
        assert told in defeat(*check, *little)
        for name, more in (("plain", setting(data__flip=0)), ("little", little)):
            defeat("train", "-r", tiny, "-t", teacher, "-q", *more, "-o", tmp_path / name)
        assert metrics(tmp_path / "little", "train") == metrics(tmp_path / "plain", "train")

    def test_a_bad_step_of_a_run_that_keeps_nothing_is_made_again_without_it(self, defeat, tiny, teacher, tmp_path):
        explodes = setting(optimizer__lr=1e25, optimizer__clip_norm="null", schedule__warmup_steps=0)
        for gib, told in ((1e-6, None), (1, 1)):
            run = tmp_path / str(gib)
            arguments = ["-t", teacher, "-q", *explodes, *setting(teacher__cache_gib=gib, run__teacher_check_images=0)]
            defeat("train", "-r", tiny, *arguments, "-o", run, code=2)
            assert bad_step.load(run / "bad_step.pt").recipe["teacher"]["cache_gib"] == told

    def test_it_is_of_no_use_without_a_teacher(self, defeat, tiny, tmp_path):
        output = defeat("train", "-r", tiny, *setting(teacher__cache_gib=1), "-o", tmp_path / "run", code=2)
        assert "teacher.cache_gib: without effect, as there is no teacher" in output
        assert list(tmp_path.iterdir()) == []
