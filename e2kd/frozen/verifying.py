"""`FrozenTeacher.verify`: is the cache what this teacher says, and does it stay true under augmentation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from e2kd.comparing import compare
from e2kd.explainers import KNOWN, Explainer
from e2kd.frozen.asking import LARGEST, Asked
from e2kd.frozen.fingerprints import hash_weights
from e2kd.frozen.matching import match_rows
from e2kd.frozen.records import Rows
from e2kd.frozen.sources import Source
from e2kd.frozen.teacher import Augmentation, FrozenTeacher, explainer_said
from e2kd.similarity import cosine, is_zero
from e2kd.taught import Taught, all_known

SAME_MAPS = 0.999  # cosine from which a recomputed map is the stored one; 8 bits alone cost 1e-4
SAME_LOGITS = 0.01  # largest difference relative to the logits' spread; another device's rounding stays below
FAITHFUL, USABLE = 0.8, 0.5  # shares of what a map tells about its image that must be left
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
    if rows < 1:
        raise ValueError(f"Expected rows >= 1 to compute again, but got {rows}.")
    matched = match_rows(dataset, frozen, ids, "position")
    source = Source(dataset, frozen.view, matched.names)
    chosen = np.random.default_rng(seed).permutation(len(source))[:rows]
    samples = [source.read(int(i)) for i in chosen]
    images, labels = torch.stack([s.image for s in samples]), [s.label for s in samples]
    stored = frozen.rows(matched.rows[chosen])
    matched.check(np.array([s.id for s in samples], np.uint64), stored.ids, [int(i) for i in chosen])
    asked = _asked(frozen, teacher, images[0], explainer)
    report = Verification(len(chosen))
    if hash_weights(asked.model) != frozen.plan["teacher"]["weights"]:
        report.problems.append(
            f"the teacher has other weights than the one that was frozen ({frozen.plan['teacher']['name']})"
        )
    _compare_rows(report, frozen, asked, images, labels, stored)
    if frozen.explains and len(images) > 1:  # to be rated, a map needs another image's beside it
        for name, augmentation in augmentations.items():
            with torch.random.fork_rng(devices=[]):  # the images are on the CPU, and so is what changes them
                torch.default_generator.manual_seed(seed)
                report.fidelity[name] = _fidelity(asked, augmentation, images, stored)
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
        (LARGEST, LARGEST) if said is None else (said["map_size"][0], said["map_size"][1]),
    )


def _compare_rows(
    report: Verification, frozen: FrozenTeacher, asked: Asked, images: Tensor, labels: list[Any], stored: Rows
) -> None:
    """The rows against the live answers, rounded as the cache rounds them."""
    parts = [asked(images[i : i + CHUNK], labels[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
    logits, classes = (torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "classes"))
    maps = torch.cat([p.maps for p in parts if p.maps is not None]) if frozen.explains else None
    record = frozen.store.record
    if logits.shape[1] != record.num_classes:
        report.problems.append(f"the teacher has {logits.shape[1]} classes, the cache {record.num_classes}")
        return
    live = record.decode(record.encode(logits, maps, classes, stored.ids))
    spread = (live.logits.amax() - live.logits.amin()).clamp_min(1e-6)
    report.logits = float((live.logits - stored.logits).abs().amax() / spread)
    if report.logits > SAME_LOGITS:
        report.problems.append("the live logits differ from the stored ones")
    if maps is not None:
        alike = cosine(stored.maps, live.maps)
        both = is_zero(stored.maps) & is_zero(live.maps)
        same_class = live.classes == stored.classes  # two logits of one value may change places
        report.maps = float(torch.where(both | ~same_class, torch.ones_like(alike), alike).amin())
        if report.maps < SAME_MAPS:
            report.problems.append("the live maps differ from the stored ones")


def _fidelity(asked: Asked, augmentation: Augmentation, images: Tensor, stored: Rows) -> Fidelity:
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
        live = asked.explain(augmented, lesson.classes)
        for found, cached in ((same, moved.maps), (other, wrong.maps)):
            alike, dead = compare(cosine, live, cached, (cached.shape[-2], cached.shape[-1]), moved.valid)
            found.append(alike[~dead])
    return Fidelity(float(torch.cat(same).mean()), float(torch.cat(other).mean()), sum(map(len, same)))


def _check_range(images: Tensor, augmented: Tensor) -> None:
    """Raise when pixels left [0, 1]: then something normalised them, which the teacher does itself."""
    if images.dtype == torch.uint8 and not -0.01 <= float(augmented.min()) <= float(augmented.max()) <= 1.01:
        raise ValueError(
            "Expected augmented images in [0, 1], but they reach from "
            f"{float(augmented.min()):.2f} to {float(augmented.max()):.2f}. Leave Normalize out of augmentations to "
            "verify: the teacher's own normalisation is applied."
        )
