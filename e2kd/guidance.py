"""Model guidance: training a network to look at the objects, with their masks or boxes.

For teachers whose explanations are worth imitating. After *Studying How to Efficiently and Effectively Guide Models
with Explanations* (Rao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.images import is_bcos
from e2kd.classes import Chosen, choose
from e2kd.errors import check_weight, shape
from e2kd.explainers import BcosContributions, Explainer, GradCAM
from e2kd.forward import Forward
from e2kd.guards import check_explainers, check_grid, check_module, check_not_empty, check_task, is_teaching
from e2kd.localization import on_grid
from e2kd.modes import unwrap
from e2kd.objects import Boxes, box_masks
from e2kd.outputs import logits_of
from e2kd.showing import shown
from e2kd.similarity import at_least_float32, check_each, is_zero
from e2kd.student import StudentExplainer
from e2kd.tasks import IGNORED, remove_hooks, reported, task_loss
from e2kd.taught import labels_of

Localization = Callable[[Tensor, Tensor], Tensor]


def energy_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Energy loss (Rao et al. 2023): 1 - share of a map's positive energy inside the mask, in [0, 1].

    Raises the energy pointing game, and leaves the network free to look at a part of the object alone.

    Args:
        maps: [B, 1, h, w]; brought to the masks' size bilinearly. Only positive values count.
        masks: of the object, [B, H, W], bool or in [0, 1].

    Returns:
        [B]; 1 with no gradient for a map without positive values.

    Raises:
        ValueError: when the shapes don't fit.

    >>> energy_loss(torch.ones(1, 1, 2, 2), torch.tensor([[[True, False], [False, False]]]))
    tensor([0.7500])
    """
    energy = on_grid(maps, masks)
    total = energy.sum((1, 2))
    return 1 - (energy * masks.to(energy)).sum((1, 2)) / torch.where(total > 0, total, torch.ones_like(total))


def l1_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """L1 loss (Rao et al. 2023): mean distance of a map, its peak at 1, from the mask, in [0, 1].

    Raises intersection over union: the map is to fill the whole object, evenly.

    Args:
        maps: [B, 1, h, w]; positive values over the largest, brought to the masks' size bilinearly.
        masks: of the object, [B, H, W], bool or in [0, 1].

    Returns:
        [B]; the mask's mean, with no gradient, for a map without positive values.

    Raises:
        ValueError: when the shapes don't fit.

    >>> l1_loss(torch.tensor([[[[4., 2.], [-9., 0.]]]]), torch.tensor([[[True, True], [False, False]]]))
    tensor([0.1250])
    """
    maps = at_least_float32(maps).relu()
    peak = maps.flatten(1).amax(1)[:, None, None, None]
    return (
        (on_grid(maps / torch.where(peak > 0, peak, torch.ones_like(peak)), masks) - masks.to(maps)).abs().mean((1, 2))
    )


class GuidanceLoss(nn.Module):
    """A criterion with a loss on the network's own explanations: criterion(outputs, targets) + weight * mean(loss).

    Called with masks behind the targets: `loss = criterion(model(images), targets, masks)`. The explanation is that of
    the trainer's own forward, read by hooks as `E2KDLoss` reads the student's. The label's class is explained; for
    multi-hot targets every positive class, with equal weights. In eval mode, under `no_grad` or without masks it
    returns the criterion's loss.

    `.parts` holds detached scalars of the last training call, if it was guided: loss, task, guidance, and zero_maps
    (samples whose maps are zero, which are not guided).

    Args:
        model: being trained.
        criterion: (outputs, targets) -> []; one of e2kd's as well.
        loss: (maps [B, 1, h, w], masks [B, H, W]) -> [B], such as `energy_loss` and `l1_loss`.
        weight: of the guidance, per sample; the paper's code sums over the batch.
        explainer: None is `GradCAM()`, or `BcosContributions()` for a B-cos network.
        example: images [B, C, H, W] to find the layer with; None makes noise of a usual size.

    Raises:
        UnsupportedModel: when the model can't be explained; the message says what to do.
        ValueError, TypeError, RuntimeError: for bad settings or input.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    >>> criterion = GuidanceLoss(model, nn.CrossEntropyLoss())
    >>> images, labels, masks = torch.rand(2, 3, 16, 16), torch.tensor([0, 3]), torch.ones(2, 16, 16)
    >>> criterion(model(images), labels, masks).backward()
    >>> sorted(criterion.parts)
    ['guidance', 'loss', 'task', 'zero_maps']
    """

    takes_lessons = True  # as a criterion inside of another: it is given the targets as they came
    part_names = ("task", "guidance", "zero_maps")

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        *,
        loss: Localization = energy_loss,
        weight: float = 1.0,
        explainer: Explainer | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_weight("weight", weight)
        check_module(model, "model", "model, criterion")
        check_task(criterion)
        check_explainers(explainer=explainer)
        self.criterion, self.loss, self.weight = criterion, loss, weight
        self.explainer = explainer or (BcosContributions() if is_bcos(unwrap(model)) else GradCAM())
        self.explained = StudentExplainer(unwrap(model), self.explainer, example)  # no submodule
        self._parts: dict[str, Tensor] = {}

    def extra_repr(self) -> str:
        """The settings."""
        return shown(weight=self.weight, loss=self.loss, explainer=self.explainer)

    @property
    def model(self) -> nn.Module:
        """The network that is trained, without wrappers."""
        return self.explained.student

    @property
    def parts(self) -> dict[str, Tensor]:
        """Detached scalars of the last training call, if it was guided; see the class."""
        return dict(self._parts)

    def remove(self) -> None:
        """Take every hook off the model, those of an e2kd criterion inside too. It can't guide afterwards."""
        self.explained.tap.remove()
        remove_hooks(self.criterion)

    def forward(self, outputs: Any, targets: Any, masks: Tensor | Boxes | None = None) -> Tensor:
        """The loss [] for the model's outputs.

        Args:
            outputs: what the model returned: logits [B, K], or a tuple, dict or ModelOutput with them.
            targets: class indices [B], of which -100 is not guided, or multi-hot [B, K]; for a criterion of e2kd's what
                that takes.
            masks: of the object [B, H, W], or of each class [B, K, H, W], bool or in [0, 1]; or a list with the boxes
                [n, 4] of every image, in pixels (`e2kd.metrics.box_masks`). A sample or class whose mask is empty was
                not annotated, and is not guided.
        """
        logits = logits_of(outputs)
        task = task_loss(self.criterion, outputs, targets, labels_of(targets))
        if masks is None and torch.is_grad_enabled() and self.training and self.model.training:
            self._parts = {}  # those of an earlier batch would be told again by a criterion around this one
        if masks is None or not is_teaching(self, self.model, logits, "model"):
            return task
        check_not_empty(logits)
        forward = self.explained.forward_of(logits)
        if not isinstance(masks, Tensor):
            masks = box_masks(masks, forward.size)
        masks = masks.to(logits.device)
        _check_masks(masks, logits)
        guidance, zero = self._guide(forward, logits, labels_of(targets), masks)
        loss = task + self.weight * guidance
        found = {"task": task, "guidance": guidance, "zero_maps": zero}
        self._parts = reported(self.criterion, found, loss)
        return loss

    def _guide(self, forward: Forward, logits: Tensor, labels: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of the explained classes, and how many samples have a map that is zero."""
        classes, weights = _guided(logits.detach(), labels)
        total = dead = torch.zeros((), device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            view = self.explained.view(forward, logits)
            for chosen, weight in zip(classes.T, weights.T, strict=True):
                maps = view.explain(self.explainer, chosen)
                check_grid(maps, f"model's (at {self.explained.place})")
                mine = masks if masks.ndim == 3 else masks[torch.arange(len(masks), device=masks.device), chosen]
                annotated = mine.flatten(1).any(1)
                counted, mine = weight * annotated, mine.where(annotated[:, None, None], torch.ones_like(mine))
                total, dead = total + counted * self._losses(maps, mine), dead + counted * is_zero(maps)
        return total.mean(), (dead > 0).sum()

    def _losses(self, maps: Tensor, masks: Tensor) -> Tensor:
        found = self.loss(maps, masks)
        check_each(found, maps, "loss", "the map")
        return found


def _guided(logits: Tensor, labels: Tensor) -> Chosen:
    """The classes to look at, with their weights; none of a label that counts for nothing."""
    if labels.ndim == 1:
        known = labels != IGNORED
        classes, weights = choose("labels", logits, labels.where(known, torch.zeros_like(labels)))
        return classes, weights * known[:, None]
    if labels.device.type == "cpu" and not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            "Expected targets as class indices or multi-hot, 0 or 1 for each class, but some are between: guidance "
            "needs to know which objects are there. Guide batches that are not mixed, with hard labels."
        )
    return choose("positives", logits, labels)


def _check_masks(masks: Tensor, logits: Tensor) -> None:
    if masks.shape[:-2] not in (logits.shape[:1], logits.shape):
        batch, classes = logits.shape
        raise ValueError(
            f"Expected masks of the batch's objects, [{batch}, H, W], or of each class, [{batch}, {classes}, H, W], "
            f"but got {shape(masks.shape)}."
        )
