"""`FrozenTeacher.verify`: is the cache what this teacher says, and does it stay true under augmentation?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from e2kd.choosing import KNOWN
from e2kd.comparing import compare_each
from e2kd.explainers import Explainer
from e2kd.frozen.asking import LARGEST_MAP, Asked
from e2kd.frozen.fingerprints import hash_weights
from e2kd.frozen.matching import check_looks, match_rows
from e2kd.frozen.planning import explainer_said
from e2kd.frozen.records import Rows
from e2kd.frozen.sources import Source
from e2kd.guards import check_explainers
from e2kd.similarity import cosine
from e2kd.taught import Taught, all_known

if TYPE_CHECKING:
    from e2kd.frozen.teacher import FrozenTeacher

Augmentation = Callable[[Tensor, Taught], tuple[Tensor, Taught]]

SAME_MAPS = 0.999  # cosine from which a recomputed map is the stored one; 8 bits alone cost 1e-4
SAME_LOGITS = 0.01  # largest difference relative to the logits' spread; another device's rounding stays below
FAITHFUL, USABLE = 0.8, 0.5  # shares of what a map tells about its image that must be left
NOTHING = 1e-4  # of the strongest map of an image: weaker ones are rounding
CHUNK = 16  # images that are augmented and explained at once


@dataclass(frozen=True)
class Fidelity:
    """How well cached maps follow one augmentation: mean cosines with the live teacher's maps of augmented images.

    Attributes:
        same: of an image's own cached map, augmented with it.
        other: of another image's, augmented likewise: what a map is worth that knows nothing of its image.
        images: how many could be compared.
    """

    same: float
    other: float
    images: int

    @property
    def kept(self) -> float:
        """Share in (-inf, 1] of the way from a stranger's map to the live one: (same - other) / (1 - other)."""
        return (self.same - self.other) / max(1 - self.other, 1e-6)

    @property
    def verdict(self) -> str:
        """ "faithful", "usable" or "misleading".

        >>> Fidelity(same=0.97, other=0.6, images=64).verdict
        'faithful'
        """
        if self.kept >= FAITHFUL:
            return "faithful"
        return "usable" if self.kept >= USABLE else "misleading"


@dataclass
class Verification:
    """The result of `verify`; print it. `ok` is whether the rows are what the teacher says."""

    rows: int
    logits: float = float("nan")
    maps: float = float("nan")
    problems: list[str] = field(default_factory=list)
    fidelity: dict[str, Fidelity] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the cache agrees with the teacher."""
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"rows       {self.rows} recomputed by the live teacher",
            f"logits     largest difference {self.logits:.1e} of their spread",
            f"maps       lowest cosine {self.maps:.5f}",
        ]
        if self.fidelity:
            lines.append(f"{'augmentation':24}{'own map':>9}{'another':>9}{'kept':>7}  verdict")
        for name, found in self.fidelity.items():
            lines.append(f"{name:24}{found.same:>9.3f}{found.other:>9.3f}{found.kept:>7.0%}  {found.verdict}")
        lines += [f"PROBLEM    {problem}" for problem in self.problems]
        lines += ["ok         the cache is what the teacher says"] * self.ok
        return "\n".join(lines)


def verification(
    frozen: FrozenTeacher,
    teacher: nn.Module,
    dataset: Any,
    *,
    rows: int,
    seed: int,
    augmentations: Mapping[str, Augmentation],
    ids: Sequence[str] | None,
    explainer: Explainer | None,
) -> Verification:
    """See `FrozenTeacher.verify`."""
    check_explainers(explainer=explainer)
    if rows < 1:
        raise ValueError(f"Expected rows >= 1 to compute again, but got {rows}.")
    matched = match_rows(dataset, frozen, ids, "position")
    source = Source(dataset, frozen.view, matched.names)
    chosen = np.random.default_rng(seed).permutation(len(source))[:rows]
    samples = [source.read(int(i)) for i in chosen]
    images, labels = torch.stack([s.image for s in samples]), [s.label for s in samples]
    stored = frozen.rows(matched.rows[chosen])
    matched.check(np.array([s.id for s in samples], np.uint64), stored.ids, chosen.tolist())
    check_looks([s.image for s in samples], stored.looks, chosen.tolist(), dataset)
    asked = _asked(frozen, teacher, images[0], explainer)
    report = Verification(len(chosen))
    if hash_weights(asked.model) != frozen.plan["teacher"]["weights"]:
        report.problems.append(
            f"the teacher has other weights than the one that was frozen ({frozen.plan['teacher']['name']})"
        )
    comparable = _compare_rows(report, frozen, asked, images, labels, stored)
    if comparable and frozen.explains and len(images) > 1:  # to be rated, a map needs another image's beside it
        for name, augmentation in augmentations.items():
            with torch.random.fork_rng(devices=[]):  # the images are on the CPU, and so is what changes them
                torch.default_generator.manual_seed(seed)
                report.fidelity[name] = _fidelity(frozen, asked, augmentation, images, stored)
    return report


def _asked(frozen: FrozenTeacher, model: nn.Module, example: Tensor, explainer: Explainer | None) -> Asked:
    """The live teacher, asked as it was when it was frozen."""
    teacher, said = frozen.plan["teacher"], frozen.plan["explainer"]
    if said is not None and explainer is None:
        if said["name"] not in KNOWN:
            raise ValueError(f"The maps were made by {said['name']}. Pass it as explainer= to verify.")
        explainer = explainer_said(said)
    normalization = teacher["normalization"]
    return Asked(
        model,
        example,
        None if said is None else explainer,
        frozen.choice,
        None if normalization is None else (normalization[0], normalization[1]),
        None if teacher["size"] is None else (teacher["size"][0], teacher["size"][1]),
        (LARGEST_MAP, LARGEST_MAP) if said is None else (said["map_size"][0], said["map_size"][1]),
    )


def _compare_rows(
    report: Verification, frozen: FrozenTeacher, asked: Asked, images: Tensor, labels: list[Any], stored: Rows
) -> bool:
    """The rows against the live answers; whether these are of the same classes."""
    parts = [asked(images[i : i + CHUNK], labels[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
    logits, classes = (torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "classes"))
    record = frozen.store.record
    if logits.shape[1] != record.num_classes:
        report.problems.append(f"the teacher has {logits.shape[1]} classes, the cache {record.num_classes}")
        return False
    report.logits = _logits_apart(logits, stored.logits, record.top)
    if not report.logits <= SAME_LOGITS:
        report.problems.append("the live logits differ from the stored ones")
    if frozen.choice == "labels" and not torch.equal(classes, stored.classes):
        changed = int((classes != stored.classes).sum())
        report.problems.append(f"{changed} of {len(images)} labels are others than those that the maps explain")
    if frozen.explains:
        maps = torch.cat([p.maps for p in parts if p.maps is not None])
        same_class = torch.ones_like(classes) if frozen.choice == "all" else classes == stored.classes
        report.maps = _maps_alike(_each(maps, frozen), _each(stored.maps, frozen), same_class.bool())
        if report.maps < SAME_MAPS:
            report.problems.append("the live maps differ from the stored ones")
    return True


def _logits_apart(live: Tensor, stored: Tensor, top: int | None) -> float:
    """The largest difference of logits [B, K] relative to their spread; those that were not stored count as one."""
    spread = (live.amax() - live.amin()).clamp_min(1e-6)
    apart = live.half().float() - stored
    if top is not None:
        kept = stored.topk(top, 1).indices  # the others were given the mean of their probabilities
        others = [torch.logsumexp(t.scatter(1, kept, -torch.inf), 1) for t in (live, stored)]
        apart = torch.cat([apart.gather(1, kept), (others[0] - others[1])[:, None]], 1)
    return float(apart.abs().amax() / spread)


def _each(maps: Tensor, frozen: FrozenTeacher) -> Tensor:
    """The maps of each class that a row has, [B, n, C, h, w]."""
    each: Tensor = maps.unflatten(1, (frozen.num_classes if frozen.choice == "all" else 1, -1))
    return each


def _maps_alike(live: Tensor, stored: Tensor, which: Tensor) -> float:
    """The lowest cosine of maps [B, n, C, h, w] of some rows; nan if there are none.

    Maps that are zero in both are alike; so are those far below the strongest of their row, which are rounding.
    """
    alike = cosine(stored.flatten(0, 1), live.flatten(0, 1)).unflatten(0, live.shape[:2])
    strength = torch.maximum(live.flatten(2).norm(dim=2), stored.flatten(2).norm(dim=2))
    nothing = strength <= NOTHING * strength.amax(1, keepdim=True)
    found = torch.where(nothing, torch.ones_like(alike), alike)[which]  # two logits of one value may change places
    return float(found.amin()) if len(found) else float("nan")


def _fidelity(
    frozen: FrozenTeacher, asked: Asked, augmentation: Augmentation, images: Tensor, stored: Rows
) -> Fidelity:
    same: list[Tensor] = []
    other: list[Tensor] = []
    for part in torch.arange(len(images)).split(CHUNK):
        if len(part) < 2:  # the last image has no other beside it
            continue
        maps = stored.maps[part]
        lesson = Taught(part, stored.logits[part], maps, all_known(maps), stored.classes[part])
        strangers = lesson._replace(maps=maps.roll(1, 0))
        state = torch.get_rng_state()
        augmented, moved = augmentation(images[part], lesson)
        _check_range(images, augmented)
        torch.set_rng_state(state)
        _, wrong = augmentation(images[part], strangers)
        live = _each(asked.explain(augmented, lesson.classes), frozen)
        for found, cached in ((same, moved.maps), (other, wrong.maps)):
            size = (cached.shape[-2], cached.shape[-1])
            found.append(_mean_alike(*compare_each(cosine, live, _each(cached, frozen), size, moved.valid)))
    return Fidelity(float(torch.cat(same).mean()), float(torch.cat(other).mean()), sum(map(len, same)))


def _mean_alike(alike: Tensor, dead: Tensor) -> Tensor:
    """The mean over the classes of each image [B, n] that have a map, for the images that have any."""
    alive = (~dead).sum(1)
    return ((alike * ~dead).sum(1) / alive)[alive > 0]


def _check_range(images: Tensor, augmented: Tensor) -> None:
    """Raise when pixels left [0, 1]: then something normalised them, which the teacher does itself."""
    if images.dtype == torch.uint8 and not -0.01 <= float(augmented.min()) <= float(augmented.max()) <= 1.01:
        raise ValueError(
            "Expected augmented images in [0, 1], but they reach from "
            f"{float(augmented.min()):.2f} to {float(augmented.max()):.2f}. Leave Normalize out of augmentations to "
            "verify: the teacher's own normalisation is applied."
        )
