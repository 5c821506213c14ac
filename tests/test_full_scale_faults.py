"""Full scale: folders that are not as their layout has them say what was expected, before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import full_scale_layouts
from benchmarks.full_scale_data import few, held_out
from benchmarks.full_scale_folders import Painter
from benchmarks.full_scale_run import images_of
from tests.full_scale_cases import Make, names, run_on, targets

PLANTS = ("Apple___healthy", "Tomato___healthy")


def plants(path: Path, **parts: int) -> Path:
    """Folders of splits with so many images of two classes."""
    for name, each in parts.items():
        Painter().folders(path / name, PLANTS, each)
    return path


def test_plantvillage_of_three_splits_chooses_on_val_and_tests_on_test(tmp_path: Path) -> None:
    found = full_scale_layouts.plantvillage(plants(tmp_path, train=3, Val=2, test=1))
    assert found.validation is not None
    assert names(found.train)[0].startswith("Apple")
    assert [len(split) for split in (found.train, found.validation, found.test)] == [6, 4, 2]
    assert found.test.root == tmp_path / "test"


@pytest.mark.parametrize("name", ["Val", "validation", "valid", "test"])
def test_plantvillage_of_two_splits_tests_on_the_other(tmp_path: Path, name: str) -> None:
    found = full_scale_layouts.plantvillage(plants(tmp_path, train=3, **{name: 2}))
    assert (found.train.classes, found.validation, len(found.test)) == (list(PLANTS), None, 4)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"train": 2}, "of splits it has train alone"),
        ({"val": 2, "test": 2}, "of splits it has test, val alone"),
        ({"color": 2, "grayscale": 2, "segmented": 2}, "color, grayscale, segmented: name one of them"),
    ],
)
def test_plantvillage_with_splits_or_versions_that_do_not_fit(tmp_path: Path, parts: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        full_scale_layouts.plantvillage(plants(tmp_path, **parts))


def test_the_folder_above_the_classes_is_no_class(tmp_path: Path) -> None:
    """Nor is a second copy of the classes beside them: its images would be in training and test."""
    inner = plants(tmp_path, PlantVillage=5) / "PlantVillage"
    with pytest.raises(ValueError, match=rf"holds folders of images, as .*PlantVillage/Apple.*pass {inner};"):
        full_scale_layouts.plantvillage(tmp_path)
    copy = shutil.copytree(inner, tmp_path / "twice")
    shutil.copytree(inner, copy / "PlantVillage")
    with pytest.raises(ValueError, match=rf"pass {copy / 'PlantVillage'}; if they are a copy, move them away"):
        full_scale_layouts.plantvillage(copy)
    splits = plants(tmp_path / "outer" / "inner", train=3, valid=2)
    with pytest.raises(ValueError, match=rf"pass {splits};"):
        full_scale_layouts.plantvillage(tmp_path / "outer")


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    Painter().folders(tmp_path, PLANTS[:1], 2)
    with pytest.raises(ValueError, match=r"Expected two classes or more in .* the folder Apple___healthy alone"):
        full_scale_layouts.plantvillage(tmp_path)


@pytest.mark.parametrize("layout", ["imagenet", "plantvillage"])
def test_hidden_files_and_folders_are_no_images_and_classes(folder: Make, tmp_path: Path, layout: str) -> None:
    """Those of macOS archives, notebooks and download caches."""
    shutil.copytree(folder(layout), tmp_path, dirs_exist_ok=True)
    before = full_scale_layouts.READERS[layout](tmp_path)
    for root in {before.train.root, before.test.root}:
        for name in ("__MACOSX", ".cache", ".ipynb_checkpoints"):
            (root / name).mkdir()
            (root / name / "._a.jpg").write_bytes(b"no image")
        (root / before.train.classes[0] / "._b.JPEG").write_bytes(b"no image")
    after = full_scale_layouts.READERS[layout](tmp_path)
    assert (after.train.classes, after.train.samples) == (before.train.classes, before.train.samples)
    assert after.test.samples == before.test.samples


def test_unrelated_images_are_followed_through_links(tmp_path: Path) -> None:
    """Once, where a link leads in a circle; and hidden files are left out."""
    Painter().folders(tmp_path / "elsewhere", PLANTS, 2)
    here = plants(tmp_path / "here", here=2)
    for name in PLANTS:
        (here / name).symlink_to(tmp_path / "elsewhere" / name)
    (here / "round").symlink_to(here)
    (here / PLANTS[0] / "._a.jpg").write_bytes(b"no image")
    found = full_scale_layouts.unrelated(here)
    assert found.classes == [*PLANTS, *(f"here/{name}" for name in PLANTS)]
    assert targets(found) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("layout", "gone", "said"),
    [
        ("imagenet", "train", r"Expected train/CLASS and val/CLASS .* no folder .*/train\."),
        ("imagenet", "val", r"Expected train/CLASS and val/CLASS .* no folder .*/val\."),
        ("plantvillage", "", "Expected train/CLASS with val/CLASS or test/CLASS, or classes alone"),
        ("voc", "VOCdevkit/VOC2012/ImageSets", "Expected VOCdevkit/VOC2012 or VOCdevkit/VOC2007 .* there is neither"),
    ],
)
def test_a_folder_that_is_missing_is_named(folder: Make, tmp_path: Path, layout: str, gone: str, said: str) -> None:
    here = shutil.copytree(folder(layout), tmp_path / "here")
    shutil.rmtree(here / gone)
    with pytest.raises(FileNotFoundError, match=said):
        full_scale_layouts.READERS[layout](here)


@pytest.mark.parametrize(("layout", "part"), [("imagenet", "val"), ("plantvillage", "test")])
def test_images_beside_one_another_have_no_classes(tmp_path: Path, layout: str, part: str) -> None:
    """As ImageNet's validation images are unpacked, and the test images of New Plant Diseases."""
    here = plants(tmp_path, train=3, **({} if part == "val" else {"valid": 2}))
    Painter().paint(here / part / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match=rf"two classes or more in .*/{part}.*Sort the images.*move {part} away"):
        full_scale_layouts.READERS[layout](here)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    (plants(tmp_path, train=3, test=2) / "test" / "Empty").mkdir()
    with pytest.raises(ValueError, match=r"test/Empty, but found none. Move it away, if it is no class"):
        full_scale_layouts.plantvillage(tmp_path)


def test_an_empty_voc2012_does_not_hide_voc2007(folder: Make, tmp_path: Path) -> None:
    devkit = shutil.copytree(folder("voc"), tmp_path, dirs_exist_ok=True) / "VOCdevkit"
    (devkit / "VOC2012").rename(devkit / "VOC2007")
    (devkit / "VOC2012").mkdir()
    lists = devkit / "VOC2007" / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    with pytest.raises(FileNotFoundError, match=r"Expected the file .*VOC2007/ImageSets/Main/test\.txt"):
        full_scale_layouts.voc(tmp_path)
    (lists / "val.txt").rename(lists / "test.txt")
    assert [len(split) for split in full_scale_layouts.voc(tmp_path)[:2]] == [6, 3]


@pytest.mark.parametrize(
    ("now", "then", "said"),
    [
        (",1,0,1,", ",2,0,1,", "y to be one of 0, 1"),
        (",1,0,1,", ",1,0,3,", "place to be one of 0, 1"),
        (",1,0,1,", ",1,5,1,", "split to be one of 0, 1, 2"),
        (",1,0,1,", ",,0,1,", "but it is ''"),
    ],
)
def test_birds_and_backgrounds_that_there_are_not(folder: Make, tmp_path: Path, now: str, then: str, said: str) -> None:
    shutil.copytree(folder("waterbirds"), tmp_path, dirs_exist_ok=True)
    changed(tmp_path, "metadata.csv", now, then)
    with pytest.raises(ValueError, match=f"{said}.*bird_4.jpg"):
        full_scale_layouts.waterbirds(tmp_path)


def changed(path: Path, file: str, now: str, then: str) -> None:
    text = (path / file).read_text()
    assert now in text
    (path / file).write_text(text.replace(now, then))


@pytest.mark.parametrize(
    ("layout", "file", "now", "then", "said"),
    [
        ("waterbirds", "metadata.csv", "place,", "where,", r"it lacks place\."),
        ("sun397", "ClassName.txt", "/b/bakery/shop", "/b/bakery", r"Training_01\.txt has /b/bakery/shop/"),
        ("sun397", "Partitions/Testing_01.txt", "/a/abbey", "/abbey", r"Testing_01\.txt has /abbey/"),
        ("voc", "VOCdevkit/VOC2012/Annotations/2008_000000.xml", "dog", "wolf", r"2008_000000\.xml has a wolf"),
    ],
)
def test_names_that_a_data_set_does_not_have(
    folder: Make, tmp_path: Path, layout: str, file: str, now: str, then: str, said: str
) -> None:
    shutil.copytree(folder(layout), tmp_path, dirs_exist_ok=True)
    changed(tmp_path, file, now, then)
    with pytest.raises(ValueError, match=said):
        full_scale_layouts.READERS[layout](tmp_path)


def test_a_split_without_images_is_not_measured_on(folder: Make, tmp_path: Path) -> None:
    shutil.copytree(folder("waterbirds"), tmp_path, dirs_exist_ok=True)
    changed(tmp_path, "metadata.csv", ",2,", ",0,")
    layout = full_scale_layouts.waterbirds(tmp_path)
    with pytest.raises(ValueError, match="Expected test images"):
        images_of(run_on(tmp_path, tmp_path / "out", "waterbirds"), layout)


def test_a_damaged_image_is_named(folder: Make, tmp_path: Path) -> None:
    shutil.copytree(folder("imagenet"), tmp_path, dirs_exist_ok=True)
    split = full_scale_layouts.imagenet(tmp_path).train
    path = Path(split.samples[3][0])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(OSError, match=rf"{path.name}.*truncated"):
        split[3]
    path.write_bytes(b"no image")
    with pytest.raises(OSError, match=path.name):
        split[3]


def test_more_images_of_a_class_than_there_are(folder: Make) -> None:
    split = full_scale_layouts.imagenet(folder("imagenet")).train
    assert len(few(split, 6, 0)) == 12
    with pytest.raises(ValueError, match=r"at least 7 images of each class to train on.*has 6 of n01440764"):
        few(split, 7, 0)
    with pytest.raises(ValueError, match="to hold out 6 of them"):
        held_out(split, 6)
    with pytest.raises(ValueError, match="hold out 1 a class"):
        held_out(full_scale_layouts.voc(folder("voc")).train, 1)
