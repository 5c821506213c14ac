"""What a frozen teacher costs, as ratios within one run.

    python -m benchmarks.frozen            # about six minutes on two idle cores; needs the shared photos
    python -m benchmarks.frozen --quick    # to see that it runs; writes nothing
    python -m benchmarks.frozen --only read    # this anew; the other rows stay

Measured, each interleaved round by round with what it is compared with, as medians with quartiles:
    step        one optimizer step of a ResNet-18 at 224: with labels alone, with a frozen teacher, with live ones. All
                take decoded 256 x 256 photos from one kind of loader, through Kornia's RandomResizedCrop and flip
    read        256 random rows of a cache with 1000 classes and 7 x 7 maps, every row verified; page cache warm
    warp        the maps of 64 images, against augmenting these images
    precompute  `freeze` with GradCAM, against the same teacher's plain inference on the same images
    bytes       of a row, and of ImageNet-1k: arithmetic
Networks have random weights: nothing here depends on them. Results: benchmarks/results/frozen.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import e2kd
from benchmarks.common import RESULTS, ROOT, between, command, markdown_table, read_rows, write_results
from e2kd.frozen.forecast import Forecast, readable
from e2kd.frozen.records import Record
from e2kd.frozen.store import Store
from e2kd.frozen.writer import Writer

Row = dict[str, Any]
PHOTOS = Path(os.environ.get("E2KD_SHARED", ROOT.parent / "shared")) / "data" / "imagenet-samples" / "all"
CANONICAL, SIZE, CLASSES = 256, 224, 1000
NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEAN, STD = (torch.tensor(values)[:, None, None] for values in NORMALIZATION)
STUDENT, TEACHER = "resnet18", "resnet34"  # the frozen one
LIVE = ("resnet34", "densenet169")
IMAGENET = 1_281_167  # images of ImageNet-1k's train part
RECORDS = {
    "logits": Record(CLASSES),
    "100 largest logits": Record(CLASSES, top=100),
    "logits, GradCAM 7 x 7": Record(CLASSES, map_shape=(1, 7, 7)),
    "100 largest logits, GradCAM 7 x 7 as uint8": Record(CLASSES, top=100, map_shape=(1, 7, 7), map_type="uint8"),
    "logits, CAM 7 x 7 of every class as int8": Record(
        CLASSES, map_shape=(CLASSES, 7, 7), map_type="int8", map_count=CLASSES
    ),
    "logits, GradCAM 14 x 14 (ViT-S/16)": Record(CLASSES, map_shape=(1, 14, 14)),
    "logits, input gradient 3 x 56 x 56 as int8": Record(CLASSES, map_shape=(3, 56, 56), map_type="int8"),
    "logits, B-cos weights 6 x 56 x 56 as int8": Record(CLASSES, map_shape=(6, 56, 56), map_type="int8"),
}


def photos(count: int) -> tuple[Tensor, Tensor]:
    """Photos of ImageNet as `freeze` takes them, [N, 3, 256, 256] uint8, and their labels [N]."""
    view = e2kd.CanonicalView((CANONICAL, CANONICAL))
    paths = sorted(PHOTOS.glob("*/*"))
    return torch.stack([view(Image.open(path)) for path in paths[:count]]), torch.arange(len(paths[:count]))


def augmentations() -> tuple[nn.Module, nn.Module]:
    """Kornia's own defaults."""
    return K.RandomResizedCrop((SIZE, SIZE)), K.RandomHorizontalFlip()


def endless(dataset: Dataset[Any], batch: int) -> Iterator[Any]:
    """Batches in random order, for ever; read in this process, so that reading counts."""
    while True:
        yield from DataLoader(dataset, batch, shuffle=True, drop_last=True)


def spread(values: Iterable[float]) -> Row:
    """Median and quartiles."""
    known = list(values)
    low, middle, high = statistics.quantiles(known, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high]}


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; every round begins with another."""
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(timed(calls[name]))
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, base: str) -> Row:
    """Median and quartiles of one call's time over another's, round by round."""
    return spread(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


class Arm:
    """One way to train: its own student, loader and criterion."""

    def __init__(self, student: nn.Module, dataset: Dataset[Any], batch: int, criterion: Callable[..., Tensor]) -> None:
        self.student, self.criterion = student, criterion
        self.batches = endless(dataset, batch)
        self.frozen = isinstance(dataset, e2kd.FrozenDataset)
        self.augment = (e2kd.JointAugmentation if self.frozen else K.AugmentationSequential)(*augmentations())
        self.optimizer = torch.optim.SGD(student.parameters(), 1e-4, momentum=0.9)

    def step(self) -> None:
        """Read, augment, forward, backward, update."""
        images, targets = next(self.batches)
        if self.frozen:
            images, targets = self.augment(images, targets)
        else:
            images = self.augment(images / 255)
        loss = self.criterion(self.student((images - MEAN) / STD), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def arms(data: TensorDataset, frozen: e2kd.FrozenTeacher, batch: int) -> dict[str, Arm]:
    """Labels alone, a frozen teacher, live teachers; the label loss is in all of them."""
    network = timm.create_model(STUDENT, num_classes=CLASSES).train()
    found = {"supervised": Arm(copy.deepcopy(network), data, batch, nn.CrossEntropyLoss())}
    student = copy.deepcopy(network)
    criterion = e2kd.E2KDLoss(student, frozen, nn.CrossEntropyLoss())
    found["frozen"] = Arm(student, e2kd.FrozenDataset(data, frozen), batch, criterion)
    for name in LIVE:
        student = copy.deepcopy(network)
        teacher = timm.create_model(name, num_classes=CLASSES).eval()
        criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), input_normalization=NORMALIZATION)
        found[name] = Arm(student, data, batch, criterion)
    return found


def measure_steps(data: TensorDataset, args: argparse.Namespace) -> list[Row]:
    """Rows of one step: time over a supervised step's, and over the frozen one's."""
    with tempfile.TemporaryDirectory() as folder:
        frozen = freeze(timm.create_model(TEACHER, num_classes=CLASSES), data, folder)
        found = arms(data, frozen, args.batch)
        seconds = interleaved({name: arm.step for name, arm in found.items()}, args.rounds, args.warmup)
    return [
        {
            "what": "step",
            "arm": name,
            "batch": args.batch,
            "seconds": spread(seconds[name]),
            "to_supervised": ratios(seconds, name, "supervised"),
            "to_frozen": ratios(seconds, name, "frozen"),
        }
        for name in found
    ]


def freeze(teacher: nn.Module, data: Dataset[Any], folder: str | Path, batch: int = 32) -> e2kd.FrozenTeacher:
    """The cache of a data set of canonical images, whose samples have no names: their pixels are hashed."""
    frozen = e2kd.freeze(
        teacher, data, folder, normalization=NORMALIZATION, teacher_size=SIZE, batch_size=batch, progress=False
    )
    assert frozen is not None
    return frozen


def measure_reads(args: argparse.Namespace) -> list[Row]:
    """Random reads from a cache that is written here, without a teacher."""
    record = RECORDS["logits, GradCAM 7 x 7"]
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = filled_store(Path(folder), record, args.rows, args.shard_rows)
        wanted = itertools.cycle([generator.integers(0, args.rows, 256) for _ in range(64)])
        rows = interleaved({"read": lambda: store.rows(next(wanted))}, args.reads, warmup=64)
        shards = len(store.manifest["shards"])
    milliseconds = spread(1000 * s for s in rows["read"])
    return [{"what": "read", "rows": 256, "cache_rows": args.rows, "shards": shards, "milliseconds": milliseconds}]


def filled_store(folder: Path, record: Record, rows: int, shard_rows: int) -> Store:
    """A complete cache of random logits and maps."""
    writer = Writer(folder, {"dataset": {"samples": rows}, "shard_rows": shard_rows}, record)
    for index in writer.todo():
        ids = np.array(writer.rows(index), np.uint64)
        logits, maps = torch.randn(len(ids), record.num_classes), torch.rand(len(ids), *(record.map_shape or ()))
        writer.write(index, record.encode(logits, maps, logits.argmax(1), ids))
    assert writer.finish()
    return Store(folder)


def measure_warp(images: Tensor, args: argparse.Namespace) -> list[Row]:
    """The time that maps add to the augmentation of their images."""
    batch = args.warp_batch
    pixels = images[torch.arange(batch) % len(images)] / 255
    maps, valid, classes = torch.rand(batch, 1, 7, 7), torch.ones(batch, 1, 7, 7), torch.zeros(batch).long()
    taught = e2kd.Taught(classes, torch.zeros(batch, CLASSES), maps, valid, classes)
    joint = e2kd.JointAugmentation(*augmentations())
    joint(pixels, taught)  # checks the first batch against a probe image
    draw: dict[str, Any] = {}

    def augment() -> None:
        draw["params"] = joint.operations.forward_parameters(pixels.shape)
        draw["images"] = joint.operations(pixels, params=draw["params"])

    def follow() -> None:
        joint._follow(pixels, draw["images"], draw["params"], taught)

    seconds: dict[str, list[float]] = {"augment": [], "follow": []}
    for turn in range(args.warmup + args.warps):
        for name, call in (("augment", augment), ("follow", follow)):
            found = timed(call)
            if turn >= args.warmup:
                seconds[name].append(found)
    return [
        {
            "what": "warp",
            "batch": batch,
            "image_seconds": spread(seconds["augment"]),
            "map_seconds": spread(seconds["follow"]),
            "ratio": ratios(seconds, "follow", "augment"),
        }
    ]


@torch.inference_mode()
def infer(teacher: nn.Module, data: Dataset[Any], batch: int) -> None:
    """What an evaluation does: the logits of every image."""
    for images, _ in DataLoader(data, batch):
        resized = F.interpolate(images / 255, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        teacher((resized - MEAN) / STD)


def measure_precompute(data: TensorDataset, args: argparse.Namespace) -> list[Row]:
    """`freeze` against inference; its start, which is paid once, told from what every image costs."""
    teacher = timm.create_model(TEACHER, num_classes=CLASSES).eval()
    batch = args.precompute_batch
    one, many = Repeated(data, batch), Repeated(data, args.images)

    def frozen(images: Dataset[Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            freeze(teacher, images, folder, batch)

    calls: dict[str, Callable[[], object]] = {
        "freeze": lambda: frozen(many),
        "infer": lambda: infer(teacher, many, batch),
        "freeze one batch": lambda: frozen(one),
        "infer one batch": lambda: infer(teacher, one, batch),
    }
    seconds = interleaved(calls, args.passes, 0)
    start = [a - b for a, b in zip(seconds["freeze one batch"], seconds["infer one batch"], strict=True)]
    return [
        {
            "what": "precompute",
            "images": args.images,
            "batch": batch,
            "freeze_seconds": spread(seconds["freeze"]),
            "infer_seconds": spread(seconds["infer"]),
            "ratio": ratios(seconds, "freeze", "infer"),
            "start_seconds": spread(start),
        }
    ]


class Repeated(Dataset[tuple[Tensor, Tensor]]):
    """A data set of a given length that begins anew when it is through."""

    def __init__(self, data: TensorDataset, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index % len(self.data)]
        return image, label


def measure_bytes() -> list[Row]:
    """The room a cache takes."""
    return [
        {"what": "bytes", "record": name, "row": record.row_bytes, "total": Forecast.of(record, IMAGENET).total}
        for name, record in RECORDS.items()
    ]


def table(rows: list[Row]) -> str:
    """One step, as Markdown."""
    names = {"supervised": "labels alone", "frozen": f"e²KD, frozen {NAMES[TEACHER]}"}
    names |= {name: f"e²KD, live {NAMES[name]}" for name in LIVE}
    body = [
        [names[row["arm"]], *(f"{between(row[key], 'x')}" for key in ("to_supervised", "to_frozen"))]
        for row in rows
        if row["what"] == "step"
    ]
    return markdown_table([f"one step of {NAMES[STUDENT]}", "to labels alone", "to frozen e²KD"], body)


NAMES = {"resnet18": "ResNet-18", "resnet34": "ResNet-34", "densenet169": "DenseNet-169"}


def bytes_table(rows: list[Row]) -> str:
    """Sizes, as Markdown."""
    body = [[row["record"], f"{row['row']:,}", readable(row["total"])] for row in rows if row["what"] == "bytes"]
    return markdown_table(["a row of a cache, 1000 classes", "bytes", "ImageNet-1k"], body)


def facts(rows: list[Row]) -> list[str]:
    """The other measures, in words."""
    found = {row["what"]: row for row in rows}
    read, warp, precompute = (found[what] for what in ("read", "warp", "precompute"))
    start, whole = precompute["start_seconds"]["median"], precompute["infer_seconds"]["median"]
    return [
        f"Reading {read['rows']} random rows of {read['cache_rows']:,} in {read['shards']} shards, each verified: "
        f"{between(read['milliseconds'], ' ms')}, with a warm page cache.",
        f"Augmenting the maps of {warp['batch']} images: {between(warp['ratio'], 'x', 3)} that of the images.",
        f"Freezing {NAMES[TEACHER]} with GradCAM, {precompute['images']:,} images: "
        f"{between(precompute['ratio'], 'x', 3)} the time of its plain inference; {start:.1f} s of it are the start, "
        f"paid once ({start / whole:.1%} here).",
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, small caches; nothing written")
    parser.add_argument("--only", nargs="+", choices=("step", "read", "warp", "precompute"), help="measure these anew")
    parser.add_argument("--rounds", type=int, default=25, help="of the steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--warps", type=int, default=25)
    parser.add_argument("--warp-batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=200_000, help="of the cache that is read")
    parser.add_argument("--shard-rows", type=int, default=16_384)
    parser.add_argument("--reads", type=int, default=400)
    parser.add_argument("--images", type=int, default=768, help="that are frozen")
    parser.add_argument("--passes", type=int, default=3, help="over them")
    parser.add_argument("--precompute-batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.warmup, args.batch, args.warps, args.warp_batch = 2, 1, 2, 2, 8
        args.rows, args.shard_rows, args.reads = 4096, 256, 20
        args.images, args.passes, args.precompute_batch = 32, 2, 8
    warnings.simplefilter("ignore", e2kd.NoEffectWarning)  # maps of random networks may be zero
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    data = TensorDataset(*photos(32 if args.quick else 128))
    measures: dict[str, Callable[[], list[Row]]] = {
        "step": lambda: measure_steps(data, args), "read": lambda: measure_reads(args),
        "warp": lambda: measure_warp(data.tensors[0], args), "precompute": lambda: measure_precompute(data, args),
        "bytes": measure_bytes,
    }  # fmt: skip
    earlier = [] if args.quick else read_rows("frozen")
    rows: list[Row] = []
    for name, measure in measures.items():
        known = [row for row in earlier if row["what"] == name]
        rows += known if args.only and name not in args.only else measure()
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows), bytes_table(rows), *facts(rows), sep="\n\n")
    if not args.quick:
        said = command()
        if args.only:
            result = json.loads((RESULTS / "frozen.json").read_text(encoding="utf-8"))
            said = f"{result['command']}`, then `{said}"
        print(write_results("frozen", rows, command=said))


if __name__ == "__main__":
    main()
