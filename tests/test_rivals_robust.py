"""Rivals, guidance and metrics where networks, images, labels or hosts are not the usual ones."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import e2kd
from e2kd import bcos
from e2kd.baselines import AFD, AT, CATKD, CRD, DKD, FitNets, Indexed, IndexedDataset, Overhaul, ReviewKD, dkd_loss
from e2kd.baselines.untrained import STEPS, Watch
from e2kd.guidance import GuidanceLoss
from e2kd.localization import energy_on_mask
from e2kd.metrics import Agreement, EnergyPointingGame, FeatureSimilarityScore
from e2kd.stages import Layers
from e2kd.tasks import default_task

Y = torch.tensor([0, 3, 1, 2])
CE = nn.CrossEntropyLoss()


def net(width: int, strides: tuple[int, ...] = (2, 2), classes: int = 5) -> nn.Sequential:
    torch.manual_seed(width)
    stages, channels = [], 3
    for n, stride in enumerate(strides, 1):
        convolution = nn.Conv2d(channels, width * n, 3, stride, 1)
        stages.append(nn.Sequential(convolution, nn.BatchNorm2d(width * n), nn.ReLU()))
        channels = width * n
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def classifying_cells(width: int) -> nn.Sequential:
    """Every cell is classified, then the classes' maps are averaged."""
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(2 * width, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(5)
    return torch.rand(4, 3, 32, 32)


def keys(stages: list[Any]) -> list[str]:
    return [stage.place.key for stage in stages]


# Which layers


def test_the_maps_of_a_classifier_of_every_cell_are_no_stage(x: Tensor) -> None:
    student, teacher = classifying_cells(4), net(6)
    assert keys(AT(student, teacher, None, example=x).student_stages) == ["1", "3"]
    (embedding,) = CRD(student, teacher, None, example=x).student_stages
    assert (embedding.place.key, embedding.channels) == ("before 4", 8)


def test_bcos_networks_are_compared_at_their_stages() -> None:
    model = bcos.BcosResNet(bcos.BasicBlock, (1, 1, 1), 5, width=6, small_images=True)
    example = torch.rand(2, 6, 32, 32)
    layers = Layers(model, example)
    assert [stage.channels for stage in layers.stages()] == [6, 12, 24]
    assert layers.embedding().channels == 24
    (embedding,) = CRD(model, model, None, example=example).student_stages
    assert embedding.channels == 24


def test_stages_are_in_the_order_of_depth() -> None:
    """PVT reduces keys and values to the last stage's grid in its first stage."""
    timm = pytest.importorskip("timm")
    layers = Layers(timm.create_model("pvt_v2_b0", num_classes=5), torch.rand(2, 3, 128, 128))
    grids = [stage.grid[0] for stage in layers.stages()]
    assert grids == [32, 16, 8, 4]


def test_named_layers_all_count(x: Tensor) -> None:
    six, three = net(2, (1, 2, 1, 2, 1, 2)), net(3, (2, 2, 2))
    named = ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="but got 4 and 3"):
        AT(six, three, None, layers=named, example=x)
    assert keys(AT(six, three, None, layers=["1", "3", "5"], example=x).student_stages) == ["1", "3", "5"]
    criterion = AT(six, six, None, layers=named, teacher_layers=named, example=x)
    assert keys(criterion.teacher_stages) == named


def test_dropout_in_place_is_not_what_is_compared(x: Tensor) -> None:
    def dropping(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.GELU(), nn.Dropout2d(0.5, inplace=inplace), nn.Conv2d(4, 8, 3, 2), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip

    for inplace in (False, True):
        student, teacher = dropping(inplace), dropping(inplace)
        criterion = AT(student, teacher, None, layers=["1"], teacher_layers=["1"], example=x)
        assert criterion(student(x)) == 0


# Images to find layers with


class OfOneSize(nn.Module):
    """A ViT whose positions are those of one size of images."""

    def __init__(self, side: int, told: bool = False) -> None:
        super().__init__()
        torch.manual_seed(side)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, (side // 8) ** 2, 16))
        blocks = [nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(3)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(16, 5)
        if told:
            self.config = SimpleNamespace(image_size=side)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.patches(images).flatten(2).mT + self.positions).mean(1))
        return logits


@pytest.mark.parametrize("method", [AT, FitNets, Overhaul, AFD, ReviewKD, CATKD, CRD])
@pytest.mark.parametrize("side", [32, 40])
def test_layers_are_found_with_images_that_the_teacher_takes_too(method: Any, side: int) -> None:
    student, teacher, x = net(4), OfOneSize(side, told=side == 40), torch.rand(4, 3, side, side)
    criterion = method(student, teacher, CE)
    assert criterion.teacher_stages[0].grid == ((1, 1) if method is CRD else (side // 8, side // 8))
    targets = Indexed(Y, torch.arange(4), torch.full((4,), 4)) if method is CRD else Y
    criterion(student(x), targets).backward()


@pytest.mark.parametrize("settings", [{"example": torch.rand(2, 3, 40, 40)}, {"teacher_size": 40}])
def test_a_teacher_that_takes_no_usual_size_is_named(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"both Sequential and its teacher OfOneSize.*size of tensor.*Pass example="):
        AT(net(4), OfOneSize(40), CE)
    student = net(4)
    AT(student, OfOneSize(40), CE, **settings)(student(torch.rand(4, 3, 40, 40)), Y).backward()


@pytest.mark.parametrize(("settings", "side"), [({"teacher_size": 32}, 224), ({}, 32)])
def test_a_teacher_for_whom_images_are_resized_has_no_say(settings: Any, side: int) -> None:
    criterion = AT(net(4), OfOneSize(32, told=True), CE, **settings)
    assert criterion.student_stages[-1].grid == (side // 4, side // 4)


# Terms


@pytest.mark.parametrize("method", [AT, FitNets, Overhaul, AFD, ReviewKD, CATKD, DKD])
def test_without_a_criterion_every_parameter_has_a_gradient(method: Any, x: Tensor) -> None:
    """Which DistributedDataParallel waits for."""
    student, teacher = net(4), net(6)
    criterion = method(student, teacher, None, **({} if method is DKD else {"example": x}))
    criterion(student(x), Y).backward()
    assert all(p.grad is not None for p in student.parameters())


def test_review_compares_the_mean_of_a_map_with_a_vector(x: Tensor) -> None:
    student = classifying_cells(4)
    criterion = ReviewKD(student, net(6), None, example=x)
    heard: list[Tensor] = []
    criterion.fusions[-1].reduce.register_forward_hook(lambda module, args, output: heard.append(args[0]))
    criterion(student(x), Y)
    assert heard[0].shape == (4, 8, 1, 1)
    torch.testing.assert_close(heard[0], student[:4](x).mean((2, 3), keepdim=True))


def test_cat_of_one_cell_is_refused() -> None:
    student, teacher = net(4, (2,) * 5), net(6, (2,) * 5)
    criterion = CATKD(student, teacher, CE, example=torch.rand(2, 3, 224, 224))
    with pytest.raises(e2kd.UnsupportedModel, match="have one cell for these images"):
        criterion(student(torch.rand(4, 3, 32, 32)), Y)


@pytest.mark.parametrize("side", [32, 160])
def test_fitnets_says_when_its_regressor_does_not_fit(side: int) -> None:
    """Also where the kernel is not too large, but makes another grid than the teacher's."""
    student, teacher, x = net(4, (1, 2, 2, 2)), net(6, (2, 2, 2, 2)), torch.rand(4, 3, side, side)
    criterion = FitNets(student, teacher, CE)
    found = rf"kernel \[57, 57\] was made from \[112, 112\] and \[56, 56\], but got \[{side // 2}, {side // 2}\] and"
    with pytest.raises(ValueError, match=found + rf" \[{side // 4}, {side // 4}\]\. Pass example=images"):
        criterion(student(x), Y)
    criterion.remove()
    criterion = FitNets(student, teacher, CE, example=x)
    criterion(student(x), Y).backward()
    with pytest.raises(ValueError, match="Expected the regressor to bring the student's grid to the teacher's"):
        criterion(student(torch.rand(4, 3, side + 16, side)), Y)


@pytest.mark.parametrize("strides", [(1, 2, 2, 2), (2, 2, 2, 2), (1, 1, 2, 2)])
def test_fitnets_of_one_cell_takes_images_of_any_size(strides: tuple[int, ...]) -> None:
    student = net(4, strides)
    criterion = FitNets(student, net(6, (1, 1, 2, 2)), CE)
    for side in (32, 48):
        criterion(student(torch.rand(4, 3, side, side)), Y).backward()


def test_overhaul_takes_a_last_batch_of_one_image_with_one_cell() -> None:
    student = net(4, (2,) * 5).train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    example = torch.rand(2, 3, 64, 64)
    criterion = Overhaul(student, net(6, (2,) * 5), CE, example=example)
    criterion(student(torch.rand(1, 3, 32, 32)), Y[:1]).backward()
    assert criterion.parts["overhaul"] == 0


def test_dkd_leaves_out_labels_that_count_for_nothing() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    labels = torch.tensor([0, -100, 1, -100])
    found = dkd_loss(student, teacher, labels)
    assert found == dkd_loss(student[[0, 2]], teacher[[0, 2]], labels[[0, 2]])
    (gradient,) = torch.autograd.grad(found, student)
    assert not gradient[[1, 3]].any()
    assert dkd_loss(student, teacher, torch.full((4,), -100)) == 0


def test_settings_of_a_frozen_teacher_are_refused(tmp_path: Path) -> None:
    dataset = TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 5)
    frozen = e2kd.freeze(net(6), dataset, tmp_path, maps=False, progress=False)
    assert frozen is not None
    with pytest.raises(ValueError, match="were settled when the teacher was frozen"):
        DKD(net(4), frozen, teacher_size=32)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_rival_is_not_copied(copied: Any, x: Tensor) -> None:
    with pytest.raises(TypeError, match="FitNets listens to its student in this process"):
        copied(FitNets(net(4), net(6), CE, example=x))


@pytest.mark.parametrize("given", ["student", "both", "nothing"])
def test_parts_that_no_optimizer_has_are_warned_of_once(
    given: str, x: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    student = net(4)
    criterion = e2kd.E2KDLoss(student, net(6), FitNets(student, net(6), CE, example=x), example=x)
    trained = {"student": student, "both": nn.ModuleList([student, criterion]), "nothing": nn.Linear(1, 1)}[given]
    optimizer = torch.optim.SGD(trained.parameters(), 0.01)
    for _ in range(3 * STEPS):
        criterion(student(x), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        student.zero_grad()
    told = [w for w in recwarn if "trainable parts of FitNets are what they were" in str(w.message)]
    assert len(told) == (given == "student")


def test_networks_that_change_their_type_between_steps_are_no_news(recwarn: pytest.WarningsRecorder) -> None:
    watch, parts, student = Watch(), nn.Linear(2, 2), nn.Linear(2, 2)
    for step in range(3 * STEPS):
        watch.look("FitNets", parts.parameters(), student.parameters())
        if step == STEPS // 2:
            student.double()
    assert not watch.known
    assert not recwarn


def test_an_indexed_data_set_of_triples_says_what_came() -> None:
    with pytest.raises(TypeError, match=r"Expected samples \(image, label\), but got tuple"):
        IndexedDataset([(1, 2, 3)])[0]


# The loss that stands in for a criterion


def test_multi_hot_targets_have_one_loss_whatever_the_batch() -> None:
    logits = torch.tensor([[3.0, -3, -3], [-3.0, 3, -3]])
    one = torch.tensor([[1, 0, 0], [0, 1, 0]])
    expected = F.binary_cross_entropy_with_logits(logits, one.float())
    assert default_task(logits, one) == expected
    assert default_task(logits, one.bool()) == expected
    assert default_task(logits, one.float(), multilabel=True) == expected
    assert default_task(logits, one.float()) == F.cross_entropy(logits, one.float())
    labels = torch.tensor([0, 1])
    assert default_task(logits, labels.to(torch.int32)) == F.cross_entropy(logits, labels)


def test_validation_of_multi_label_distillation_is_bce(x: Tensor) -> None:
    student = net(4)
    criterion = e2kd.E2KDLoss(student, net(6), distillation=e2kd.MultiLabelKDLoss(), example=x).eval()
    hot = F.one_hot(Y, 5).float()
    with torch.no_grad():
        logits = student(x)
        assert criterion(logits, hot) == F.binary_cross_entropy_with_logits(logits, hot)


# Guidance


def test_labels_that_count_for_nothing_are_not_guided(x: Tensor) -> None:
    model, masks = net(4), torch.ones(4, 32, 32)
    masks[:, 16:] = 0
    criterion = GuidanceLoss(model, CE, example=x)
    criterion(model(x), torch.tensor([0, 3, 1, -100]), masks)
    found = criterion.parts["guidance"]
    masks[3] = 0
    criterion(model(x), Y, masks)
    torch.testing.assert_close(criterion.parts["guidance"], found)


def test_boxes_are_taken_as_masks_are(x: Tensor) -> None:
    model, masks = net(4), torch.zeros(4, 32, 32)
    masks[0, 4:20, 8:24] = 1
    criterion = GuidanceLoss(model, CE, example=x)
    boxes = [[[8.0, 4.0, 24.0, 20.0]], [], [], []]
    found = [(criterion(model(x), Y, some), criterion.parts["guidance"])[1] for some in (masks, boxes)]
    assert found[0] == found[1] > 0


def test_guidance_stands_around_criteria_of_e2kd(x: Tensor) -> None:
    model, teacher, masks = net(4), net(6), torch.ones(4, 32, 32)
    inner = e2kd.E2KDLoss(model, teacher, CRD(model, teacher, CE, example=x), example=x)
    criterion = GuidanceLoss(model, inner, example=x)
    criterion(model(x), Indexed(Y, torch.arange(4), torch.full((4,), 20)), masks).backward()
    assert {"kd", "crd", "explanation", "guidance", "loss"} <= criterion.parts.keys()
    criterion.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_mixed_labels_are_not_guided(x: Tensor) -> None:
    model = net(4)
    with pytest.raises(ValueError, match="but some are between"):
        GuidanceLoss(model, CE, example=x)(model(x), torch.full((4, 5), 0.2), torch.ones(4, 32, 32))


def test_a_loss_that_is_nan_for_an_empty_mask_does_not_spoil_the_others(x: Tensor) -> None:
    model, masks = net(4), torch.ones(4, 32, 32)
    masks[1] = 0
    criterion = GuidanceLoss(model, CE, loss=lambda maps, some: 1 - energy_on_mask(maps, some), example=x)
    criterion(model(x), Y, masks).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Metrics


def metric_of(kind: str) -> Any:
    return {"agreement": Agreement, "epg": EnergyPointingGame, "fss": FeatureSimilarityScore}[kind]()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # of one whose state was loaded
@pytest.mark.parametrize("kind", ["agreement", "epg", "fss"])
def test_metrics_are_merged_and_restored(kind: str) -> None:
    torch.manual_seed(0)
    given = [
        (torch.rand(8, 3), torch.rand(8, 3)) if kind != "epg" else (torch.rand(8, 1, 4, 4), torch.rand(8, 4, 4))
        for _ in range(2)
    ]
    whole, parts = metric_of(kind), [metric_of(kind) for _ in given]
    for batch, part in zip(given, parts, strict=True):
        whole.update(*batch)
        part.update(*batch)
    parts[0].merge_state(parts[1])
    torch.testing.assert_close(parts[0].compute(), whole.compute())
    with_dict = metric_of(kind)
    with_dict.merge_state(whole.metric_state)
    torch.testing.assert_close(with_dict.compute(), whole.compute())
    whole.persistent(True)
    restored = metric_of(kind)
    restored.persistent(True)
    restored.load_state_dict(whole.state_dict())
    torch.testing.assert_close(restored.compute(), whole.compute())


# What one-dimensional pools leave of tokens


class Pooled(nn.Module):
    """Tokens of a convolution, and a pool to [B, C, 1], as Hugging Face's Swin has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.last = nn.Conv2d(3, width, 16, 16), nn.LayerNorm(width)
        self.pooler, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.last(self.patches(x).flatten(2).transpose(1, 2)).relu()
        logits: Tensor = self.fc(self.pooler(tokens.transpose(1, 2)).flatten(1))
        return logits


@pytest.mark.parametrize("width", [64, 96, 256, 1024])
def test_what_a_pool_leaves_of_tokens_is_no_stage(width: int) -> None:
    stages = AT(net(8), Pooled(width), example=torch.rand(2, 3, 128, 128)).teacher_stages
    assert (stages[-1].grid, stages[-1].channels) == ((8, 8), width)


@pytest.mark.parametrize("width", [24, 36, 64])
def test_no_stage_of_hugging_faces_swin_is_its_pooler(width: int) -> None:
    transformers = pytest.importorskip("transformers")
    configuration = transformers.SwinConfig(
        image_size=64, embed_dim=width, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=4, num_labels=5
    )
    model = transformers.SwinForImageClassification(configuration).eval()
    for method in (AT, FitNets):
        stages = method(net(8), model, example=torch.rand(2, 3, 64, 64)).teacher_stages
        assert "swin.pooler" not in [stage.place.turn.name for stage in stages]
