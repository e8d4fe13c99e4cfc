"""Commands on the simulated device: no tensor is left behind on the CPU, and results are the CPU's to the last bit."""

import re
from pathlib import Path

import pytest
import simulated_device
import torch
from matplotlib.figure import Figure
from runs import dying_at, metrics, setting
from tiny import COMMON, OWN, build, options, save_run

from defeat_cli.config import schema as recipes
from defeat_cli.data.formats.shapes import draw_shapes
from defeat_cli.data.loading import training_loader
from defeat_cli.detectors.contract import FeatureDetector, anchor_obstacle
from defeat_cli.detectors.pooling import RoIPool, pool_with_one_wait
from defeat_cli.detectors.zoo import wrap
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import TERMS
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.step import train_step
from defeat_cli.engine.transfer import to_device
from defeat_cli.session import assemble

pytestmark = pytest.mark.skipif(not simulated_device.supported(), reason="this torch has no devices made in Python")

CLASSES = ["circle", "square", "triangle", "star", "ring", "cross"]

FEW = {"candidates_per_level": 100}
"""torchvision suppresses detections in one of two ways, by their number and device; so few in the same way on both."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data") / "few", train_images=4, val_images=2, size=64, seed=0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, data):
    """A detector of each family with random weights, which takes anything for an object."""
    paths = {}
    for family in OWN:
        student = {"detector": family, **COMMON, **OWN[family], **FEW, "score_threshold": 0.0}
        paths[family] = save_run(
            tmp_path_factory.mktemp(family), CLASSES, student, {"short_side": [64], "long_side": 64, "path": str(data)}
        )
    return paths


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes most of the time, and the CPU does it."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b""))


@pytest.fixture(autouse=True)
def one_order_of_sums(monkeypatch):
    """On a CPU the gradients of pooling, and an optimizer's step, are added up in an order of their own: not here."""

    def pooled(pool, features, boxes, sizes):
        maps = [level for name, level in features.items() if name in pool.featmap_names]
        return pool_with_one_wait(pool, maps, boxes)

    def plain(kind):
        return lambda groups, fused=False, **settings: kind(groups, **settings)

    monkeypatch.setattr(RoIPool, "forward", pooled)
    for name in ("SGD", "AdamW"):
        monkeypatch.setattr(torch.optim, name, plain(getattr(torch.optim, name)))


@pytest.fixture
def fit(defeat, tiny, data):
    """A short training: (folder, teacher, options)."""

    def run(folder, teacher, *more, batch_size=2, log_every=1):
        settings = setting(schedule__epochs=1, run__log_every=log_every, data__batch_size=batch_size)
        defeat("train", "-r", tiny, "-t", teacher, "-d", data, "-o", folder, *settings, *more)

    return run


def test_tensors_of_two_devices_do_not_meet():
    with simulated_device.installed():
        here, there = torch.ones(3, device=simulated_device.DEVICE), torch.ones(3)
        assert here.device.type == simulated_device.NAME
        for meet in (
            lambda: here + there,
            lambda: there + here,
            lambda: torch.cat([here, there]),
            lambda: torch.stack([here.sum(), there.sum()]),
            lambda: there.sum().add_(here.sum()),
            lambda: torch.where(there > 0, here, here),
            lambda: torch.nn.functional.conv1d(here[None, None], there[None, None]),
        ):
            with pytest.raises(RuntimeError, match="one device"):
                meet()
        with pytest.raises(TypeError, match="cpu"):
            here.numpy()
        assert (here + there.sum()).tolist() == [4, 4, 4]
        assert (here + there.to(here.device)).cpu().tolist() == [2, 2, 2]


def test_waits_launches_and_memory_are_counted():
    with simulated_device.installed() as meter:
        start = meter.alive
        values = torch.arange(6.0, device=simulated_device.DEVICE)
        meter.reset()
        doubled = (values * 2).view(2, 3)
        assert dict(meter.launches) == {"mul": 1}
        assert not meter.waits
        assert doubled.sum().item() == 30
        assert doubled[doubled > 4].shape == (3,)
        doubled[:, [0, 2]].cpu()
        assert sum(meter.waits.values()) == 4
        assert meter.peak >= start + 2 * 6 * 4
        del values, doubled
        assert meter.alive == start


def test_gradients_are_the_cpus():
    weight = torch.arange(6.0).reshape(2, 3).requires_grad_()
    (weight.square()[:, [0, 2]].sum() + weight[weight > 1].sum()).backward()
    with simulated_device.installed():
        there = torch.nn.Parameter(weight.detach().to(simulated_device.DEVICE))
        (there.square()[:, [0, 2]].sum() + there[there > 1].sum()).backward()
        assert there.grad.device == there.device
        assert torch.equal(there.grad.cpu(), weight.grad)


def test_a_run_with_everything_on_equals_the_cpus(fit, teachers, tmp_path):
    """Every term that two-stage detectors can have, an average of the weights, accumulation, a stop and a resume."""
    teacher = teachers["faster_rcnn"]
    more = setting(optimizer__accumulate=2, optimizer__ema=0.9, distillation__balance=0.5, teacher__cache_gib=1)
    more += setting(
        run__save_every=1, **{f"distillation__{term}": "{}" for term in TERMS if term not in ("crosskd", "ld")}
    )
    fit(tmp_path / "cpu", teacher, *more, batch_size=1, log_every=2)
    with simulated_device.installed():
        with dying_at(1):
            fit(tmp_path / "device", teacher, *more, batch_size=1, log_every=2)
        fit(tmp_path / "device", teacher, *more, "--resume", batch_size=1, log_every=2)
    assert metrics(tmp_path / "device") == metrics(tmp_path / "cpu")
    states = [torch.load(tmp_path / name / "student.pth", weights_only=True) for name in ("cpu", "device")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("family", list(OWN))
def test_every_family_learns_as_on_the_cpu(fit, teachers, family, tmp_path):
    """With the terms that only some families can have."""
    more = [*options(family), *setting(teacher__cache_gib=1)]
    if family != "faster_rcnn":
        more += setting(distillation__crosskd="{}", student__candidates_per_level=FEW["candidates_per_level"])
    if family == "retinanet":
        more += setting(distillation__neck="{mask: fine-grained}")
    fit(tmp_path / "cpu", teachers[family], *more)
    with simulated_device.installed():
        fit(tmp_path / "device", teachers[family], *more)
    assert metrics(tmp_path / "device") == metrics(tmp_path / "cpu")


def test_a_distilled_step_launches_little_and_seldom_waits(teachers, data):
    """Of eight images; image by image it would be 268 waits and half as many operations again."""
    recipe = recipes.load(
        "quickstart",
        {"run.compare_plain": False, "data.shapes.train_images": 8, "data.path": str(data.parent / "eight")}
        | {"teacher.cache_gib": None},  # the teacher's layers are to run
    )
    with simulated_device.installed() as meter:
        session = assemble(recipe)
        training = begin(recipe, session.distiller, session.device)
        training.distiller.train()
        (batch,) = training_loader(session.training_data, 8, 0)
        for _ in range(2):
            meter.reset()
            train_step(training, [batch], seed=0, lr=1e-3, strength=1.0, clip_norm=10.0, autocast=None)
    assert sum(meter.waits.values()) < 60, meter.waits
    assert sum(meter.launches.values()) < 2771, meter.launches


@pytest.mark.parametrize("family", list(OWN))
def test_looking_commands_find_what_they_find_on_the_cpu(defeat, teachers, data, family, tmp_path):
    image = data / "images" / "val_00000.png"

    def looked(name):
        folder = tmp_path / name
        folder.mkdir()
        defeat("eval", teachers[family], "-d", data, "--json", folder / "figures.json")
        defeat("predict", teachers[family], image, "-o", folder / "found", "--save-coco", "--threshold", 0)
        maps = ["--save-arrays", "--data", data, "--teacher", teachers[family]]
        maps += ["--distillation"] if family == "faster_rcnn" else []
        defeat("gradmap", "-c", teachers[family], image, *maps, "-o", folder / "maps")
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    expected = looked("cpu")
    with simulated_device.installed() as meter:
        found = looked("device")
    assert sum(meter.launches.values()) > 1000
    assert found.keys() == expected.keys()
    for path, content in expected.items():
        assert found[path].replace(b"/device/", b"/cpu/") == content, path


def test_scoring_is_done_on_the_device(defeat, teachers, data):
    """On the CPU it would give the same figures."""
    with simulated_device.installed() as meter:
        defeat("eval", teachers["faster_rcnn"], "-d", data)
    assert sum(meter.launches.values()) > 100


def test_unlabelled_images_and_a_teacher_with_its_own_size(fit, teachers, data, tmp_path):
    more = setting(data__unlabelled=str(data / "images"), data__unlabelled_threshold=0.1, teacher__size="own")
    fit(tmp_path / "cpu", teachers["faster_rcnn"], *more)
    with simulated_device.installed():
        fit(tmp_path / "device", teachers["faster_rcnn"], *more)
    assert metrics(tmp_path / "device", "train") == metrics(tmp_path / "cpu", "train")


def test_check_and_mask_pictures(defeat, tiny, teachers, data, tmp_path):
    look = ["-r", tiny, "-t", teachers["faster_rcnn"], "-d", data]
    expected = defeat("check", *look)
    with simulated_device.installed():
        found = defeat("check", *look)
        defeat("ablate", "--show-masks", data / "images" / "val_00000.png", *look, "-o", tmp_path / "masks")
    memory = re.compile(r".*(memory|GiB).*")
    assert memory.sub("", found) == memory.sub("", expected)
    assert list((tmp_path / "masks").rglob("*masks.png"))


def test_what_no_command_moves_alone():
    """Detectors of a user's own modules, images of unlike types, and a training that nothing has moved yet."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[1.0, 2, 3, 4]]), "labels": torch.tensor([1])}
    with simulated_device.installed():
        device = simulated_device.DEVICE
        own = FeatureDetector(torch.nn.Conv2d(3, 3, 1), ["a"], lambda model, batch: [model(batch.pixels)], size=(16, 8))
        batch = own.to(device).prepare(to_device([image], device), [target])
        assert {value.device for value in batch.targets[0].values()} == {batch.pixels.device} == {device}
        assert batch.targets[0]["boxes"].tolist() == [[1, 4, 3, 8]]
        assert {one.device for one in to_device([image, image.float()], device)} == {device}

        training = begin(recipes.load("quickstart", {}), Distiller(build("faster_rcnn")), device)
        assert {value.device for value in training.distiller.state_dict().values()} == {device}
        here, there = build("faster_rcnn").anchor_generator, build("faster_rcnn").anchor_generator
        there.set_cell_anchors(torch.float32, device)
        assert anchor_obstacle(there, here) is None


def test_a_model_that_is_on_the_device_already_is_wrapped_there():
    model = build(classes=CLASSES).model
    expected = wrap(model, CLASSES).levels
    with simulated_device.installed():
        assert wrap(model.to(simulated_device.DEVICE), CLASSES).levels == expected
