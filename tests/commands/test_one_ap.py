"""One set of weights has one AP, that of plain torchvision fed one image at a time, however images are batched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles.torchvision_alone import evaluate_alone, tiny_model, tiny_settings
from PIL import Image
from torch.utils.data import Subset

from defeat_cli.config import schema as recipes
from defeat_cli.console import Reporter
from defeat_cli.data.opening import open_split
from defeat_cli.detectors.loading import load_detector
from defeat_cli.engine.evaluation import FIGURES, evaluate
from defeat_cli.jobs.validating import score
from defeat_cli.session import assemble

CROPS = [(64, 64), (40, 64), (64, 36), (33, 47), (58, 49)]
"""(height, width) that images are cut to in turn."""


@pytest.fixture(scope="module")
def unlike(tmp_path_factory, shapes) -> Path:
    """The drawn training images, cut to unlike sizes, as training and validation data."""
    folder = tmp_path_factory.mktemp("unlike")
    (folder / "images").mkdir()
    content = json.loads((shapes / "train.json").read_text())
    sizes = {}
    for i, image in enumerate(content["images"]):
        height, width = sizes[image["id"]] = CROPS[i % len(CROPS)]
        picture = Image.open(shapes / "images" / image["file_name"])
        picture.crop((0, 0, width, height)).save(folder / "images" / image["file_name"])
        image |= {"height": height, "width": width}
    kept = []
    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        w, h = min(x + w, width) - x, min(y + h, height) - y
        if w > 4 and h > 4:
            kept.append({**annotation, "bbox": [x, y, w, h], "area": w * h})
    content["annotations"] = kept
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


EPOCHS = {"faster_rcnn": 60, "retinanet": 20, "fcos": 20}


@pytest.mark.parametrize("family", EPOCHS)
def test_weights_have_one_ap_whatever_the_batches(family, defeat, tiny, unlike, tmp_path):
    run, epochs = tmp_path / "run", EPOCHS[family]
    defeat(
        "train", "-r", tiny, "-d", unlike, "-o", run, "-q", *tiny_settings(family), "--set", "data.long_side=96",
        "--set", f"schedule.epochs={epochs}", "--set", f"run.evaluate_every={epochs}",
        "--set", "schedule.decay=cosine", "--set", "optimizer.name=adamw", "--set", "optimizer.lr=5e-3",
    )  # fmt: skip
    results, stats = evaluate_alone(tiny_model(family, max_size=96), run / "student.pth", unlike, "val")
    assert stats[0] > 0.02  # there is something to compare

    trained = json.loads((run / "results.json").read_text())["student"]
    assert [trained[name] for name in FIGURES] == stats
    for checkpoint in ("best.pt", "student.pth"):
        defeat("eval", run / checkpoint, "--json", tmp_path / "figures.json")
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert [figures[name] for name in FIGURES] == stats

    detector = load_detector(str(run / "best.pt")).detector.eval()
    for batch_size in (1, 3, 8):
        session = assemble(recipes.load(str(run / "recipe.yaml"), {"data.batch_size": batch_size}))
        metrics = score(session, detector, Reporter("student", quiet=True))
        assert [metrics[name] for name in FIGURES] == stats
    data = open_split(unlike, "val", train=False)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    for chosen, workers in ((data, 1), (Subset(data, order), 0)):
        found: list[dict] = []
        metrics = evaluate(detector, chosen, workers=workers, keep_detections=found)
        assert [metrics[name] for name in FIGURES] == stats
        found.sort(key=lambda detection: detection["image_id"])
        for key in ("image_id", "category_id", "score"):
            assert [mine[key] for mine in found] == [theirs[key] for theirs in results]
        for mine, theirs in zip(found, results, strict=True):
            assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=1e-4)  # subtracted in another precision

    # It could have been otherwise: padded to the largest of eight, the same images are detected on differently.
    images = [data[i].image for i in range(8)]
    with torch.no_grad():
        together, alone = detector.detect(images), [detector.detect([image])[0] for image in images]
    assert any(not torch.equal(a["scores"], b["scores"]) for a, b in zip(together, alone, strict=True))
