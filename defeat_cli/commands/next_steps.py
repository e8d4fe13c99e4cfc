"""What to do next, for someone who typed `defeat`, or `defeat train`, and nothing else."""

STEPS = (
    ("to try it, no data needed", "defeat train --recipe quickstart"),
    ("a teacher for your images", "defeat train --data FOLDER --output runs/teacher"),
    ("a small student of it", "defeat train --data FOLDER --teacher runs/teacher/best.pt"),
    ("a recipe file to change", "defeat init FOLDER"),
    ("all there is", "defeat --help"),
)


def next_steps() -> str:
    """The steps, one a line."""
    return "\n".join(f"  {what + ':':27} {command}" for what, command in STEPS)
