"""What `defeat bench` measures with, against numbers worked out by hand."""

import pytest
import torch
from tiny import batch, build, distil
from torch import nn

from defeat_cli.benchmark.detectors import compare, drawn_images, gflops
from defeat_cli.benchmark.memory import Peak, size_of
from defeat_cli.benchmark.step import TERMS as TOGETHER
from defeat_cli.benchmark.step import _necessary
from defeat_cli.benchmark.timing import Spread, Stopwatch
from defeat_cli.config import schema as recipes
from defeat_cli.data.loading import training_loader
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.step import train_step
from defeat_cli.session import assemble

CPU = torch.device("cpu")


def test_95_of_100_rounds_are_at_or_below_p95():
    spread = Spread.of([number / 1000 for number in range(100, 0, -1)])
    assert (spread.least, spread.median, spread.p95) == pytest.approx((1, 50.5, 95))
    assert Spread.of([0.001, 0.003]).p95 == pytest.approx(3)
    assert Spread.of([0.002]) == Spread(2.0, 2.0, 2.0)


def test_a_stopwatch_keeps_what_came_after_the_warm_up():
    watch = Stopwatch(CPU)
    for number in range(3):
        if number == 1:
            watch.forget()
        with watch.timing("part"):
            sum(range(1000))
    assert len(watch.seconds["part"]) == 2
    assert watch.spread("part").least > 0


def test_what_terms_share_counts_once_in_the_sum():
    seconds = {
        "student's step": [1.0, 2.0],
        "teacher": [3.0, 4.0],
        "a": [5.0, 5.0],
        "b": [6.0, 6.0],
        TOGETHER: [7.0, 8.0],
    }
    assert _necessary(seconds, ["a", "b"]) == [11.0, 14.0]
    assert _necessary({"student's step": [1.0], "teacher": [2.0], "a": [4.0]}, ["a"]) == [7.0]
    assert _necessary({"student's step": [1.0]}, []) == [1.0]


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(1000, requires_grad=True)
    with Peak(CPU, [x]) as peak, torch.no_grad():
        x.exp().exp().exp()
    assert peak.bytes == 3 * 4000  # x, and one result while the next is made of it
    with Peak(CPU, [x]) as peak:
        x.exp().exp().exp().sum()
    assert peak.bytes == 4 * 4000 + 4  # backward will need every result
    with Peak(CPU) as peak:
        torch.zeros(10)
        kept = torch.zeros(1000)
    assert peak.bytes == 4000  # the first is gone, and its place may be taken
    with Peak(CPU) as peak:
        kept = torch.zeros(1000)
        kept.view(10, 100)[3].mul_(2)
    assert peak.bytes == 4000  # a view is no memory of its own


def test_a_distilled_step_takes_little_more_memory_than_a_plain_one_and_the_teacher(tmp_path):
    """15% more; 17% where the teacher's first layers run while the student's activations are kept."""
    few = {"data.path": str(tmp_path / "shapes"), "data.shapes.train_images": 8, "data.shapes.val_images": 1}
    few |= {"teacher.cache_gib": None}  # the teacher's layers are to run
    session = assemble(recipes.load("quickstart", few))
    training = begin(session.recipe, session.distiller, session.device)
    training.distiller.train()
    resident = [*training.distiller.parameters(), *training.distiller.buffers()]
    (batch,) = training_loader(session.training_data, 8, 0)
    taken = []
    for strength in ({"neck": None}, 1.0):
        with Peak(CPU, resident) as peak:
            train_step(training, [batch], seed=0, lr=0.0, strength=strength, clip_norm=10.0, autocast=None)
        taken.append(peak.bytes)
    teacher = size_of(session.teacher.state_dict().values())
    plain = taken[0] - teacher
    assert plain + teacher < taken[1] < 1.15 * plain + teacher


def test_shared_memory_counts_once():
    x = torch.zeros(10, 10)
    assert size_of([x, x[0], x.t(), torch.zeros(5, dtype=torch.float64)]) == 400 + 40


class Convolution(nn.Module):
    """A `detector` of one convolution."""

    def __init__(self):
        super().__init__()
        self.model = nn.Conv2d(3, 4, 3, padding=1)

    def detect(self, images):
        return [{"boxes": self.model(image[None].float())} for image in images]


class Elsewhere:
    """A detector that is no module, as an exported file is."""

    def detect(self, images):
        return [{} for _ in images]


def test_detectors_are_counted_by_hand():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    # 64 places x 4 channels x 27 weights, a multiplication and an addition each.
    assert gflops(Convolution(), [image, image]) == pytest.approx(2 * 13824 / 1e9)
    conv, file = compare({"a": (Convolution(), [image, image]), "b": (Elsewhere(), [image])}, CPU, rounds=2)
    assert (conv.parameters, conv.gflops) == (4 * 27 + 4, pytest.approx(13824 / 1e9))
    # Weights, the image as floats, and the result.
    assert conv.memory == 4 * (4 * 27 + 4) + 4 * 3 * 64 + 4 * 4 * 64
    assert conv.many.least > 0
    assert (file.parameters, file.gflops, file.memory) == (None, None, None)


def test_drawn_images_are_the_same_and_differ_among_themselves():
    first, second = drawn_images(2, 30, 40)
    assert first.shape == (3, 30, 40)
    assert first.dtype == torch.uint8
    assert not torch.equal(first, second)
    assert torch.equal(first, drawn_images(1, 30, 40)[0])


@pytest.mark.parametrize("names", [["neck"], ["neck", "head"], ["head", "dist", "backbone"], ["pkd", "frs"]])
def test_what_is_timed_as_the_teachers_is_all_that_the_terms_ask(names, monkeypatch):
    """With it there, the terms run on a teacher that cannot do anything more, and give the losses of the step."""
    student, teacher = build(), build(seed=1, fpn_channels=16)
    distiller = distil(student, teacher, names)
    images, targets = batch()
    torch.manual_seed(5)
    ours, theirs = distiller.views(images, targets)
    expected = {}
    for name in names:
        expected |= {(name, part): loss.value for part, loss in distiller.terms[name](ours, theirs).items()}
    torch.manual_seed(5)
    _, again = distiller.views(images, targets)
    again.look_at(theirs.looked_at)
    for name in ("stages", "neck", "regions", "classify", "cell_logits"):
        monkeypatch.setattr(teacher, name, None)
    cut = ours.cut_loose()
    found = {(name, part): loss.value for name in names for part, loss in distiller.terms[name](cut, again).items()}
    torch.testing.assert_close(found, expected)
    sum(found.values()).backward()
    assert all(p.grad is None for p in student.model.backbone.parameters())
    assert any(level.grad is not None for level in (*cut.features, *cut.stages))
