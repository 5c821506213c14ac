"""What is measured on a trained net: accuracies, agreement with the teacher, and where its maps lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import e2kd
from e2kd.demo.data import Scenes
from e2kd.localization import energy_on_mask

CHUNK = 500  # images per forward


class Scores(NamedTuple):
    """Shares in [0, 1] unless said otherwise; `nan` where a measure does not apply.

    id_accuracy: on images whose texture equals the label. ood_accuracy: on images whose texture contradicts it.
    ood_agreement: out-of-distribution images on which the net's top class is the teacher's (1 for the teacher).
    worst_group_accuracy: the lowest accuracy among the four groups class x texture of both test sets.
    epg: mean share of a map's energy on the digit, out of distribution, the map explaining the net's own top class.
    epg_teacher_class: the same, the map explaining the teacher's top class.
    zero_maps, zero_maps_teacher_class: images left out of these two means because nothing speaks for the class.
    """

    id_accuracy: float
    ood_accuracy: float
    ood_agreement: float
    worst_group_accuracy: float
    epg: float
    epg_teacher_class: float
    zero_maps: int
    zero_maps_teacher_class: int


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The model's top classes [N] on images [N, 3, h, w]."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(CHUNK)])


def maps_of(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """GradCAM maps [N, 1, h, w] of the classes [N]."""
    parts = zip(images.split(CHUNK), classes.split(CHUNK), strict=True)
    return torch.cat([e2kd.explain(model, image, classes=chosen).maps for image, chosen in parts])


def share(correct: Tensor) -> float:
    """Mean of a boolean tensor [N].

    >>> share(torch.tensor([True, False, True, True]))
    0.75
    """
    return correct.double().mean().item()


def mean_and_missing(values: Tensor) -> tuple[float, int]:
    """Mean of the values that are not nan, and how many are.

    >>> mean_and_missing(torch.tensor([0.25, float("nan"), 0.75]))
    (0.5, 1)
    """
    return values.double().nanmean().item(), int(values.isnan().sum())


def worst_group(correct: Tensor, labels: Tensor, textures: Tensor) -> float:
    """Lowest accuracy among the groups class x texture that occur; all [N].

    >>> worst_group(torch.tensor([True, True, False, True]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 0]))
    0.5
    """
    groups = torch.stack([labels, textures], 1)
    return min(share(correct[(groups == group).all(1)]) for group in groups.unique(dim=0))


def evaluate(model: nn.Module, aligned: Scenes, reversed_: Scenes, teacher_classes: Tensor) -> Scores:
    """Scores of a net on both test sets; `teacher_classes` [N] are the teacher's on the reversed one."""
    own_aligned, own = predictions(model, aligned.images), predictions(model, reversed_.images)
    correct_id, correct_ood = own_aligned == aligned.labels, own == reversed_.labels
    labels, textures = torch.cat([aligned.labels, reversed_.labels]), torch.cat([aligned.textures, reversed_.textures])
    epg, zeros = _epg(model, reversed_, own)
    epg_teacher, zeros_teacher = _epg(model, reversed_, teacher_classes)
    return Scores(
        id_accuracy=share(correct_id),
        ood_accuracy=share(correct_ood),
        ood_agreement=share(own == teacher_classes),
        worst_group_accuracy=worst_group(torch.cat([correct_id, correct_ood]), labels, textures),
        epg=epg,
        epg_teacher_class=epg_teacher,
        zero_maps=zeros,
        zero_maps_teacher_class=zeros_teacher,
    )


def _epg(model: nn.Module, scenes: Scenes, classes: Tensor) -> tuple[float, int]:
    return mean_and_missing(energy_on_mask(maps_of(model, scenes.images, classes), scenes.masks))
