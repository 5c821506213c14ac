"""What seeing the transfer costs: UniCAM against plain forwards and the papers' procedure, ROAD, the monitor.

    python -m benchmarks.transfer [--rounds 5] [--papers layer1 layer2 layer3 layer4]

One run, identical input: 16 images at 224, a pair of ResNet-50 with random weights, four layers, both directions. Every
arm runs in a fresh process, once to warm up and then in rounds; its CPU time is that of the process, all threads
together, its memory the growth of the resident set over one call. The papers' procedure is written here as their code
does it: for each layer and direction two forwards with a graph, distances through n x n x d differences, and a backward
through both models. It runs once per layer, since it takes most of a minute.
"""

from __future__ import annotations

import argparse
import json
import resource
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
from torch import Tensor, nn

import e2kd
from benchmarks.common import environment, markdown_table, write_json
from e2kd.monitor import TransferMonitor
from e2kd.perturb import road

LAYERS = ("layer1", "layer2", "layer3", "layer4")
COUNT, SIDE, KEPT = 16, 224, 20.0
STEPS = 500  # the monitor's `every`, for its share of training
Arm = Callable[[], object]


class Bench:
    """The models and images of every arm."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student, self.base = (timm.create_model("resnet50", num_classes=10).eval() for _ in range(2))
        self.images = torch.randn(COUNT, 3, SIDE, SIDE)
        self.labels = torch.arange(COUNT) % 4
        coarse = torch.rand(COUNT, 1, 7, 7)
        self.maps = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")

    def arm(self, name: str) -> Arm:
        """An arm by its name; the papers' is named after a layer."""
        if name in LAYERS:
            return lambda: papers_unicam(self.student, self.base, self.images, self.labels, name)
        if name in ("step", "probe"):
            arm: Arm = getattr(Training(), name)
            return arm
        return {
            "forwards": self.forwards,
            "unicam": self.unicam,
            "road": lambda: road(self.images, self.maps, KEPT),
            "road_loose": lambda: road(self.images, self.maps, KEPT, tolerance=1e-4),
            "road_grad_cam": self.road_of_grad_cam,
        }[name]

    def forwards(self) -> None:
        with torch.no_grad():
            self.student(self.images)
            self.base(self.images)

    def unicam(self) -> None:
        e2kd.unicam(self.student, self.base, self.images, self.labels, LAYERS)

    def road_of_grad_cam(self) -> None:
        from pytorch_grad_cam.metrics.road import NoisyLinearImputer

        impute = NoisyLinearImputer(noise=0.01)
        threshold = torch.quantile(self.maps.flatten(1), 1 - KEPT / 100, dim=1)
        for image, kept, cut in zip(self.images, self.maps[:, 0], threshold, strict=True):
            impute(image, (kept > cut).float())


def papers_unicam(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor, layer: str) -> list[Tensor]:
    """Both directions at one layer as the papers' code computes them."""
    target = _centred(nn.functional.one_hot(labels).float())
    found = []
    for model, given in ((student, base), (base, student)):
        (own, other) = (_output(m, layer, images) for m in (model, given))
        p, q = _centred(own.flatten(1)), _centred(other.flatten(1))
        unique = p - (p * q).sum() / ((q * q).sum() + 1e-12) * q
        score = (unique * target).sum() / ((unique * unique).sum() * (target * target).sum() + 1e-18).sqrt()
        own.retain_grad()
        score.backward()
        weights = own.grad.mean((2, 3), keepdim=True)
        found.append((weights * own.detach()).sum(1).relu())
        model.zero_grad()
        given.zero_grad()
    return found


def _output(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    model(images)
    handle.remove()
    return kept[0]


def _centred(x: Tensor) -> Tensor:
    """U-centred distances [n, n] through all differences, [n, n, d]."""
    n = len(x)
    distances = ((x[:, None] - x[None]).square().sum(-1) + 1e-18).sqrt()
    rows, total = distances.sum(1) / (n - 2), distances.sum() / ((n - 1) * (n - 2))
    return (distances - rows[:, None] - rows[None] + total) * (1 - torch.eye(n))


class Training:
    """A ResNet-18 in training on batches of 32, and its monitor with a probe of 64 images at four layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student, base, teacher = (timm.create_model("resnet18", num_classes=10) for _ in range(3))
        self.images, self.labels = torch.randn(32, 3, SIDE, SIDE), torch.arange(32) % 10
        self.optimizer = torch.optim.SGD(self.student.parameters(), 1e-3)
        probe = torch.randn(64, 3, SIDE, SIDE), torch.arange(64) % 10
        pictures: list[dict[str, Tensor]] = []
        self.monitor = TransferMonitor(
            self.student,
            base,
            probe,
            lambda scalars, step: None,
            lambda drawn, step: pictures.append(drawn),
            teacher=teacher,
            layers=LAYERS,
        )

    def step(self) -> None:
        """A supervised step, the cheapest training there is."""
        loss = nn.functional.cross_entropy(self.student(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def probe(self) -> None:
        self.monitor.measure(0)


def measure(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """In a fresh process: CPU and wall seconds of every round, and MiB that the first call adds at its peak."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    run = Bench().arm(name)
    before = _peak()
    cpu, wall = [], []
    warm = 0 if name in LAYERS else 1
    for turn in range(warm + rounds):
        start = time.process_time(), time.perf_counter()
        run()
        if turn == 0:
            memory = _peak() - before
        if turn >= warm:
            cpu.append(time.process_time() - start[0])
            wall.append(time.perf_counter() - start[1])
    return {"arm": name, "cpu": cpu, "wall": wall, "mib": memory}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def started(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.transfer", "--arm", name, "--rounds", str(rounds)]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that the rows are for, of those that were measured."""
    cpu = {row["arm"]: statistics.median(row["cpu"]) for row in rows}
    memory = {row["arm"]: row["mib"] for row in rows}
    found = {"UniCAM, 4 layers, to two plain forwards": cpu["unicam"] / cpu["forwards"]}
    papers = [layer for layer in LAYERS if layer in cpu]
    if papers:
        said = f"papers' procedure, {len(papers)} of 4 layers, to UniCAM of 4"
        found[said] = sum(cpu[layer] for layer in papers) / cpu["unicam"]
        found["peak memory, UniCAM to the papers'"] = memory["unicam"] / max(memory[layer] for layer in papers)
    found |= {
        "ROAD: grad-cam's to ours": cpu["road_grad_cam"] / cpu["road"],
        "ROAD: grad-cam's to ours at a tolerance of 1e-4": cpu["road_grad_cam"] / cpu["road_loose"],
        "probe of 64 images, in supervised steps of 32": cpu["probe"] / cpu["step"],
        f"monitor's share of training, every {STEPS} steps": cpu["probe"] / (cpu["probe"] + STEPS * cpu["step"]),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--papers", nargs="*", choices=LAYERS, default=list(LAYERS), help="layers of their procedure")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transfer.json")
    args = parser.parse_args()
    if args.arm is not None:
        print(json.dumps(measure(args.arm, args.rounds, args.threads)))
        return
    rows = []
    for name in ("forwards", "unicam", "road", "road_loose", "road_grad_cam", "step", "probe"):
        rows.append(started(name, args.rounds, args.threads))
        print(name, f"{statistics.median(rows[-1]['cpu']):.2f} CPU s", f"{rows[-1]['mib']:.0f} MiB", file=sys.stderr)
    rows += [started(name, 1, args.threads) for name in args.papers]
    found = ratios(rows)
    said = {"command": "python -m benchmarks.transfer", "images": COUNT, "side": SIDE, "threads": args.threads}
    write_json(args.out, {"environment": environment(), **said, "ratios": found, "rows": rows})
    print(markdown_table(["", "ratio"], [[name, value] for name, value in found.items()]))


if __name__ == "__main__":
    main()
