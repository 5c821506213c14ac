"""Where a monitor's numbers and pictures go: the trackers that trainers already have."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

Log = Callable[[dict[str, float], int], None]
LogImages = Callable[[dict[str, Tensor], int], None]
ONE_IMAGE = ("aim", "clearml")  # Accelerate's trackers that take an image [H, W, 3] where others take a list


class Sinks(NamedTuple):
    """The two callables of a monitor, in its order: `TransferMonitor(student, base, probe, *to_tensorboard(writer))`.

    Attributes:
        log: called as log(scalars, step).
        log_images: called as log_images(pictures, step), with pictures [3, H, W] uint8; None where there is no place
            for them.
    """

    log: Log
    log_images: LogImages | None = None


def to_tensorboard(writer: Any) -> Sinks:
    """Into torch's SummaryWriter.

    Args:
        writer: anything with `add_scalar(name, value, step)` and `add_image(name, picture, step)`.

    >>> class Writer:
    ...     def add_scalar(self, name, value, step): print(step, name, value)
    >>> to_tensorboard(Writer()).log({"e2kd/n": 64.0}, 10)
    10 e2kd/n 64.0
    """

    def log(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    def log_images(pictures: dict[str, Tensor], step: int) -> None:
        for name, picture in pictures.items():
            writer.add_image(name, picture, step)

    return Sinks(log, log_images)


def to_accelerate(accelerator: Any) -> Sinks:
    """Into every tracker of an `accelerate.Accelerator`: scalars into all, pictures into those that take images.

    Call it after `init_trackers`. Trackers are asked for when something is logged, so that later ones count too. Those
    that take no images (MLflow, Comet, Trackio, DVCLive) get the scalars alone: `to_folder` keeps the pictures. Log the
    rest of the training with its steps as well: W&B drops what comes with a smaller step than before.

    >>> class Accelerator:
    ...     trackers = []
    ...     def log(self, values, step): print(step, values)
    >>> to_accelerate(Accelerator()).log({"e2kd/n": 64.0}, 10)
    10 {'e2kd/n': 64.0}
    """

    def log(scalars: dict[str, float], step: int) -> None:
        accelerator.log(scalars, step=step)

    def log_images(pictures: dict[str, Tensor], step: int) -> None:
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: _as_taken(tracker.name, p) for name, p in pictures.items()}, step=step)

    return Sinks(log, log_images)


def _as_taken(tracker: str, picture: Tensor) -> Any:
    """A picture [3, H, W] in the form that a tracker of Accelerate's takes."""
    if tracker == "tensorboard":
        return picture[None].numpy()
    array = picture.permute(1, 2, 0).contiguous().numpy()
    return array if tracker in ONE_IMAGE else [array]


def to_folder(folder: str | Path) -> Sinks:
    """Into files: `scalars.csv` with a line (step, name, value) for every number, and PNGs. Needs Pillow for these.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_folder(folder).log({"e2kd/n": 64.0}, 10)
    ...     (Path(folder) / "scalars.csv").read_text().splitlines()
    ['step,name,value', '10,e2kd/n,64.0']
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)

    def log(scalars: dict[str, float], step: int) -> None:
        file = path / "scalars.csv"
        fresh = not file.exists()
        with file.open("a", newline="", encoding="utf-8") as lines:
            writer = csv.writer(lines)
            writer.writerows([("step", "name", "value")] if fresh else [])
            writer.writerows((step, name, value) for name, value in scalars.items())

    def log_images(pictures: dict[str, Tensor], step: int) -> None:
        from PIL import Image

        for name, picture in pictures.items():
            safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
            Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path / f"{safe}-{step:08d}.png")

    return Sinks(log, log_images)


def to_trainer(trainer: Any) -> Sinks:
    """Into the log of a Hugging Face `Trainer`, and with it into its reports. It has no place for pictures.

    >>> from types import SimpleNamespace
    >>> class Trainer:
    ...     control = SimpleNamespace(should_log=False)
    ...     def log(self, logs): print(logs)
    >>> to_trainer(Trainer()).log({"e2kd/n": 64.0}, 10)
    {'e2kd/n': 64.0}
    """

    def log(scalars: dict[str, float], step: int) -> None:
        due = trainer.control.should_log  # a log says that nothing is due any more: the loss of this step would be lost
        trainer.log(dict(scalars))
        trainer.control.should_log = due

    return Sinks(log)


def trainer_callback(monitor: Callable[[int], object]) -> Any:
    """A callback for a Hugging Face `Trainer` that calls the monitor after every optimizer step.

    `trainer.add_callback(trainer_callback(TransferMonitor(student, base, probe, *to_trainer(trainer))))`

    Raises:
        ImportError: without transformers.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError('Trainer is of transformers: pip install "e2kd[transformers]".') from error

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            monitor(state.global_step)

    return Watching()
