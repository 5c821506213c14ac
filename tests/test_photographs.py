"""The photographs of the benchmarks: what is in them, what is in no two parts, what moves together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import e2kd
from benchmarks import coco, composites, localisation, objects, pets, right_reasons
from benchmarks.common import RESULTS
from benchmarks.paired import Case
from benchmarks.small_networks import STUDENTS
from e2kd.demo.data import Mode

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _data(shared: Callable[[str], Path]) -> None:
    for folder in ("pets600", "coco256", "imagenet-samples"):
        shared(f"data/{folder}")


def test_composites_follow_their_mode_and_are_the_same_for_the_same_seed() -> None:
    aligned, again, reversed_ = (
        composites.composites("validation", mode, 40, seed=3) for mode in (Mode.ALIGNED, Mode.ALIGNED, Mode.REVERSED)
    )
    assert all(torch.equal(a, b) for a, b in zip(aligned, again, strict=True))
    assert torch.equal(aligned.textures, aligned.labels)
    assert torch.equal(reversed_.textures, 1 - reversed_.labels)
    assert aligned.labels.float().mean() == 0.5
    assert aligned.images.shape == (40, 3, 64, 64)
    assert 0 <= aligned.images.min() < aligned.images.max() <= 1
    assert (aligned.masks.flatten(1).sum(1) > 100).all()


def test_what_lies_behind_does_not_depend_on_the_animal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Black backgrounds leave the animal alone, and nothing of it lies outside of its mask but a soft edge."""
    black = torch.zeros(4, 3, composites.BACKGROUND, composites.BACKGROUND)
    monkeypatch.setattr(composites, "backgrounds", lambda kind, part: black)
    found = composites.composites("validation", Mode.RANDOM, 20, seed=0)
    inside = (found.images.amax(1) > 0) & found.masks
    outside = (found.images.amax(1) > 0) & ~found.masks
    assert inside.sum() > 0.9 * found.masks.sum()
    assert outside.sum() < 0.25 * found.masks.sum()


def test_no_background_is_in_two_parts_or_of_two_kinds() -> None:
    photos = {
        (kind, part): composites.backgrounds(kind, part)
        for kind in (composites.WATER, composites.GREENERY)
        for part in composites.PLACES
    }
    assert {len(of) for (_, part), of in photos.items() if part == "train"} == {26}
    every = torch.cat(list(photos.values())).flatten(1)
    assert len(every.unique(dim=0)) == len(every)


def test_no_pet_is_in_two_parts_and_every_mask_holds_the_animal() -> None:
    parts = [pets.squares(part, 16, animals=True) for part in ("validation", "test")]
    assert [part.breeds.bincount().tolist() for part in parts] == [[39, 40, 40], [60, 60, 60]]
    every = torch.cat([part.images for part in parts]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)
    for part in parts:  # a square around the animal: it touches two opposite sides of it
        rows, columns = (part.masks.amax(axis) > 0 for axis in (2, 1))
        assert ((rows[:, 0] & rows[:, -1]) | (columns[:, 0] & columns[:, -1])).float().mean() > 0.95


def test_boxes_are_filled_where_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "boxes.txt"
    path.write_text("0 0.5 0.25 0.5 0.5\n2 0.1 0.9 0.01 0.01\n9 0.5 0.5 1 1\n")
    masks = coco.boxes(path, 8)
    person = torch.zeros(8, 8, dtype=torch.bool)
    person[:4, 2:6] = True
    names = list(coco.GROUPS)
    assert torch.equal(masks[names.index("person")], person)
    assert masks[names.index("vehicle")].sum() == 1  # never lost, however small
    assert masks.flatten(1).any(1).sum() == 2  # class 9 is in no group
    assert not coco.boxes(tmp_path / "none.txt", 8).any()


def test_masks_move_with_their_images() -> None:
    """An image that is its own mask stays so, but for the blur of its edges, through every crop and mirroring."""
    masks = torch.zeros(8, 2, 64, 64, dtype=torch.bool)
    masks[:, 0, 10:40, 20:30] = masks[:, 1, 30:60, 5:50] = True
    images = torch.cat([masks.float(), torch.zeros(8, 1, 64, 64)], 1)
    torch.manual_seed(0)
    moved, (labels, found) = objects.Objects(images, torch.arange(8), masks).feed()(torch.tensor([5, 2, 7]))
    assert labels.tolist() == [5, 2, 7]
    assert found.shape == (3, 2, 64, 64)
    assert ((moved[:, :2] > 0.5) == (found > 0.5)).float().mean() > 0.97
    assert not torch.equal(found > 0.5, masks[:3])


@pytest.mark.parametrize("name", STUDENTS)
def test_students_take_the_photographs_and_are_explained_on_fine_maps(name: str) -> None:
    """A live step of each family; a grid of at least 4x4 cells."""
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64)
    student, teacher = STUDENTS[name].make(2), STUDENTS["resnet"].make(2)
    criterion = right_reasons.criterion_of(Case("test", "e2kd", 0, 1.0, 5.0), student, teacher, images, steps=10)
    criterion(student(images), torch.zeros(4, dtype=torch.long)).backward()
    assert 0 < criterion.parts["explanation"] < 1
    assert e2kd.explain(student, images).maps.shape[2] >= 4


def row(arm: str, seed: int, value: float, fields: tuple[str, ...], split: str = "test") -> dict[str, Any]:
    setting = {"temperature": 4.0, "weight": 5.0 if arm == "e2kd" else None}
    return {"split": split, "arm": arm, "seed": seed, **setting, **dict.fromkeys(fields, value)}


def test_tables_say_what_the_rows_say() -> None:
    fields = tuple(right_reasons.TITLES)
    rows = [row(arm, seed, v, fields) for arm, v in (("kd", 0.5), ("e2kd", 0.75)) for seed in (0, 1)]
    head = {"commands": ["python -m x"], "settings": asdict(right_reasons.Settings())}
    found = [{**head, "student": "vit", "teacher": dict.fromkeys(fields, 0.9), "rows": rows}]
    lines = right_reasons.table(found).splitlines()
    assert lines[2] == "| teacher (ResNet-32) |  | " + "90.0 | " * 6 + " |  |"
    assert lines[-1] == "| ViT, 0.5 M | e²KD | " + "75.0 ±0.0 | " * 6 + "4 | 5 |"
    said = right_reasons.section(found)
    assert "| ViT, 0.5 M | e²KD - KD" + " | +25.0 (+25.0 to +25.0)" * 4 + " |" in said
    assert "```sh\npython -m x\n```" in said

    fields = ("f1", "epg", "iou")
    rows = [row(arm, seed, v, fields) for arm, v in (("kd", 0.5), ("e2kd", 0.75)) for seed in (0, 1)]
    head = {"commands": ["python -m x"], "settings": asdict(localisation.Settings(30, 30))}
    found = [{**head, "task": "coco", "guidance": "l1", "teacher": dict.fromkeys(fields, 0.9), "rows": rows}]
    lines = localisation.table(found).splitlines()
    assert lines[2].startswith("| COCO, 7 groups, guided for IoU | teacher | 90.0 | 90.0 | 90.0 |")
    assert lines[-2] == "|  | e²KD | " + "75.0 ±0.0 | " * 3 + "4 | 5 |"
    assert lines[-1] == "|  | e²KD - KD | " + "+25.0 (+25.0 to +25.0) | " * 3 + " |  |"
    assert "python -m x" in localisation.section(found)


STUDIES = sorted([*RESULTS.glob("right_reasons_*.json"), *RESULTS.glob("localisation_*.json")])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_students_are_compared_in_pairs(path: Path) -> None:
    """Every seed of each arm, each arm with what was best for it on other photos and another seed."""
    found = json.loads(path.read_text(encoding="utf-8"))
    module = right_reasons if "student" in found else localisation
    by = "accuracy" if "student" in found else objects.TASKS[found["task"]].measure
    tested = [row for row in found["rows"] if row["split"] == "test"]
    tuned = [row for row in found["rows"] if row["split"] == "validation"]
    assert {row["seed"] for row in tuned}.isdisjoint(module.SEEDS)
    for arm in {row["arm"] for row in tested}:
        mine = [row for row in tested if row["arm"] == arm]
        assert sorted(row["seed"] for row in mine) == list(module.SEEDS)
        tried: dict[tuple[Any, Any], list[float]] = {}
        for row in (row for row in tuned if row["arm"] == arm):
            tried.setdefault((row["temperature"], row["weight"]), []).append(row[by])
        chosen = {(row["temperature"], row["weight"]) for row in mine}
        assert chosen == {max(tried, key=lambda choice: statistics.mean(tried[choice]))} if tried else len(chosen) == 1
