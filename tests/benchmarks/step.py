"""What distilling costs: one distilled step against what it cannot do without, a plain step and a teacher's forward.

    python tests/benchmark_step.py --recipe quickstart --data runs/shapes

All three are timed in turn, step by step, on the same batches, so that a busy machine slows them alike. Not a test:
speed is never asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice

import torch

from defeat_cli.config import schema as recipes
from defeat_cli.config.yaml import parse_assignments
from defeat_cli.data.loading import training_loader
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.step import train_step
from defeat_cli.session import AUTOCAST, assemble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--data")
    parser.add_argument("--teacher")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()

    changes = parse_assignments(options.set)
    changes |= {"data.path": options.data} if options.data else {}
    changes |= {"teacher.checkpoint": options.teacher} if options.teacher else {}
    changes |= {"run.device": options.device, "run.compare_plain": False}
    recipe = recipes.load(options.recipe, changes)
    sessions = [assemble(recipes.load(options.recipe, {**changes, "distillation.only": []})), assemble(recipe)]
    device, teacher = sessions[1].device, sessions[1].teacher
    autocast = AUTOCAST[recipe.run.precision]
    plain, distilled = (begin(recipe, each.distiller, device) for each in sessions)

    def step(training, batch):
        training.distiller.train()
        train_step(
            training, [batch], seed=0, lr=1e-4, strength=1.0, clip_norm=recipe.optimizer.clip_norm, autocast=autocast
        )

    def look(batch):
        images = [image.to(device) for image in batch[0]]
        targets = [{key: value.to(device) for key, value in target.items()} for target in batch[1]]
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            prepared = teacher.prepare(images, targets)
            features = teacher.features(prepared)
            teacher.classify(features, teacher.regions(features, prepared))

    parts = {
        "plain step": lambda batch: step(plain, batch),
        "teacher forward": look,
        "distilled step": lambda batch: step(distilled, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    loader = training_loader(sessions[1].training_data, recipe.data.batch_size, 0, seed=0)
    for i, batch in enumerate(islice(loader, options.steps + 2)):
        for name, run in parts.items():
            began = time.perf_counter()
            run(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 2:  # the first ones warm up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:16} {1000 * value:8.1f} ms")
    floor = medians["plain step"] + medians["teacher forward"]
    print(f"distilled / (plain + teacher forward): {medians['distilled step'] / floor:.2f}")


if __name__ == "__main__":
    main()
