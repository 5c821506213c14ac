"""The parts of CIFAR-10 that a comparison needs, decoded, and a teacher fine-tuned on these very files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from benchmarks.cifar import CLASSES, ResNet, labels_of, normalized, pixels, pretrained
from benchmarks.common import ROOT

SHARED = Path(os.environ.get("E2KD_SHARED", ROOT.parent / "shared"))
TRAIN, TEST = (SHARED / "data" / "cifar10" / f"{part}_jpeg.safetensors" for part in ("train", "test"))
WEIGHTS = SHARED / "data" / "pretrained" / "cifar_resnet32-d509ac18.safetensors"
BLOCKS = 5  # of each stage of a ResNet-32
HELD_OUT = 500  # images of each class of the train part that neither teacher nor students train on
BATCH, LEARNING_RATE, MOMENTUM, DECAY = 128, 0.05, 0.9, 5e-4  # of the fine-tuning


class Images(NamedTuple):
    """Images [N, 3, 32, 32] uint8 and their labels [N]."""

    pixels: Tensor
    labels: Tensor

    def some(self, places: Tensor) -> Images:
        """The images at some places."""
        return Images(self.pixels[places], self.labels[places])


def places(labels: Tensor, start: int, stop: int | None) -> Tensor:
    """Where the images of each class stand, from its `start`-th to before its `stop`-th.

    >>> places(torch.tensor([0, 0, 1, 0, 1]), 0, 1)
    tensor([0, 2])
    """
    return torch.cat([(labels == c).nonzero().flatten()[start:stop] for c in range(CLASSES)])


def part(path: Path, start: int, stop: int | None) -> Images:
    """Decoded images of a file: those of each class from its `start`-th to before its `stop`-th."""
    labels = labels_of(path)
    chosen = places(labels, start, stop)
    return Images(pixels(path, chosen.tolist()), labels[chosen])


def few(pool: Images, per_class: int, seed: int) -> Images:
    """So many images of each class, chosen by the seed."""
    generator = Generator().manual_seed(seed)
    order = torch.randperm(len(pool.labels), generator=generator)
    return pool.some(order[places(pool.labels[order], 0, per_class)])


def operations() -> tuple[nn.Module, nn.Module]:
    """The augmentation of teacher and students: a shift by up to 4 pixels, and a flip."""
    return K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip()


def orders(count: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of each batch of a whole training: full batches alone, a new order every epoch."""
    generator = Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator)[: count - count % batch].split(batch)


def fine_tuned(work: Path, pool: Images, epochs: int) -> nn.Module:
    """The teacher: the shared ResNet-32, trained on the train part's JPEG files; kept in the work folder.

    With no epochs it is the shared network as it is.
    """
    if not epochs:
        return pretrained(WEIGHTS, BLOCKS)
    path = work / f"teacher-{epochs}-epochs.safetensors"
    if not path.exists():
        teacher = pretrained(WEIGHTS, BLOCKS)
        fine_tune(teacher, pool, epochs)
        work.mkdir(parents=True, exist_ok=True)
        save_file(teacher.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    teacher = ResNet(BLOCKS)
    teacher.load_state_dict(load_file(path))
    return teacher.eval()


def fine_tune(model: nn.Module, data: Images, epochs: int) -> None:
    """SGD with labels, one-cycle, in place."""
    torch.manual_seed(0)
    augmentation = K.AugmentationSequential(*operations())
    plan = list(orders(len(data.labels), BATCH, epochs, seed=0))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(plan))
    model.train()
    begun = time.perf_counter()
    for step, batch in enumerate(plan):
        images = augmentation(data.pixels[batch] / 255)
        loss = F.cross_entropy(model(normalized(images)), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.perf_counter() - begun
            print(f"teacher: step {step} of {len(plan)}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The model's top classes [N] for pixels [N, 3, 32, 32]."""
    return torch.cat([model(normalized(chunk)).argmax(1) for chunk in images.split(500)])
