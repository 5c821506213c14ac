"""ImageNet, SUN397, Waterbirds, VOC and PlantVillage as they are unpacked."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import VOCDetection
from torchvision.datasets.folder import is_image_file

from benchmarks.full_scale_data import SPLIT_SEED, Box, Layout, Split

BACKGROUNDS = ("land", "water")
BIRD_COLUMNS = ("img_filename", "y", "split", "place")
BIRD_VALUES = {"y": ("0", "1"), "split": ("0", "1", "2"), "place": ("0", "1")}
PLANT_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PLANT_VERSIONS = {"color", "grayscale", "segmented"}  # of all images, beside one another as they are downloaded
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_SPLITS = {"2012": ("train", "val"), "2007": ("trainval", "test")}  # 2012's test annotations are not public


def image_folder(path: Path) -> Split:
    """A folder with one folder of images for each class; what is hidden is left out.

    Raises:
        ValueError: for fewer than two classes, and for one without images, or with folders of images.
    """
    folders = _folders(path)
    samples = [(str(image), label) for label, folder in enumerate(folders) for image in _images_of(folder)]
    if len(folders) < 2:
        found = f"the folder {folders[0].name} alone" if folders else "no folder"
        raise ValueError(
            f"Expected two classes or more in {path}, a folder of images for each, but found {found}. Sort the "
            f"images into folders of their classes or, if they are not needed, move {path.name} away."
        )
    return Split(path, samples, [folder.name for folder in folders])


def _images_of(folder: Path) -> list[Path]:
    """The images of a class."""
    (_, names), *below = _tree(folder)
    inner = next((each for each, images in below if images), None)
    if inner is not None:
        above = inner.parent.parent if inner.parent.name.lower() in PLANT_SPLITS else inner.parent
        raise ValueError(
            f"Expected images of one class in {folder}, but it holds folders of images, as {inner}. If those are the "
            f"classes, pass {above}; if they are a copy, move them away."
        )
    if not names:
        raise ValueError(f"Expected images of one class in {folder}, but found none. Move it away, if it is no class.")
    return [folder / name for name in names]


def imagenet(path: Path) -> Layout:
    """`train/CLASS` and `val/CLASS`.

    Raises:
        FileNotFoundError: when one of them is not there.
    """
    for part in ("train", "val"):
        _existing_folder(path / part, "train/CLASS and val/CLASS")
    return _same_classes(image_folder(path / "train"), image_folder(path / "val"))


def plantvillage(path: Path) -> Layout:
    """`train/CLASS` with `val/CLASS`, `test/CLASS` or both; or classes alone, a fifth of each of which is for the test.

    Of `val` and `test`, `test` is for the test; `val` is alone if there is no other. `valid` and `validation` are
    other names for `val`, in capitals or not.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: for a folder of several versions of the images, or of splits without their others.
    """
    _existing_folder(path, "train/CLASS with val/CLASS or test/CLASS, or classes alone")
    folders = {folder.name.lower(): folder for folder in _folders(path)}
    if PLANT_VERSIONS & folders.keys():
        raise ValueError(
            f"Expected classes in {path}, but found {_told(folders)}: name one of them, as {path / 'color'}."
        )
    parts = {PLANT_SPLITS[name]: image_folder(folder) for name, folder in folders.items() if name in PLANT_SPLITS}
    if parts:
        return _named_splits(path, parts)
    whole = image_folder(path)
    labels = [label for _, label in whole.samples]
    parts = train_test_split(range(len(whole)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    return Layout(*(whole.some(sorted(part)) for part in parts))


def _named_splits(path: Path, parts: dict[str, Split]) -> Layout:
    test = parts.get("test", parts.get("val"))
    if "train" not in parts or test is None:
        raise ValueError(f"Expected train and val or test in {path}, but of splits it has {_told(parts)} alone.")
    validation = parts["val"] if "test" in parts and "val" in parts else None
    if validation is not None:
        _same_classes(parts["train"], validation)
    return _same_classes(parts["train"], test)._replace(validation=validation)


def sun397(path: Path) -> Layout:
    """`a/abbey/*.jpg` ..., `ClassName.txt`, and the first of the official partitions.

    Raises:
        ValueError: for an image of a class that `ClassName.txt` does not have.
    """
    classes = [line[len("/a/") :] for line in _lines(path / "ClassName.txt")]
    numbers = {name: label for label, name in enumerate(classes)}

    def part(name: str) -> Split:
        file = path / "Partitions" / f"{name}_01.txt"
        images = [PurePosixPath(line.lstrip("/")) for line in _lines(file)]
        return Split(path, [(str(path / image), number(image, file)) for image in images], classes)

    def number(image: PurePosixPath, file: Path) -> int:
        name = str(PurePosixPath(*image.parts[1:-1]))
        if name not in numbers:
            raise ValueError(
                f"Expected images as /a/abbey/NAME.jpg of the classes in {path / 'ClassName.txt'}, but {file} has "
                f"/{image}."
            )
        return numbers[name]

    return Layout(part("Training"), part("Testing"))


def waterbirds(path: Path) -> Layout:
    """`metadata.csv` with img_filename, y, split and place; a group is a class on a background, number 2 y + place.

    Raises:
        ValueError: for a table without one of these columns, or with other values than there are.
    """
    rows = _birds(_existing(path / "metadata.csv"))
    classes = [f"{background}bird" for background in BACKGROUNDS]

    def part(number: int) -> Split:
        mine = [row for row in rows if int(row["split"]) == number]
        samples = [(str(path / row["img_filename"]), int(row["y"])) for row in mine]
        return Split(path, samples, classes, groups=[2 * int(row["y"]) + int(row["place"]) for row in mine])

    groups = tuple(f"{bird} on {background}" for bird in classes for background in BACKGROUNDS)
    return Layout(part(0), part(2), part(1), groups)


def _birds(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, missing = list(reader), [name for name in BIRD_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"Expected the columns {', '.join(BIRD_COLUMNS)} in {table}, but it lacks {', '.join(missing)}."
        )
    for row, (name, known) in product(rows, BIRD_VALUES.items()):
        if row[name] not in known:
            raise ValueError(
                f"Expected {name} to be one of {_told(known)} in {table}, but it is {row[name]!r} of "
                f"{row['img_filename']}. The table has to be that of Waterbirds."
            )
    return rows


def voc(path: Path) -> Layout:
    """`VOCdevkit/VOC2012`, or VOC2007 where that is empty or not there, as torchvision's `VOCDetection` reads it.

    Raises:
        FileNotFoundError: when there is neither, or a list of images is missing.
    """
    lists = {year: path / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Main" for year in VOC_SPLITS}
    year = next((year for year, folder in lists.items() if folder.is_dir()), None)
    if year is None:
        raise FileNotFoundError(
            f"Expected VOCdevkit/VOC2012 or VOCdevkit/VOC2007 in {path}, with JPEGImages, Annotations and "
            "ImageSets/Main, but there is neither."
        )
    for part in VOC_SPLITS[year]:
        _existing(lists[year] / f"{part}.txt")
    return Layout(*(_voc_part(VOCDetection(str(path), year, part)) for part in VOC_SPLITS[year]))


def _voc_part(found: VOCDetection) -> Split:
    boxes = [list(_voc_boxes(Path(file))) for file in found.annotations]
    targets = [_multi_hot([box.label for box in some], len(VOC_CLASSES)) for some in boxes]
    samples = list(zip(found.images, targets, strict=True))
    return Split(Path(found.root), samples, list(VOC_CLASSES), boxes=boxes)


def _voc_boxes(annotation: Path) -> Iterator[Box]:
    """All objects, difficult ones too. VOC counts pixels from 1, and right and bottom belong to the object."""
    tree = VOCDetection.parse_voc_xml(ElementTree.parse(annotation).getroot())
    for thing in tree["annotation"]["object"]:
        left, top, right, bottom = (round(float(thing["bndbox"][side])) for side in ("xmin", "ymin", "xmax", "ymax"))
        if thing["name"] not in VOC_CLASSES:
            raise ValueError(f"Expected objects of VOC's 20 classes, but {annotation} has a {thing['name']}.")
        yield Box(VOC_CLASSES.index(thing["name"]), left - 1, top - 1, right, bottom)


READERS: dict[str, Callable[[Path], Layout]] = {
    "imagenet": imagenet, "sun397": sun397, "waterbirds": waterbirds, "voc": voc, "plantvillage": plantvillage,
}  # fmt: skip


def unrelated(path: Path) -> Split:
    """All images below a folder, linked ones too, whatever they show: the folder each is in stands for its class."""
    files = sorted(folder / name for folder, names in _tree(path) for name in names)
    if not files:
        raise FileNotFoundError(f"Expected images in {path} or folders below it, but found none.")
    folders = sorted({file.parent.relative_to(path).as_posix() for file in files})
    numbers = {name: label for label, name in enumerate(folders)}
    return Split(path, [(str(file), numbers[file.parent.relative_to(path).as_posix()]) for file in files], folders)


def _folders(path: Path) -> list[Path]:
    """Those in a folder, by name."""
    return sorted(found for found in path.iterdir() if found.is_dir() and _shown(found.name))


def _tree(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below, each with the names of its images; linked folders too, but none twice."""
    seen = set()
    for found, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(found)
        if real in seen:  # or a link to a folder above would be followed for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_shown, folders))
        yield Path(found), sorted(name for name in files if _shown(name) and is_image_file(name))


def _shown(name: str) -> bool:
    """Whether a file or folder is the data set's: archives and editors leave hidden ones beside them."""
    return not name.startswith(".") and name != "__MACOSX"


def _same_classes(train: Split, test: Split) -> Layout:
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))[:5]
        raise ValueError(f"Expected the same classes in {train.root} and {test.root}, but not in both are {different}.")
    return Layout(train, test)


def _told(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _multi_hot(labels: Sequence[int], classes: int) -> Tensor:
    return torch.zeros(classes).index_fill(0, torch.tensor(labels, dtype=torch.long), 1.0)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _existing(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _existing_folder(path: Path, layout: str) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"Expected {layout} in the folder of the data set, but there is no folder {path}.")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"Expected the file {path}, which comes with the data set, but it is not there.")
    return path
