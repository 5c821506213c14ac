"""Which row of a cache belongs to which sample of a data set, and what is wrong where they don't match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from e2kd.frozen.looks import ALLOWED, Looks, apart, apart_from, looks_of
from e2kd.frozen.samples import class_names_of, hashes_of, names_of, transformed
from e2kd.frozen.sources import READ_AGAIN, Sample, Source, spread

if TYPE_CHECKING:
    from e2kd.frozen.teacher import FrozenTeacher

MATCHES = ("position", "id")
ANOTHER_TRANSFORM = (
    "The data set {now}, but it {then} when it was frozen, so the maps would not fit the images. Give FrozenDataset "
    "the data set as it was, and what is to augment it as transform=; or freeze it again as it is now."
)
ANOTHER_PICTURE = (
    "Sample {place}{name} has the name of one that was frozen but does not look like it: pixels differ by {apart:.2f} "
    f"in the mean (range 0 to 1, allowed: {ALLOWED}). If the data set has a transform, take it off and give it to "
    "FrozenDataset, transform=, or use JointAugmentation: maps must follow it. If its images were replaced, or are "
    "those of another data set with the same names, freeze it as it is now, into another folder."
)


@dataclass(frozen=True)
class Matched:
    """Rows [N] of a cache for the samples of a data set, and the names' hashes [N]; None if pixels are the name."""

    rows: np.ndarray
    names: np.ndarray | None

    def check(self, found: np.ndarray, stored: np.ndarray, places: Sequence[int]) -> None:
        """Raise a ValueError unless the rows read were frozen for these very samples; all [B]."""
        wrong = np.flatnonzero(found != stored)
        if len(wrong):
            place = places[int(wrong[0])]
            raise ValueError(
                f"Sample {place} is not the one that row {int(self.rows[place])} of the cache was frozen for: the data "
                "set was re-ordered or changed, its images are decoded differently here, or it has a random transform. "
                "Freeze it again as it is now."
            )


def check_labels(labels: Sequence[Any], explained: Tensor, places: Sequence[int]) -> None:
    """Raise a ValueError unless the classes that the maps explain, [B], are still the samples' labels."""
    now = torch.tensor([int(label) for label in labels])
    wrong = (now != explained).nonzero().flatten()
    if len(wrong):
        k = int(wrong[0])
        raise ValueError(
            f"Sample {places[k]} has the label {int(now[k])}, but its map explains {int(explained[k])}, which was its "
            'label when it was frozen with classes="labels". Restore the labels, freeze it again as it is now, or '
            'freeze it with classes="teacher", whose maps do not depend on them.'
        )


def check_unchanged(image: Tensor, place: int, frozen: FrozenTeacher) -> None:
    """Raise a ValueError unless the canonical image [C, H, W] of a data set's `place` is that of the cache's row 0."""
    far = apart_from(image, frozen.plan["first_image"])
    if not far <= ALLOWED:
        raise ValueError(ANOTHER_PICTURE.format(place=place, name="", apart=far))


def check_looks(images: Sequence[Tensor], stored: Looks, places: Sequence[int], dataset: Any) -> None:
    """Raise a ValueError unless canonical images [C, H, W] look as they did when their rows were frozen, [B, 16].

    Nothing is compared where that was not kept, [B, 0].
    """
    if not stored.size:
        return
    far = apart(looks_of(images), stored)
    wrong = np.flatnonzero(~(far <= ALLOWED))
    if len(wrong):
        place, names = places[int(wrong[0])], names_of(dataset)
        name = "" if names is None else f" ({names[place]!r})"
        raise ValueError(ANOTHER_PICTURE.format(place=place, name=name, apart=float(far[wrong[0]])))


def match_rows(dataset: Any, frozen: FrozenTeacher, ids: Sequence[str] | None, match: str) -> Matched:
    """The rows for a data set, or a ValueError that says how it differs from the one that was frozen."""
    if match not in MATCHES:
        raise ValueError(f"Expected match to be one of {MATCHES}, but got {match!r}.")
    _check_classes(class_names_of(dataset), frozen.class_names)
    _check_transform(transformed(dataset), frozen.plan["dataset"].get("transformed"))
    names = list(ids) if ids is not None else names_of(dataset) if frozen.named else None
    if names is None:
        return _by_pixels(dataset, frozen, match)
    if len(names) != len(dataset):
        raise ValueError(f"Expected one id for each of the {len(dataset)} samples, but got {len(names)}.")
    part = isinstance(dataset, Subset)  # it may list a sample more than once
    hashes, stored = hashes_of(names, repeats=part), frozen.ids()
    if len(hashes) == len(stored) and bool((hashes == stored).all()):
        return Matched(np.arange(len(stored)), hashes)
    if match == "id" or part:
        return Matched(_look_up(names, hashes, stored), hashes)
    raise ValueError(_difference(names, hashes, stored))


def _by_pixels(dataset: Any, frozen: FrozenTeacher, match: str) -> Matched:
    """Positions, which every read proves by the pixels' hash."""
    if frozen.named or match == "id":
        raise ValueError(
            "The samples have no names to find their rows by. Pass ids=, the names that were given to freeze."
            if frozen.named
            else 'match="id" needs names, but the data set was frozen without. Freeze it with ids=.'
        )
    root: Any = dataset
    rows = np.arange(len(root))
    found = [rows] if len(root) == len(frozen) else []
    while isinstance(root, Subset):
        rows = np.asarray(root.indices, np.int64)[rows]
        root = root.dataset
        found += [rows] if len(root) == len(frozen) else []
    if not found:
        raise ValueError(
            f"The cache has {len(frozen)} rows but the data set has {len(root)} samples: it has grown or shrunk since. "
            "Freeze it again, or pass a torch.utils.data.Subset of the data set that was frozen."
        )
    fitting = (rows for rows in found if _fits(dataset, frozen, rows)) if len(found) > 1 else iter(())
    return Matched(next(fitting, found[0]), None)


def _fits(dataset: Any, frozen: FrozenTeacher, rows: np.ndarray) -> bool:
    """Whether some samples are those of the rows, by their pixels: a data set and a shuffled one have one length."""
    source, ids = Source(dataset, frozen.view, None), frozen.ids()
    samples = [found for place in spread(len(rows), READ_AGAIN) if isinstance(found := source[place], Sample)]
    return all(sample.id == int(ids[rows[sample.row]]) for sample in samples)


def _look_up(names: list[str], hashes: np.ndarray, stored: np.ndarray) -> np.ndarray:
    order = np.argsort(stored)
    places = np.minimum(np.searchsorted(stored[order], hashes), len(stored) - 1)
    rows = order[places]
    missing = np.flatnonzero(stored[rows] != hashes)
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(names)} samples are not in the cache, the first being {names[int(missing[0])]!r}. "
            "Freeze the data set again as it is now."
        )
    return rows


def _difference(names: list[str], hashes: np.ndarray, stored: np.ndarray) -> str:
    new = np.flatnonzero(~np.isin(hashes, stored))
    gone = int((~np.isin(stored, hashes)).sum())
    if not len(new) and not gone:
        first = int(np.flatnonzero(hashes != stored)[0])
        return (
            f"The data set lists the same {len(names)} samples in another order than the cache, first at {first} "
            f'({names[first]!r}). Restore the order, or pass match="id" to find the rows by name.'
        )
    said = [f"{len(new)} samples are new, the first being {names[int(new[0])]!r}"] if len(new) else []
    said += [f"{gone} that were frozen are gone"] if gone else []
    return (
        f"The data set is not the one that was frozen ({len(names)} samples now, {len(stored)} then): "
        f"{'; '.join(said)}. Freeze it again"
        + ("." if len(new) else ', or pass match="id" to use the rows of those that are left.')
    )


def _check_transform(now: bool | None, then: bool | None) -> None:
    if None not in (now, then) and now != then:
        said = {True: "has a transform", False: "has no transform"}, {True: "had one", False: "had none"}
        raise ValueError(ANOTHER_TRANSFORM.format(now=said[0][bool(now)], then=said[1][bool(then)]))


def _check_classes(now: list[str] | None, then: list[str] | None) -> None:
    if now is None or then is None or now == then:
        return
    differing = [k for k, (a, b) in enumerate(zip(now, then, strict=False)) if a != b]
    where = f"; class {differing[0]} is {now[differing[0]]!r} but was {then[differing[0]]!r}" if differing else ""
    raise ValueError(
        f"The data set has other classes than the one that was frozen, or in another order ({len(now)} now, "
        f"{len(then)} then{where}). The teacher's logits would be for the wrong classes: restore the classes, or "
        "freeze again."
    )
