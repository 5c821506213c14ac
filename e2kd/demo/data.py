"""Real handwritten digits on textures that give the class away: a Waterbirds-100 in a second, offline.

The label is whether the digit is 5 or more. In the students' training data the background's texture equals the label
(`Mode.ALIGNED`), so that a network may learn either; in the out-of-distribution test it contradicts it
(`Mode.REVERSED`); the teacher has seen them unrelated (`Mode.RANDOM`). After the protocol of Waterbirds-100 in
*Good Teachers Explain* (ECCV 2024), with scikit-learn's 1797 digits in the place of the birds.
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from e2kd.demo.textures import blend, texture_heights, uniform

SIZE = 32  # side of a canvas, pixels
SIDES = (14, 22)  # side of an enlarged digit, pixels
DARK, BRIGHT, TINT = (0.0, 0.35), (0.35, 0.7), (0.5, 1.0)  # intensity per channel: a texture's two colours, the digit's
INK = 0.5  # coverage from which a pixel belongs to the digit's mask
SPLIT_SEED = 1797  # the split is one and the same in every run


class Mode(Enum):
    """How an image's texture follows its label."""

    RANDOM = "random"
    ALIGNED = "aligned"
    REVERSED = "reversed"


class Part(Enum):
    """Which digits: no digit is in two parts."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Digits(NamedTuple):
    """Real digits: ink [N, 8, 8] in [0, 1], classes 0 to 9 [N] and their places [N] in scikit-learn's set."""

    ink: Tensor
    classes: Tensor
    places: Tensor


class Scenes(NamedTuple):
    """Images [N, 3, 32, 32] in [0, 1], labels and textures [N] in {0, 1}, and what a network does not see.

    That is the digits' masks [N, 32, 32] and their places [N] in scikit-learn's set.
    """

    images: Tensor
    labels: Tensor
    textures: Tensor
    masks: Tensor
    places: Tensor


@cache
def all_digits() -> Digits:
    """scikit-learn's 1797 digits, in its order."""
    from sklearn.datasets import load_digits

    ink, classes = load_digits(return_X_y=True)
    return Digits(torch.tensor(ink).float().view(-1, 8, 8) / 16, torch.tensor(classes), torch.arange(len(classes)))


def digits_of(part: Part) -> Digits:
    """The digits of one part: 1097 to train, 300 to tune, 400 to report.

    >>> [len(digits_of(part).classes) for part in Part]
    [1097, 300, 400]
    """
    digits = all_digits()
    order = torch.randperm(len(digits.classes), generator=Generator().manual_seed(SPLIT_SEED))
    test, validation, train = order.split([400, 300, len(order) - 700])
    chosen = {Part.TRAIN: train, Part.VALIDATION: validation, Part.TEST: test}[part]
    return Digits(*(field[chosen] for field in digits))


def textures_for(labels: Tensor, mode: Mode, generator: Generator) -> Tensor:
    """Textures [N] (0 stripes, 1 blobs) for the labels [N].

    >>> textures_for(torch.tensor([0, 1, 1]), Mode.REVERSED, torch.Generator())
    tensor([1, 0, 0])
    """
    if mode is Mode.RANDOM:
        return torch.randint(0, 2, labels.shape, generator=generator)
    return labels if mode is Mode.ALIGNED else 1 - labels


def draw_digits(count: int, available: int, generator: Generator) -> Tensor:
    """Places [count] of the digits to draw: every digit once, in a new order, before any digit again."""
    rounds = -(-count // available)
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])[:count]


def placed(ink: Tensor, generator: Generator) -> Tensor:
    """Coverage [N, SIZE, SIZE] in [0, 1] of digits [N, 8, 8]: each enlarged at random, at a random place inside."""
    count = len(ink)
    share = uniform((count,), SIDES[0] / SIZE, SIDES[1] / SIZE, generator)  # of the canvas' side
    centre = (1 - share)[:, None] * uniform((count, 2), -1.0, 1.0, generator)
    scale = 1 / share
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = -centre * scale[:, None]
    grid = F.affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(ink[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp(0, 1)


def painted(coverage: Tensor, textures: Tensor, generator: Generator) -> Tensor:
    """Images [N, 3, SIZE, SIZE]: digits of the coverage in one tint each, on coloured textures [N]."""
    count = len(textures)
    heights = texture_heights(textures, SIZE, generator)
    dark, bright, tint = (uniform((count, 3), *levels, generator) for levels in (DARK, BRIGHT, TINT))
    background = blend(heights, dark, bright)
    return torch.lerp(background, tint[..., None, None], coverage[:, None])


def make_scenes(part: Part, mode: Mode, count: int, seed: int) -> Scenes:
    """`count` images of the part's digits, the same for the same seed; the global random state is left alone.

    >>> scenes = make_scenes(Part.TEST, Mode.ALIGNED, 4, seed=0)
    >>> scenes.images.shape, bool((scenes.textures == scenes.labels).all())
    (torch.Size([4, 3, 32, 32]), True)
    """
    generator = Generator().manual_seed(seed)
    digits = digits_of(part)
    chosen = draw_digits(count, len(digits.classes), generator)
    labels = (digits.classes[chosen] >= 5).long()
    textures = textures_for(labels, mode, generator)
    coverage = placed(digits.ink[chosen], generator)
    return Scenes(painted(coverage, textures, generator), labels, textures, coverage > INK, digits.places[chosen])
