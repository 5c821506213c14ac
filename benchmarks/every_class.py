"""What explaining every class costs, by the number of classes: ratios to a KD step of the same networks and run.

    python -m benchmarks.every_class [--rounds 9] [--batch 8] [--device cuda] [--quick]

Arms, interleaved round by round after a warm-up: a hand-written KD step, e²KD of the teacher's class, of eight classes
drawn from all, and of all classes, each by `CAM`. Where the head pools and applies one linear layer, all maps are one
product of matrices; a ViT that reads a class token takes a second derivative of its last block for each class.
Results: benchmarks/results/every_class_<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

import e2kd
from benchmarks.common import command, markdown_table, write_results
from benchmarks.step import Arms, Step, interleaved, plain_kd, to_kd

CASES = {
    "ResNet-34 -> ResNet-18": ("resnet34", "resnet18"),
    "ResNet-50 -> ViT-Ti": ("resnet50", "vit_tiny_patch16_224"),
}
COUNTS = (10, 100, 1000)
TOO_MUCH = [("ResNet-50 -> ViT-Ti", 1000)]  # a graph of every class at once
DRAWN = 8
EXPLAINED: dict[str, dict[str, Any]] = {
    "e2kd": {},
    "drawn": {"classes": "all", "max_classes": DRAWN},
    "all": {"classes": "all"},
}
TITLES = {"e2kd": "the teacher's class", "drawn": f"{DRAWN} drawn of all classes", "all": "all classes"}


class Classes(Arms):
    """One pair of networks for so many classes."""

    def __init__(self, pair: str, count: int, batch: int, device: str) -> None:
        torch.manual_seed(0)
        teacher, student = CASES[pair]
        self.teacher = timm.create_model(teacher, num_classes=count).eval().to(device)
        self.bare = timm.create_model(student, num_classes=count).train().to(device)
        self.images = torch.randn(batch, 3, 224, 224, device=device)
        self.students = {arm: copy.deepcopy(self.bare) for arm in arms_of(pair, count)}
        self.criteria = {
            arm: e2kd.E2KDLoss(student, self.teacher, explainer=e2kd.CAM(), **EXPLAINED[arm])
            for arm, student in self.students.items()
        }
        every = (p for model in (self.bare, *self.students.values()) for p in model.parameters())
        self.optimizer = torch.optim.SGD(every, 1e-4)

    def arms(self) -> dict[str, Step]:
        return {"kd": self.kd} | {arm: partial(self.taught, arm) for arm in self.students}

    def kd(self) -> Tensor:
        return plain_kd(self.bare, self.teacher, self.images)

    def taught(self, arm: str) -> Tensor:
        """The loss [] of a student that is explained."""
        return self.criteria[arm](self.students[arm](self.images))


def arms_of(pair: str, count: int) -> list[str]:
    """What is explained of so many classes."""
    return [arm for arm in TITLES if arm != "all" or (pair, count) not in TOO_MUCH]


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios with their quartiles, as Markdown."""
    body = [
        [row["pair"], str(row["classes"]), *(to_kd(row, arm) if arm in row["ratio"] else "" for arm in TITLES)]
        for row in rows
    ]
    return markdown_table(["teacher -> student", "classes", *TITLES.values()], body)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two rounds of two images; nothing written")
    args = parser.parse_args()
    warnings.simplefilter("ignore", e2kd.NoEffectWarning)
    rounds, batch = (2, 2) if args.quick else (args.rounds, args.batch)
    rows = []
    for pair in CASES:
        for count in COUNTS[:1] if args.quick else COUNTS:
            bench = Classes(pair, count, batch, args.device)
            rows.append({"pair": pair, "classes": count, "batch": batch, **interleaved(bench, rounds, warmup=2)})
    print(table(rows))
    if not args.quick:
        write_results(f"every_class_{args.device}", rows, command=command(), rounds=rounds)


if __name__ == "__main__":
    main()
