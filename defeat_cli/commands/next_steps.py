"""What to do next, for someone who typed `defeat`, or `defeat train`, and nothing else."""

STEPS = (
    ("try it, no data", "defeat train --recipe quickstart"),
    ("make a teacher", "defeat train --data FOLDER --output runs/teacher"),
    ("make its student", "defeat train --data FOLDER --teacher runs/teacher/best.pt"),
    ("write a recipe", "defeat init FOLDER"),
    ("see all commands", "defeat --help"),
)


def next_steps() -> str:
    """The steps, one a line."""
    return "\n".join(f"  {what + ':':18} {command}" for what, command in STEPS)
