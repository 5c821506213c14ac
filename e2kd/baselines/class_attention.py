"""CAT-KD: class activation maps of all classes (Guo et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.baselines.base import Baseline
from e2kd.baselines.pairs import Batch, Pair
from e2kd.errors import UnsupportedModel
from e2kd.explainers import GradCAM
from e2kd.heads import is_plain_linear
from e2kd.plans import Plan, plan_for
from e2kd.stages import Layers, Stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings

ONE_CELL = (
    "CAT-KD compares class activation maps, but those of {name} have one cell for these images, which says nothing "
    "about where a class is. Use larger images, or a network that keeps more of their size."
)
NO_CAM = (
    "CAT-KD compares class activation maps, which need a network that ends in average pooling and one linear layer. "
    "{name} does not. For any pair of networks there is e²KD: E2KDLoss(student, teacher, ...)."
)
REPLACED = (
    "CAT-KD reads the classifier {layer!r} of {name}, which was replaced or adapted since the criterion was built and "
    "is no plain linear layer now. Build the criterion after the head has its final form, or use E2KDLoss."
)


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """CAMs of all classes: features [B, C, h, w] and a classifier's weight [K, C] -> [B, K, h, w], signed.

    >>> class_activation_maps(torch.ones(1, 2, 3, 3), torch.tensor([[1., 2.]])).unique()
    tensor([3.])
    """
    return F.conv2d(features, weight[:, :, None, None])


class CATKD(Baseline):
    """Class attention transfer (CAT-KD, Guo et al. 2023, Eq. 4 and 5): where the evidence for each class is.

    term = mean((φ(CAM_student) - φ(CAM_teacher))²) over classes and cells, φ averaging to `resolution` cells a side.
    The paper's Eq. 4 divides each map by its length; its authors do so where CAMs are all that is transferred (CAT),
    not in CAT-KD, whose settings for CIFAR-100 are the defaults. For ImageNet they use weight 0.5 and resolution 4.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: β, which "should be tuned": the scale of the CAMs is the network's.
        resolution: of the compared maps.
        normalize: whether maps are brought to unit length.
        settings: see `Baseline`.

    Raises:
        UnsupportedModel: when a network has no class activation maps.

    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = CATKD(student, teacher, nn.CrossEntropyLoss())
    >>> criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    """

    name = "cat"
    reads_weights = True
    shows = ("resolution", "normalize")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 15.0,
        resolution: int = 2,
        normalize: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        plans: list[tuple[nn.Module, Plan]] = []

        def choose(pair: Pair) -> tuple[list[Stage], list[Stage]]:
            plans.extend((side.model, _pooled_plan(side)) for side in (pair.student, pair.teacher))
            return [_stage(pair.student, plans[0][1])], [_stage(pair.teacher, plans[1][1])]

        super().__init__(student, teacher, criterion, weight, choose, **settings)
        self._plans = plans
        self.resolution, self.normalize = resolution, normalize

    def term(self, batch: Batch) -> Tensor:
        """Last features of both networks -> []."""
        mine = self._maps(*self._plans[0], batch.student[0])
        with torch.no_grad():
            theirs = self._maps(*self._plans[1], batch.teacher[0])
        return F.mse_loss(mine, theirs)

    def _maps(self, model: nn.Module, plan: Plan, features: Tensor) -> Tensor:
        assert plan.linear is not None
        if features.shape[2] * features.shape[3] == 1:
            raise UnsupportedModel(ONE_CELL.format(name=type(model).__name__))
        if plan.head is not None:  # which may begin with an activation that is no module
            features = plan.head.prologue(features)
        classifier = model.get_submodule(plan.linear)
        if not is_plain_linear(classifier):
            raise RuntimeError(REPLACED.format(name=type(model).__name__, layer=plan.linear))
        maps = class_activation_maps(features, classifier.weight.to(features.dtype))
        maps = F.adaptive_avg_pool2d(maps, self.resolution)
        return F.normalize(maps.flatten(2), dim=2).view_as(maps) if self.normalize else maps


def _pooled_plan(layers: Layers) -> Plan:
    """How the network is explained, if by the closed form of a pooled linear head."""
    plan = plan_for(layers.model, GradCAM(), layers.images)
    if plan.linear is None or plan.site is None:
        raise UnsupportedModel(NO_CAM.format(name=type(layers.model).__name__))
    return plan


def _stage(layers: Layers, plan: Plan) -> Stage:
    assert plan.site is not None
    return layers.at(plan.site.made_by)
