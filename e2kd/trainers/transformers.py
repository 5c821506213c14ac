"""Hugging Face's Trainer: `Trainer(compute_loss_func=E2KDLoss(...))`, its log, and batches of a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from e2kd.taught import Taught
from e2kd.trainers.averages import Averages


class E2KDCallback(TrainerCallback):
    """Logs the parts of the trainer's criterion wherever its loss is logged, as `e2kd/kd`, `e2kd/explanation` ...

    They are means over the steps since the last log and over all processes, and reach the log history and every
    integration (TensorBoard, W&B ...) through `Trainer.log`.

    Where batches have no labels, the trainer says nothing of the others that are accumulated for a step, nor divides by
    their number: then the loss is divided here, so that its gradient is that of the mean.

    Args:
        trainer: with an `E2KDLoss`, or a method of `e2kd.baselines`, as its `compute_loss_func`.

    Raises:
        TypeError: for a trainer with another loss.

    In a script: `trainer.add_callback(E2KDCallback(trainer))`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.averages = Averages(trainer.compute_loss_func)
        self.sharing: RemovableHandle | None = None

    def _share(self, criterion: Any, args: Any, kwargs: dict[str, Any], loss: Tensor) -> Tensor:
        """The loss as this batch's share of a step's."""
        divided = getattr(self.trainer, "loss_is_scaled_for_ga", None) is False
        if kwargs.get("num_items_in_batch") is not None or divided or not loss.requires_grad:
            return loss
        batches = self.trainer.args.gradient_accumulation_steps
        return loss / getattr(self.trainer, "current_gradient_accumulation_steps", batches)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **_: Any,
    ) -> None:
        """What `every` and `fraction` go on from after a resume; the criterion is this trainer's until it ends."""
        self.on_train_end()
        self.averages.listen()
        self.sharing = self.averages.criterion.register_forward_hook(self._share, with_kwargs=True)
        batches = len(train_dataloader) if has_length(train_dataloader) else None
        self.averages.resume(calls(state.global_step, args.gradient_accumulation_steps, batches))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The criterion may be another trainer's."""
        self.averages.remove()
        if self.sharing is not None:
            self.sharing.remove()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """All processes come here when the loss is logged; evaluations and the parts themselves have no "loss"."""
        if logs is not None and "loss" in logs:
            parts = {f"e2kd/{name}": value for name, value in self.averages.take().items()}
            if parts:
                self.trainer.log(parts)


def calls(step: int, accumulated: int, batches: int | None) -> int:
    """Batches that were seen in so many steps of the optimizer.

    Args:
        step: of the optimizer.
        accumulated: batches of a step; the last of an epoch has what is left.
        batches: of an epoch; None where it has no end.

    >>> calls(3, 4, 6), calls(3, 4, None)
    (10, 12)
    """
    if batches is None:
        return step * accumulated
    epochs, steps = divmod(step, -(-batches // accumulated))
    return epochs * batches + steps * accumulated


@dataclass(frozen=True)
class FrozenCollator:
    """Batches for a Trainer out of (image, label or `Taught`) pairs, such as those of `FrozenDataset`.

    Training arguments need `remove_unused_columns=False`, as always with collators of one's own.

    Args:
        augment: (images, `Taught`) -> the same, for training batches alone; a `JointAugmentation` for example.

    >>> import torch
    >>> batch = FrozenCollator()([(torch.zeros(3, 8, 8), 1), (torch.zeros(3, 8, 8), 0)])
    >>> batch["pixel_values"].shape, batch["labels"]
    (torch.Size([2, 3, 8, 8]), tensor([1, 0]))
    """

    augment: Callable[[Tensor, Taught], tuple[Tensor, Taught]] | None = None

    def __call__(self, samples: list[tuple[Any, Any]]) -> dict[str, Any]:
        images, labels = default_collate(samples)
        if self.augment is not None and isinstance(labels, Taught):
            images, labels = self.augment(images, labels)
        return {"pixel_values": images, "labels": labels}
