"""What one e²KD step costs, as ratios to a plain KD step of the same models in the same run.

python -m benchmarks.step [--quick] [--rounds 7] [--batch 8] [--device cuda] [--compile]

With --compile the student of every arm, KD's too, is compiled by inductor; the teacher runs as it is.
Arms, interleaved round by round after a warm-up, median of the per-round ratios:
    kd      a hand-written KD loop: teacher under no_grad, KL, backward, optimizer step
    kd*     E2KDLoss with weight=0: what the criterion itself costs
    e2kd    E2KDLoss with GradCAM, live teacher
    twice   the way of CAM libraries: both models run a second time under hooks, gradients with create_graph
Peak memory: growth of the resident set over one step on the CPU (a fresh process per arm), allocator peak on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import e2kd
from benchmarks.common import ROOT, between, command, markdown_table, write_results

PAIRS = {
    "ResNet-34 -> ResNet-18": ("resnet34", "resnet18", "layer4", "layer4"),
    "DenseNet-169 -> ResNet-18": ("densenet169", "resnet18", "features", "layer4"),
    "ResNet-50 -> ViT-Ti": ("resnet50", "vit_tiny_patch16_224", "layer4", "blocks.10"),
}
Step = Callable[[], Tensor]
# glibc then gives every large block back at once, so that the resident set is what is alive.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def captured(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the output of a layer, by a hook around one forward."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(images)
    handle.remove()
    return logits, kept[0]


def cam_of_library(model: nn.Module, layer: str, images: Tensor, classes: Tensor, *, create_graph: bool) -> Tensor:
    """GradCAM as CAM libraries make it: a forward of its own, then a gradient."""
    with sdpa_kernel(SDPBackend.MATH):
        logits, features = captured(model, layer, images)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features, create_graph=create_graph)
    if features.ndim == 3:
        side = int((features.shape[1] - 1) ** 0.5)
        features, gradient = (t[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for t in (features, gradient))
    return F.relu((features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))


def plain_kd(student: Callable[[Tensor], Tensor], teacher: nn.Module, images: Tensor) -> Tensor:
    """A hand-written KD loss []: the student first, as in timm.task and every loop that calls a criterion."""
    logits = student(images)
    with torch.no_grad():
        target = teacher(images)
    return e2kd.kd_loss(logits, target)


class Arms:
    """Steps that are compared: what they share. Subclasses set the attributes.

    Attributes:
        images: of the batch.
        optimizer: of every student.
        criteria: those that listen to a student, by the name of their arm.
    """

    images: Tensor
    optimizer: torch.optim.Optimizer
    criteria: dict[str, e2kd.E2KDLoss]

    def arms(self) -> dict[str, Step]:
        """The loss of every arm; "kd" is what the others are measured by."""
        raise NotImplementedError

    def keep_hooks_of(self, arm: str) -> None:
        """Only the arm's own criterion listens, as in a training script."""
        for name, criterion in self.criteria.items():
            if name != arm:
                criterion.remove()

    def step(self, loss: Step) -> float:
        """Seconds of one optimizer step."""
        self.wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.images.is_cuda:
            torch.cuda.synchronize()


class Bench(Arms):
    """One pair of models and its arms."""

    def __init__(self, pair: str, batch: int, size: int, device: str, compile_student: bool) -> None:
        torch.manual_seed(0)
        teacher, student, self.teacher_layer, self.student_layer = PAIRS[pair]
        self.teacher = timm.create_model(teacher, num_classes=1000).eval().to(device)
        self.student = timm.create_model(student, num_classes=1000).train().to(device)
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.bare = copy.deepcopy(self.student)  # for the arms without e2kd: nothing listens to it
        self.optimizer = torch.optim.SGD([*self.student.parameters(), *self.bare.parameters()], 1e-4)
        self.plain = e2kd.E2KDLoss(self.student, self.teacher, weight=0.0)
        self.full = e2kd.E2KDLoss(self.student, self.teacher)
        self.criteria = {"kd*": self.plain, "e2kd": self.full}
        self.run, self.run_bare = self.student, self.bare
        if compile_student:
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # or one would run the other's code
            self.run, self.run_bare = torch.compile(self.student), torch.compile(self.bare)

    def arms(self) -> dict[str, Step]:
        return {"kd": self.kd, "kd*": self.kd_star, "e2kd": self.e2kd, "twice": self.twice}

    def kd(self) -> Tensor:
        return plain_kd(self.run_bare, self.teacher, self.images)

    def kd_star(self) -> Tensor:
        return self.plain(self.run(self.images))

    def e2kd(self) -> Tensor:
        return self.full(self.run(self.images))

    def twice(self) -> Tensor:
        with torch.no_grad():
            target = self.teacher(self.images)
        classes = target.argmax(1)
        loss = e2kd.kd_loss(self.run_bare(self.images), target)
        theirs = cam_of_library(self.teacher, self.teacher_layer, self.images, classes, create_graph=False).detach()
        mine = cam_of_library(self.bare, self.student_layer, self.images, classes, create_graph=True)
        return loss + (1 - e2kd.cosine(mine, theirs)).mean()


def interleaved(bench: Arms, rounds: int, warmup: int) -> dict[str, Any]:
    """Median seconds of the KD step, and of every arm the median and quartiles of its ratios to it."""
    arms = bench.arms()
    for loss in arms.values():
        for _ in range(warmup):
            bench.step(loss)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(bench.step(arms[name]))
    ratios = {name: [s / k for s, k in zip(values, seconds["kd"], strict=True)] for name, values in seconds.items()}
    return {
        "kd_seconds": statistics.median(seconds["kd"]),
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
    }


def to_kd(row: dict[str, Any], arm: str) -> str:
    """An arm's ratio of what `interleaved` found, with its quartiles."""
    return between({"median": row["ratio"][arm], "quartiles": row["quartiles"][arm]}, "x")


def time_pair(pair: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median ratios to KD of one pair."""
    bench = Bench(pair, args.batch, args.size, args.device, args.compile)
    return {
        "pair": pair,
        "batch": args.batch,
        "size": args.size,
        "device": args.device,
        "compiled": args.compile,
        "rounds": args.rounds,
        **interleaved(bench, args.rounds, args.warmup),
    }


def peak(pair: str, arm: str, args: argparse.Namespace, module: str = "benchmarks.step") -> float:
    """MiB that one step of an arm adds at its peak, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        module,
        "--peak",
        pair,
        arm,
        "--batch",
        str(args.batch),
        "--size",
        str(args.size),
    ]
    done = subprocess.run(
        [*command, "--device", args.device],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | EXACT,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def growth(bench: Arms, arm: str) -> float:
    """In a fresh process: MiB by which one step raises the peak."""
    bench.keep_hooks_of(arm)
    bench.step(bench.arms()[arm])  # the first step also finds the teacher's layer
    if bench.images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.step(bench.arms()[arm])
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    bench.step(bench.arms()[arm])
    return (resident("VmHWM") - before) / 2**10


def resident(field: str) -> int:
    """KiB of this process's resident set, now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair, two rounds at batch 2, nothing written")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="the student under torch.compile (inductor)")
    parser.add_argument("--only", choices=list(PAIRS), nargs="*", default=list(PAIRS))
    parser.add_argument("--peak", nargs=2, metavar=("PAIR", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore", e2kd.NoEffectWarning)
    if args.peak:
        pair, arm = args.peak
        print(json.dumps(growth(Bench(pair, args.batch, args.size, args.device, False), arm)))
        return
    if args.quick:
        args.rounds, args.warmup, args.batch, args.only = 2, 1, 2, args.only[:1]
    rows = []
    for pair in args.only:
        row = time_pair(pair, args)
        if not args.compile:
            row["peak_mib"] = {arm: peak(pair, arm, args) for arm in ("kd", "kd*", "e2kd", "twice")}
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(table(rows))
    if not args.quick:
        name = f"step_{args.device}{'_compiled' if args.compile else ''}"
        print(write_results(name, rows, command=command()))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: time and, where it was measured, peak memory as ratios to KD."""
    header = ["teacher -> student", "KD through E2KDLoss", "e²KD", "two forwards"]
    peaks = ["e²KD peak memory", "two forwards, peak"] if all("peak_mib" in row for row in rows) else []
    body = []
    for row in rows:
        times = [
            between({"median": row["ratio"][arm], "quartiles": row["quartiles"][arm]}, "x")
            for arm in ("kd*", "e2kd", "twice")
        ]
        shares = [f"{row['peak_mib'][arm] / row['peak_mib']['kd']:.2f}x" for arm in ("e2kd", "twice") if peaks]
        body.append([row["pair"], *times, *shares])
    return markdown_table([*header, *peaks], body)


if __name__ == "__main__":
    main()
