"""What makes a student at full scale: its settings, its images, what they go through, and its learning rate."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torchvision.transforms import v2

from benchmarks.full_scale_data import Layout, Split, few, held_out
from benchmarks.full_scale_layouts import unrelated
from benchmarks.full_scale_presets import Recipe
from benchmarks.limited_training import EVERY_CLASS, EXPLAINED, RIVALS
from benchmarks.paired import Row
from e2kd.normalization import Normalization

WARMUP_FROM = 0.01  # of the learning rate
READING_LABELS = ("cross_entropy", "dkd")
SHORTER_SIDE = 256 / 224  # of a test image, to the side of its centre crop
CHOSEN = ("temperature", "weight", "kd_weight", "max_classes", "fraction")
ELSEWHERE = ("out", "workers", "evaluate_every", "track", "cpu", "hold_out")  # may be others when a run goes on


@dataclass(frozen=True)
class Run:
    """One student.

    Attributes:
        recipe: how it is trained.
        data, path: layout and folder of the data set.
        unrelated: folder of the images to distil on instead; any images.
        arm: a name in `ARMS`.
        temperature, weight, kd_weight, max_classes, fraction: τ, λ, the weight of KD's term, how many of all classes
            are drawn in a step (None: all), and the share of each batch that is explained, as far as the arm reads
            them. λ is e²KD's weight or, of a rival without it, a multiple of the rival's own.
        split: "test", or "validation" to choose settings.
        hold_out: whether the recipe's `held_out` was asked for, and does not only stand in a preset.
        teacher_checkpoint, student_checkpoint: state_dicts.
        teacher_logit_bias: of an official B-cos network that was trained with another than -log(classes - 1).
        pretrained: whether a teacher without a checkpoint has its maker's weights.
        cache: of a frozen teacher; made where it is not complete.
        out: folder of the result and the checkpoints.
        accumulate: parts that a batch is computed in.
        evaluate_every: epochs between two looks at the measures; 0 looks at the end alone.
    """

    recipe: Recipe
    data: str
    path: Path
    out: Path
    unrelated: Path | None = None
    arm: str = "e2kd"
    seed: int = 0
    temperature: float = 1.0
    weight: float = 1.0
    kd_weight: float = 1.0
    max_classes: int | None = None
    fraction: float = 1.0
    split: str = "test"
    hold_out: bool = False
    teacher_checkpoint: Path | None = None
    teacher_logit_bias: float | None = None
    student_checkpoint: Path | None = None
    pretrained: bool = True
    cache: Path | None = None
    accumulate: int = 1
    workers: int = 8
    mixed_precision: str = "no"
    evaluate_every: int = 10
    track: str | None = None
    cpu: bool = False

    def settings(self) -> Row:
        """What makes the student what it is, in JSON's types; None for what its arm does not read."""
        kept = {name: value for name, value in asdict(self).items() if name not in ELSEWHERE}
        kept |= {name: None for name in CHOSEN if name not in read_by(self.arm)}
        found: Row = json.loads(json.dumps(kept, default=str))
        return found


def read_by(arm: str) -> list[str]:
    """Which of τ, λ, KD's weight, the drawn classes and the explained share make a difference to an arm.

    >>> read_by("e2kd"), read_by("kd"), read_by("dkd")
    (['temperature', 'weight', 'kd_weight', 'fraction'], ['temperature', 'kd_weight'], ['weight'])
    """
    distils = arm not in ("cross_entropy", "dkd")  # DKD stands in KD's place and has a τ of its own
    reads = {
        "temperature": distils,
        "weight": arm in EXPLAINED or arm in RIVALS,
        "kd_weight": distils,
        "max_classes": arm in EVERY_CLASS,
        "fraction": arm in EXPLAINED,
    }
    return [name for name in CHOSEN if reads[name]]


def images_of(run: Run, layout: Layout) -> tuple[Split, Split]:
    """What the student is trained on, and what it is measured on. Images are held out of the training where the data
    set has none to choose settings on.

    Raises:
        ValueError: for held-out images that would serve nothing, an arm that can't read its images, and no images.
    """
    train, validation = layout.train, layout.validation
    if validation is not None and run.hold_out:
        raise ValueError(
            f"The data set in {run.path} has images of its own to choose settings on: held-out ones would be lost to "
            "the training. Leave out --held-out."
        )
    if validation is None and run.recipe.held_out:
        train, validation = held_out(train, run.recipe.held_out)
    if run.unrelated is not None:
        if run.arm in READING_LABELS:
            raise ValueError(
                f"Unrelated images have no labels of these classes, which {run.arm} reads: name another arm."
            )
        train = unrelated(run.unrelated)
    if run.recipe.per_class is not None:
        train = few(train, run.recipe.per_class, run.seed)
    measured = layout.test if run.split == "test" else validation
    if measured is None:
        raise ValueError("There are no images to choose settings on. Pass --held-out, images of each class.")
    if not len(measured):
        raise ValueError(f"Expected {run.split} images in {run.path}, but the data set names none.")
    return train, measured


def augmentation(recipe: Recipe, normalization: Normalization) -> v2.Compose:
    """What a training image goes through; the maps of a frozen teacher follow it."""
    magnitude, bilinear = recipe.rand_augment, v2.InterpolationMode.BILINEAR
    policy = [] if magnitude is None else [v2.RandAugment(magnitude=magnitude, interpolation=bilinear)]
    crop = v2.RandomResizedCrop(recipe.size, (recipe.least_area, 1.0))
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *policy, encoding(normalization)])


def centre(size: int) -> v2.Compose:
    """The square that an image is classified by."""
    return v2.Compose([v2.Resize(round(size * SHORTER_SIDE)), v2.CenterCrop(size)])


def whole(size: int) -> v2.Resize:
    """All of an image, which objects are looked for in, as a square."""
    return v2.Resize((size, size))


def encoding(normalization: Normalization) -> v2.Compose:
    """An image of PIL as a tensor for a network."""
    return v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normalization), v2.ToPureTensor()]
    )


def schedule_of(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LRScheduler:
    """The rate rises to its value, linearly, and falls to 0 in a cosine; stepped after each batch.

    The authors step it after each epoch, and after each batch for the ViT of Fig. 5 alone: in the warm-up an epoch's
    mean rate is higher here, by half of what it rises in that epoch.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    >>> schedule = schedule_of(optimizer, 2, 6)
    >>> rates = []
    >>> for _ in range(6):
    ...     rates.append(round(schedule.get_last_lr()[0], 3))
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.01, 0.505, 1.0, 0.854, 0.5, 0.146]
    """
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup))
    if not warmup:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, WARMUP_FROM, total_iters=warmup), cosine], [warmup])
