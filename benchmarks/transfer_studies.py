"""The UniCAM paper's studies on small networks: what each way of distilling hands over, and what a gap costs.

    python -m benchmarks.transfer_studies [--data catsdogs|cifar10] [--epochs 20] [--seeds 3]

Equal base: a student (ResNet-20) distilled from a ResNet-56 by its answers (Hinton et al. 2015), by attention maps
(Zagoruyko and Komodakis 2017) or by features (Heo et al. 2019, "overhaul"), each against the same network trained on
labels alone. Capacity gap: a narrower student distilled from the ResNet-56, or from a ResNet-32 in between that was
distilled from it (Mirzadeh et al. 2020). Every arm begins with the same weights and sees the same images in the same
order. Reported for each stage: similarity to the base and to the teacher (FSS), relevance beyond the base and the
base's beyond the student (RS), with their standard errors and the spread by chance; and accuracy on images held out.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import e2kd
from benchmarks.cifar import ResNet, normalized
from benchmarks.cifar_data import SHARED, TEST, TRAIN, few, part
from benchmarks.common import RESULTS, environment, markdown_table, write_json
from e2kd.commands.photos import find_photos, read_photos
from e2kd.distance import Score
from e2kd.transfer import scores_of, unicam

LAYERS = ("layer1", "layer2", "layer3")
TEACHER, ASSISTANT, STUDENT, SMALL = 9, 5, 3, 1  # blocks of each stage: ResNet-56, -32, -20 and -8
PROBED = 200  # images that the scores are measured on
TEMPERATURE, ATTENTION, FEATURES = 4.0, 1000.0, 1.0  # the papers' temperature and weight; features are a mean here
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # images and labels to train on, and those held out
Way = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], Tensor]


def cats_and_dogs(side: int) -> Data:
    """ASIRRA photographs at a side of so many pixels."""
    found = []
    for name in ("train", "val"):
        photos = find_photos(SHARED / "data" / "catsdogs1400" / name, 10_000)
        found += [normalized(read_photos(photos.paths, side)), torch.tensor(photos.labels)]
    return found[0], found[1], found[2], found[3]


def cifar10() -> Data:
    """200 images of each class to train on, 100 to test."""
    train, test = few(part(TRAIN, 0, 1000), 200, seed=0), part(TEST, 0, 100)
    return normalized(train.pixels), train.labels, normalized(test.pixels), test.labels


def stages(model: ResNet, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the features at the end of every stage before their ReLU."""
    x, found = F.relu(model.bn1(model.conv1(images))), []
    for layer in (model.layer1, model.layer2, model.layer3):
        for block in layer[:-1]:
            x = block(x)
        last = layer[-1]
        short = F.pad(x[:, :, :: last.stride, :: last.stride], (0, 0, 0, 0, last.pad, last.pad))
        found.append(last.bn2(last.conv2(F.relu(last.bn1(last.conv1(x))))) + short)
        x = F.relu(found[-1])
    return model.linear(x.mean((2, 3))), found


def by_answers(student: Tensor, teacher: Tensor, mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """KL divergence of softened answers."""
    return e2kd.kd_loss(student, teacher, temperature=TEMPERATURE)


def by_attention(student: Tensor, teacher: Tensor, mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Squared distance of the energies over space, each scaled to unit length."""

    def energy(features: Tensor) -> Tensor:
        return F.normalize(features.relu().square().mean(1).flatten(1))

    return ATTENTION / 2 * sum((energy(a) - energy(b)).square().mean() for a, b in zip(mine, theirs, strict=True))


class ByFeatures(nn.Module):
    """Partial squared distance of the student's features, mapped by a 1x1 convolution, to the teacher's above a margin.

    The margin of a channel is the mean of its negative values, from a first batch.
    """

    def __init__(self, teacher: ResNet, images: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            found = stages(teacher, images)[1]
        self.margins = [-(-x).relu().sum((0, 2, 3)) / (x < 0).sum((0, 2, 3)).clamp_min(1) for x in found]
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(x.shape[1], x.shape[1], 1, bias=False), nn.BatchNorm2d(x.shape[1])) for x in found
        )

    def forward(self, student: Tensor, teacher: Tensor, mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
        total = student.new_zeros(())
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            wanted, given = torch.maximum(b, self.margins[k][:, None, None]), self.maps[k](a)
            counts = (given > wanted) | (wanted > 0)
            total = total + ((given - wanted).square() * counts).mean() / 2 ** (len(mine) - 1 - k)
        return FEATURES * total


def train(
    blocks: int, data: Data, args: argparse.Namespace, seed: int, teacher: ResNet | None = None, way: Way | None = None
) -> ResNet:
    """A network trained on labels and, with a teacher, by one way of distilling."""
    torch.manual_seed(seed)
    model, (images, labels) = ResNet(blocks), data[:2]
    extra = list(way.parameters()) if isinstance(way, nn.Module) else []
    optimizer = torch.optim.SGD([*model.parameters(), *extra], 0.05, momentum=0.9, weight_decay=5e-4)
    steps = args.epochs * -(-len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    generator = Generator().manual_seed(seed)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(images), generator=generator).split(args.batch):
            batch = images[rows]
            batch = batch.flip(3) if torch.rand((), generator=generator) < 0.5 else batch
            logits, mine = stages(model, batch)
            loss = F.cross_entropy(logits, labels[rows])
            if teacher is not None and way is not None:
                with torch.no_grad():
                    answers, theirs = stages(teacher, batch)
                loss = loss + way(logits, answers, mine, theirs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def scores(first: ResNet, second: ResNet, data: Data) -> dict[str, dict[str, Score]]:
    """FSS and RS of two networks at every stage, on images held out."""
    rows = torch.linspace(0, len(data[2]) - 1, min(PROBED, len(data[2]))).long()  # of all classes alike
    found = unicam(first, second, data[2][rows], data[3][rows], LAYERS, batch_size=100)
    return {name: scores_of(layer.sums) for name, layer in found.layers.items()}


def accuracy(model: ResNet, data: Data) -> float:
    with torch.no_grad():
        logits = torch.cat([model(part) for part in data[2].split(200)])
    return (logits.argmax(1) == data[3]).double().mean().item()


def study(data: Data, args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """All arms of one seed."""

    def told(said: str) -> None:
        print(f"seed {seed}: {said}, {time.perf_counter() - start:.0f} s", file=sys.stderr)

    start = time.perf_counter()
    teacher = train(TEACHER, data, args, seed)
    told("teacher")
    base, small = train(STUDENT, data, args, seed + 1), train(SMALL, data, args, seed + 1)
    told("bases")
    assistant = train(ASSISTANT, data, args, seed + 2, teacher, by_answers)
    told("assistant")
    torch.manual_seed(seed)  # of the mappings
    features = ByFeatures(teacher, data[0][: args.batch])
    arms: list[tuple[str, str, int, ResNet, ResNet, Way]] = [
        ("equal base", "answers", STUDENT, teacher, base, by_answers),
        ("equal base", "attention", STUDENT, teacher, base, by_attention),
        ("equal base", "features", STUDENT, teacher, base, features),
        ("capacity gap", "from the teacher", SMALL, teacher, small, by_answers),
        ("capacity gap", "through an assistant", SMALL, assistant, small, by_answers),
    ]
    rows = []
    for name, arm, blocks, source, other, way in arms:
        student = train(blocks, data, args, seed + 1, source, way)
        rows.append({"study": name, "arm": arm, "seed": seed} | row(student, other, teacher, data))
        told(arm)
    return rows


def row(student: ResNet, base: ResNet, teacher: ResNet, data: Data) -> dict[str, Any]:
    """What is reported of a student."""
    found: dict[str, Any] = {
        f"{who}_accuracy": accuracy(model, data)
        for who, model in (("student", student), ("base", base), ("teacher", teacher))
    }
    for other, model in (("base", base), ("teacher", teacher)):
        for layer, each in scores(student, model, data).items():
            found |= {f"{other}/{layer}/{name}": vars(score) for name, score in each.items()}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, at the last stage."""
    header = ["study", "distilled by", "accuracy", "base's", "FSS teacher", "FSS base", "RS distilled", "RS residual"]
    columns = ("teacher/layer3/fss", "base/layer3/fss", "base/layer3/rs_distilled", "base/layer3/rs_residual")
    lines = []
    for name, arm in dict.fromkeys((found["study"], found["arm"]) for found in rows):
        own = [found for found in rows if (found["study"], found["arm"]) == (name, arm)]
        means = [sum(found[c]["value"] for found in own) / len(own) for c in columns]
        shares = [sum(found[k] for found in own) / len(own) for k in ("student_accuracy", "base_accuracy")]
        lines.append([name, arm, *(f"{100 * s:.1f}" for s in shares), *(f"{m:.2f}" for m in means)])
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("catsdogs", "cifar10"), default="catsdogs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=48, help="of the photographs, pixels")
    parser.add_argument("--out", type=Path, help="JSON; benchmarks/results/transfer_studies_DATA.json if not given")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    data = cats_and_dogs(args.side) if args.data == "catsdogs" else cifar10()
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        rows += study(data, args, 100 * seed)
        said = {"data": args.data, "epochs": args.epochs, "side": args.side, "images": len(data[0])}
        path = args.out or RESULTS / f"transfer_studies_{args.data}.json"
        write_json(path, {"environment": environment(), **said, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
