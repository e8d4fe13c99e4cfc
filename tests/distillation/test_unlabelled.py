"""Terms on images without annotations: pseudo-labels by hand, the loss by torchvision's own detections, whole runs."""

import json
import shutil

import pytest
import torch
from PIL import Image
from runs import assert_resumes_bit_for_bit, metrics, setting
from tiny import batch, build, distil
from torch import nn

from defeat_cli.detectors.contract import FeatureDetector
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.losses import imitation_loss, region_kl
from defeat_cli.distillation.masks import box_masks, valid_masks
from defeat_cli.distillation.terms import TERMS, Loss, View
from defeat_cli.distillation.unlabelled import PseudoLabels, averaged
from defeat_cli.engine.step import seed_step

FAMILIES = {
    "faster_rcnn": [name for name in TERMS if name not in ("crosskd", "ld")],
    "retinanet": [name for name in TERMS if name != "ld"],
}


FOUND = {
    "boxes": torch.tensor([[0.0, 0, 10, 10], [2.0, 4, 20, 30], [1.0, 1, 5, 5]]),
    "scores": torch.tensor([0.5, 0.7, 0.49]),
    "labels": torch.tensor([1, 2, 3]),
}


class Fixed(FeatureDetector):
    """Detects the same in every image: a box of class `x` at 0.5, one of `B` at 0.7, one of `a` at 0.49."""

    def __init__(self, size=None, classes=("x", "B", "a")):
        features = lambda model, batch: [model(batch.pixels)]  # noqa: E731
        super().__init__(
            nn.Conv2d(3, 4, 8, stride=8), classes, features,
            detect=lambda model, images: [dict(FOUND) for _ in images], size=size,
        )  # fmt: skip


def test_pseudo_labels_are_confident_detections_of_shared_classes():
    student, teacher = build("faster_rcnn"), Fixed()  # the student has a, b, c
    view = View(teacher, teacher.prepare([torch.rand(3, 64, 64)] * 2), frozen=True)

    def found(**settings):
        targets = PseudoLabels(student, teacher, **settings)(view)
        assert len(targets) == 2
        return targets[1]["labels"].tolist(), targets[1]["boxes"].tolist()

    assert found() == ([2], [[2, 4, 20, 30]])  # x is none of the student's, a is not sure enough
    assert found(threshold=0.49) == ([2, 1], [[2, 4, 20, 30], [1, 1, 5, 5]])
    assert found(class_map={"x": "c"}) == ([3, 2], [[0, 0, 10, 10], [2, 4, 20, 30]])  # 0.5 is enough
    assert found(threshold=0.8) == ([], [])
    assert PseudoLabels(student, Fixed(classes=("u", "v", "w"))).pairs == []


def test_pseudo_labels_are_scaled_to_the_students_batch():
    student, teacher = Fixed(size=(32, 48)), Fixed(size=(64, 144))
    distiller = Distiller(student, teacher, {"neck": TERMS["neck"](student, teacher)}, own_size=True)
    ours, theirs = distiller.views([torch.rand(3, 40, 40)], None)
    assert theirs.targets[0]["boxes"].tolist() == [[0, 0, 10, 10], [2, 4, 20, 30]]
    # Half as high and a third as wide.
    torch.testing.assert_close(ours.targets[0]["boxes"], torch.tensor([[0, 0, 10 / 3, 5], [2 / 3, 2, 20 / 3, 15]]))
    assert ours.targets[0]["labels"].tolist() == [1, 2]


def test_losses_of_both_kinds_are_averaged_by_images():
    first, second = torch.tensor(2.0, requires_grad=True), torch.tensor(6.0, requires_grad=True)
    labelled = {"fg": Loss(first, 4.0, {"P3": torch.tensor(1.0)})}
    unlabelled = {"fg": Loss(second, 4.0, {"P3": torch.tensor(5.0)})}
    loss = averaged(labelled, unlabelled, share=0.25)["fg"]
    assert (loss.value.item(), loss.weight, loss.parts["P3"].item()) == (3.0, 4.0, 2.0)
    loss.value.backward()
    assert (first.grad.item(), second.grad.item()) == (0.75, 0.25)


def unlabelled_images():
    generator = torch.Generator().manual_seed(8)
    return [torch.rand(3, 64, width, generator=generator) for width in (64, 80)]


def mixed():
    """Three labelled images and, among them, two unlabelled ones."""
    images, targets = batch()
    more = unlabelled_images()
    return [images[0], more[0], *images[1:], more[1]], [targets[0], None, *targets[1:], None]


def spread(detector):
    """A detector of random weights whose scores differ enough for detections to be told apart."""
    torch.manual_seed(5)
    for module in detector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, nn.Conv2d) and module.weight.std() < 0.02:
            nn.init.normal_(module.weight, std=0.05)
    if not detector.softmax:
        nn.init.zeros_(detector.model.head.classification_head.cls_logits.bias)
    return detector.eval()


def test_the_combined_loss_is_that_of_both_batches_by_torchvisions_own_detections():
    student, teacher = build("faster_rcnn"), spread(build("faster_rcnn", seed=1, fpn_channels=12))
    images, targets = batch()
    more = unlabelled_images()
    with torch.no_grad():
        found = teacher.model(more)  # of the student's size already, so boxes are in the pixels of the batch
    ranked = torch.cat([of_image["scores"] for of_image in found]).sort(descending=True).values
    threshold = float(ranked[5:7].mean())
    chosen = [of_image["scores"] >= threshold for of_image in found]
    assert sum(map(int, map(torch.sum, chosen))) == 6
    stand_ins = [{k: of_image[k][c] for k in ("boxes", "labels")} for of_image, c in zip(found, chosen, strict=True)]

    terms = {"neck": TERMS["neck"](student, teacher), "head": TERMS["head"](student, teacher)}
    pseudo = PseudoLabels(student, teacher, threshold)
    distiller = Distiller(student, teacher, terms, pseudo_labels=pseudo).train()
    seed_step(0, 0)
    losses = distiller(*mixed(), 0.5)

    def neck_and_head(images, targets, detection):
        prepared = student.prepare(images, targets)
        features = student.features(prepared)
        own = student.losses(features, prepared) if detection else {}
        theirs = teacher.features(prepared)
        shapes = [tuple(feature.shape[-2:]) for feature in features]
        masks = box_masks([t["boxes"] for t in prepared.targets], shapes, student.strides)
        valid = valid_masks(prepared.valid, shapes, student.strides)
        levels = zip(terms["neck"].adapters, features, theirs, masks, valid, strict=True)
        neck = [imitation_loss(adapter(s), t, mask, 1.0, 1.0, valid=ok) for adapter, s, t, mask, ok in levels]
        regions = teacher.regions(theirs, prepared)
        foreground = torch.cat(regions.labels) > 0
        head = region_kl(student.classify(features, regions), teacher.classify(theirs, regions), foreground)
        return own, [*(torch.stack(group).mean() for group in zip(*neck, strict=True)), *head]

    seed_step(0, 0)
    own, on_labelled = neck_and_head(images, targets, detection=True)
    _, on_unlabelled = neck_and_head(more, stand_ins, detection=False)
    assert on_unlabelled[0] > 0
    assert on_unlabelled[2] > 0
    for name, value in own.items():
        assert torch.equal(losses.weighted[name], value)
    for name, weight, *values in zip(
        ("neck_fg", "neck_bg", "head_fg", "head_bg"), (4, 16, 2, 2), on_labelled, on_unlabelled, strict=True
    ):
        expected = 3 / 5 * values[0] + 2 / 5 * values[1]
        torch.testing.assert_close(losses.raw[name], expected.detach())
        torch.testing.assert_close(losses.weighted[name], 0.5 * weight * expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.4, 1.1])
def test_every_term_learns_from_unlabelled_images_and_none_is_disturbed_on_labelled_ones(family, threshold):
    student, teacher = build(family), spread(build(family, seed=1))
    distiller = distil(student, teacher, FAMILIES[family])
    distiller.pseudo_labels.threshold = threshold
    found = distiller.views(unlabelled_images(), None)[0].targets
    assert any(len(of_image["boxes"]) for of_image in found) == (threshold < 1)
    seed_step(0, 0)
    plain = Distiller(student, teacher, distiller.terms).train()(*batch(), measure=True)
    seed_step(0, 0)
    losses = distiller(*mixed(), measure=True)
    assert losses.pull.keys() == plain.pull.keys() == set(FAMILIES[family])
    assert all(torch.equal(value, plain.pull[name]) for name, value in losses.pull.items())
    assert losses.raw.keys() == plain.raw.keys()
    for name, value in plain.weighted.items():
        detection = name.startswith("loss_") or name in ("classification", "bbox_regression")
        assert torch.equal(losses.weighted[name], value) == detection or value == losses.weighted[name] == 0, name
        assert losses.weighted[name].isfinite()
    sum(losses.weighted.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.terms.parameters())


def test_terms_that_need_no_boxes_do_not_let_the_teacher_detect(monkeypatch):
    student, teacher = build("retinanet"), build("retinanet", seed=1)

    def refuse(*_):
        raise AssertionError("detected")

    monkeypatch.setattr(teacher, "detections", refuse)
    neck = TERMS["neck"](student, teacher, mask="teacher")
    others = {name: TERMS[name](student, teacher) for name in ("pkd", "cwd", "mgd", "frs", "fitnets")}
    losses = Distiller(student, teacher, {"neck": neck, **others}).train()(*mixed())
    assert losses.weighted["neck_fg"] > 0
    with pytest.raises(AssertionError, match="detected"):
        distil(student, teacher, ["neck"])(*mixed())


def test_a_term_that_is_off_does_not_look_at_unlabelled_images(monkeypatch):
    distiller = distil(build("faster_rcnn"), build("faster_rcnn", seed=1), ["pkd"])
    looked, views = [], distiller.views
    monkeypatch.setattr(distiller, "views", lambda images, targets: looked.append(targets) or views(images, targets))
    distiller(*mixed(), {"pkd": None})
    assert [targets is None for targets in looked] == [False]
    distiller(*mixed(), {"pkd": 0.0})
    assert [targets is None for targets in looked] == [False, False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shapes):
    """Seven unlabelled images of 64 pixels, and a file that is none."""
    from defeat_cli.data.formats.shapes import draw_shapes

    drawn = draw_shapes(tmp_path_factory.mktemp("drawn") / "more", train_images=7, val_images=1, size=64, seed=5)
    images = sorted((drawn / "images").iterdir())[:7]
    folder = tmp_path_factory.mktemp("unlabelled")
    for image in images:
        shutil.copy(image, folder)
    (folder / "notes.txt").write_text("nothing")
    return folder


def test_a_run_counts_its_images_and_resumes_bit_for_bit(defeat, tiny, teacher, folder, tmp_path):
    options = setting(
        data__unlabelled=folder, data__unlabelled_batch=3, data__unlabelled_threshold=0.01, run__log_every=1,
        run__save_every=1, run__evaluate_every=2, data__batch_size=5, optimizer__accumulate=2,
        distillation__balance=0.5, distillation__mgd="{}",
    )  # fmt: skip
    arguments = ["-r", tiny, "-t", teacher, *options]
    output, lines, _ = assert_resumes_bit_for_bit(defeat, arguments, tmp_path, step=3)
    assert "unlabelled: 7 images (other files there: 1), 3 beside each batch of 5 labelled" in output
    assert "unlabelled: the teacher finds" in output
    # Twelve images in batches of 5, 5 and 2 make two steps an epoch. A pass over the seven is 3, 3 and 1 in some order.
    assert [line["seen"]["labelled"] for line in lines][1::2] == [12, 24]
    assert [line["seen"]["unlabelled"] for line in lines][1::2] == [7, 14]
    assert 4 <= lines[0]["seen"]["unlabelled"] <= 6
    assert "student: trained on 24 labelled and 14 unlabelled images" in output
    assert "(24 labelled and 14 unlabelled images)" in output
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["seen"] == {"labelled": 24, "unlabelled": 14}


def test_a_teacher_and_a_plain_student_are_trained_without_them(defeat, tiny, folder, tmp_path):
    (tmp_path / "teacher.yaml").write_text(tiny.read_text().replace("epochs: 2", "epochs: 1"))
    options = setting(
        data__unlabelled=folder, data__unlabelled_batch=9, schedule__epochs=1, teacher__recipe=tmp_path / "teacher.yaml"
    )
    told = defeat("train", "-r", tiny, *options, "-o", tmp_path / "run", "--compare-plain")
    assert "student: trained on 12 labelled and 21 unlabelled images" in told
    for name in ("teacher", "plain"):
        assert "unlabelled: null" in (tmp_path / "run" / name / "recipe.yaml").read_text()
        assert all("seen" not in line for line in metrics(tmp_path / "run" / name))


def test_a_variant_without_terms_says_that_they_are_not_used(defeat, tiny, teacher, folder, tmp_path):
    options = setting(data__unlabelled=folder, schedule__epochs=1)
    told = defeat("train", "-r", tiny, *options, "-o", tmp_path / "none", "-t", teacher, "--variant", "none")
    assert "no term of distillation is on, so these images are not used" in told
    assert metrics(tmp_path / "none")[0]["seen"] == {"labelled": 8, "unlabelled": 0}


def test_check_tells_of_unlabelled_images(defeat, tiny, teacher, folder, shapes):
    told = defeat("check", "-r", tiny, "-t", teacher, *setting(data__unlabelled=folder, data__unlabelled_threshold=1.0))
    assert "unlabelled: 7 images (other files there: 1), 4 beside each batch of 4 labelled" in told
    assert "warning: the teacher finds nothing with a score of 1.0 on unlabelled images" in told
    told = defeat("check", "-r", tiny, "-t", teacher, *setting(data__unlabelled=shapes / "images"))
    assert "warning: data.unlabelled: 12 of 18 images are training images too" in told
    assert "warning: data.unlabelled: 6 of 18 images are validation images too" in told


def test_a_teacher_of_other_classes_is_told_of(defeat, tiny, teacher, folder, tmp_path):
    content = torch.load(teacher, weights_only=True)
    content["classes"] = ["one", "two", "three", "four", "five", "six"]
    torch.save(content, tmp_path / "teacher.pt")
    told = defeat("check", "-r", tiny, "-t", tmp_path / "teacher.pt", *setting(data__unlabelled=folder))
    assert "warning: teacher and student share no class: unlabelled images have no boxes" in told


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", "no images in this folder; files ending in .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp count"),
        ("nowhere", "nowhere: no such folder"),
        ("broken", "b.png: is not an image that can be read"),
        ("no teacher", "data.unlabelled: there is no teacher to learn from on these images"),
        ("no folder", "unlabelled_batch is about unlabelled images, and there are none; give unlabelled: FOLDER"),
        ("threshold", "data.unlabelled_threshold: should be greater than 0"),
    ],
)
def test_what_cannot_be_used_is_refused_by_check_and_train_alike(
    case, message, defeat, tiny, teacher, folder, tmp_path
):
    place = folder if case in ("no teacher", "threshold") else tmp_path / case
    if case in ("empty", "broken"):
        place.mkdir()
    if case == "broken":
        Image.new("RGB", (8, 8)).save(place / "a.png")
        (place / "b.png").write_bytes(b"nothing")
    options = setting(data__unlabelled=place) if case != "no folder" else setting(data__unlabelled_batch=2)
    options += setting(data__unlabelled_threshold=0.0) if case == "threshold" else []
    options += ["-t", teacher] if case != "no teacher" else []
    said = [
        defeat(*command, "-r", tiny, *options, code=2) for command in (["check"], ["train", "-o", tmp_path / "run"])
    ]
    assert message in said[0]
    assert "Traceback" not in said[0]
    assert said[0][said[0].index("error:") :] == said[1][said[1].index("error:") :]
    assert not (tmp_path / "run").exists()
