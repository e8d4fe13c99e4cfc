"""One `defeat bench`: what a recipe's training step costs, or what detectors cost as users deploy them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from defeat_cli import session as sessions
from defeat_cli.benchmark.detectors import Cost, compare, drawn_images
from defeat_cli.benchmark.picture import draw_ap_over_latency
from defeat_cli.benchmark.step import BACKWARD, FORWARD, WHOLE, StepCost, measure_step, read_batches
from defeat_cli.benchmark.timing import Spread, machine
from defeat_cli.config.architecture import SIZES
from defeat_cli.config.schema import Recipe
from defeat_cli.console import Reporter, counting, new_table, percent
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.errors import CheckpointError, DataError
from defeat_cli.export.runtime import SUFFIX
from defeat_cli.files import write_json
from defeat_cli.jobs.fitting import batches_of
from defeat_cli.jobs.opening import Opened, open_finder
from defeat_cli.jobs.training import tell
from defeat_cli.precision import AUTOCAST
from defeat_cli.text import counted

MIB = 2**20


@dataclass(frozen=True)
class Bench:
    """What was found: tables to show, and the same as plain values."""

    tables: list[Table]
    facts: dict[str, Any] = field(repr=False)

    def write(self, path: Path | None) -> None:
        """Write the figures as JSON, where a path is given."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.facts)


def bench_step(recipe: Recipe, *, rounds: int, trace: Path | None = None, quiet: bool = False) -> Bench:
    """Measure a recipe's training step and its parts, on its own data. Nothing is trained.

    A teacher that the recipe is to train first stands there with random weights, which cost the same.

    Raises:
        DefeatError: a run of the recipe could not be started.
    """
    reporter = Reporter("bench", quiet)
    session = sessions.assemble(recipe)
    recipe = session.recipe
    tell(session, reporter)
    if session.distiller.cache is not None:
        reporter.note(
            "teacher.cache_gib: its features are found in memory, as of images that were seen before; what they take "
            "there comes on top of the peak memory"
        )
    training = begin(recipe, session.distiller, session.device)
    loader = batches_of(session)
    batches, loaded = read_batches(loader, rounds)
    autocast = AUTOCAST[recipe.run.precision]
    settings = {"clip_norm": recipe.optimizer.clip_norm, "autocast": autocast}
    cost = measure_step(training, batches, rounds, settings=settings, trace=trace)
    ran_on = machine(session.device)
    facts = {
        "machine": ran_on,
        "recipe": recipe.model_dump(),
        "rounds": rounds,
        "images_a_batch": cost.images,
        "pixels": list(session.student.prepare(batches[0][0]).pixels.shape[-2:]),
        "parts_ms": {name.strip(): _figures(spread) for name, spread in cost.parts.items()},
        "necessary_ms": round(cost.necessary, 3),
        "ratio": round(cost.ratio, 4),
        "images_per_second": round(_speed(cost), 2),
        "loader_images_per_second": round(loaded, 2),
        "memory_mib": {name: round(size / MIB, 1) for name, size in asdict(cost.memory).items()},
        "launches_and_waits": cost.counts,
    }
    return Bench([_parts_table(cost, facts), _summary_table(cost, facts)], facts)


def _speed(cost: StepCost) -> float:
    return 1000 * cost.images / cost.parts[WHOLE].median


def _parts_table(cost: StepCost, facts: Mapping[str, Any]) -> Table:
    rows, whole = [], cost.parts[WHOLE].median
    for name, spread in cost.parts.items():
        speed = "" if name in (FORWARD, BACKWARD) else f"{1000 * cost.images / spread.median:.1f}"
        rows.append([name, *_milliseconds(spread), f"{100 * spread.median / whole:.0f}%", speed])
    height, width = facts["pixels"]
    return new_table(
        f"{counted(cost.images, 'image')} of {width}x{height} a step, {counted(facts['rounds'], 'round')}; "
        f"{_spoken(facts['machine'])}",
        ["part, ms", "min", "median", "p95", "share", "images/s"],
        rows,
    )


def _summary_table(cost: StepCost, facts: Mapping[str, Any]) -> Table:
    memory = facts["memory_mib"]
    rows = [
        ["whole step / sum of its necessary parts", f"{cost.ratio:.2f}"],
        ["the loader alone, images/s", f"{facts['loader_images_per_second']:.1f}"],
        ["peak memory of a step, MiB", f"{memory['whole']:.0f}"],
    ]
    if cost.terms:
        rows.append(["… with the terms off, teacher's weights there", f"{memory['without_terms']:.0f}"])
        rows.append(["… of which the teacher's weights", f"{memory['teacher']:.0f}"])
    for name, counts in facts["launches_and_waits"].items():
        rows += [[f"{kind} of the {name}", str(count)] for kind, count in counts.items()]
    return new_table("In sum", ["", "value"], rows)


def bench_detectors(
    checkpoints: Sequence[str],
    changes: Mapping[str, Any],
    *,
    image_size: int | None = None,
    batch_size: int = 8,
    rounds: int,
    picture: Path | None = None,
    quiet: bool = False,
) -> Bench:
    """Compare detectors as users deploy them; with data, on its validation images, and by their AP.

    Args:
        checkpoints: any that `eval` takes, and ONNX files of `defeat export`.
        changes: dotted recipe overrides, for all of them.
        image_size: short and long side that images are resized to; None leaves each detector its own.
        picture: file for a picture of AP over latency.

    Raises:
        DefeatError: a checkpoint, the data or the device cannot be used, or a size cannot be had.
    """
    reporter = Reporter("bench", quiet)
    if picture is not None and "data.path" not in changes:
        raise DataError("--picture: AP is known with --data only; give it too")
    sides = {f"data.{side}" for side in SIZES}
    about_data = [key for key in changes if key.startswith("data.") and key not in sides]
    if about_data and "data.path" not in changes:
        raise DataError(f"--set {about_data[0]}: without effect, as no data is read; add --data FOLDER")
    opened = {name: _open(name, changes, image_size) for name in dict.fromkeys(checkpoints)}
    for name, one in opened.items():
        for note in one.notes:
            reporter.note(note if note.startswith(name) else f"{name}: {note}")
        if one.device.type != next(iter(opened.values())).device.type:
            reporter.warn(f"{name} runs on the {one.device.type}, and the first of them does not")
    data = None
    if "data.path" in changes:
        data = sessions.open_data(next(iter(opened.values())).recipe.data, "val", train=False)
        for one in opened.values():
            data.refuse_vanishing([_sides(one)[0]], _sides(one)[1])
    scores = [_score(name, one, data, quiet) for name, one in opened.items()]
    finders = {name: (one.detector, _images(one, data, batch_size)) for name, one in opened.items()}
    costs = compare(finders, next(iter(opened.values())).device, rounds)
    entries = [
        {**_entry(name, one, cost), "metrics": metrics}
        for (name, one), cost, metrics in zip(opened.items(), costs, scores, strict=True)
    ]
    facts = {
        "machine": machine(next(iter(opened.values())).device),
        "rounds": rounds,
        "batch_size": batch_size,
        "data": changes.get("data.path"),
        "detectors": entries,
    }
    if picture is not None:
        points = [(e["checkpoint"], e["latency_ms"]["median"], e["metrics"]["AP"]) for e in entries]
        draw_ap_over_latency(points, _spoken(facts["machine"]), picture)
    return Bench([_detectors_table(facts)], facts)


def _open(checkpoint: str, changes: Mapping[str, Any], size: int | None) -> Opened:
    if size is None:
        return open_finder(checkpoint, None, changes, "bench")
    if not checkpoint.endswith(SUFFIX):
        sides = {"data.short_side": [size], "data.long_side": size}
        return open_finder(checkpoint, None, {**changes, **sides}, "bench")
    opened = open_finder(checkpoint, None, changes, "bench")
    if _sides(opened) != (size, size):
        short, long = _sides(opened)
        raise CheckpointError(
            f"{checkpoint}: was exported for a short side of {short} and a long side of {long}, which --image-size "
            f"{size} cannot change; leave it out, or export again with --set data.short_side=[{size}] "
            f"--set data.long_side={size}"
        )
    return opened


def _sides(opened: Opened) -> tuple[int, int]:
    """Short and long side that a detector resizes images to."""
    card = getattr(opened.detector, "card", None)
    if card is not None:
        return card.short_side, card.long_side
    transform = opened.detector.model.transform
    return transform.min_size[-1], transform.max_size


def _images(opened: Opened, data: DetectionDataset | None, count: int) -> list[Tensor]:
    """The images of a batch: those of the data, spread over it, or drawn ones of the size that the detector sees."""
    if data is None:
        images = drawn_images(count, *_sides(opened))
    else:
        images = [data[i * len(data) // count][0] for i in range(count)]
    return [image.to(opened.device) for image in images]


def _score(name: str, opened: Opened, data: DetectionDataset | None, quiet: bool) -> dict[str, Any] | None:
    if data is None:
        return None
    workers = sessions.loader_processes(opened.recipe.data.workers)
    with counting(f"evaluating {name}", len(data), quiet) as advance:
        return evaluate(opened.detector, data, workers=workers, on_image=advance)


def _entry(name: str, opened: Opened, cost: Cost) -> dict[str, Any]:
    return {
        "checkpoint": name,
        "device": opened.device.type,
        "short_side": _sides(opened)[0],
        "long_side": _sides(opened)[1],
        "parameters": cost.parameters,
        "gflops": None if cost.gflops is None else round(cost.gflops, 3),
        "memory_mib": None if cost.memory is None else round(cost.memory / MIB, 1),
        "latency_ms": _figures(cost.one),
        "batch_latency_ms": _figures(cost.many),
    }


def _detectors_table(facts: Mapping[str, Any]) -> Table:
    rows = []
    for entry in facts["detectors"]:
        parameters, flops, memory = entry["parameters"], entry["gflops"], entry["memory_mib"]
        row = [
            entry["checkpoint"],
            f"{entry['short_side']}-{entry['long_side']}",
            "-" if parameters is None else f"{parameters / 1e6:.2f}",
            "-" if flops is None else f"{flops:.2f}",
            "-" if memory is None else f"{memory:.0f}",
            *(f"{entry['latency_ms'][name]:.1f}" for name in ("min", "median", "p95")),
            f"{entry['batch_latency_ms']['median'] / facts['batch_size']:.1f}",
        ]
        rows.append(row + ([percent(entry["metrics"]["AP"])] if entry["metrics"] else []))
    scored = ["AP"] if facts["data"] is not None else []
    return new_table(
        f"ms an image; images of {facts['data'] or 'blotches'}, {facts['rounds']} rounds; {_spoken(facts['machine'])}",
        ["", "sides", "M par.", "GFLOPs", "MiB", "min", "median", "p95", f"in {facts['batch_size']}", *scored],
        rows,
    )


def _figures(spread: Spread) -> dict[str, float]:
    return {"min": round(spread.least, 3), "median": round(spread.median, 3), "p95": round(spread.p95, 3)}


def _milliseconds(spread: Spread) -> list[str]:
    return [f"{value:.1f}" for value in (spread.least, spread.median, spread.p95)]


def _spoken(ran_on: Mapping[str, Any]) -> str:
    threads = f", threads: {ran_on['threads']}" if ran_on["device"] == "cpu" else ""
    return f"{ran_on['name']}{threads}, torch {ran_on['torch']}"
