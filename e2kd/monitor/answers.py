"""What a model says of the probe and where it looks, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2kd.comparing import compare
from e2kd.explainers import Explainer
from e2kd.inspection import explain
from e2kd.localization import energy_on_mask
from e2kd.similarity import cosine


@dataclass(frozen=True)
class Answers:
    """Logits [n, K] of a model, and its maps [n, 1, h, w] for the classes that were asked about."""

    logits: Tensor
    maps: Tensor

    @property
    def classes(self) -> Tensor:
        """The top classes, [n]."""
        return self.logits.argmax(1)


def answers_of(
    model: nn.Module, images: Tensor, classes: Tensor | None, explainer: Explainer | None, batch_size: int | None
) -> Answers:
    """A model's answers to images [n, C, H, W], explained for given classes [n] or its own top ones."""
    size = batch_size or len(images)
    asked = [None] * len(images.split(size)) if classes is None else list(classes.split(size))
    found = [explain(model, part, c, explainer) for part, c in zip(images.split(size), asked, strict=True)]
    return Answers(torch.cat([part.logits for part in found]), torch.cat([part.maps for part in found]))


def check_classes(student: Tensor, reference: Tensor) -> None:
    """Raise a ValueError unless logits [*, K] tell as many classes apart."""
    if student.shape[1] != reference.shape[1]:
        raise ValueError(
            f"Expected models of the same classes, but the student tells {student.shape[1]} apart and the model it is "
            f"compared with {reference.shape[1]}. Pass one for the same classes as teacher=."
        )


def compared(student: Answers, reference: Answers, masks: Tensor | None) -> dict[str, float]:
    """Agreement on the top class, mean cosine of the maps that are not all zero, and the energy of both on masks."""
    values, dead = compare(cosine, student.maps, reference.maps.to(student.maps.device))
    found = {
        "agreement": _mean((student.classes == reference.classes.to(student.classes.device)).double()),
        "explanation_cosine": _mean(values[~dead]),
        "zero_maps": _mean(dead.double()),
    }
    if masks is not None:
        for name, who in (("epg_student", student), ("epg_reference", reference)):
            maps = who.maps.sum(1, keepdim=True)
            found[name] = energy_on_mask(maps, masks.to(maps.device)).nanmean().item()
    return found


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
