"""What processes that train together do in tests: by name, so that each can import it; see `processes`."""

import os
import signal
import time

import torch
from tiny import batch as make_batch
from tiny import build, distil

from defeat_cli.config import schema as recipes
from defeat_cli.data.loading import BatchOrder
from defeat_cli.data.opening import open_split
from defeat_cli.data.sharing import StepOrder
from defeat_cli.distillation.balance import Balance
from defeat_cli.engine import loop, watch
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.distributed import joined
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.engine.monitor import add, averages
from defeat_cli.engine.step import train_step
from defeat_cli.errors import RunError

OFF = {"neck", "fgd", "crosskd"}
"""Terms that one step leaves out: their adapters have no gradient then."""


def steps(world, family, names):
    """Gradients, weights, averages and balance after three steps of two batches, the last of which has but one."""
    distiller = distil(build(family), build(family, seed=1), names)
    distiller.balance = Balance(names, 2.0)
    recipe = recipes.validate({"run": {"precision": "fp32"}, "optimizer": {"ema": 0.9, "momentum": 0.5}}, "tiny")
    training = begin(recipe, distiller.train(), torch.device("cpu"), world)
    gradients = []
    training.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([None if p.grad is None else p.grad.clone() for p in distiller.parameters()])
    )
    order = StepOrder(BatchOrder([(64, 64 + i) for i in range(9)], 2, seed=1), 2, world.rank, world.size)
    images, targets = make_batch()
    logged = []
    for step, share in enumerate(order.shares):
        batches = []
        for part in share.parts:
            chosen = [i % 3 for _, i in part.keys]
            # An image without annotations goes along with each batch.
            some = [targets[i] for i in chosen]
            batches.append(([images[i] for i in chosen] + images[:1], [*some, None], []))
        strength = {name: None if step == 1 and name in OFF else 0.5 for name in distiller.terms}
        made = train_step(
            training, batches, seed=0, lr=0.01, strength=strength, clip_norm=5.0, autocast=None, measure=step < 2,
            share=share, world=world,
        )  # fmt: skip
        for losses in made.losses:
            add(training, losses)
        logged.append(averages(training, world))
    weights = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    average = [p.clone() for p in training.ema.module.parameters()]
    return logged, gradients, weights, distiller.balance.factors(), average


def scored(world, shapes):
    """The figures and detections of a detector on five validation images."""
    data = open_split(shapes, "val", train=False)
    few = torch.utils.data.Subset(data, [5, 0, 3, 1, 4])
    detector = build("fcos", classes=data.classes, score_threshold=0.0)
    found = []
    return evaluate(detector, few, keep_detections=found, world=world), found


def fault(kind, step):
    """Have the process of rank 1 `die`, `stop`, `fail` or see pixels that are no numbers (`nan`) before a step."""
    make_step = loop.train_step

    def faulty(state, batches, **named):
        if state.step == step and named["world"].rank == 1:
            if kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            if kind == "fail":
                raise RunError("step 3: it cannot go on")
            if kind == "nan":
                batches = [([image * float("nan") for image in images], *rest) for images, *rest in batches]
        return make_step(state, batches, **named)

    loop.train_step = faulty


def hang():
    """Rank 1 hangs in its second step, in which rank 0 waits for it."""
    watch.HANG_SECONDS = 1.0
    with joined() as world:
        world.watch.at(watch.COMPUTED, 1)
        world.watch.at(watch.REST)
        world.wait()
        world.watch.at(watch.LOADING, 2)
        if world.rank == 0:
            world.watch.at(watch.COMPUTED)
            world.wait()
        time.sleep(60)


def save_slowly(world):
    """The main process is busy between steps for longer than a step may take; the other waits in the next one."""
    watch.HANG_SECONDS = 1.0
    world.watch.at(watch.COMPUTED, 1)
    world.watch.at(watch.REST)
    if world.is_main:
        time.sleep(4)
    else:
        world.watch.at(watch.COMPUTED, 2)
    world.wait()
    return True
