"""Trackers that show a run elsewhere while it trains: TensorBoard, Weights & Biases, MLflow. A class each."""

from defeat_cli.tracking.following import TRACKERS, Tracking, require_trackers, tracked

__all__ = ["TRACKERS", "Tracking", "require_trackers", "tracked"]
