"""Masks, a head on more regions, the neck loss, scoring and JPEG, each against what to compare it with, in one run.

    python tests/benchmarks/kernels.py                 # on a GPU where there is one; --device cpu
    OMP_NUM_THREADS=1 python tests/benchmarks/kernels.py --device cpu

Not a test: speed is never asserted. `defeat bench` measures whole steps and detectors.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from oracles import masks as oracle  # noqa: E402

from defeat_cli.benchmark.timing import Stopwatch, machine  # noqa: E402
from defeat_cli.building import build_student  # noqa: E402
from defeat_cli.config import schema as recipes  # noqa: E402
from defeat_cli.distillation.losses import imitation_loss  # noqa: E402
from defeat_cli.distillation.masks import box_masks, fine_grained_masks, gaussian_masks  # noqa: E402
from defeat_cli.engine import scorers  # noqa: E402

HEIGHT, WIDTH = 800, 1333
STRIDES = [4, 8, 16, 32, 64]
SHAPES = [(-(-HEIGHT // stride), -(-(-(-WIDTH // 32) * 32) // stride)) for stride in STRIDES]


def least(device: torch.device, rounds: int, **work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the fastest of some rounds, in which the pieces of work take turns."""
    watch = Stopwatch(device)
    for number in range(rounds + 2):
        if number == 2:
            watch.forget()
        for name, piece in work.items():
            with watch.timing(name):
                piece()
    return {name: watch.spread(name).least for name in work}


def boxes(images: int, each: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = torch.exp(torch.rand(images, each, 2, generator=generator) * 4 + 2.3)
    centres = torch.rand(images, each, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    edges = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    return list(torch.minimum(torch.cat([centres - sides / 2, centres + sides / 2], dim=2).clamp(min=0), edges))


def masks(device: torch.device, rounds: int) -> None:
    of_images = boxes(16, 20)
    slow = [b.tolist() for b in of_images]
    found = [b.to(device) for b in of_images]
    generator = AnchorGenerator(tuple((8 * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES))
    pixels = ImageList(torch.zeros(1, 3, HEIGHT, SHAPES[0][1] * 4), [(HEIGHT, WIDTH)])
    anchors = generator(pixels, [torch.zeros(1, 1, *shape) for shape in SHAPES])[0].to(device)
    anchors = list(anchors.split([3 * h * w for h, w in SHAPES]))
    took = least(
        device, rounds,
        oracle=lambda: oracle.box_masks(slow, SHAPES, STRIDES),
        boxes=lambda: box_masks(found, SHAPES, STRIDES),
        gaussian=lambda: gaussian_masks(found, SHAPES, STRIDES),
        fine_grained=lambda: fine_grained_masks(found, SHAPES, anchors),
    )  # fmt: skip
    print("masks, batch 16, 20 boxes, 5 levels, 800 x 1333, ms:", {k: round(v, 2) for k, v in took.items()})
    print(f"  box masks are {took['oracle'] / took['boxes']:.0f} times as fast as loops over boxes and cells")


def neck_loss(device: torch.device, rounds: int) -> None:
    """The loss reads two maps, reads them again backward, and writes a gradient: against copies that move as much."""
    shape = (4, 256, *SHAPES[0])
    student, teacher = (torch.randn(shape, device=device) for _ in range(2))
    student.requires_grad_()
    mask = torch.rand(shape[0], *shape[2:], device=device) < 0.2
    target = torch.empty_like(teacher)

    def step() -> None:
        student.grad = None
        sum(imitation_loss(student, teacher, mask, 4.0, 16.0)).backward()

    def copies() -> None:  # each reads one map and writes one: five passes over maps in two and a half copies
        target.copy_(teacher)
        target.copy_(teacher)
        target[:2].copy_(teacher[:2])

    took = least(device, rounds, loss=step, traffic=copies)
    print("neck loss forward and backward on P2 of 4 images, ms:", {k: round(v, 2) for k, v in took.items()})
    print(f"  {took['loss'] / took['traffic']:.2f} times its memory traffic")


def scoring(images: int) -> None:
    rng = np.random.default_rng(0)
    truth, found = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 14)):
            (x, y), (w, h), label = rng.random(2) * [500, 350], np.exp(rng.random(2) * 5), int(rng.integers(1, 81))
            box = [float(x), float(y), float(w), float(h)]
            entry = {"image_id": image, "category_id": label, "bbox": box, "area": float(w * h), "iscrowd": 0}
            truth.append({"id": len(truth) + 1, **entry})
        for number in range(100):
            near = truth[-1 - number % 14]["bbox"] if len(truth) > 14 else [0.0, 0.0, 9.0, 9.0]
            moved = [value + float(rng.normal()) for value in near]
            found.append(
                {"image_id": image, "category_id": int(rng.integers(1, 81)), "bbox": moved, "score": rng.random()}
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image, "width": 640, "height": 480} for image in range(1, images + 1)],
        "categories": [{"id": label, "name": str(label)} for label in range(1, 81)],
        "annotations": truth,
    }
    coco.createIndex()
    results, faster = coco.loadRes(found), scorers.faster_kind()
    for name, kind in (("pycocotools", None), *([("faster-coco-eval", faster)] if faster else [])):
        scorers.faster_kind = lambda kind=kind: kind
        watch = Stopwatch(torch.device("cpu"))
        with watch.timing(name):
            scored = scorers.score(coco, results, range(1, images + 1))
        print(f"scoring {images} images x 100 detections, {name}: {watch.seconds[name][0]:.2f} s, AP {scored.stats[0]}")


def jpeg(rounds: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

    def pillow() -> np.ndarray:
        return np.asarray(Image.open(buffer).convert("RGB"))

    def torchvision() -> torch.Tensor:
        return decode_image(content, ImageReadMode.RGB)

    took = least(torch.device("cpu"), rounds, pillow=pillow, torchvision=torchvision)
    same = np.array_equal(pillow(), torchvision().permute(1, 2, 0).numpy())
    print("JPEG 640 x 480, ms:", {k: round(v, 2) for k, v in took.items()}, "same pixels:", same)


def regions_at_once(device: torch.device, rounds: int) -> None:
    """Pooling and head over a detector's own and as many other regions, forward and backward: in two passes, in one."""
    recipe = recipes.load("faster_rcnn_r50_from_r101_coco", {"student.backbone_weights": None})
    student = build_student(recipe, [f"class {number}" for number in range(80)]).to(device).train()
    heads, side, images, each = student.model.roi_heads, 320, 2, 512
    generator = torch.Generator().manual_seed(0)
    starts, sides = (torch.rand(2, images, each, 2, generator=generator) * side for _ in range(2))
    own, others = (list(both) for both in torch.cat([starts / 2, starts / 2 + sides / 4 + 8], dim=3).to(device))
    maps = [torch.randn(images, 256, side // s, side // s, device=device, requires_grad=True) for s in STRIDES]
    sizes, named = [(side, side)] * images, student._named(maps)

    def features(boxes: list[torch.Tensor]) -> torch.Tensor:
        return heads.box_head(heads.box_roi_pool(named, boxes, sizes))

    def backward(mine: torch.Tensor, theirs: torch.Tensor) -> None:
        student.zero_grad()
        logits, deltas = heads.box_predictor(mine)
        (logits.sum() + deltas.sum() + heads.box_predictor.cls_score(theirs).sum()).backward()

    def one_pass() -> None:
        both = features([torch.cat(pair) for pair in zip(own, others, strict=True)]).view(images, 2, each, -1)
        backward(both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1))

    took = least(device, rounds, two=lambda: backward(features(own), features(others)), one=one_pass)
    print("head of R50 on 2 x 512 regions of 2 images, 320 px, in two passes and in one, ms:", took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=int, default=500, help="That are scored.")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(machine(device))
    masks(device, options.rounds)
    regions_at_once(device, min(options.rounds, 3) if device.type == "cpu" else options.rounds)
    neck_loss(device, min(options.rounds, 5) if device.type == "cpu" else options.rounds)
    scoring(options.images)
    jpeg(options.rounds)


if __name__ == "__main__":
    main()
