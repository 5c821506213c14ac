"""The rivals: their formulas, their parts, and e²KD on top of them."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
from pathlib import Path
from typing import Any

import baseline_reference as slow
import pytest
import timm
import torch
import torch.nn.functional as F
from nets import TinyViT, bcos_cnn, cnn
from properties import assert_matches_finite_difference
from reference import cosine, gradient
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import e2kd
from e2kd.baselines import METHODS, Baseline, Indexed, IndexedDataset, dkd_loss
from e2kd.stages import Layers

pytestmark = pytest.mark.usefixtures("one_thread")
WITH_PARTS = {"FitNets", "ReviewKD", "CRD", "Overhaul", "AFD"}
SAMPLES = 12
Y = torch.tensor([0, 1, 3, 2])
INDICES = torch.tensor([7, 0, 11, 4])
TARGETS = Indexed(Y, INDICES, torch.full((4,), SAMPLES))
SETTINGS: dict[str, dict[str, Any]] = {"CRD": {"negatives": 5, "width": 6}, "AFD": {"width": 5}}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def models(student: str = "cnn") -> tuple[nn.Module, nn.Module]:
    return (TinyViT(seed=2) if student == "vit" else cnn(seed=0)), cnn(width=5, seed=1)


def build(name: str, student: nn.Module, teacher: nn.Module, x: Tensor, criterion: Any = None, **more: Any) -> Baseline:
    torch.manual_seed(5)
    return METHODS[name](student, teacher, criterion, **{"example": x, **SETTINGS.get(name, {}), **more})


def parts_of(criterion: nn.Module) -> list[Tensor]:
    return list(criterion.parameters())


class Residual(nn.Module):
    """One ReLU in place for all of a block, and another after an addition, as in many ResNets."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.one, self.two = Block(width), nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), Block(width))
        self.fc = nn.Linear(width, 4)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.two(self.one(self.stem(images))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


class OneReLU(nn.Module):
    """The same activation module after every convolution, as people write by hand."""

    def __init__(self, width: int, seed: int, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(given, width * n, 3, 2, 1) for given, n in ((3, 1), (width, 2), (2 * width, 4))
        )
        self.act, self.fc = nn.ReLU(inplace), nn.Linear(4 * width, 4)
        self.double()

    def before_relu(self, images: Tensor) -> list[Tensor]:
        """What the ReLU is given at the end of each stage, by functions alone."""
        found = [images]
        for conv in (self.conv1, self.conv2, self.conv3):
            found.append(F.conv2d(found[-1].relu(), conv.weight, conv.bias, 2, 1))
        return found[1:]

    def features(self, images: Tensor) -> list[Tensor]:
        """What each stage ends with."""
        return [given.relu() for given in self.before_relu(images)]

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.conv1(images))
        x = self.act(self.conv2(x))
        return self.fc(self.act(self.conv3(x)).mean((2, 3)))


class LateReLU(nn.Module):
    """The last ReLU is a function, as in torchvision's DenseNet."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3))
        self.fc = nn.Linear(width, 4)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.features(images), inplace=True).mean((2, 3)))


# The formulas


def check(criterion: Baseline, student: nn.Module, x: Tensor, expected: Tensor, targets: Any = TARGETS) -> None:
    """Value, and gradient in the student and in the parts."""
    found = criterion(student(x), targets) / criterion.weight
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    of = [*student.parameters(), *criterion.parameters()]
    wanted = torch.autograd.grad(expected, of, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in wanted)
    got = torch.autograd.grad(found, of, allow_unused=True)
    for parameter, *both in zip(of, got, wanted, strict=True):
        mine, theirs = (torch.zeros_like(parameter) if g is None else g for g in both)
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


def both(student: nn.Module, teacher: nn.Module, x: Tensor, mine: list[str], theirs: list[str]) -> Any:
    with torch.no_grad():
        taught = slow.heard(teacher, x, theirs)
    return slow.heard(student, x, mine), taught


def test_at_is_the_papers(x: Tensor) -> None:
    student, teacher = models()
    (_, mine), (_, theirs) = both(student, teacher, x, ["1", "3"], ["1", "3"])
    check(build("AT", student, teacher, x), student, x, slow.at(mine, theirs))


@pytest.mark.parametrize(("layer", "kernel"), [(None, 1), ("1", 5)])
def test_fitnets_is_the_papers(layer: str | None, kernel: int, x: Tensor) -> None:
    """With a convolution without padding from the student's grid to the teacher's where that is coarser."""
    student, teacher = models()
    criterion = build("FitNets", student, teacher, x, layer=layer, teacher_layer=None if layer is None else "3")
    assert criterion.regressor.kernel_size == (kernel, kernel)
    (_, mine), (_, theirs) = both(student, teacher, x, ["1"], ["1" if layer is None else "3"])
    check(criterion, student, x, slow.fitnets(criterion.regressor, mine[0], theirs[0]))


def test_overhaul_is_the_papers_on_features_before_their_relu(x: Tensor) -> None:
    student, teacher = Residual(4, seed=0), Residual(5, seed=1)
    criterion = build("Overhaul", student, teacher, x)
    places = [(s.place.module, s.place.before) for s in criterion.teacher_stages]
    assert places == [("one.relu", True), ("two.1.relu", True)]
    names = ["<one.relu", "<two.1.relu"]  # a ReLU in place: what it is given is copied
    (_, mine), (_, theirs) = both(student, teacher, x, names, names)
    assert all((t < 0).any() for t in theirs)
    check(criterion, student, x, slow.overhaul(criterion.connectors, mine, theirs))


def test_margins_are_means_of_the_negative_responses_of_all_batches() -> None:
    margin, seen = e2kd.baselines.overhaul.Margin(2), []
    for seed in range(3):
        batch = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
        seen.append(batch)
        found = margin(batch)
    whole = torch.cat(seen)
    for c in range(2):
        expected = whole[:, c][whole[:, c] < 0].mean()
        torch.testing.assert_close(found[:, c].min(), expected)
        assert torch.equal(found[:, c][batch[:, c] > 0], batch[:, c][batch[:, c] > 0])


def test_review_is_the_papers(x: Tensor) -> None:
    student, teacher = models()
    criterion = build("ReviewKD", student, teacher, x)
    (_, mine), (_, theirs) = both(student, teacher, x, ["1", "3", "<6"], ["1", "3", "<6"])
    mine[2], theirs[2] = mine[2][:, :, None, None], theirs[2][:, :, None, None]
    check(criterion, student, x, slow.review(criterion.fusions, mine, theirs))


def test_afd_is_the_papers(x: Tensor) -> None:
    student, teacher = models()
    criterion = build("AFD", student, teacher, x, layers=["1", "3"], teacher_layers=["3", "0", "1"])
    (_, mine), (_, theirs) = both(student, teacher, x, ["1", "3"], ["3", "0", "1"])
    check(criterion, student, x, slow.afd(criterion.matching, mine, theirs))


def test_crd_is_the_papers_over_two_steps(x: Tensor) -> None:
    """The second with the memory that the first renewed, and the partition constant that it found."""
    student, teacher = models()
    criterion = build("CRD", student, teacher, x, momentum=0.3)
    (_, (mine,)), (_, (theirs,)) = both(student, teacher, x, ["<6"], ["<6"])
    columns = torch.cat(
        [INDICES[:, None], torch.randint(SAMPLES, (4, 5), generator=torch.Generator().manual_seed(0))], 1
    )
    criterion.memory.draw = lambda indices, labels, number: columns[:, 1:]
    criterion.memory.fit(TARGETS.counts)
    z = [-1.0, -1.0]
    for _ in range(2):
        s = F.normalize(slow.linear(criterion.student_embedding, mine))
        t = F.normalize(slow.linear(criterion.teacher_embedding, theirs))
        memories = (criterion.memory.student.clone(), criterion.memory.teacher.clone())
        expected, z = slow.crd(s, t, memories, columns, 0.07, z)
        found = criterion(student(x), TARGETS) / criterion.weight
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # the authors' epsilon of 1e-7
        of = [*student[:5].parameters(), *criterion.parameters()]
        for got, want in zip(*(torch.autograd.grad(v, of, retain_graph=True) for v in (found, expected)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        for memory, old, new in zip(
            (criterion.memory.student, criterion.memory.teacher), memories, (s, t), strict=True
        ):
            old[INDICES] = F.normalize(0.3 * old[INDICES] + 0.7 * new.detach())
            torch.testing.assert_close(memory, old)


@pytest.mark.parametrize("normalize", [False, True])
def test_cat_is_the_papers(normalize: bool, x: Tensor) -> None:
    student, teacher = models()
    (_, mine), (_, theirs) = both(student, teacher, x, ["3"], ["3"])
    expected = slow.cat(mine[0], theirs[0], (student[6].weight, teacher[6].weight.detach()), 2, normalize)
    check(build("CATKD", student, teacher, x, normalize=normalize), student, x, expected)


def test_maps_of_cat_sum_to_the_logits_where_the_last_relu_is_a_function(x: Tensor) -> None:
    student, teacher = LateReLU(4, seed=0), LateReLU(5, seed=1)
    criterion = build("CATKD", student, teacher, x, resolution=1)
    sides: list[Tensor] = []
    own = criterion._maps
    criterion._maps = lambda *args: (sides.append(own(*args)), sides[-1])[1]
    logits = student(x)
    criterion(logits)
    for model, found, expected in zip((student, teacher), sides, (logits, teacher(x)), strict=True):
        torch.testing.assert_close(found[:, :, 0, 0] + model.fc.bias, expected)


def test_dkd_is_the_papers(x: Tensor) -> None:
    student, teacher = models()
    logits, taught = student(x), teacher(x).detach()
    check(build("DKD", student, teacher, x), student, x, slow.dkd(logits, taught, Y, 1.0, 8.0, 4.0), Y)


def test_dkd_with_kds_weights_is_kd() -> None:
    """Zhao et al., Eq. 6: KD = TCKD + (1 - p) NCKD."""
    student, teacher = torch.randn(2, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label, tau = torch.tensor([3]), 2.5
    p = (teacher / tau).softmax(1)[0, 3].item()
    found = dkd_loss(student, teacher, label, alpha=1, beta=1 - p, temperature=tau)
    torch.testing.assert_close(found, e2kd.kd_loss(student, teacher, tau))
    assert dkd_loss(torch.tensor([[200.0, 0, 0]]), torch.tensor([[0.0, 200, 0]]), torch.tensor([0])).isfinite()


def test_default_settings_are_the_papers() -> None:
    """Weights of the authors' code, see each docstring."""
    weights = {
        "AT": 1000,
        "FitNets": 100,
        "ReviewKD": 1,
        "CRD": 0.8,
        "Overhaul": 1e-3,
        "AFD": 200,
        "CATKD": 15,
        "DKD": 1,
    }
    rest = {"CRD": (16384, 0.07, 0.5, 128), "AFD": (128,), "CATKD": (2, False), "DKD": (1, 8, 4), "AT": (2,)}
    for name, method in METHODS.items():
        found = {k: p.default for k, p in inspect.signature(method).parameters.items()}
        assert list(found)[:4] == ["student", "teacher", "criterion", "weight"]
        assert found["weight"] == weights[name]
        own = [v for k, v in found.items() if isinstance(v, (int, float)) and k != "weight"]
        assert tuple(own) == rest.get(name, ())


# CRD's memory


def test_negatives_are_of_other_classes_and_uniform() -> None:
    memory = e2kd.baselines.memory.ContrastMemory(4, 0.5)
    memory.fit(torch.tensor([10]))
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    memory.draw(torch.arange(10), classes, 1)
    drawn = memory.draw(torch.tensor([0, 4]), torch.tensor([0, 1]), 6000)
    assert (classes[drawn] != torch.tensor([[0], [1]])).all()
    for row, others in zip(drawn, (6, 7), strict=True):
        counts = row.bincount(minlength=10)
        counts = counts[counts > 0]
        assert len(counts) == others
        assert ((counts - 6000 / others).abs() < 5 * (6000 / others) ** 0.5).all()
    assert not torch.equal(drawn, memory.draw(torch.tensor([0, 4]), torch.tensor([0, 1]), 6000))


def test_without_class_indices_negatives_are_the_other_samples() -> None:
    memory = e2kd.baselines.memory.ContrastMemory(4, 0.5)
    memory.fit(torch.tensor([5]))
    drawn = memory.draw(torch.tensor([0, 3]), None, 400)
    assert [sorted(row.unique().tolist()) for row in drawn] == [[1, 2, 3, 4], [0, 1, 2, 4]]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
@pytest.mark.parametrize("name", ["CRD", "DKD"])
def test_methods_that_read_labels_take_any_integer_type(name: str, kind: torch.dtype, x: Tensor) -> None:
    student, teacher = models()
    found = [build(name, student, teacher, x)(student(x), TARGETS._replace(labels=y)) for y in (Y, Y.to(kind))]
    assert torch.equal(*found)


def test_crd_without_indices_is_refused(x: Tensor) -> None:
    student, teacher = models()
    criterion = build("CRD", student, teacher, x, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="IndexedDataset"):
        criterion(student(x), Y)
    criterion(student(x), TARGETS)
    with pytest.raises(ValueError, match="holds 12 samples, but the data set has 13"):
        criterion(student(x), TARGETS._replace(counts=TARGETS.counts + 1))


def test_indices_travel_with_the_labels_through_a_loader() -> None:
    data = IndexedDataset(TensorDataset(torch.rand(SAMPLES, 3, 16, 16), torch.arange(SAMPLES) % 4))
    for images, targets in DataLoader(data, 5, shuffle=True):
        assert type(targets) is Indexed
        assert torch.equal(images, torch.stack([data.dataset[i][0] for i in targets.indices]))
        assert torch.equal(targets.labels, targets.indices % 4)
        assert targets.counts.unique().tolist() == [SAMPLES]
        assert targets.to(torch.float64).indices.dtype == torch.int64
    student, teacher = (m.float() for m in models())
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), classes="labels")
    logits = student(images)
    criterion(logits, targets)  # not only CRD takes them
    torch.testing.assert_close(criterion.parts["task"], F.cross_entropy(logits, targets.labels).detach())
    with torch.no_grad():
        assert criterion.eval()(student(images), targets) == F.cross_entropy(student(images), targets.labels)


def test_dicts_are_not_taken_for_image_and_label() -> None:
    with pytest.raises(TypeError, match=r"gave a dict with \['image', 'label'\]. Wrap the data set"):
        IndexedDataset([{"image": "pixels", "label": 3}])[0]


# What holds for all of them


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_finite_differences(name: str, x: Tensor) -> None:
    student, teacher = models()
    criterion = build(name, student, teacher, x, nn.CrossEntropyLoss())
    criterion(student(x), TARGETS)
    before = copy.deepcopy(criterion.state_dict())

    def loss() -> Tensor:
        criterion.load_state_dict({k: v for k, v in before.items() if k.startswith("memory")}, strict=False)
        return criterion(student(x), TARGETS)

    assert_matches_finite_difference(loss, nn.ModuleList([student, criterion]))


@pytest.mark.parametrize("name", METHODS)
def test_parts_are_the_criterions_and_the_teacher_is_not(name: str, x: Tensor) -> None:
    student, teacher = models()
    teacher.train()
    criterion = build(name, student, teacher, x, nn.CrossEntropyLoss())
    networks = {id(p) for m in (student, teacher) for p in m.parameters()}
    parts = parts_of(criterion)
    assert bool(parts) == (name in WITH_PARTS)
    assert not networks & {id(p) for p in parts}
    assert all(p.dtype == torch.float64 for p in parts)
    if name not in WITH_PARTS:
        assert not criterion.state_dict()
    before = [p.clone() for p in parts]
    optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=0.01)
    criterion(student(x), TARGETS).backward()
    assert all(p.grad is not None for p in parts)
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(parts, before, strict=True) if p.grad.abs().max() > 1e-9)
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_but_the_parts(name: str, x: Tensor) -> None:
    model = models()[1]
    found = build(name, model, model, x)(model(x), TARGETS)
    assert found >= 0
    assert (abs(found.item()) < 1e-12) == (name not in WITH_PARTS)


@pytest.mark.parametrize("name", METHODS)
def test_outside_of_training_it_is_the_wrapped_criterion(name: str, x: Tensor) -> None:
    student, teacher = models()
    criterion = build(name, student, teacher, x, nn.CrossEntropyLoss())
    expected = F.cross_entropy(student(x), Y).detach()
    with torch.no_grad():
        assert criterion(student(x), TARGETS) == expected
    with pytest.warns(e2kd.NoEffectWarning, match="the criterion is in eval mode"):
        assert criterion.eval()(student(x), Y) == expected
    assert not criterion.tap.forwards[1:]
    with pytest.warns(e2kd.NoEffectWarning, match="eval mode"):
        assert criterion.train()(student.eval()(x), TARGETS) == expected
    criterion.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not criterion.teacher.ears


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", METHODS)
def test_a_criterion_that_is_gone_leaves_no_hooks(name: str, x: Tensor) -> None:
    student, teacher = models()
    for _ in range(2):
        criterion = build(name, student, teacher, x)
        criterion(student(x), TARGETS)
        assert hooks(student)
        del criterion
        gc.collect()
    assert not hooks(student)


def test_removing_takes_the_criterion_inside_along(x: Tensor) -> None:
    student, teacher = models()
    ce = nn.CrossEntropyLoss()
    for inner in (build("DKD", student, teacher, x, ce), e2kd.E2KDLoss(student, teacher, ce, example=x)):
        build("AT", student, teacher, x, inner).remove()
    assert not hooks(student)
    build("AT", student, teacher, x, ce).remove()  # one without hooks


@pytest.mark.parametrize("name", METHODS)
def test_a_last_batch_of_one_image_is_taken(name: str, x: Tensor) -> None:
    student, teacher = models()
    criterion = build(name, student, teacher, x, nn.CrossEntropyLoss())
    logits = student(x[:1])
    loss = criterion(logits, Indexed(*(field[:1] for field in TARGETS)))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in (*student.parameters(), *criterion.parameters()))
    if name in ("ReviewKD", "AFD"):  # batch norm has nothing to compare it with
        torch.testing.assert_close(loss, F.cross_entropy(logits, Y[:1]))
        assert not any(p.grad.any() for p in criterion.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_state_goes_through_a_checkpoint(name: str, x: Tensor, tmp_path: Path) -> None:
    student, teacher = models()
    saved = build(name, student, teacher, x, nn.CrossEntropyLoss(), warmup=3)
    for _ in range(2):
        saved(student(x), TARGETS)
    torch.save(saved.state_dict(), tmp_path / "criterion.pt")
    fresh = build(name, student, teacher, x, nn.CrossEntropyLoss(), warmup=3)
    for p in fresh.parameters():
        nn.init.normal_(p)
    fresh.load_state_dict(torch.load(tmp_path / "criterion.pt", weights_only=True))
    assert torch.equal(fresh(student(x), TARGETS), saved(student(x), TARGETS))


def test_the_weight_warms_up(x: Tensor) -> None:
    student, teacher = models()
    warm, full = (build("AT", student, teacher, x, warmup=n) for n in (4, 0))
    expected = full(student(x))
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        torch.testing.assert_close(warm(student(x)), expected * share)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_points_where_float32_does(name: str, x: Tensor) -> None:
    student, teacher = (m.float() for m in models())
    images = 10 * x.float()  # batch norms over four samples that are nearly alike would show bfloat16's digits
    criterion = build(name, student, teacher, images, nn.CrossEntropyLoss())
    criterion(student(images), TARGETS)
    state, found = copy.deepcopy(criterion.state_dict()), []
    for on in (False, True):
        criterion.load_state_dict(state)
        both = nn.ModuleList([student, criterion])
        both.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = criterion(student(images), TARGETS)
        assert loss.dtype == torch.float32
        loss.backward()
        found.append(gradient(both))
    assert cosine(*found) > 0.99


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"CATKD"}))
def test_a_vit_learns_from_a_cnn(name: str, x: Tensor) -> None:
    student, teacher = models("vit")
    criterion = build(name, student, teacher, x, nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam([*student.parameters(), *criterion.parameters()], 3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = criterion(student(x), TARGETS)
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), criterion.parts[criterion.name].item()))
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1] < losses[0][1]


def test_the_stages_of_a_vit_are_its_blocks_and_cam_is_refused(x: Tensor) -> None:
    student, teacher = models("vit")
    criterion = build("AT", student, teacher, x)
    assert [s.place.module for s in criterion.student_stages] == ["blocks.0", "blocks.1"]
    (_, mine), (_, theirs) = both(student, teacher, x, ["blocks.0", "blocks.1"], ["1", "3"])
    maps = [m[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for m in mine]
    check(criterion, student, x, slow.at(maps, [slow.averaged(theirs[0], 4), theirs[1]]))
    with pytest.raises(e2kd.UnsupportedModel, match="average pooling and one linear layer"):
        build("CATKD", student, teacher, x)


# Which layers


@pytest.mark.parametrize(
    ("name", "side", "stages", "blocks"),
    [
        ("test_resnet", 96, ["layer1", "layer2", "layer3", "layer4"], 3),
        ("test_vit", 160, ["blocks.0", "blocks.2", "blocks.3", "blocks"], 6),
    ],
)
def test_stages_of_timm_networks(name: str, side: int, stages: list[str], blocks: int) -> None:
    """Where grids change, without the stem; evenly spaced blocks where they don't."""
    layers = Layers(timm.create_model(name), torch.rand(2, 3, side, side))
    assert [s.place.module for s in layers.stages()] == stages
    assert len(layers.blocks()) == blocks


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["AT", "FitNets", "AFD", "ReviewKD"])
def test_stages_that_end_in_one_module_for_all_are_told_apart(name: str, inplace: bool, x: Tensor) -> None:
    student, teacher = OneReLU(3, seed=0, inplace=inplace), OneReLU(4, seed=1, inplace=inplace)
    criterion = build(name, student, teacher, x)
    seen = []
    own = criterion.term
    criterion.term = lambda batch: (seen.append(batch), own(batch))[1]
    criterion(student(x)).backward()
    stages = slice(1, 2) if name == "FitNets" else slice(3)
    for found, expected in zip(seen[0].student[:3], student.features(x)[stages], strict=True):
        torch.testing.assert_close(found, expected)
    theirs = teacher.features(x)[stages]
    if name == "ReviewKD":  # before the ReLU
        theirs = teacher.before_relu(x)
    for found, expected in zip(seen[0].teacher[:3], theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_at_of_one_module_for_all_is_the_papers(x: Tensor) -> None:
    student, teacher = OneReLU(3, seed=0), OneReLU(4, seed=1)
    criterion = build("AT", student, teacher, x)
    assert [s.place.key for s in criterion.student_stages] == ["act 0", "act 1", "act 2"]
    with torch.no_grad():
        theirs = teacher.features(x)
    check(criterion, student, x, slow.at(student.features(x), theirs))


@pytest.mark.parametrize("inplace", [False, True])
def test_overhaul_of_one_module_for_all_is_the_papers(inplace: bool, x: Tensor) -> None:
    student, teacher = OneReLU(3, seed=0, inplace=inplace), OneReLU(4, seed=1, inplace=inplace)
    criterion = build("Overhaul", student, teacher, x)
    with torch.no_grad():
        theirs = teacher.before_relu(x)
    check(criterion, student, x, slow.overhaul(criterion.connectors, student.before_relu(x), theirs))


@pytest.mark.parametrize("compiled", [False, True])
def test_catkd_of_one_module_for_all_is_the_papers(compiled: bool, x: Tensor) -> None:
    student, teacher = OneReLU(3, seed=0), OneReLU(4, seed=1)
    criterion = build("CATKD", student, teacher, x)
    with torch.no_grad():
        theirs = teacher.features(x)[-1]
    expected = slow.cat(student.features(x)[-1], theirs, (student.fc.weight, teacher.fc.weight.detach()), 2, False)
    run = torch.compile(student, backend="eager") if compiled else student
    torch.testing.assert_close(criterion(run(x), TARGETS) / criterion.weight, expected, rtol=1e-9, atol=1e-12)


def test_what_dropout_changes_in_training_is_not_taken_for_its_input(x: Tensor) -> None:
    """In eval mode, in which layers are found, Dropout hands on the very tensor."""

    class Dropping(OneReLU):
        def forward(self, images: Tensor) -> Tensor:
            for conv in (self.conv1, self.conv2, self.conv3):
                images = self.drop(self.act(conv(images)))
            return self.fc(images.mean((2, 3)))

    student = Dropping(3, seed=0)
    student.drop = nn.Dropout(0.5)
    assert [s.place.key for s in build("AT", student, student, x).student_stages] == ["act 1", "act 2"]


def test_a_module_for_all_layers_is_named_once_for_each(x: Tensor) -> None:
    """Its last calls are meant."""
    student, teacher = OneReLU(3, seed=0), OneReLU(4, seed=1)
    criterion = build("AT", student, teacher, x, layers=["act", "act"])
    assert [s.place.key for s in criterion.student_stages] == ["act 1", "act 2"]
    assert [s.place.key for s in build("AT", student, teacher, x, layers=["act"]).student_stages] == ["act 2"]
    with torch.no_grad():
        theirs = teacher.features(x)[1:]
    check(criterion, student, x, slow.at(student.features(x)[1:], theirs))
    with pytest.raises(e2kd.UnsupportedModel, match=r"'act' at most 3 times, .* but it was named 4 times"):
        build("AT", student, teacher, x, layers=["act"] * 4)


def test_two_layers_of_the_student_may_learn_from_one(x: Tensor) -> None:
    student, teacher = models()
    (_, mine), (_, theirs) = both(student, teacher, x, ["1", "3"], ["3", "3"])
    criterion = build("AT", student, teacher, x, layers=["1", "3"], teacher_layers=["3", "3"])
    check(criterion, student, x, slow.at([slow.averaged(mine[0], 4), mine[1]], theirs))


def test_a_teacher_that_runs_other_layers_than_before_is_told_of(x: Tensor) -> None:
    student, teacher = models()
    criterion = build("AT", student, teacher, x)
    teacher.forward = lambda images: torch.zeros(len(images), 4, dtype=images.dtype)
    with pytest.raises(RuntimeError, match=r"some of its layers \['1', '3'\], which were found"):
        criterion(student(x))


def test_layers_can_be_named(x: Tensor) -> None:
    student, teacher = models()
    criterion = build("AT", student, teacher, x, layers=["3"])
    assert [s.place.module for s in criterion.teacher_stages] == ["3"]
    with pytest.raises(ValueError, match="as many layers of the student as of the teacher, but got 2 and 1"):
        build("AT", student, teacher, x, layers=["1", "3"], teacher_layers=["3"])
    with pytest.raises(e2kd.UnsupportedModel, match="no layer named 'conv9'"):
        build("AT", student, teacher, x, layers=["conv9"])
    with pytest.raises(e2kd.UnsupportedModel, match=r"returned a tensor \[2, 4\], which holds no map"):
        build("AT", student, teacher, x, layers=["6"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


class FunctionalReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = Inner(), nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).mean((2, 3)))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def test_a_relu_that_is_no_module_is_refused_where_it_has_to_be_undone() -> None:
    student, teacher = FunctionalReLU(), FunctionalReLU()
    with pytest.raises(e2kd.UnsupportedModel, match=r"applied by a function"):
        METHODS["Overhaul"](student, teacher)
    METHODS["ReviewKD"](student, teacher)


# e²KD on top, and each other


def count_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    return calls


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("net", ["closed", "class_token"])
def test_e2kd_on_top_is_the_sum_and_asks_the_teacher_once(name: str, net: str, x: Tensor) -> None:
    """A ViT teacher's last block is run again for its explanation, which nobody may mistake for another answer."""
    student, teacher = cnn(seed=0), cnn(width=5, seed=1) if net == "closed" else TinyViT(seed=1)
    if name == "CATKD" and net == "class_token":
        pytest.skip("a class token has no CAM")
    alone = build(name, student, teacher, x)
    term = alone(student(x), TARGETS)
    plain = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), weight=2.0, example=x)
    expected = plain(student(x), TARGETS) + term
    inner = build(name, student, teacher, x, nn.CrossEntropyLoss())
    on_top = e2kd.E2KDLoss(student, teacher, inner, weight=2.0, example=x)
    mine, theirs = count_calls(student), count_calls(teacher)
    found = on_top(student(x), TARGETS)
    torch.testing.assert_close(found, expected)
    assert (len(mine), len(theirs)) == (1, 1)
    assert {"at", "hint", "review", "crd", "overhaul", "afd", "cat", "dkd"} & on_top.parts.keys() == {inner.name}
    assert on_top.parts["explanation"] == plain.parts["explanation"]
    of = [p for p in student.parameters()]
    for got, want in zip(*(torch.autograd.grad(v, of) for v in (found, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert list(map(id, on_top.parameters())) == list(map(id, inner.parameters()))


@pytest.mark.parametrize("order", ["e2kd outside", "e2kd between", "e2kd inside", "no e2kd"])
def test_criteria_nest_in_any_order_with_one_call_of_the_teacher(order: str, x: Tensor) -> None:
    student, teacher = models()
    ce = nn.CrossEntropyLoss()

    def e2kd_loss(criterion: Any) -> e2kd.E2KDLoss:
        return e2kd.E2KDLoss(student, teacher, criterion, example=x)

    def at(criterion: Any) -> Baseline:
        return build("AT", student, teacher, x, criterion)

    def dkd(criterion: Any) -> Baseline:
        return build("DKD", student, teacher, x, criterion)

    criterion = {
        "e2kd outside": lambda: e2kd_loss(at(dkd(ce))),
        "e2kd between": lambda: at(e2kd_loss(dkd(ce))),
        "e2kd inside": lambda: dkd(at(e2kd_loss(ce))),
        "no e2kd": lambda: dkd(at(ce)),
    }[order]()
    criterion(student(x), Y)  # the first step finds out how the teacher is explained
    calls = count_calls(teacher)
    loss = criterion(student(x), Y)
    assert len(calls) == 1
    expected = at(None)(student(x)) + dkd(None)(student(x), Y)
    expected = expected + (ce(student(x), Y) if order == "no e2kd" else e2kd_loss(ce)(student(x), Y))
    torch.testing.assert_close(loss, expected)
    assert all(ear.heard is None for ear in criterion.teacher.ears)  # nothing is kept alive


def test_a_rival_inside_follows_how_the_teacher_is_to_be_asked(x: Tensor) -> None:
    student, teacher = models()
    asked = {"input_normalization": ((0.0,) * 3, (1.0,) * 3), "teacher_normalization": ((0.4,) * 3, (0.2,) * 3)}
    own = build("AT", student, teacher, x, **asked)(student(x))
    inside = build("AT", student, teacher, x)
    e2kd.E2KDLoss(student, teacher, inside, example=x, **asked)(student(x))
    torch.testing.assert_close(inside.parts["at"] * inside.weight, own.detach())
    other = build("AT", student, teacher, x, teacher_size=32)
    outer = e2kd.E2KDLoss(student, teacher, other, example=x, **asked)
    assert outer.teacher is not other.teacher
    outer(student(x))
    assert other.parts["at"] != inside.parts["at"]


def test_e2kd_of_a_drawn_share_of_the_batch_still_gives_the_rival_the_whole(x: Tensor) -> None:
    student, teacher = models()
    inside = build("AT", student, teacher, x)
    settings = {"explainer": e2kd.InputGradient(), "fraction": 0.5, "example": x}
    e2kd.E2KDLoss(student, teacher, inside, **settings)(student(x))
    torch.testing.assert_close(inside.parts["at"] * 1000, build("AT", student, teacher, x)(student(x)).detach())


def test_bcos_networks_are_heard_in_the_forward_that_explains_them(x: Tensor) -> None:
    student, teacher = bcos_cnn(seed=0), bcos_cnn(seed=2)
    inside = build("AT", student, teacher, x)
    criterion = e2kd.E2KDLoss(student, teacher, inside, example=x)
    criterion(student(x))
    calls = count_calls(teacher)
    criterion(student(x)).backward()
    assert len(calls) == 1
    names = [stage.place.module for stage in inside.student_stages]
    (_, mine), (_, theirs) = both(student, teacher.eval(), x, names, names)
    torch.testing.assert_close(inside.parts["at"], slow.at(mine, theirs).detach())


# Frozen teachers


UNIT = ((0.0,) * 3, (1.0,) * 3)


def test_features_of_a_frozen_teacher_are_refused_and_dkd_is_as_with_the_live_one(tmp_path: Path) -> None:
    teacher, student = cnn(width=5, seed=1).float(), cnn(seed=0).float()
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(pixels, torch.arange(8) % 4)
    frozen = e2kd.freeze(teacher, data, tmp_path, normalization=UNIT, progress=False)
    images, taught = next(iter(DataLoader(e2kd.FrozenDataset(data, frozen), 8)))
    for name in METHODS.keys() - {"DKD"}:
        with pytest.raises(e2kd.UnsupportedModel, match=f"{name} compares features"):
            METHODS[name](student, frozen)
    x = images / 255
    ce = nn.CrossEntropyLoss()
    dkd = METHODS["DKD"](student, frozen, ce)
    found = dkd(student(x), taught)
    live = METHODS["DKD"](student, teacher, ce)(student(x), taught.labels)
    torch.testing.assert_close(found, live, rtol=1e-3, atol=1e-3)
    inside = e2kd.E2KDLoss(student, frozen, METHODS["DKD"](student, frozen, ce))
    plain = e2kd.E2KDLoss(student, frozen)
    torch.testing.assert_close(inside(student(x), taught), found + plain(student(x), taught))
    with torch.no_grad():
        assert dkd.eval()(student(x), taught) == ce(student(x), taught.labels)
    with pytest.raises(ValueError, match="lessons of a frozen teacher"):
        METHODS["AT"](student, teacher)(student(x), taught)


# Bad input


def test_what_cannot_be_compared_is_refused(x: Tensor) -> None:
    student, teacher = models()
    with pytest.raises(ValueError, match="weight >= 0"):
        build("AT", student, teacher, x, weight=-1)
    with pytest.raises(ValueError, match="warmup"):
        build("AT", student, teacher, x, warmup=-1)
    with pytest.raises(TypeError, match="teacher to be a torch"):
        METHODS["AT"](student, None)
    criterion = build("AT", student, teacher, x)
    with pytest.raises(RuntimeError, match="without a training forward"):
        criterion(torch.zeros(4, 4, requires_grad=True))
    with pytest.raises(ValueError, match="same classes"):
        build("AT", student, cnn(classes=5), x)(student(x))
    with pytest.raises(ValueError, match="class indices"):
        build("DKD", student, teacher, x)(student(x), torch.full((4, 4), 0.25))
    with pytest.raises(ValueError, match="class indices"):
        build("DKD", student, teacher, x)(student(x))


def test_copies_of_the_student_carry_inert_hooks(x: Tensor) -> None:
    student, teacher = models()
    criterion = build("FitNets", student, teacher, x)
    for copied in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        copied(x)
        assert not criterion.tap.forwards
        with pytest.raises(RuntimeError, match="without a training forward"):
            criterion(copied(x))


def test_a_compiled_student_is_heard(x: Tensor) -> None:
    student, teacher = models()
    criterion = build("AT", student, teacher, x, nn.CrossEntropyLoss())
    parameters = list(student.parameters())
    expected = criterion(student(x), Y)
    wanted = torch.autograd.grad(expected, parameters)
    criterion = build("AT", student, teacher, x, nn.CrossEntropyLoss())
    found = criterion(torch.compile(student, backend="aot_eager", fullgraph=True)(x), Y)
    torch.testing.assert_close(found, expected)
    for got, want in zip(torch.autograd.grad(found, parameters), wanted, strict=True):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


# Recipes: chains of teachers, mixed images


def test_a_chain_of_teacher_assistants_is_a_loop(x: Tensor) -> None:
    """Mirzadeh et al. 2020: each network is the next one's teacher."""
    teacher = cnn(width=8, seed=0)
    first = teacher
    for width, seed in ((6, 0), (4, 4)):
        student = cnn(width=width, seed=seed)
        criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), example=x)
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = criterion(student(x), Y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        criterion.remove()
        teacher = student
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*student.modules(), *first.modules()))


def test_the_teacher_sees_the_mixed_images(x: Tensor) -> None:
    """Beyer et al. 2022: mixup, and nothing to learn but what the teacher says of the very same pixels."""
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, build("AT", student, teacher, x), example=x)
    share = torch.distributions.Beta(0.2, 0.2).sample((4, 1, 1, 1)).double()
    mixed = share * x + (1 - share) * x.flip(0)
    criterion(student(x))
    seen = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = student(mixed)
    criterion(logits).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], mixed)
    torch.testing.assert_close(criterion.parts["kd"], e2kd.kd_loss(logits, teacher(mixed)).detach())
