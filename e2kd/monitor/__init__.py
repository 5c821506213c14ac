"""Watching the transfer while a student trains: one line in the loop, numbers and pictures in the usual tracker."""

from e2kd.monitor.sinks import Sinks, to_accelerate, to_folder, to_tensorboard, to_trainer, trainer_callback
from e2kd.monitor.watching import TransferMonitor

__all__ = [
    "Sinks",
    "TransferMonitor",
    "to_accelerate",
    "to_folder",
    "to_tensorboard",
    "to_trainer",
    "trainer_callback",
]
