"""One draw for image and map: every operation of Kornia that moves pixels, checked against Kornia's own pixels."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia_reference import GRIDS, augmented, mean_error, rough_maps, smooth_maps, taught
from torch import Tensor, nn

from e2kd import augment, kornia_stages
from e2kd.augment import JointAugmentation, usual_augmentations
from e2kd.kornia_stages import probe, walk
from e2kd.regions import project
from e2kd.warping import warp_by_matrix

S = (224, 224)
Operations = Callable[[], list[nn.Module]]
POLICY = [[("rotate", -30.0, 30.0)], [("shear_x", -0.3, 0.3)], [("translate_y", -0.5, 0.5)]]

# What resamples images, with the canonical size that makes 224 x 224 of it.
RIGID: dict[str, tuple[tuple[int, int], Operations]] = {
    "resized crop": ((256, 256), lambda: [K.RandomResizedCrop(S)]),
    "resized crop, half pixels": ((256, 256), lambda: [K.RandomResizedCrop(S, align_corners=False)]),
    "resized crop, resample": ((256, 320), lambda: [K.RandomResizedCrop(S, cropping_mode="resample")]),
    "resized crop, nearest": ((256, 256), lambda: [K.RandomResizedCrop(S, resample="nearest")]),
    "crop": ((256, 256), lambda: [K.RandomCrop(S, padding=(8, 20), fill=0.5)]),
    "crop, resample": ((256, 256), lambda: [K.RandomCrop(S, padding=(9, 3, 5, 8), cropping_mode="resample")]),
    "crop, padded where needed": ((200, 256), lambda: [K.RandomCrop(S, pad_if_needed=True)]),
    "centre crop": ((256, 256), lambda: [K.CenterCrop(S)]),
    "centre crop, resample": ((256, 256), lambda: [K.CenterCrop(S, cropping_mode="resample")]),
    "pad": ((192, 200), lambda: [K.PadTo(S, pad_value=0.5)]),
    "pad and cut": ((192, 256), lambda: [K.PadTo(S)]),
    "resize and cut": ((256, 300), lambda: [K.SmallestMaxSize(230), K.CenterCrop(S)]),
    "resize and pad": ((256, 300), lambda: [K.LongestMaxSize(224), K.PadTo(S)]),
    "resize, antialiased, and cut": ((300, 300), lambda: [K.Resize((260, 240), antialias=True), K.RandomCrop(S)]),
    "rotation": (S, lambda: [K.RandomRotation(45.0, p=1.0)]),
    "rotation, half pixels": (S, lambda: [K.RandomRotation(45.0, align_corners=False, p=1.0)]),
    "affine": (S, lambda: [K.RandomAffine(30, (0.1, 0.1), (0.7, 1.3), 15, p=1.0)]),
    "affine, corners": (S, lambda: [K.RandomAffine(180, (0.2, 0.2), (0.4, 2.0), 20, align_corners=True, p=1.0)]),
    "affine, coloured": (S, lambda: [K.RandomAffine(30, padding_mode="fill", fill_value=torch.ones(3), p=1.0)]),
    "shear": (S, lambda: [K.RandomShear(25.0, p=1.0)]),
    "translate": (S, lambda: [K.RandomTranslate((-0.3, 0.3), (-0.3, 0.3), p=1.0)]),
    "perspective": (S, lambda: [K.RandomPerspective(0.5, p=1.0)]),
    "perspective, corners": (S, lambda: [K.RandomPerspective(0.5, align_corners=True, p=1.0)]),
    "crop and erase": ((256, 256), lambda: [K.RandomResizedCrop(S), K.RandomErasing(p=1.0, value=0.5)]),
    "erase twice and crop": (S, lambda: [K.RandomErasing(p=1.0), K.RandomErasing(p=1.0), K.RandomResizedCrop(S)]),
    "crop and RandAugment": ((256, 256), lambda: [K.RandomResizedCrop(S), K.auto.RandAugment(2, 15, POLICY)]),
}  # fmt: skip

# What Kornia can warp and no matrix says: a probe image does.
PROBED: dict[str, Operations] = {
    "elastic": lambda: [K.RandomElasticTransform(alpha=(8.0, 8.0), p=1.0)],
    "elastic, corners": lambda: [K.RandomElasticTransform(alpha=(8.0, 8.0), align_corners=True, p=1.0)],
    "border": lambda: [K.RandomAffine(30, (0.2, 0.2), padding_mode="border", p=1.0)],
    "reflection": lambda: [K.RandomAffine(30, (0.2, 0.2), padding_mode="reflection", p=1.0)],
    "crop, reflected": lambda: [K.RandomCrop(S, padding=40, padding_mode="reflect")],
    "own class, then erase": lambda: [Shift(p=1.0), K.RandomErasing(p=1.0)],
}


class Shift(K.GeometricAugmentationBase2D):
    """Somebody's own operation: 40 pixels to the right, with the last column smeared behind it."""

    def compute_transformation(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any]) -> Tensor:
        matrix = self.identity_matrix(input).clone()
        matrix[:, 0, 2] = 40
        return matrix

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        return F.pad(input, (40, 0, 0, 0), mode="replicate")[..., :-40]


def flips() -> list[nn.Module]:
    return [K.RandomHorizontalFlip(), K.RandomVerticalFlip(), K.RandomRotation90((0, 3), p=0.5)]


def geometry(name: str) -> tuple[JointAugmentation, tuple[int, int]]:
    size, operations = RIGID[name]
    return JointAugmentation(*operations()), size


@pytest.mark.parametrize("name", RIGID)
def test_maps_follow_every_rigid_operation(name: str) -> None:
    """Against maps as large as the image that go the way of Kornia's masks; every grid, smooth and rough."""
    augmentation, size = geometry(name)
    assert augmentation.rigid
    for make in (smooth_maps, rough_maps):
        for channels, cells in GRIDS:
            assert mean_error(augmentation, make(4, channels, cells), size) < 5e-4, (make.__name__, cells)


@pytest.mark.parametrize("name", PROBED)
def test_maps_follow_what_a_probe_shows(name: str) -> None:
    augmentation = JointAugmentation(*PROBED[name]())
    assert not augmentation.rigid
    for make in (smooth_maps, rough_maps):
        for channels, cells in GRIDS:
            assert mean_error(augmentation, make(3, channels, cells), S) < 5e-4, (make.__name__, cells)


@pytest.mark.parametrize("seed", range(16))
def test_maps_follow_random_compositions(seed: int) -> None:
    """Two or three operations in any order, gated, nested and at random: fill on the way is zero on the map."""
    draw = random.Random(seed)
    moving = [RIGID[name][1] for name in RIGID if RIGID[name][0] == S]
    other: list[Operations] = [
        flips,
        lambda: [K.RandomErasing()],
        lambda: [K.ImageSequential(K.ColorJitter(0.1, 0.1, 0.1, 0.1), *flips(), random_apply=2)],
        lambda: [K.AugmentationSequential(K.RandomGaussianBlur((3, 3), (0.1, 2.0)), K.RandomHorizontalFlip())],
        lambda: [K.RandomResizedCrop(S, cropping_mode="resample")],
    ]
    count = draw.choice([1, 2])
    operations = [o for make in draw.choices(moving, k=count) + draw.choices(other, k=2 - count // 2) for o in make()]
    draw.shuffle(operations)
    augmentation = JointAugmentation(*operations)
    assert augmentation.rigid
    for make in (smooth_maps, rough_maps):
        for channels, cells in GRIDS:
            error = mean_error(augmentation, make(4, channels, cells), S, seed)
            # Each of Kornia's resamplings blurs the reference, which shows in cells of 4 pixels.
            assert error < (2e-3 if cells == 56 else 1e-3), (
                make.__name__,
                cells,
                [type(o).__name__ for o in operations],
            )


@pytest.mark.parametrize("name", RIGID)
def test_pixels_of_the_image_come_from_where_the_walk_says(name: str) -> None:
    """An image whose colours are its coordinates: every pixel that is no fill names its origin, to 0.02 pixels."""
    augmentation, (height, width) = geometry(name)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    image = torch.stack([x / width, y / height, torch.ones_like(x)]).expand(3, -1, -1, -1).double()
    torch.manual_seed(3)
    params = augmentation.operations.forward_parameters(image.shape)
    moved = augmentation.operations(image, params=params)
    way = walk(augmentation.operations, params, 3)
    rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in moved.shape[-2:])
    u, v, _ = project(way.matrices, columns[None, None], rows[None, :, None])
    _, share = probe(augmentation.operations, params, image)
    sure = F.avg_pool2d(share, 5, 1, 2, count_include_pad=False)[:, 0] > 1 - 1e-9
    sure &= (u > 2) & (u < width - 2) & (v > 2) & (v < height - 2)  # bilinear ends at the last pixel's centre
    apart = torch.hypot(moved[:, 0] * width - u, moved[:, 1] * height - v)
    assert sure.float().mean() > 0.2
    assert apart[sure].max() < (0.75 if "nearest" in name or "half pixels" in name else 0.02)
    assert apart[sure].mean() < (0.5 if "nearest" in name else 0.02)


def test_flips_and_quarter_turns_are_exact_and_identity_changes_nothing() -> None:
    """Kornia flips a map of 7 x 7 pixels as it flips the image; ours are the same cells, also those not drawn."""
    for maps in (rough_maps(32, 1, 7).double(), rough_maps(32, 6, 56).double()):
        augmentation = JointAugmentation(*flips())
        _, got, params = augmented(augmentation, maps, S)
        expected = augmentation.operations(maps, params=params, data_keys=["mask"])
        small = K.AugmentationSequential(*flips()[:2])
        expected = small(maps, params=params[:2], data_keys=["mask"])
        times = params[2].data["times"].round() * (params[2].data["batch_prob"] > 0.5)
        expected = torch.stack([m.rot90(int(k), (1, 2)) for m, k in zip(expected, times, strict=True)])
        torch.testing.assert_close(got.maps, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.valid, torch.ones_like(got.valid), rtol=0, atol=1e-6)
        assert len(set(times.tolist())) > 2


@pytest.mark.parametrize(
    "operation",
    [
        K.RandomRotation(30.0, p=0.0), K.RandomPerspective(p=0.0), K.RandomErasing(p=0.0),
        K.RandomElasticTransform(p=0.0), K.RandomAffine(20, padding_mode="border", p=0.0), K.ColorJitter(0.1, p=1.0),
        K.RandomResizedCrop(S, (1.0, 1.0), (1.0, 1.0)), K.Resize((96, 96)), K.RandomCrop(S), K.PadTo(S),
    ],
    ids=lambda operation: type(operation).__name__,
)  # fmt: skip
def test_a_draw_that_moves_nothing_returns_the_maps(operation: nn.Module) -> None:
    maps = rough_maps(4, 1, 7)
    _, got, _ = augmented(JointAugmentation(operation), maps, S)
    torch.testing.assert_close(got.maps, maps, rtol=0, atol=2e-2 if isinstance(operation, K.Resize) else 1e-5)
    torch.testing.assert_close(got.valid, torch.ones_like(maps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("operation", [K.RandomRotation((15.0, 40.0)), K.RandomElasticTransform(alpha=(8.0, 8.0))])
def test_samples_that_were_not_drawn_stay_among_those_that_were(operation: nn.Module) -> None:
    maps = rough_maps(16, 1, 7)
    _, got, params = augmented(JointAugmentation(operation), maps, (64, 64))
    drawn = params[0].data["batch_prob"] > 0.5
    assert 0 < drawn.sum() < 16
    torch.testing.assert_close(got.maps[~drawn], maps[~drawn], rtol=0, atol=1e-6)
    assert ((got.maps - maps).abs().amax((1, 2, 3)) > 0.05)[drawn].all()


def test_two_crops_are_one_crop() -> None:
    """The walk through both equals the matrix of the crop they make together."""
    augmentation = JointAugmentation(K.CenterCrop((48, 56)), K.RandomCrop((32, 32)), K.RandomCrop((16, 24)))
    maps = rough_maps(5, 2, 7).double()
    _, got, params = augmented(augmentation, maps, (64, 64))
    starts = torch.tensor([4.0, 8.0]) + sum(p.data["src"][:, 0] for p in params[1:])
    matrices = torch.eye(3, dtype=torch.float64).repeat(5, 1, 1)
    matrices[:, :2, 2] = starts.double()
    expected, valid = warp_by_matrix(maps, matrices, (16, 24), (64, 64))
    torch.testing.assert_close(got.maps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.valid.double(), valid, rtol=0, atol=1e-6)


def test_a_batch_equals_batches_of_one_with_the_same_draw() -> None:
    augmentation = JointAugmentation(
        K.RandomResizedCrop((32, 32)), K.RandomRotation(40.0), K.RandomHorizontalFlip(), K.RandomErasing()
    )
    maps = rough_maps(6, 2, 7).double()
    _, got, params = augmented(augmentation, maps, (48, 40))
    for k in range(6):
        way = walk(augmentation.operations, [_row(item, k) for item in params], 1)
        one, valid = warp_by_matrix(
            maps[k : k + 1], way.matrices, (32, 32), (48, 40), frames=way.frames, holes=way.holes
        )
        torch.testing.assert_close(one, got.maps[k : k + 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(valid, got.valid[k : k + 1].double(), rtol=0, atol=1e-6)


def _row(item: Any, k: int) -> Any:
    """One sample's part of what was drawn for six."""
    data = {key: value[k : k + 1] for key, value in item.data.items() if key != "forward_input_shape"}
    shape = item.data["forward_input_shape"].clone()
    shape[0] = 1
    return item._replace(data={**data, "forward_input_shape": shape})


def test_what_was_filled_or_erased_is_zero_and_invalid() -> None:
    """Half of the image shifted out, and a box erased: both leave zero, in the share that `valid` says."""
    maps = rough_maps(4, 3, 8) + 1
    shifted = JointAugmentation(K.RandomTranslate((0.5, 0.5), (0.0, 0.0), p=1.0))
    _, got, _ = augmented(shifted, maps, (64, 64))
    assert got.valid[..., :4].max() == 0
    assert got.maps[..., :4].abs().max() == 0
    assert got.valid[..., 4:].min() > 1 - 1e-6
    assert got.maps[..., 4:].min() > 0.9
    _, got, params = augmented(JointAugmentation(K.RandomErasing(p=1.0)), maps, (64, 64))
    area = params[0].data["widths"] * params[0].data["heights"] / 64**2
    torch.testing.assert_close(1 - got.valid.mean((1, 2, 3)), area)
    torch.testing.assert_close(got.maps, maps * got.valid)


def test_what_was_unknown_before_stays_unknown() -> None:
    """A map that covers the left half: after a flip the right half is known, after a crop what is left of it."""
    valid = torch.zeros(8, 1, 8, 8)
    valid[..., :4] = 1
    maps = rough_maps(8, 1, 8) * valid
    augmentation = JointAugmentation(K.RandomHorizontalFlip(p=1.0))
    _, got = augmentation(torch.rand(8, 3, 64, 64), taught(maps, valid))
    torch.testing.assert_close(got.valid, valid.flip(3))
    for operations in ([K.RandomRotation(20.0, p=1.0)], [K.RandomElasticTransform(p=1.0)]):
        _, got = JointAugmentation(*operations)(torch.rand(8, 3, 64, 64), taught(valid.clone(), valid))
        torch.testing.assert_close(got.maps, got.valid)
        assert 0.3 < got.valid.mean() < 0.55


def test_images_and_random_numbers_are_those_of_kornia_alone() -> None:
    """With the first batch's check, without it, and without us: the same images, the same state afterwards."""
    operations = [K.RandomResizedCrop((32, 32)), K.ColorJitter(0.2, 0.2, 0.2, 0.1), K.RandomErasing(), *flips()]
    operations.append(K.auto.RandAugment(2, 10))
    augmentation, alone = JointAugmentation(*operations), K.AugmentationSequential(*copy.deepcopy(operations))
    images = torch.randint(256, (4, 3, 48, 48), dtype=torch.uint8)
    targets = taught(rough_maps(4, 1, 7))
    for _ in range(2):
        torch.manual_seed(5)
        first, got = augmentation(images, targets)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        torch.testing.assert_close(alone(images / 255), first)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(got.labels, targets.labels)
    assert torch.equal(got.logits, targets.logits)
    assert torch.equal(got.classes, targets.classes)


def test_one_draw_for_the_batch_and_draws_of_whole_batches() -> None:
    same = JointAugmentation(
        K.ImageSequential(K.RandomRotation(40.0, p=1.0), K.RandomCrop((32, 32)), same_on_batch=True)
    )
    maps = rough_maps(1, 1, 7).repeat(4, 1, 1, 1)
    _, got, _ = augmented(same, maps, (48, 48))
    torch.testing.assert_close(got.maps, got.maps[:1].expand_as(got.maps))
    seen = set()
    for seed in range(12):
        now_and_then = JointAugmentation(K.RandomCrop((42, 42), p=0.5, keepdim=True), K.Resize((28, 28), p=0.5))
        images, got, _ = augmented(now_and_then, smooth_maps(4, 1, 7), (56, 56), seed)
        seen.add(tuple(images.shape[-2:]))
        assert got.maps.shape == (4, 1, 7, 7)
        assert mean_error(now_and_then, smooth_maps(4, 1, 7), (56, 56), seed) < 2e-3
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("dtype", "returned"),
    [
        (torch.uint8, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_types_of_images_change_no_geometry(dtype: torch.dtype, returned: torch.dtype) -> None:
    """Half precision is augmented in float32: its coordinates would be whole pixels off."""
    augmentation = JointAugmentation(K.RandomAffine(30, (0.1, 0.1), p=1.0), K.RandomPerspective(p=1.0))
    images = (torch.rand(4, 3, 64, 64) * 255).round()
    images = images.to(dtype) if dtype == torch.uint8 else (images / 255).to(dtype)
    targets = taught(rough_maps(4, 1, 7))
    torch.manual_seed(0)
    got, maps = augmentation(images, targets)
    torch.manual_seed(0)
    plain, expected = augmentation(images.float() / (255 if dtype == torch.uint8 else 1), targets)
    assert got.dtype == returned
    torch.testing.assert_close(got.float(), plain, rtol=0, atol=1e-2)
    torch.testing.assert_close(maps.maps, expected.maps)


def test_autocast_and_memory_format_change_nothing() -> None:
    augmentation = JointAugmentation(K.RandomAffine(30, (0.1, 0.1), p=1.0), K.RandomResizedCrop((48, 48)))
    images, targets = torch.rand(4, 3, 64, 64, requires_grad=True), taught(rough_maps(4, 1, 7))
    results = []
    for way in (images, images.to(memory_format=torch.channels_last)):
        for autocast in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append(augmentation(way, targets))
    for moved, got in results[1:]:
        assert not moved.requires_grad
        torch.testing.assert_close(moved, results[0][0])
        torch.testing.assert_close(got.maps, results[0][1].maps)


def test_maps_come_out_on_the_grid_that_was_asked_for() -> None:
    maps = smooth_maps(4, 1, 14)
    for operations in ([K.RandomRotation(20.0, p=1.0)], [K.RandomElasticTransform(p=1.0)]):
        torch.manual_seed(0)
        _, fine = JointAugmentation(*operations, size=(14, 14))(torch.rand(4, 3, 56, 56), taught(maps))
        torch.manual_seed(0)
        torch.rand(4, 3, 56, 56)
        _, coarse = JointAugmentation(*operations, size=(7, 7))(torch.rand(4, 3, 56, 56), taught(maps))
        assert coarse.maps.shape == coarse.valid.shape == (4, 1, 7, 7)
        assert fine.maps.shape == (4, 1, 14, 14)
    torch.manual_seed(0)
    _, fine = JointAugmentation(K.RandomHorizontalFlip(p=1.0), size=(7, 7))(torch.rand(4, 3, 56, 56), taught(maps))
    torch.testing.assert_close(fine.maps, F.avg_pool2d(maps.flip(3), 2), rtol=0, atol=0.03)


def test_a_cache_of_logits_alone_passes() -> None:
    targets = taught(torch.zeros(4, 0, 0, 0))._replace(valid=torch.zeros(4, 1, 0, 0))
    images, got = JointAugmentation(K.RandomResizedCrop((32, 32)))(torch.rand(4, 3, 48, 48), targets)
    assert images.shape == (4, 3, 32, 32)
    assert got is targets


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (K.RandomMixUpV2(), "mixes, pastes"), (K.RandomCutMixV2(use_correct_lambda=True), "mixes, pastes"),
        (K.RandomMosaic(), "mixes, pastes"), (K.RandomJigsaw(), "pastes or shuffles"),
        (K.RandomTransplantation(), "mixes, pastes"), (K.RandomThinPlateSpline(), "but not masks"),
        (K.RandomFisheye(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.1, 1.0])), "not masks"),
        (nn.Conv2d(3, 3, 1), "unknown"), (K.RandomHorizontalFlip3D(), "unknown"),
        (K.PatchSequential(K.RandomHorizontalFlip(), grid_size=(2, 2), patchwise_apply=False), "unknown"),
        (K.VideoSequential(K.RandomHorizontalFlip()), "unknown"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:Geometric transformation detected in PatchSeqeuntial")
def test_operations_that_no_map_can_follow_are_refused_when_built(
    operation: nn.Module, reason: str, nested: bool
) -> None:
    made = K.ImageSequential(K.RandomHorizontalFlip(), operation) if nested else operation
    with pytest.raises(ValueError, match=f"can't take {type(operation).__name__}: .*{reason}"):
        JointAugmentation(made)


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        (torch.rand(2, 3, 8, 8), torch.zeros(2), TypeError, "for training batches"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), taught(torch.rand(2, 1, 7, 7)), TypeError, "torch.int64"),
        (torch.rand(3, 8, 8), taught(torch.rand(3, 1, 7, 7)), ValueError, r"\[3, 8, 8\]"),
        (torch.rand(3, 3, 8, 8), taught(torch.rand(2, 1, 7, 7)), ValueError, "same batch"),
    ],
)
def test_what_is_no_training_batch_raises(images: Tensor, targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        JointAugmentation(K.RandomHorizontalFlip())(images, targets)


@pytest.mark.parametrize("mode", ["slice", "resample"])
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
def test_matrices_known_by_formula_are_kornias(mode: str, corners: bool, resample: str) -> None:
    crop = K.RandomResizedCrop((5, 7), align_corners=corners, resample=resample, cropping_mode=mode)
    container = kornia_stages.pipeline(crop, K.RandomHorizontalFlip(), K.RandomVerticalFlip())
    for side in (1, 33):
        params = container.forward_parameters(torch.Size((16, 3, side, 2 * side)))
        for operation, draw in kornia_stages.drawn(container, params):
            size = draw["forward_input_shape"].tolist()
            kornias = operation.generate_transformation_matrix(torch.empty(size).double(), draw, operation.flags)
            known = kornia_stages._known_matrix(operation, draw, size[2:])
            if type(operation) is not K.RandomResizedCrop or (corners and resample == "bilinear" and side > 1):
                assert known is not None
            if known is not None:
                assert np.abs(known - kornias.numpy()).max() < 1e-9


def test_the_first_batch_finds_a_matrix_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Kornia before 0.9: the error names the operation, in the first batch in which it is drawn."""
    right = kornia_stages.matrix_of

    def wrong(operation: Any, draw: dict[str, Tensor]) -> tuple[Any, tuple[int, int]]:
        matrix, size = right(operation, draw)
        return (np.linalg.inv(matrix) if isinstance(operation, K.RandomRotation) else matrix), size

    monkeypatch.setattr(kornia_stages, "matrix_of", wrong)
    images, targets = torch.rand(4, 3, 48, 48), taught(rough_maps(4, 1, 7))
    for operations in (
        [K.RandomHorizontalFlip(p=1.0), K.RandomRotation(30.0, p=1.0), K.RandomErasing(p=1.0)],
        [K.RandomResizedCrop((32, 32)), K.ImageSequential(K.RandomRotation((20.0, 40.0), p=1.0))],
    ):
        with pytest.raises(RuntimeError, match=r"^RandomRotation moves images and maps differently: .* pixels apart"):
            JointAugmentation(*operations)(images, targets)
    JointAugmentation(K.RandomHorizontalFlip(p=1.0))(images, targets)


def test_the_first_batch_finds_fill_that_was_not_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kornia_stages, "FILLING", ())
    monkeypatch.setattr(kornia_stages, "KEEPING", (K.RandomTranslate,))
    with pytest.raises(RuntimeError, match=r"RandomTranslate .*of the pixels are filled in one and not in the other"):
        JointAugmentation(K.RandomTranslate((0.2, 0.3), p=1.0))(torch.rand(2, 3, 48, 48), taught(rough_maps(2, 1, 7)))


def test_each_operation_is_checked_once_when_it_is_first_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    original = augment._disagreement
    monkeypatch.setattr(augment, "_disagreement", lambda *args: checks.append(1) or original(*args))
    augmentation = JointAugmentation(
        K.ImageSequential(K.RandomRotation(9.0, p=1.0), K.RandomShear(9.0, p=1.0), random_apply=1)
    )
    torch.manual_seed(0)
    for _ in range(12):
        augmentation(torch.rand(2, 3, 32, 32), taught(rough_maps(2, 1, 7)))
    assert len(checks) == 2
    assert augmentation.verified == {"RandomRotation", "RandomShear"}


def test_copies_and_pickles_draw_alike() -> None:
    augmentation = JointAugmentation(K.RandomResizedCrop((32, 32)), K.RandomRotation(20.0), K.auto.RandAugment(1, 9))
    images, targets = torch.rand(4, 3, 48, 48), taught(rough_maps(4, 1, 7))
    augmentation(images, targets)
    copies = copy.deepcopy(augmentation), pickle.loads(pickle.dumps(augmentation))
    assert all(each.verified == augmentation.verified for each in copies)
    results = []
    for each in (augmentation, *copies):
        torch.manual_seed(1)
        results.append(each(images, targets))
    for moved, got in results[1:]:
        torch.testing.assert_close(moved, results[0][0])
        torch.testing.assert_close(got.maps, results[0][1].maps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_moves_maps_as_the_cpu_does() -> None:
    augmentation = JointAugmentation(K.RandomResizedCrop(S), K.RandomRotation(20.0), K.RandomErasing(), *flips())
    images, targets = torch.rand(4, 3, 256, 256), taught(rough_maps(4, 1, 7))
    torch.manual_seed(0)
    _, expected = augmentation(images, targets)
    torch.manual_seed(0)
    moved, got = augmentation(images.cuda(), targets.to("cuda"))
    assert moved.is_cuda
    torch.testing.assert_close(got.maps.cpu(), expected.maps, rtol=0, atol=1e-4)


def test_the_usual_augmentations_keep_the_size() -> None:
    for name, augmentation in usual_augmentations((48, 40)).items():
        images, got, _ = augmented(augmentation, rough_maps(4, 1, 7), (48, 40))
        assert images.shape == (4, 3, 48, 40), name
        assert 0 <= images.min() <= images.max() <= 1 + 1e-5, name
        assert got.valid.mean() > 0.5, name


def test_what_kornia_must_go_on_saying() -> None:
    """What the walk reads of a draw, beyond Kornia's methods. If this fails, look at `kornia_stages` again."""
    why = "Kornia's parameters have changed: `e2kd.kornia_stages` reads them by these names"
    container = kornia_stages.pipeline(
        K.RandomCrop((32, 32), padding=3), K.RandomErasing(p=1.0), K.ImageSequential(K.RandomRotation(9.0))
    )
    crop, erasing, nested = container.forward_parameters(torch.Size([2, 3, 40, 44]))
    assert crop.data["forward_input_shape"].tolist() == [2, 3, 46, 50], why
    assert crop.data["padding_size"].tolist() == [[3, 3, 3, 3]] * 2, why
    assert {"xs", "ys", "widths", "heights", "batch_prob"} <= set(erasing.data), why
    assert erasing.data["forward_input_shape"].tolist() == [2, 3, 32, 32], why
    assert nested.data[0].name == "RandomRotation_0", why
    assert isinstance(container.get_submodule(nested.name), K.ImageSequential), why
    assert all(hasattr(K, name) for name in ("MixAugmentationBaseV2", "AugmentationBase2D", "PatchSequential")), why
