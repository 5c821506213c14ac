"""The numbers of a report: answers, explanations, FSS and RS of every pair of models, and the maps of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from e2kd.answers import answers_of, places_of
from e2kd.choosing import default_explainer, explainers_of
from e2kd.comparing import compare as compare_maps
from e2kd.distance import DistanceSums, Score
from e2kd.errors import taking_images
from e2kd.inspection import Explanation
from e2kd.localization import energy_on_mask, intersection_over_union
from e2kd.outputs import equal, top_classes
from e2kd.report.stages import paired
from e2kd.similarity import cosine
from e2kd.transfer import Models, Reading, Regions, UniCAMResult, read, scores_of, stability, untrained
from e2kd.transfer.contrasting import contrast
from e2kd.transfer.seeing import features_of
from e2kd.transfer.targets import label_features


@dataclass(frozen=True)
class Subject:
    """One network of a report.

    Attributes:
        role: "student", "base" or "teacher".
        name: what people call it.
        model: on its device, in eval mode.
        images: the pictures as it expects them, [n, C, H, W].
        layers: the names of its stages, from early to late.
    """

    role: str
    name: str
    model: nn.Module
    images: Tensor
    layers: list[str]


@dataclass(frozen=True)
class Pictures:
    """What the report shows and asks about.

    Attributes:
        images: [n, 3, H, W] in [0, 1].
        labels: [n], or None if the images have no classes.
        classes: their names.
        embeddings: of the classes, [K, d]; None is one-hot.
        masks: of the objects, [n, H, W], or None.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    embeddings: Tensor | None = None
    masks: Tensor | None = None

    @property
    def targets(self) -> Tensor | None:
        """What stands for the labels, [n, d]."""
        return None if self.labels is None else label_features(self.labels, self.embeddings)


@dataclass(frozen=True)
class Answer:
    """What one network says, each a share in [0, 1] or NaN: accuracy, energy of its maps on the objects, and IoU."""

    accuracy: float
    epg: float
    iou: float
    zero_maps: float


@dataclass(frozen=True)
class LayerScores:
    """What two networks share at a pair of layers.

    Attributes:
        layers: the first's and the second's name.
        scores: of whole images, as `e2kd.transfer.scores_of`; "fss_control" is that of the first with an untrained
            network.
        regions: of the pixels that each model's map keeps; empty if not asked for.
        blank: shares of blank maps, distilled and residual.
        steady: how alike an image's maps are among other companions, distilled and residual; 1 is its own.
    """

    layers: tuple[str, str]
    scores: dict[str, Score]
    regions: dict[str, Score]
    blank: tuple[float, float]
    steady: tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """Two of the networks: how often they say the same, how alike they explain it, and all layers."""

    roles: tuple[str, str]
    agreement: float
    cosine: float
    layers: list[LayerScores]
    maps: UniCAMResult


@dataclass(frozen=True)
class Measured:
    """All numbers of a report. The first pair is the student and the base, or the teacher if there is no base."""

    subjects: list[Subject]
    pictures: Pictures
    answers: dict[str, Answer]
    pairs: list[Pair]
    keep: float
    notes: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Images."""
        return len(self.pictures.images)


def measure(
    subjects: Sequence[Subject],
    pictures: Pictures,
    *,
    regions: Regions | None = None,
    keep: float = 50.0,
    batch_size: int = 32,
    say: Callable[[str], None] = lambda said: None,
) -> Measured:
    """Everything a report shows.

    Args:
        subjects: two or three networks, the student first.
        regions: of the perturbed scores of the first pair; None leaves them out.
        keep: percentage of the pixels kept in them.
        say: told what is being done.
    """
    explained, answers, notes = {}, {}, list[str]()
    for subject in subjects:
        say(f"{subject.role}: answers and explanations")
        with taking_images(subject.role, subject.model, subject.images.shape, "Pass the pictures as it expects them."):
            explained[subject.role] = answers_of(subject.model, subject.images, batch_size=batch_size)
        answers[subject.role] = _answer(subject, explained[subject.role], pictures, batch_size)
        notes += _broken(subject.role, explained[subject.role].logits)
    pairs: list[Pair] = []
    for first, second in combinations(subjects, 2):
        say(f"{first.role} and {second.role}: layers")
        agreement, alike = _alike(first, second, explained, batch_size, notes)
        shown = regions if not pairs else None  # the imputation costs more than everything else
        layers, maps = _layers(first, second, pictures, shown, keep, batch_size)
        pairs.append(Pair((first.role, second.role), agreement, alike, layers, maps))
    return Measured(list(subjects), pictures, answers, pairs, keep, notes)


def _answer(subject: Subject, found: Explanation, pictures: Pictures, batch_size: int) -> Answer:
    nan = float("nan")
    labels, count = pictures.labels, found.logits.shape[1]
    known = labels is not None and count == len(pictures.classes)
    accuracy = _share(equal(top_classes(found.logits).cpu(), labels)) if known and labels is not None else nan
    maps = places_of(subject.model, subject.images, found, None, batch_size).cpu()
    zero = _share(_without_evidence(maps.flatten(1)))
    if pictures.masks is None or not maps.isfinite().all():
        return Answer(accuracy, nan, nan, zero)
    epg, iou = (f(maps, pictures.masks).double().nanmean().item() for f in (energy_on_mask, intersection_over_union))
    return Answer(accuracy, epg, iou, zero)


def _broken(role: str, logits: Tensor) -> list[str]:
    """What to say of logits that are NaN."""
    count = int(logits.isnan().any(1).sum())
    said = f"The {role}'s logits are NaN for {count} of {len(logits)} images: it has no accuracy and no agreement."
    return [said] if count else []


def _without_evidence(maps: Tensor) -> Tensor:
    """1 for maps [n, hw] with nothing above 0, else 0; NaN for those that are not finite."""
    return torch.where(maps.isfinite().all(1), (maps.amax(1) <= 0).double(), torch.nan)


def _share(which: Tensor) -> float:
    return which.double().mean().item()


def _alike(
    first: Subject, second: Subject, explained: dict[str, Explanation], batch_size: int, notes: list[str]
) -> tuple[float, float]:
    """Agreement on the top class, and the mean cosine of both's maps for the second's top class."""
    mine, theirs = explained[first.role], explained[second.role]
    if mine.logits.shape != theirs.logits.shape:
        notes.append(
            f"The {first.role} tells {mine.logits.shape[1]} classes apart and the {second.role} "
            f"{theirs.logits.shape[1]}: their answers are not compared."
        )
        return float("nan"), float("nan")
    own, others = explainers_of(first.model, second.model, None, None)
    again = answers_of(first.model, first.images, theirs.classes, own, batch_size)
    if others != default_explainer(second.model):  # beside a network of the other kind
        theirs = answers_of(second.model, second.images, theirs.classes, others, batch_size)
    values, dead = compare_maps(cosine, again.maps, theirs.maps.to(again.maps.device))
    same = equal(top_classes(mine.logits), top_classes(theirs.logits))
    return _share(same), values[~dead].double().mean().item()


def _layers(
    first: Subject, second: Subject, pictures: Pictures, regions: Regions | None, keep: float, batch_size: int
) -> tuple[list[LayerScores], UniCAMResult]:
    names = paired(first.layers, second.layers)
    mine = read(first.model, first.images, [a for a, _ in names], batch_size=batch_size)
    other = read(second.model, second.images, [b for _, b in names], batch_size=batch_size)
    control = untrained(first.model)
    base = read(control, first.images, [a for a, _ in names], batch_size=batch_size)
    maps = contrast(mine, other, pictures.targets, None)
    steady = _steady(mine, other, pictures)
    shown = {}
    if regions is not None:
        models = Models(first.model, second.model, (first.images, second.images), (mine, other), pictures.targets)
        shown = features_of(models, regions, keep=keep, batch_size=batch_size)
    found = []
    for index, (name, layer) in enumerate(maps.layers.items()):
        sums = DistanceSums.of_distances(student=mine.layers[index].distances, control=base.layers[index].distances)
        scores = scores_of(layer.sums) | {"fss_control": sums.score("student", "control")}
        blank = (_share(layer.distilled.blank), _share(layer.residual.blank))
        regional = scores_of(shown[name].sums) if name in shown else {}
        found.append(LayerScores(names[index], scores, regional, blank, steady[name]))
    return found, maps


def _steady(mine: Reading, other: Reading, pictures: Pictures) -> dict[str, tuple[float, float]]:
    """Mean stability of the maps that are not blank, by layer."""
    found = stability(mine, other, pictures.targets)
    return {name: (each.distilled.nanmean().item(), each.residual.nanmean().item()) for name, each in found.items()}
