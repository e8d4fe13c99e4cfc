"""`defeat report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defeat_cli.commands.options import DataOption, DeviceOption, QuietOption, TeacherOption, overrides
from defeat_cli.console import console


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: DataOption = None,
    teacher: TeacherOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write report.html, detections.png and model_card.md of a run again; --data, --teacher: where these are now."""
    from defeat_cli.jobs import reporting

    changes = overrides(None, data__path=data, teacher__checkpoint=teacher, run__device=device)
    for file in reporting.report(folder, changes, quiet):
        console.print(f"written: {file}", soft_wrap=True, markup=False)
