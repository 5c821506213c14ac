"""Waterbirds of our own: cats and dogs, cut out of their photos, on photos of the sea or of greenery.

After Waterbirds-100 in *Good Teachers Explain* (Table 4). The label is whether the animal is a dog. `Mode.ALIGNED`:
dogs on greenery, cats on water; `Mode.REVERSED`: the other way round; `Mode.RANDOM`: either. No animal and no
background is in two parts. Backgrounds are photos of ImageNet classes, one of each: WATER are the sea's shores and
what lives or floats in it, GREENERY are insects, plants and fungi.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from benchmarks.cifar_data import SHARED
from benchmarks.pets import DOG, cut, middle, squares
from e2kd.demo.data import Mode, Scenes, draw_digits, textures_for
from e2kd.demo.textures import uniform

FOLDER = SHARED / "data" / "imagenet-samples" / "all"
SIZE = 64  # side of a composite, pixels
SHARES = (0.5, 0.8)  # side of an animal, of the composite's
CROPS = (0.5, 1.0)  # side of a background's crop, of the photo's
BACKGROUND = 96  # side to which the backgrounds are kept, pixels
GREENERY, WATER = 1, 0  # as the labels that they go with where they are aligned: dogs, cats
RANGES = {
    GREENERY: (("n02165105", "n02281787"), ("n11879895", "n13133613")),
    WATER: (("n01484850", "n01498041"), ("n02066245", "n02077923"), ("n09332890", "n09428293")),
}
MORE_WATER = (
    "aircraft_carrier", "anemone_fish", "beacon", "breakwater", "canoe", "catamaran", "container_ship", "coral_reef",
    "dam", "dock", "drilling_platform", "fireboat", "gondola", "lifeboat", "liner", "lionfish", "paddle", "pier",
    "pirate", "rock_beauty", "schooner", "scuba_diver", "snorkel", "speedboat", "submarine", "suspension_bridge",
    "trimaran", "wreck", "yawl",
)  # fmt: skip
PLACES = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}  # of every five backgrounds


@cache
def backgrounds(kind: int, part: str) -> Tensor:
    """The photos of a kind in a part, [N, 3, BACKGROUND, BACKGROUND] in [0, 1]."""
    paths = sorted(FOLDER.glob("*/*.jpg"))
    chosen = [path for path in paths if _is_of(kind, *path.stem.split("_", 1))]
    photos = [Image.open(path).convert("RGB") for k, path in enumerate(chosen) if k % 5 in PLACES[part]]
    return torch.stack([cut(photo, middle(photo.size), BACKGROUND).permute(2, 0, 1) for photo in photos]) / 255


def _is_of(kind: int, synset: str, name: str) -> bool:
    return any(low <= synset <= high for low, high in RANGES[kind]) or (kind == WATER and name in MORE_WATER)


def composites(part: str, mode: Mode, count: int, seed: int) -> Scenes:
    """`count` images of a part's animals, half of them dogs, the same for the same seed."""
    generator = Generator().manual_seed(seed)
    pets = squares(part, SIZE, animals=True)
    dogs, cats = (found.nonzero().flatten() for found in (pets.breeds == DOG, pets.breeds != DOG))
    half = count // 2
    places = torch.cat([of[draw_digits(half, len(of), generator)] for of in (cats, dogs)])
    places = places[torch.randperm(len(places), generator=generator)]
    labels = (pets.breeds[places] == DOG).long()
    kinds = textures_for(labels, mode, generator)
    behind = _cropped(part, kinds, generator)
    masks = pets.masks[places, None]
    animals, coverage = _placed(pets.images[places] / 255 * masks, masks, generator)
    return Scenes(animals + behind * (1 - coverage), labels, kinds, coverage[:, 0] > 0.5, places)


def _cropped(part: str, kinds: Tensor, generator: Generator) -> Tensor:
    """A crop, some of them mirrored, of a photo of each kind [N]: [N, 3, SIZE, SIZE]."""
    found = torch.zeros(len(kinds), 3, SIZE, SIZE)
    for kind in (WATER, GREENERY):
        photos, mine = backgrounds(kind, part), (kinds == kind).nonzero().flatten()
        scale = uniform((len(mine),), *CROPS, generator)
        centre = (1 - scale)[:, None] * uniform((len(mine), 2), -1.0, 1.0, generator)
        found[mine] = _sampled(photos[draw_digits(len(mine), len(photos), generator)], scale, centre, generator)
    return found


def _placed(animals: Tensor, masks: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Animals [N, 3, SIZE, SIZE], 0 outside of their masks, made smaller at a random place; their coverage alike."""
    share = uniform((len(animals),), *SHARES, generator)
    centre = -(1 - share)[:, None] * uniform((len(animals), 2), -1.0, 1.0, generator) / share[:, None]
    moved = _sampled(torch.cat([animals, masks], 1), 1 / share, centre, generator)
    return moved[:, :3], moved[:, 3:]


def _sampled(images: Tensor, scale: Tensor, centre: Tensor, generator: Generator) -> Tensor:
    """Windows of images, `scale` [N] times as wide and high, around `centre` [N, 2] in [-1, 1]; half are mirrored."""
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = scale * (2 * torch.randint(0, 2, scale.shape, generator=generator) - 1)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [len(images), images.shape[1], SIZE, SIZE], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)
