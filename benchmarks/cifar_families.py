"""Families of teachers and students for CIFAR-10: standard networks, explained by GradCAM, and B-cos networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.cifar import CLASSES, ResNet, normalized, pretrained
from benchmarks.cifar_data import SHARED, TURNS, Images, orders, shifts, shifts_and_flips, turned
from e2kd import bcos

WEIGHTS = SHARED / "data" / "pretrained" / "cifar_resnet32-d509ac18.safetensors"
BLOCKS = 5  # of each stage of a ResNet-32
TURNED_CLASSES = TURNS * CLASSES
BATCH = 128  # of a teacher's training
VIT_SIZE: dict[str, int] = {"embed_dim": 96, "depth": 4}
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """What teachers and students of one kind have in common, and the teacher.

    Args:
        name: of the teacher's file.
        encode: pixels [B, 3, h, w], uint8 or in [0, 1] -> what the networks take.
        loss: of a training with labels.
        teacher: makes the network; its weights may be pretrained.
        optimizer: the teacher's, at the peak of its one-cycle schedule.
        epochs: the teacher's, over the whole train part.
        title: the teacher's.
        seen: the images of CIFAR-10 -> those of the task.
        augmentation: makes the operations.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    teacher: Callable[[], nn.Module]
    optimizer: Optimizer
    epochs: int
    title: str
    seen: Callable[[Images], Images] = lambda images: images
    augmentation: Callable[[], tuple[nn.Module, ...]] = shifts_and_flips


@dataclass(frozen=True)
class Family:
    """A teacher and its students; the optimizer is the students'. Of `shifted` ones the curve of Fig. 5 is measured."""

    name: str
    kind: Kind
    student: Callable[[], nn.Module]
    optimizer: Optimizer
    title: str
    shifted: bool = False


def encoded(images: Tensor) -> Tensor:
    """Pixels, uint8 or in [0, 1], beside their inverse: [B, 6, h, w] in [0, 1]."""
    return bcos.AddInverse()(images if images.is_floating_point() else images / 255)


def small_bcos(depth: int) -> nn.Module:
    """A B-cos ResNet of 6*depth+2 layers whose stem halves the image: a fifth of the cost of `bcos.resnet20`."""
    model = bcos.BcosResNet(bcos.BasicBlock, (depth,) * 3, 10, width=24)
    model.pool = nn.Identity()
    return model


def vit() -> nn.Module:
    """A ViT of 4x4 patches that pools its tokens."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 4, num_classes=10, global_pool="avg", class_token=False, **VIT_SIZE, num_heads=3)


def bcos_vit() -> nn.Module:
    """A B-cos ViT-C of as many tokens: two convolutions halve the image."""
    return bcos.bcos_vit(VIT_SIZE["embed_dim"], VIT_SIZE["depth"], 3, 10, patch_size=1, stem=(24, 48), hidden=192)


def of_turned_images() -> nn.Module:
    """The shared ResNet-32 with a class for each pair of what an image shows and how it is turned."""
    model = pretrained(WEIGHTS, BLOCKS)
    model.linear = nn.Linear(model.linear.in_features, TURNED_CLASSES)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The recipe of the shared networks."""
    return torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizer for B-cos networks."""
    return torch.optim.Adam(model.parameters(), 3e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizer for standard students."""
    return torch.optim.AdamW(model.parameters(), 3e-3)


STANDARD = Kind(
    "standard", normalized, F.cross_entropy, lambda: pretrained(WEIGHTS, BLOCKS), sgd, epochs=3, title="ResNet-32"
)
BCOS = Kind("bcos", encoded, bcos.bcos_loss, lambda: small_bcos(2), adam, epochs=6, title="B-cos ResNet-14")
TURNED = Kind(
    "turned", normalized, F.cross_entropy, of_turned_images, sgd, 3, "ResNet-32", seen=turned, augmentation=shifts
)
FAMILIES = {
    family.name: family
    for family in (
        Family("standard", STANDARD, lambda: ResNet(3), adamw, "ResNet-20"),
        Family("bcos", BCOS, lambda: small_bcos(1), adam, "B-cos ResNet-8"),
        Family("turned", TURNED, lambda: ResNet(3, classes=TURNED_CLASSES), adamw, "ResNet-20, 40 classes"),
        Family("vit", STANDARD, vit, adamw, "ViT", shifted=True),
        Family("bcos_vit", BCOS, bcos_vit, adam, "B-cos ViT-C", shifted=True),
    )
}


def trained_teacher(kind: Kind, work: Path, pool: Images, epochs: int) -> nn.Module:
    """The teacher, trained on the train part's JPEG files; kept in the work folder. 0 epochs: as it begins."""
    torch.manual_seed(0)
    teacher = kind.teacher()
    path = work / f"{kind.name}-teacher-{epochs}-epochs.safetensors"
    if not epochs:
        return teacher.eval()
    if not path.exists():
        _train(kind, teacher, pool, epochs)
        work.mkdir(parents=True, exist_ok=True)
        save_file(teacher.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    teacher.load_state_dict(load_file(path))
    return teacher.eval()


def _train(kind: Kind, teacher: nn.Module, data: Images, epochs: int) -> None:
    """With labels, one-cycle, in place."""
    torch.manual_seed(0)
    augmentation = K.AugmentationSequential(*kind.augmentation())
    plan = list(orders(len(data.labels), BATCH, epochs, seed=0))
    optimizer = kind.optimizer(teacher)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=len(plan))
    teacher.train()
    begun = time.perf_counter()
    for step, batch in enumerate(plan):
        images = augmentation(data.pixels[batch] / 255)
        loss = kind.loss(teacher(kind.encode(images)), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.perf_counter() - begun
            print(f"teacher: step {step} of {len(plan)}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


@torch.no_grad()
def predictions(kind: Kind, model: nn.Module, pixels: Tensor) -> Tensor:
    """The model's top classes [N] for pixels [N, 3, 32, 32]."""
    return torch.cat([model(kind.encode(chunk)).argmax(1) for chunk in pixels.split(500)])
