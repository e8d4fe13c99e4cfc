"""MLflow: on the server of MLFLOW_TRACKING_URI, else where MLflow itself keeps runs by default."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

EXPERIMENT = "defeat"
PARAMETERS_A_CALL = 100
"""As many as MLflow takes at once."""


class MLflow:
    """See `following.Tracker`. An id holds the place too, so that a run is found again from another folder."""

    package = "mlflow"

    def __init__(self, folder: Path, name: str, recipe: Mapping[str, Any], id: str | None) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells of its data base
        self.kind = Metric
        self.run_id, _, place = (id or "").partition(" ")
        place = place or get_tracking_uri()
        self.client = MlflowClient(place)
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self.client.get_experiment_by_name(experiment)
            place_of = found.experiment_id if found else self.client.create_experiment(experiment)
            self.run_id = self.client.create_run(place_of, run_name=name).info.run_id
            parameters = [Param(key, str(value)) for key, value in flat(recipe)]
            for i in range(0, len(parameters), PARAMETERS_A_CALL):
                self.client.log_batch(self.run_id, params=parameters[i : i + PARAMETERS_A_CALL])
        self.id = f"{self.run_id} {place}"

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self.kind(allowed(name), value, now, step) for name, value in scalars.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        for title, picture in pictures.items():
            self.client.log_image(self.run_id, picture, key=allowed(title), step=step)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def allowed(name: str) -> str:
    """A name with nothing in it that MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by their dotted names."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
