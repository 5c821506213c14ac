"""Full scale: what the readers find in each layout, and one student of each from the first batch to its result."""

from __future__ import annotations

import doctest
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks import (
    full_scale,
    full_scale_data,
    full_scale_layouts,
    full_scale_run,
    full_scale_scores,
    full_scale_table,
)
from benchmarks.full_scale_arms import ARMS
from benchmarks.full_scale_checkpoints import checkpoints
from benchmarks.full_scale_data import Box, Measured, Split, few, held_out
from benchmarks.full_scale_folders import HEIGHT, WIDTH
from benchmarks.full_scale_layouts import VOC_CLASSES
from benchmarks.full_scale_networks import UNCHANGED, network, normalization_of
from benchmarks.full_scale_presets import PRESETS
from benchmarks.full_scale_run import Run, augmentation, centre, encoding, images_of, whole
from benchmarks.full_scale_scores import Scores
from benchmarks.full_scale_training import Distillation, distil
from e2kd import bcos
from tests.full_scale_cases import Make, names, reset, run_on, targets

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::e2kd.errors.NoEffectWarning"),  # networks of random weights
]


@pytest.mark.parametrize("module", [full_scale_data, full_scale_run, full_scale_table], ids=lambda m: m.__name__)
def test_examples(module: ModuleType) -> None:
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed


def test_imagenet_is_two_folders_of_classes(folder: Make) -> None:
    found = full_scale_layouts.imagenet(folder("imagenet"))
    assert found.train.classes == ["n01440764", "n01443537"]
    assert targets(found.train) == [0] * 6 + [1] * 6
    assert names(found.test)[0] == "n01440764/n01440764_0.jpg"
    image, label = found.test[5]
    assert (image.size, image.mode, label) == ((WIDTH, HEIGHT), "RGB", 1)


def test_classes_of_train_and_test_must_be_the_same(folder: Make, tmp_path: Path) -> None:
    shutil.copytree(folder("imagenet"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "val" / "n01440764").rename(tmp_path / "val" / "n09999999")
    with pytest.raises(ValueError, match=r"n01440764.*n09999999"):
        full_scale_layouts.imagenet(tmp_path)


def test_sun397_follows_the_partition_and_the_names_of_classes(folder: Make) -> None:
    found = full_scale_layouts.sun397(folder("sun397"))
    assert found.train.classes == ["abbey", "apartment_building/outdoor", "bakery/shop"]
    assert targets(found.train) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert names(found.test)[2:4] == [
        "a/apartment_building/outdoor/sun_a3.jpg",
        "a/apartment_building/outdoor/sun_a4.jpg",
    ]
    assert set(names(found.train)).isdisjoint(names(found.test))
    assert all(Path(path).is_file() for path, _ in found.train.samples + found.test.samples)


def test_sun397_without_its_partitions_says_what_is_missing(folder: Make, tmp_path: Path) -> None:
    shutil.copytree(folder("sun397"), tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "Partitions")
    with pytest.raises(FileNotFoundError, match=r"Training_01\.txt"):
        full_scale_layouts.sun397(tmp_path)


def test_waterbirds_has_splits_and_groups_from_its_table(folder: Make) -> None:
    found = full_scale_layouts.waterbirds(folder("waterbirds"))
    assert found.validation is not None
    assert [len(split) for split in (found.train, found.validation, found.test)] == [8, 8, 8]
    assert found.train.groups == [0] * 4 + [3] * 4
    assert found.test.groups == [0, 0, 1, 1, 2, 2, 3, 3]
    assert targets(found.test) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found.groups[2] == "waterbird on land"
    assert found.test.some([7, 2]).groups == [3, 1]


def test_voc_has_classes_and_boxes_from_its_annotations(folder: Make) -> None:
    found = full_scale_layouts.voc(folder("voc"))
    dog, person = VOC_CLASSES.index("dog"), VOC_CLASSES.index("person")
    assert [target.nonzero().flatten().tolist() for target in targets(found.test)] == [[dog], [person], [dog, person]]
    assert found.test.boxes is not None
    assert found.test.boxes[2] == [Box(dog, 10, 5, 31, 25), Box(person, 0, 0, 48, 40)]
    assert names(found.train)[0] == "VOCdevkit/VOC2012/JPEGImages/2008_000000.jpg"


def test_voc_2007_is_read_where_2012_is_not(folder: Make, tmp_path: Path) -> None:
    shutil.copytree(folder("voc"), tmp_path, dirs_exist_ok=True)
    home = (tmp_path / "VOCdevkit" / "VOC2012").rename(tmp_path / "VOCdevkit" / "VOC2007")
    for now, then in (("train", "trainval"), ("val", "test")):
        (home / "ImageSets" / "Main" / f"{now}.txt").rename(home / "ImageSets" / "Main" / f"{then}.txt")
    found = full_scale_layouts.voc(tmp_path)
    assert [len(found.train), len(found.test)] == [6, 3]
    shutil.rmtree(home)
    with pytest.raises(FileNotFoundError, match="VOC2007"):
        full_scale_layouts.voc(tmp_path)


def test_boxes_move_with_the_image(folder: Make) -> None:
    """The masks of the whole image, made square, against a slow count of where each pixel's centre comes from."""
    split, side = full_scale_layouts.voc(folder("voc")).test, 32
    found = Measured(split, centre(side), whole(side), encoding(UNCHANGED))[0]
    dog = VOC_CLASSES.index("dog")
    assert found["image"].shape == found["whole"].shape == (3, side, side)
    assert not torch.equal(found["image"], found["whole"])
    assert found["masks"].shape == (len(VOC_CLASSES), side, side)
    expected = torch.zeros(side, side, dtype=torch.bool)
    for y in range(side):
        for x in range(side):
            row, column = (y + 0.5) * HEIGHT / side, (x + 0.5) * WIDTH / side
            expected[y, x] = 5 <= row < 25 and 10 <= column < 31
    assert torch.equal(found["masks"][dog] > 0.5, expected)
    assert found["masks"].sum() == pytest.approx(21 * 20 * (side / HEIGHT) * (side / WIDTH), rel=0.01)


def test_objects_outside_of_the_crop_are_looked_for_too(tmp_path: Path) -> None:
    """As the authors do: classified by the centre, explained as a whole."""
    Image.new("RGB", (200, 80)).save(tmp_path / "wide.jpg")
    split = Split(tmp_path, [(str(tmp_path / "wide.jpg"), torch.ones(1))], ["car"], boxes=[[Box(0, 0, 0, 20, 80)]])
    found = Measured(split, centre(32), whole(32), encoding(UNCHANGED))[0]
    assert (found["masks"].amax((0, 1)) > 0.5).sum() == 3


def test_plantvillage_is_split_where_it_is_not(folder: Make, tmp_path: Path) -> None:
    found, again = (full_scale_layouts.plantvillage(folder("plantvillage")) for _ in range(2))
    assert sorted(targets(found.test)) == [0, 1, 2]
    assert sorted(targets(found.train)) == [0] * 4 + [1] * 4 + [2] * 4
    assert set(names(found.train)).isdisjoint(names(found.test))
    assert names(found.test) == names(again.test)
    for now, then in (("train", "train"), ("val", "valid")):
        shutil.copytree(folder("imagenet") / now, tmp_path / then)
    assert [len(split) for split in full_scale_layouts.plantvillage(tmp_path)[:2]] == [12, 6]


def test_few_images_of_each_class_are_chosen_by_the_seed(folder: Make) -> None:
    split = full_scale_layouts.imagenet(folder("imagenet")).train
    first, same, other = (few(split, 2, seed) for seed in (3, 3, 4))
    assert targets(first) == [0, 0, 1, 1]
    assert names(first) == names(same) != names(other)
    assert set(names(first)) <= set(names(split))
    with pytest.raises(ValueError, match="one class each"):
        few(full_scale_layouts.voc(folder("voc")).train, 2, 0)


def test_held_out_images_are_the_same_for_every_student_and_never_trained_on(folder: Make) -> None:
    split = full_scale_layouts.imagenet(folder("imagenet")).train
    rest, kept = held_out(split, 2)
    assert targets(kept) == [0, 0, 1, 1]
    assert sorted(names(rest) + names(kept)) == names(split)
    assert names(held_out(split, 2)[1]) == names(kept)
    several = full_scale_layouts.voc(folder("voc")).train
    rest, kept = held_out(several.some(list(range(6)) * 5), 1)
    assert (len(rest), len(kept)) == (10, len(VOC_CLASSES))


def test_images_of_a_run(folder: Make, tmp_path: Path) -> None:
    """Shots come from what is not held out, validation from what is; unrelated images take the training's place."""
    here = folder("imagenet")
    run = run_on(here, tmp_path, "imagenet", recipe={"per_class": 3, "held_out": 1}, split="validation")
    layout = full_scale_layouts.imagenet(here)
    train, validation = images_of(run, layout)
    assert targets(train) == [0, 0, 0, 1, 1, 1]
    assert targets(validation) == [0, 1]
    assert set(names(train)).isdisjoint(names(validation))
    assert images_of(replace(run, split="test"), layout)[1] is layout.test
    train, _ = images_of(replace(run, unrelated=folder("sun397")), layout)
    assert train.classes == ["a/abbey", "a/apartment_building/outdoor", "b/bakery/shop"]
    assert targets(train) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="no labels"):
        images_of(replace(run, unrelated=folder("sun397"), arm="cross_entropy"), layout)
    birds = full_scale_layouts.waterbirds(folder("waterbirds"))
    own = images_of(run_on(here, tmp_path, "waterbirds", split="validation"), birds)[1]
    assert own is birds.validation


def test_images_are_held_out_only_where_there_are_no_others_to_choose_on(folder: Make, tmp_path: Path) -> None:
    here = folder("waterbirds")
    birds = full_scale_layouts.waterbirds(here)
    run = run_on(here, tmp_path, "waterbirds", recipe={"held_out": 1}, split="validation")
    assert images_of(run, birds) == (birds.train, birds.validation)
    words = ["--data", "waterbirds", str(here), "--held-out"]
    asked, not_asked = (full_scale.run_of(full_scale.arguments([*words, number])) for number in "10")
    with pytest.raises(ValueError, match="Leave out --held-out"):
        images_of(asked, birds)
    assert images_of(not_asked, birds) == (birds.train, birds.test)
    assert asked.settings().keys() == run.settings().keys()
    assert "hold_out" not in run.settings()


ONE_OF_EACH = {
    "imagenet": {"arm": "kd"},
    "sun397": {"arm": "cross_entropy"},
    "waterbirds": {"arm": "e2kd", "recipe": {"per_class": 4}},
    "voc": {"arm": "frozen_e2kd"},
    "plantvillage": {"arm": "e2kd", "recipe": {"rand_augment": 10, "adaptive_clip": 0.01, "optimizer": "Adam"}},
}  # fmt: skip
MEASURED = {
    "imagenet": {"accuracy", "agreement"},
    "waterbirds": {"worst_group", "out_of_distribution_accuracy", "agreement landbird on water"},
    "voc": {"f1", "agreement", "epg", "teacher_epg"},
}  # fmt: skip


@pytest.mark.parametrize("layout", list(ONE_OF_EACH))
def test_a_student_of_each_layout(folder: Make, tmp_path: Path, layout: str) -> None:
    """From the folder to a result that says what it is; the same command again finds it done."""
    run = run_on(folder(layout), tmp_path, layout, **ONE_OF_EACH[layout])
    row = distil(run)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["rows"] == [row]
    assert found["settings"]["recipe"]["table"] == PRESETS[layout].table
    assert {"torch", "python", "platform", "threads"} <= found["environment"].keys()
    assert MEASURED.get(layout, set()) <= row.keys()
    measured = {name: row[name] for name in row.keys() - {"split", "arm", "seed", "temperature", "weight", "processes"}}
    assert all(0 <= value <= 1 for value in measured.values())
    assert load_file(tmp_path / "model.safetensors").keys()
    (tmp_path / "model.safetensors").unlink()
    assert distil(run) == row
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("layout", "arm", "teacher", "student"),
    [
        ("voc", "e2kd", "bcos.official", "bcos.resnet20"),
        ("imagenet", "frozen_e2kd", "bcos.official", "test_resnet"),
        ("imagenet", "frozen_e2kd", "test_resnet", "bcos.resnet20"),
        ("imagenet", "e2kd_all", "test_resnet", "test_resnet"),
        ("imagenet", "frozen_e2kd_all", "test_resnet", "test_resnet"),
        ("imagenet", "e2kd_all", "bcos.official", "test_resnet"),
    ],
)
def test_networks_of_both_kinds_learn_from_one_another(
    folder: Make, tmp_path: Path, layout: str, arm: str, teacher: str, student: str
) -> None:
    """Live and frozen: what either takes and how it is explained is found out, not told."""
    classes = {"voc": len(VOC_CLASSES), "imagenet": 2}[layout]
    torch.manual_seed(0)
    model = bcos.resnet20(classes) if teacher == "bcos.official" else network(teacher, classes, None)
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    recipe = {"teacher": teacher, "student": student}
    run = run_on(folder(layout), tmp_path / "out", layout, arm=arm, recipe=recipe)
    row = distil(replace(run, teacher_checkpoint=tmp_path / "teacher.safetensors"))
    assert 0 <= row["agreement"] <= 1
    if layout == "voc":
        assert row["epg"] > 0
        assert row["teacher_epg"] > 0


def test_a_run_that_was_stopped_ends_where_it_would_have(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, with a schedule, augmentation, shuffling and explained fractions; other workers or not."""
    recipe = {"epochs": 2, "warmup": 1, "optimizer": "Adam", "lr": 1e-3}
    whole = run_on(folder("waterbirds"), tmp_path / "whole", "waterbirds", fraction=0.5, recipe=recipe)
    row = distil(whole)
    stopped = replace(whole, out=tmp_path / "stopped", workers=1, evaluate_every=1)

    def killed(self: Any, number: int) -> float:
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number)

    epoch = Distillation.epoch
    reset()
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            distil(stopped)
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["epoch_0"]
    with pytest.raises(SystemExit, match="other settings"):
        distil(replace(stopped, weight=3.0))
    reset()
    assert distil(stopped) == row
    one, other = (load_file(run.out / "model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["epoch_1"]


def test_a_complete_cache_needs_no_teacher(folder: Make, tmp_path: Path) -> None:
    """It has the answers that matter; agreement, which would take the teacher itself, is not made up."""
    first = run_on(folder("plantvillage"), tmp_path / "first", "plantvillage", arm="frozen_kd")
    distil(first)
    reset()
    alone = {"recipe": {"teacher": "none", "per_class": 3}, "arm": "frozen_e2kd", "cache": tmp_path / "first" / "cache"}
    row = distil(run_on(folder("plantvillage"), tmp_path / "second", "plantvillage", **alone))
    assert row["accuracy"] is not None
    assert "agreement" not in row
    reset()
    with pytest.raises(ValueError, match="live teacher"):
        distil(run_on(folder("plantvillage"), tmp_path / "third", "plantvillage", **alone | {"arm": "kd"}))


def test_parts_that_a_criterion_trains_are_trained_and_saved(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hint(nn.Module):
        """Scales the logits by a number it learns."""

        def __init__(self, student: nn.Module, teacher: Any, run: Run, multilabel: bool) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.scale * logits, labels)

    monkeypatch.setitem(ARMS, "hint", Hint)
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="hint")
    made = Distillation(run)
    made.epoch(0)
    trained = made.criterion.scale.detach().clone()
    assert trained != 1
    made.save(0)
    with torch.no_grad():
        made.criterion.scale.fill_(7.0)
    assert made.resume() == 1
    assert made.criterion.scale == trained


def test_a_rival_with_a_memory_under_e2kd(folder: Make, tmp_path: Path) -> None:
    made = Distillation(run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="crd_e2kd"))
    made.epoch(0)
    assert {"cosine", "kd", "crd"} <= made.criterion.parts.keys()
    assert any(name.startswith("criterion.memory") for name in made.criterion.state_dict())


def test_official_checkpoints_and_torchvisions_networks_are_teachers(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 64, 64)
    save_file(bcos.resnet18(5).state_dict(), tmp_path / "official.safetensors")
    official = network("bcos.official", 5, tmp_path / "official.safetensors")
    assert official(images).shape == (2, 5)
    assert normalization_of(official) == UNCHANGED
    standard = network("torchvision.resnet18", 5, None)
    save_file(standard.state_dict(), tmp_path / "standard.safetensors")
    again = network("torchvision.resnet18", 5, tmp_path / "standard.safetensors")
    assert torch.equal(again.eval()(images), standard.eval()(images))
    for wrong, said in (("bcos.official", "file of an official"), ("bcos.resnet18", "without weights")):
        with pytest.raises(ValueError, match=said):
            network(wrong, 5, None, pretrained=True)


def test_scores_are_shares_of_images_and_groups() -> None:
    """Two batches against counting by hand."""
    scores = Scores(2, groups=("a", "b", "c", "d"), taught=True)
    answers, labels, theirs = [0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]
    groups = [0, 1, 1, 3, 2]
    for part in (slice(0, 2), slice(2, 5)):
        logits, taught = (torch.eye(2)[torch.tensor(some[part])] for some in (answers, theirs))
        scores.update(logits, taught, {"target": torch.tensor(labels[part]), "group": torch.tensor(groups[part])})
    found = scores.compute()
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["agreement"] == pytest.approx(3 / 5)
    assert [found[f"accuracy {group}"] for group in "abcd"] == [1.0, 0.5, 0.0, 1.0]
    assert found["worst_group"] == 0.0
    assert (found["in_distribution_accuracy"], found["out_of_distribution_accuracy"]) == (1.0, 0.25)
    with pytest.raises(ValueError, match="classes"):
        Scores(2, taught=True).update(torch.eye(2), torch.rand(2, 3), {"target": torch.tensor([0, 1])})


def test_evidence_on_the_object_is_counted_for_each_class_in_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that is the same everywhere has the object's share of the image; one row per image and class."""
    monkeypatch.setattr(full_scale_scores, "evidence", lambda model, images, classes: images[:, :1] * 0 + 1)
    scores, masks = Scores(3, multilabel=True, regions=True, taught=False), torch.zeros(2, 3, 4, 4)
    masks[0, 1, :2], masks[0, 2, 0, 0], masks[1, 2] = 1, 1, 1
    scores.localize("epg", nn.Identity(), torch.rand(2, 3, 4, 4), masks)
    logits, labels = torch.tensor([[2.0, 1.0, -1.0], [-1.0, -1.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 0, 1]])
    scores.update(logits, None, {"target": labels.float()})
    assert scores.compute() == pytest.approx({"epg": (1 / 2 + 1 / 16 + 1) / 3, "f1": 1.0, "f1_macro": 1.0})


def test_f1_is_of_all_classes_together_as_the_authors_count_it() -> None:
    """At logits >= 0. Classes that are never found cost the mean over classes more."""
    scores = Scores(3, multilabel=True, taught=False)
    logits = torch.tensor([[1.0, 0.0, -1.0], [2.0, -1.0, -1.0]])
    scores.update(logits, None, {"target": torch.tensor([[1, 1, 0], [1, 0, 1]]).float()})
    assert scores.compute() == pytest.approx({"f1": 6 / 7, "f1_macro": 2 / 3})


def test_images_are_distorted_bilinearly() -> None:
    (policy,) = [
        step
        for step in augmentation(PRESETS["imagenet-bcos-vit"], UNCHANGED).transforms
        if isinstance(step, v2.RandAugment)
    ]
    assert policy.interpolation is v2.InterpolationMode.BILINEAR


def test_command_line(folder: Make, tmp_path: Path) -> None:
    here = str(folder("voc"))
    words = ["--data", "voc", here, "--arm", "kd", "--weight-decay", "0.1", "--clip", "none", "--out", str(tmp_path)]
    run = full_scale.run_of(full_scale.arguments(words))
    assert (run.data, run.path, run.arm, run.out) == ("voc", Path(here), "kd", tmp_path)
    assert run.recipe == replace(PRESETS["voc"], weight_decay=0.1, clip=None)
    with pytest.raises(ValueError, match="--unrelated"):
        full_scale.run_of(full_scale.arguments(["--data", "imagenet", here, "--preset", "imagenet-unrelated"]))
    words = [
        "--data",
        "imagenet",
        "a folder",
        "--preset",
        "imagenet-bcos",
        "--lr",
        "0.1",
        "--temperature",
        "7",
        "--grid",
    ]
    commands = full_scale.grid(full_scale.arguments(words), words)
    assert len(set(commands)) == 2 * 4
    for arm, count in (("kd", 2), ("dkd", 4), ("at", 8), ("cross_entropy", 1)):
        own = [*words, "--arm", arm]
        assert len(set(full_scale.grid(full_scale.arguments(own), own))) == count
    with pytest.raises(SystemExit):
        full_scale.arguments([*words[:-1], "--gri"])
    for command in commands:
        again = full_scale.run_of(full_scale.arguments(shlex.split(command)[4:]))
        assert (again.split, again.path) == ("validation", Path("a folder"))
        assert again.recipe == replace(PRESETS["imagenet-bcos"], lr=0.1)
        assert again.weight in again.recipe.weights
        assert again.temperature in again.recipe.temperatures


@pytest.mark.slow
def test_presets_name_networks_and_layouts_that_exist() -> None:
    for recipe in PRESETS.values():
        assert recipe.data in full_scale_layouts.READERS
        for name in {recipe.teacher, recipe.student} - {"bcos.official"}:
            with torch.device("meta"):
                assert any(True for _ in network(name, 3, None).parameters())


@pytest.mark.slow
def test_two_processes_measure_every_image_once(folder: Make, tmp_path: Path) -> None:
    """A real run by the command line; one process then finds the same of its student."""
    here, teacher = folder("waterbirds"), tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    save_file(network("test_resnet", 2, None).state_dict(), teacher)
    short = ["--epochs", "1", "--batch", "4", "--size", "64", "--teacher", "test_resnet", "--student", "test_resnet"]
    short += ["--warmup", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["--data", "waterbirds", str(here), "--teacher-checkpoint", str(teacher), "--out", str(tmp_path / "two")]
    command = [*launch, "-m", "benchmarks.full_scale", *words, *short, "--cpu", "--workers", "0"]
    subprocess.run([*command, "--arm", "frozen_e2kd"], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (row,) = json.loads((tmp_path / "two" / "result.json").read_text())["rows"]
    assert row["processes"] == 2
    trained = tmp_path / "two" / "model.safetensors"
    one = run_on(
        here, tmp_path / "one", "waterbirds", recipe={"epochs": 0}, arm="frozen_e2kd", student_checkpoint=trained
    )
    again = distil(replace(one, teacher_checkpoint=teacher, cache=tmp_path / "two" / "cache"))
    assert {**again, "processes": 2} == pytest.approx(row)
