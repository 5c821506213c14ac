"""How a student's answers and explanations compare with another model's, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2kd.answers import answers_of, places_of
from e2kd.comparing import compare
from e2kd.explainers import Explainer
from e2kd.inspection import Explanation
from e2kd.localization import energy_on_mask
from e2kd.outputs import equal, top_classes
from e2kd.similarity import cosine

ALL_ZERO = "all maps are zero in one of the two"
NOT_FINITE = "one of the two has maps that are NaN or infinite"
ITS_MAPS = "its maps are NaN or infinite"
NAN_LOGITS = "one of the two has logits that are NaN"
NO_ENERGY = "every map is zero or its mask is empty"


@dataclass(frozen=True)
class Answers:
    """Logits [n, K] of a model, its maps [n, C, h, w] for the classes that were asked about, and their energy [n] on
    the objects where masks were given."""

    logits: Tensor
    maps: Tensor
    energy: Tensor | None

    @property
    def classes(self) -> Tensor:
        """The top classes, [n]."""
        return self.logits.argmax(1)


def answered(
    model: nn.Module,
    images: Tensor,
    classes: Tensor | None,
    explainer: Explainer,
    masks: Tensor | None,
    batch_size: int | None,
) -> Answers:
    """A model's answers to images [n, C, H, W], explained for given classes [n] or its own top ones."""
    found = answers_of(model, images, classes, explainer, batch_size)
    energy = None if masks is None else _energy(model, images, found, explainer, masks, batch_size)
    return Answers(found.logits, found.maps, energy)


def _energy(
    model: nn.Module, images: Tensor, found: Explanation, explainer: Explainer, masks: Tensor, batch_size: int | None
) -> Tensor:
    places = places_of(model, images, found, explainer, batch_size)
    return energy_on_mask(places, masks.to(places.device))


def check_classes(student: Tensor, reference: Tensor) -> None:
    """Raise a ValueError unless logits [*, K] tell as many classes apart."""
    if student.shape[1] != reference.shape[1]:
        raise ValueError(
            f"Expected models of the same classes, but the student tells {student.shape[1]} apart and the model it is "
            f"compared with {reference.shape[1]}. Pass one for the same classes as teacher=."
        )


def compared(student: Answers, reference: Answers) -> tuple[dict[str, float], dict[str, str]]:
    """Agreement on the top class, mean cosine of the maps that are not all zero, and the energy of both on the objects;
    and why some of these are NaN."""
    values, dead = compare(cosine, student.maps, reference.maps.to(student.maps.device))
    broken = values.isnan() & ~dead
    same = equal(top_classes(student.logits), top_classes(reference.logits))
    found = {
        "agreement": _mean(same),
        "explanation_cosine": _mean(values[~dead]),
        "zero_maps": _mean(torch.where(broken, torch.nan, dead.double())),
    }
    reasons = {"explanation_cosine": ALL_ZERO} if bool(dead.all()) else {}
    reasons |= dict.fromkeys(("explanation_cosine", "zero_maps"), NOT_FINITE) if bool(broken.any()) else {}
    reasons |= {"agreement": NAN_LOGITS} if bool(same.isnan().any()) else {}
    for name, answers in {"epg_student": student, "epg_reference": reference}.items():
        if answers.energy is not None:
            finite = bool(answers.maps.isfinite().all())
            found[name] = answers.energy.nanmean().item() if finite else math.nan
            if math.isnan(found[name]):
                reasons[name] = NO_ENERGY if finite else ITS_MAPS
    return found, reasons


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
