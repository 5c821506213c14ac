"""Metrics of faithfulness: against slow references and other libraries, in any batches, with reasons for NaN."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from faithfulness_cases import BATCHES, METRICS, faithfulness_batch, faithfulness_metric
from nets import BUILD, TinyViT, bcos_cnn, cnn
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import pairwise_cosine_similarity
from torchvision.ops import box_area, box_convert, box_iou, masks_to_boxes
from torchvision.tv_tensors import BoundingBoxes

import e2kd
from e2kd.bcos import AddInverse, explanation_mode
from e2kd.demo.measure import worst_group
from e2kd.metrics import (
    Agreement,
    EnergyPointingGame,
    ExplanationIoU,
    ExplanationSimilarity,
    FeatureSimilarityScore,
    ShiftEquivariance,
    WorstGroupAccuracy,
    box_masks,
    by_class,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CROP, SHIFTS = 16, [0, 3, (2, 0), (-4, 5)]


def seeded(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def some_boxes(n: int, side: int = 20, *, whole: bool = False, seed: int = 0) -> Tensor:
    """Boxes [n, 4] within an image, of at least a pixel."""
    corners = seeded(n, 2, 2, seed=seed) * (side - 1)
    low, high = corners.amin(1), corners.amax(1) + 1
    boxes = torch.cat([low, high], 1)
    return torch.cat([low.floor(), high.ceil()], 1) if whole else boxes


# Slow references


def enlarged(grid: list[list[float]], side: int) -> list[list[float]]:
    """Bilinear, pixel centres at 1/2, edges repeated: one pixel at a time."""
    n = len(grid)

    def taps(i: int) -> list[tuple[int, float]]:
        at = min(max((i + 0.5) * n / side - 0.5, 0), n - 1)
        low = min(int(at), n - 2)
        return [(low, low + 1 - at), (low + 1, at - low)]

    return [
        [sum(wy * wx * grid[y][x] for y, wy in taps(i) for x, wx in taps(j)) for j in range(side)] for i in range(side)
    ]


def epg_and_iou(grid: list[list[float]], boxes: list[list[int]], side: int) -> tuple[float, float]:
    pixels = {(i, j): value for i, row in enumerate(enlarged(grid, side)) for j, value in enumerate(row)}
    inside = {(i, j) for i, j in pixels if any(a <= j < c and b <= i < d for a, b, c, d in boxes)}
    chosen = set(sorted(pixels, key=lambda place: -pixels[place])[: len(inside)])
    energy = sum(pixels[place] for place in inside) / sum(pixels.values())
    return energy, len(chosen & inside) / len(chosen | inside)


def curve_by_hand(
    images: Tensor, maps_of: Callable[[Tensor, int], Tensor], class_of: Callable[[Tensor], int], theirs: Any = None
) -> list[float]:
    """Image by image, shift by shift: the shared area as pixels of the large image that both crops show."""
    top, left = (24 - CROP - 6) // 2 + 4, (28 - CROP - 5) // 2
    found = []
    for down, right in ((0, 0), (0, 3), (2, 0), (-4, 5)):
        values = []
        for image in images:
            canvases = []
            fixed = image[:, top : top + CROP, left : left + CROP][None]
            label = class_of(fixed)
            for y, x, explain in ((top + down, left + right, maps_of), (top, left, theirs or maps_of)):
                maps = explain(image[:, y : y + CROP, x : x + CROP][None], label)
                canvas = torch.full((maps.shape[1], 24, 28), math.nan, dtype=maps.dtype)
                shown = F.interpolate(maps, (CROP, CROP), mode="bilinear", align_corners=False)
                canvas[:, y : y + CROP, x : x + CROP] = shown[0]
                canvases.append(canvas)
            both = ~(canvases[0] + canvases[1]).isnan()
            values.append(F.cosine_similarity(canvases[0][both], canvases[1][both], dim=0).item())
        found.append(sum(values) / len(values))
    return found


class TestAnswers:
    def test_agreement_is_the_accuracy_with_the_teacher_as_label(self) -> None:
        student, teacher = seeded(50, 4), seeded(50, 4, seed=1)
        agreement, accuracy = Agreement(), MulticlassAccuracy(4, average="micro")
        accuracy.update(student, teacher.argmax(1))
        agreement.update(student, teacher)
        assert agreement.compute().item() == pytest.approx(accuracy.compute().item())
        agreement.reset()
        agreement.update({"logits": student}, teacher.argmax(1))
        assert agreement.compute().item() == pytest.approx(accuracy.compute().item())

    def test_worst_group_is_the_lowest_of_accuracies_of_each_alone(self) -> None:
        outputs, labels = seeded(60, 2), torch.arange(60) % 2
        places = torch.arange(60) // 7 % 2
        groups = 2 * labels + places
        worst = WorstGroupAccuracy(5)
        worst.update(outputs, labels, groups)
        alone = [MulticlassAccuracy(2, average="micro")(outputs[groups == g], labels[groups == g]) for g in range(4)]
        assert [found.value for found in worst.groups()[:4]] == pytest.approx([each.item() for each in alone])
        assert worst.compute().item() == pytest.approx(min(alone).item())
        assert worst.compute().item() == pytest.approx(worst_group(outputs.argmax(1) == labels, labels, places))
        assert (worst.groups()[4].n, worst.groups()[4].reason) == (0, "no samples were given")

    def test_error_is_that_of_a_mean(self) -> None:
        student, teacher = seeded(50, 4), seeded(50, 4, seed=1)
        agreement = Agreement()
        agreement.update(student, teacher)
        equal = (student.argmax(1) == teacher.argmax(1)).double()
        assert agreement.score().error == pytest.approx((equal.std() / 50**0.5).item())


class TestExplanations:
    def test_similarity_is_the_mean_cosine_of_maps_on_one_grid(self) -> None:
        student, teacher = seeded(6, 3, 8, 8), seeded(6, 3, 4, 4, seed=1)
        similarity = ExplanationSimilarity()
        similarity.update(student, teacher)
        larger = F.interpolate(teacher, (8, 8), mode="bilinear")
        expected = pairwise_cosine_similarity(student.flatten(1), larger.flatten(1), zero_diagonal=False).diag().mean()
        assert similarity.compute().item() == pytest.approx(expected.item(), abs=1e-6)

    def test_another_similarity_on_another_grid_is_that_of_maps_brought_there(self) -> None:
        def overlap(a: Tensor, b: Tensor) -> Tensor:
            return torch.minimum(a, b).sum((1, 2, 3)) / torch.maximum(a, b).sum((1, 2, 3))

        student, teacher = seeded(6, 1, 8, 8), seeded(6, 1, 4, 4, seed=1)
        similarity = ExplanationSimilarity(overlap, (16, 16))
        similarity.update(student, teacher)
        grown = [F.interpolate(maps, (16, 16), mode="bilinear") for maps in (student, teacher)]
        assert similarity.compute().item() == pytest.approx(overlap(*grown).mean().item(), abs=1e-6)

    def test_unknown_cells_count_in_neither_map(self) -> None:
        student, teacher, known = seeded(2, 1, 4, 4), seeded(2, 1, 4, 4, seed=1), torch.zeros(2, 1, 4, 4)
        known[..., :2] = 1
        part, masked = ExplanationSimilarity(), ExplanationSimilarity()
        part.update(student[..., :2], teacher[..., :2])
        masked.update(student, teacher, known)
        assert masked.compute().item() == pytest.approx(part.compute().item(), abs=1e-6)

    def test_epg_and_iou_are_those_of_pixel_loops(self) -> None:
        maps = seeded(5, 1, 4, 4)
        boxes = [some_boxes(1 + k % 2, 9, whole=True, seed=k) for k in range(5)]
        epg, iou = EnergyPointingGame(), ExplanationIoU()
        for metric in (epg, iou):
            metric.update(maps, boxes, size=(10, 10))
        slow = [epg_and_iou(m[0].tolist(), b.int().tolist(), 10) for m, b in zip(maps, boxes, strict=True)]
        assert epg.compute().item() == pytest.approx(sum(e for e, _ in slow) / 5, abs=1e-6)
        assert iou.compute().item() == pytest.approx(sum(i for _, i in slow) / 5, abs=1e-6)

    def test_iou_of_a_map_that_is_a_box_is_that_of_boxes(self) -> None:
        first, second = some_boxes(8, whole=True), some_boxes(8, whole=True, seed=1)
        iou = ExplanationIoU(threshold=0.5)
        iou.update(
            3 * box_masks([box[None] for box in first], (20, 20))[:, None], [box[None] for box in second], (20, 20)
        )
        assert iou.compute().item() == pytest.approx(box_iou(first, second).diag().mean().item(), abs=1e-6)

    def test_soft_masks_weigh_the_energy(self) -> None:
        """A trimap's border as 1/2: half of its energy counts, and it belongs to the object."""
        trimap = torch.tensor([[[1, 3, 2, 2]]])
        masks = (trimap == 1).float() + 0.5 * (trimap == 3)
        maps = torch.tensor([[[[4.0, 2.0, 2.0, 0.0]]]])
        epg, iou = EnergyPointingGame(), ExplanationIoU()
        epg.update(maps, masks)
        iou.update(maps, masks)
        assert epg.compute().item() == 5 / 8
        assert iou.compute().item() == pytest.approx(2 / 3)  # ties at the cut are not told apart

    def test_a_row_for_every_class_of_an_image(self) -> None:
        """What rows of classes give is what each image gives for each of its classes."""
        model, images = cnn(seed=2).float(), seeded(2, 3, 16, 16)
        boxes = [some_boxes(3, 16), some_boxes(1, 16, seed=1)]
        present = by_class(boxes, [torch.tensor([1, 0, 1]), torch.tensor([3])])
        epg, one = EnergyPointingGame(), EnergyPointingGame()
        maps = e2kd.explain(model, images[present.images], present.classes).maps
        epg.update(maps, present.boxes, (16, 16))
        for image, label, rows in ((0, 0, [1]), (0, 1, [0, 2]), (1, 3, [0])):
            found = e2kd.explain(model, images[image : image + 1], torch.tensor([label]))
            one.update(found.maps, box_masks([boxes[image][rows]], (16, 16)))
        assert epg.score().n + sum(epg.score().left_out.values()) == 3
        assert epg.compute().item() == pytest.approx(one.compute().item())


class TestBoxes:
    def test_cover_their_area(self) -> None:
        boxes = some_boxes(9)
        covered = box_masks([box[None] for box in boxes], (20, 20))
        torch.testing.assert_close(covered.sum((1, 2)), box_area(boxes))
        assert 0 <= covered.min() <= covered.max() <= 1

    def test_are_found_again(self) -> None:
        boxes = some_boxes(9, whole=True)
        masks = box_masks([box[None] for box in boxes], (20, 20))
        torch.testing.assert_close(masks_to_boxes(masks), boxes - torch.tensor([0.0, 0.0, 1.0, 1.0]))  # there inclusive

    def test_other_forms_come_by_torchvision_and_what_is_outside_is_left_out(self) -> None:
        centred = box_convert(torch.tensor([[1.0, 1.0, 4.0, 2.0]]), "cxcywh", "xyxy")
        expected = torch.zeros(1, 4, 4)
        expected[:, :2, :3] = 1
        torch.testing.assert_close(box_masks([centred], (4, 4)), expected)

    def test_overlapping_ones_count_once(self) -> None:
        assert box_masks([[[0, 0, 2, 2], [1, 0, 3, 2]]], (4, 4)).sum() == 6

    @pytest.mark.parametrize(
        ("boxes", "sentence"),
        [
            ([[[4, 4, 2, 6]]], "end before they start"),
            ([[[0, 0, math.nan, 1]]], "are NaN"),
            ([[[0, 0, 1]]], r"as \[n, 4\], but got \[1, 3\]"),
            (torch.zeros(2, 4), "a list with the boxes"),
        ],
    )
    def test_of_another_form(self, boxes: Any, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            box_masks(boxes, (8, 8))
        with pytest.raises(ValueError, match="a label for every box"):
            by_class([torch.zeros(2, 4)], [torch.zeros(1)])

    @pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
    def test_of_torchvision_are_what_they_say(self, form: str) -> None:
        corners = torch.tensor([[4.0, 6.0, 14.0, 10.0], [1.0, 1.0, 3.0, 4.0]])
        numbers = box_convert(corners, "xyxy", form.lower())
        boxes = BoundingBoxes(numbers, format=form, canvas_size=(20, 20))  # type: ignore[call-overload]
        assert torch.equal(box_masks([boxes], (20, 20)), box_masks([corners], (20, 20)))
        present = by_class([boxes], [torch.tensor([3, 5])])
        assert torch.equal(torch.cat(present.boxes), corners)
        with pytest.raises(ValueError, match=r"images \[40, 40\], but they say they are of images \[20, 20\]"):
            box_masks([boxes], (40, 40))

    def test_by_class_takes_lists_as_box_masks_does(self) -> None:
        present = by_class([[[0, 0, 2, 2], [1, 1, 3, 3]], []], [[7, 2], []])
        assert (present.images.tolist(), present.classes.tolist()) == ([0, 0], [2, 7])
        assert present.boxes[0].tolist() == [[1, 1, 3, 3]]
        for wrong in ([["dog"]], ["dog"], [torch.zeros(1, 1)], [3]):
            with pytest.raises(ValueError, match="labels of an image's boxes as whole numbers"):
                by_class([[[0, 0, 2, 2]]], wrong)  # type: ignore[arg-type]


class TestShifts:
    images = seeded(3, 3, 24, 28)

    def curve(self, model: nn.Module, **settings: Any) -> list[float]:
        equivariance = ShiftEquivariance(model, SHIFTS, CROP, **settings)
        equivariance.update(self.images)
        return equivariance.curve().tolist()

    @staticmethod
    def top(model: nn.Module) -> Callable[[Tensor], int]:
        return lambda images: int(model(images).argmax(1))

    @staticmethod
    def captum(model: nn.Sequential) -> Callable[[Tensor, int], Tensor]:
        cam = LayerGradCam(model, model[3])
        return lambda image, label: cam.attribute(image, label, relu_attributions=True).detach()

    def test_of_a_cnn_are_captums(self) -> None:
        model = cnn(seed=2).float()
        by_hand = curve_by_hand(self.images, self.captum(model), self.top(model))
        assert self.curve(model) == pytest.approx(by_hand, abs=1e-6)

    def test_of_a_bcos_network_are_those_of_its_dynamic_weights(self) -> None:
        model = bcos_cnn(seed=2).float().eval()

        def weights(image: Tensor, label: int) -> Tensor:
            encoded = AddInverse()(image).requires_grad_()
            with explanation_mode() as mode:
                return mode.weights(model[1](encoded)[0, label], encoded).detach()

        assert self.curve(model) == pytest.approx(curve_by_hand(self.images, weights, self.top(model)), abs=1e-6)

    def test_of_a_transformer_student_against_its_teacher(self) -> None:
        """The teacher says which class, and its map of the crop at rest is what all are compared with."""
        model, teacher = TinyViT(seed=2).float(), cnn(seed=2).float()

        def cam(image: Tensor, label: int) -> Tensor:
            return e2kd.explain(model, image, torch.tensor([label])).maps

        by_hand = curve_by_hand(self.images, cam, self.top(teacher), self.captum(teacher))
        found = self.curve(model, reference=teacher)
        assert found == pytest.approx(by_hand, abs=1e-6)
        assert max(found) < 0.999

    def test_a_network_that_sees_pixels_alone_follows_them_exactly(self) -> None:
        torch.manual_seed(0)
        pointwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        assert self.curve(pointwise) == pytest.approx([1] * 4, abs=1e-6)
        placed = nn.Sequential(Placed(), *pointwise)
        assert self.curve(placed)[0] == pytest.approx(1, abs=1e-6)
        assert max(self.curve(placed)[1:]) < 0.99

    @pytest.mark.slow
    @pytest.mark.parametrize("bcos", [False, True], ids=["standard", "bcos"])
    def test_transformers_follow_at_multiples_of_their_patches(self, bcos: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(AddInverse(), e2kd.bcos.vit_ti()) if bcos else timm.create_model("vit_tiny_patch16_224")
        equivariance = ShiftEquivariance(model, [4, 12, 16, (16, 0)], 224)
        equivariance.update(seeded(2, 3, 240, 240))
        curve = equivariance.curve()
        assert curve[2:].min() > curve[:2].max() + 0.1

    def test_given_classes_and_images_of_other_colours(self) -> None:
        model = cnn(seed=2).float()
        darker = nn.Sequential(Half(), *cnn(seed=2).float())
        found = []
        for reference, images in ((model, None), (darker, 2 * self.images)):
            equivariance = ShiftEquivariance(model, SHIFTS, CROP, reference=reference, explainer=e2kd.InputGradient())
            equivariance.update(self.images, torch.tensor([1, 1, 2]), reference_images=images)
            found.append(equivariance.curve())
        torch.testing.assert_close(*found)

    def test_models_are_no_part_of_the_metric_and_stay_as_they_are(self) -> None:
        model = cnn().train()
        equivariance = ShiftEquivariance(model, SHIFTS, CROP)
        equivariance.update(self.images.double())
        assert not list(equivariance.parameters())
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        assert copy.deepcopy(equivariance).models[0] is model

    @pytest.mark.parametrize(
        ("shifts", "sentence"),
        [([], "shifts smaller than the crops"), ([16], "shifts smaller"), ([0, 13], "span of the shifts, 13 pixels")],
    )
    def test_that_do_not_fit(self, shifts: list[int], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            ShiftEquivariance(cnn().float(), shifts, CROP).update(self.images)


class Placed(nn.Module):
    """Brighter to the right and to the bottom of whatever it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        side = torch.linspace(0, 1, images.shape[-1])
        return images * side * side[:, None]


class Half(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images / 2


@pytest.mark.parametrize("name", METRICS)
class TestEveryMetric:
    def test_batches_are_one_batch(self, name: str) -> None:
        parts, whole = faithfulness_metric(name), faithfulness_metric(name)
        batches = [faithfulness_batch(name, n) for n in BATCHES]
        for batch in batches:
            parts.update(*batch)
        whole.update(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        assert parts.compute().item() == pytest.approx(whole.compute().item(), abs=1e-6)
        assert parts.score().n == whole.score().n
        assert 0 < whole.compute() < 1

    def test_forward_gives_the_batchs_and_keeps_the_whole(self, name: str) -> None:
        forward, whole, alone = (faithfulness_metric(name) for _ in range(3))
        first, second = (faithfulness_batch(name, n) for n in BATCHES[:2])
        forward.update(*first)
        alone.update(*second)
        assert forward(*second) == alone.compute()
        for batch in (first, second):
            whole.update(*batch)
        assert forward.compute().item() == pytest.approx(whole.compute().item(), abs=1e-12)
        forward.reset()
        forward.update(*second)
        assert forward.compute() == alone.compute()

    def test_travels(self, name: str) -> None:
        metric = faithfulness_metric(name)
        metric.update(*faithfulness_batch(name, 5))
        for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
            assert other.compute() == metric.compute()

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_without_samples_has_a_reason(self, name: str) -> None:
        assert faithfulness_metric(name).compute().isnan()
        assert "no samples were given" in faithfulness_metric(name).score().reason

    def test_values_that_are_not_finite_have_a_reason(self, name: str) -> None:
        batch = list(faithfulness_batch(name, 5))
        batch[0] = batch[0].clone()
        batch[0][2] = math.nan
        metric = faithfulness_metric(name)
        metric.update(*batch)
        assert metric.compute().isnan()
        assert "values that are NaN or infinite" in metric.score().reason


class TestUndefined:
    def test_blank_maps_and_empty_regions_are_left_out_and_counted(self) -> None:
        maps = torch.ones(4, 1, 4, 4)
        maps[1], maps[2] = 0, -1
        for metric in (EnergyPointingGame(), ExplanationIoU()):
            metric.update(maps, [[[0, 0, 2, 4]], [[0, 0, 2, 4]], [[0, 0, 2, 4]], [[0, 0, 0, 4]]], (4, 4))
            assert metric.compute().item() == 0.5
            assert metric.score().left_out == {"blank maps": 2, "empty regions": 1}

    def test_maps_blank_in_either(self) -> None:
        student, teacher = torch.ones(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
        student[0], teacher[1] = 0, 0
        similarity = ExplanationSimilarity()
        similarity.update(student, teacher)
        assert str(similarity.score()) == "1.000 ± nan (n = 1, left out: 2 blank maps)"
        similarity.reset()
        similarity.update(0 * student, teacher)
        assert similarity.score().reason == "there were only 3 blank maps"

    def test_an_infinite_value_is_no_number_anywhere(self) -> None:
        maps = torch.ones(2, 1, 4, 4)
        for value in (math.inf, -math.inf, math.nan):
            maps[0] = value
            for metric in (EnergyPointingGame(), ExplanationIoU()):
                metric.update(maps, torch.ones(2, 4, 4))
                assert "1 of 2 samples" in metric.score().reason

    def test_one_dead_shift_makes_the_mean_of_the_curve_undefined(self) -> None:
        equivariance = ShiftEquivariance(DeadBelow(), [0, (8, 0)], CROP, explainer=e2kd.GradCAM("body.1"))
        images = torch.rand(2, 3, 24, 16)
        images[:, :, 16:] = 0
        equivariance.update(images, torch.zeros(2, dtype=torch.long))
        assert equivariance.curve()[0] == pytest.approx(1)
        assert equivariance.score().reason == "at the shift (8, 0): there were only 2 blank maps"

    def test_masked_logits_still_have_a_top_class(self) -> None:
        agreement = Agreement()
        agreement.update(torch.tensor([[-math.inf, 0.0]]), torch.tensor([[0.0, 1.0]]))
        assert agreement.compute() == 1

    def test_a_group_of_nothing_but_nan(self) -> None:
        worst = WorstGroupAccuracy(2)
        outputs = torch.tensor([[1.0, 0.0], [math.nan, 0.0]])
        worst.update(outputs, torch.tensor([0, 0]), torch.tensor([0, 1]))
        assert "NaN" in worst.score().reason


class DeadBelow(nn.Module):
    """Has no evidence for images that are dark at the bottom of their upper half."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus())
        self.head = nn.Linear(4, 2)
        self.head.weight.data = torch.ones(2, 4)

    def forward(self, images: Tensor) -> Tensor:
        alive = (images[:, :, 8:].sum((1, 2, 3)) > 0).to(images)
        return self.head(self.body(images).mean((2, 3)) * (2 * alive[:, None] - 1))


class TestCollections:
    def test_two_that_begin_alike_are_not_taken_for_one(self) -> None:
        """torchmetrics merges metrics whose states are equal after the first batch."""
        both = MetricCollection({"epg": EnergyPointingGame(), "iou": ExplanationIoU(), "cut": ExplanationIoU(0.9)})
        corner = torch.zeros(1, 4, 4)
        corner[:, 0, 0] = 1
        both.update(corner.flip(1)[:, None], corner)
        both.update(seeded(3, 1, 4, 4), corner.expand(3, 4, 4))
        found = both.compute()
        for name, alone in (("epg", EnergyPointingGame()), ("iou", ExplanationIoU()), ("cut", ExplanationIoU(0.9))):
            alone.update(corner.flip(1)[:, None], corner)
            alone.update(seeded(3, 1, 4, 4), corner.expand(3, 4, 4))
            assert found[name] == alone.compute()
        assert len(set(found.values())) == 3

    def test_biased_and_unbiased_fss(self) -> None:
        both = MetricCollection({"a": FeatureSimilarityScore(), "b": FeatureSimilarityScore(biased=True)})
        for seed in (0, 1):
            both.update(seeded(8, 9, seed=seed), seeded(8, 9, seed=seed + 2))
        found = both.compute()
        assert found["b"] > found["a"] + 0.1


class TestBadInput:
    def test_answers(self) -> None:
        two, three = seeded(4, 2), seeded(4, 3)
        labels = torch.zeros(4, dtype=torch.long)
        for call, sentence in (
            (lambda: Agreement().update(two, three), "tells 2 apart and the teacher 3"),
            (lambda: Agreement().update(two, two[:2]), "to the same images, but got 4 and 2"),
            (lambda: Agreement().update(two[:, :1], two[:, :1]), "at least 2 classes"),
            (lambda: WorstGroupAccuracy(2).update(two, labels, labels + 2), "groups from 0 to 1"),
            (lambda: WorstGroupAccuracy(2).update(two, labels, labels.float()), "as indices"),
            (lambda: WorstGroupAccuracy(2).update(two, labels[:2], labels), "of the same images"),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()
        with pytest.raises(TypeError, match="Expected logits"):
            Agreement().update(two[:, 0], two)

    def test_maps_and_regions(self) -> None:
        maps = torch.ones(2, 1, 4, 4)
        trimap = torch.tensor([1, 2, 3, 1]).expand(2, 4, 4)
        for call, sentence in (
            (lambda: EnergyPointingGame().update(maps, trimap), r"are from 1 to 3\. Of a trimap"),
            (lambda: EnergyPointingGame().update(maps, [[], []]), "size of the images"),
            (lambda: EnergyPointingGame().update(torch.ones(2, 6, 4, 4), torch.ones(2, 4, 4)), "BcosContributions"),
            (lambda: ExplanationIoU(threshold=0), r"in \(0, 1\]"),
            (lambda: ExplanationSimilarity().update(maps, maps[:1]), "the same B and C"),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()

    @pytest.mark.parametrize("net", BUILD)
    def test_an_empty_batch_is_named(self, net: str) -> None:
        with pytest.raises(ValueError, match="Skip empty batches"):
            e2kd.explain(BUILD[net](), torch.rand(0, 3, 16, 16).double())
