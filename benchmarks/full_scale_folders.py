"""Tiny data sets of noise in the layouts of the real ones, to see that everything runs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator
from torchvision.transforms.v2.functional import to_pil_image

HEIGHT, WIDTH = 40, 48  # unequal, so that an exchange of the two is seen
VOC_OBJECTS = (("dog", (11, 6, 31, 25)), ("person", (1, 1, 48, 40)))  # xmin, ymin, xmax, ymax


class Painter:
    """Writes JPEG files of noise, each of another mean."""

    def __init__(self) -> None:
        self.generator = Generator().manual_seed(0)

    def paint(self, path: Path) -> None:
        """One image."""
        path.parent.mkdir(parents=True, exist_ok=True)
        mean = torch.rand(3, 1, 1, generator=self.generator)
        noise = torch.rand(3, HEIGHT, WIDTH, generator=self.generator)
        to_pil_image(0.5 * mean + 0.5 * noise).save(path)

    def folders(self, path: Path, classes: tuple[str, ...], each: int) -> None:
        """A folder for each class."""
        for name in classes:
            for number in range(each):
                self.paint(path / name / f"{name}_{number}.jpg")


def imagenet(path: Path) -> None:
    """Two classes, 6 training images of each and 3 for the test."""
    painter, classes = Painter(), ("n01440764", "n01443537")
    painter.folders(path / "train", classes, 6)
    painter.folders(path / "val", classes, 3)


def plantvillage(path: Path) -> None:
    """Three classes of 5 images, without splits."""
    Painter().folders(path, ("Apple___Apple_scab", "Apple___healthy", "Tomato___healthy"), 5)


def sun397(path: Path) -> None:
    """Three classes, one in a folder below, with more images than the partition names."""
    painter = Painter()
    classes = ("/a/abbey", "/a/apartment_building/outdoor", "/b/bakery/shop")
    (path / "Partitions").mkdir(parents=True)
    (path / "ClassName.txt").write_text("".join(f"{name}\n" for name in classes))
    images = {name: [f"{name}/sun_{name[1]}{number}.jpg" for number in range(6)] for name in classes}
    for part, chosen in (("Training", slice(0, 3)), ("Testing", slice(3, 5))):
        lines = [image for some in images.values() for image in some[chosen]]
        (path / "Partitions" / f"{part}_01.txt").write_text("".join(f"{line}\n" for line in lines))
    for image in (image for some in images.values() for image in some):
        painter.paint(path / image.lstrip("/"))


def waterbirds(path: Path) -> None:
    """Training images of birds where they live; two of each group for validation and test."""
    painter = Painter()
    homes = [(0, 0, 0)] * 4 + [(0, 1, 1)] * 4
    others = [(split, y, place) for split in (1, 2) for y in (0, 1) for place in (0, 1) for _ in range(2)]
    names = ("img_id", "img_filename", "y", "split", "place", "place_filename")
    rows = []
    for number, (split, y, place) in enumerate(homes + others):
        file = f"{y:03}.Bird/bird_{number}.jpg"
        painter.paint(path / file)
        rows.append((number, file, y, split, place, f"/p/place_{number}.jpg"))
    with (path / "metadata.csv").open("w", newline="") as target:
        csv.writer(target).writerows([names, *rows])


def voc(path: Path) -> None:
    """Images of a dog, a person, or both, in turn."""
    painter, home = Painter(), path / "VOCdevkit" / "VOC2012"
    for folder in ("Annotations", "ImageSets/Main"):
        (home / folder).mkdir(parents=True)
    for part, numbers in (("train", range(6)), ("val", range(6, 9))):
        (home / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"2008_{n:06}\n" for n in numbers))
        for number in numbers:
            painter.paint(home / "JPEGImages" / f"2008_{number:06}.jpg")
            things = (VOC_OBJECTS[:1], VOC_OBJECTS[1:], VOC_OBJECTS)[number % 3]
            (home / "Annotations" / f"2008_{number:06}.xml").write_text(_annotation(things))


def _annotation(things: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for name, box in things
    )
    return f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{objects}</annotation>"


FOLDERS: dict[str, Callable[[Path], None]] = {
    "imagenet": imagenet, "sun397": sun397, "waterbirds": waterbirds, "voc": voc, "plantvillage": plantvillage,
}  # fmt: skip
