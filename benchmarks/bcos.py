"""What a step with the W(x) of B-cos networks costs, as ratios to a plain KD step of the same models in the same run.

python -m benchmarks.bcos [--quick] [--rounds 5] [--batch 4] [--device cuda]

Arms, interleaved round by round after a warm-up, median of the per-round ratios:
    kd          a hand-written KD loop: teacher under no_grad, KL, backward, optimizer step
    shared      E2KDLoss, W(x) of the student's own forward
    separate    W(x) of a second forward
    half, quarter   a random half or quarter of the batch explained, as E2KDLoss chooses to
    frozen      logits and W(x) of the teacher, 56 x 56, come with the batch
    official    frozen, with the student's attention as the papers' code writes it (ViT alone)
Peak memory as in benchmarks.step: what one step adds at its peak, in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import e2kd
from benchmarks import step
from benchmarks.common import command, markdown_table, read_rows, write_results
from e2kd import bcos
from e2kd.bcos.dynamic import scaled
from e2kd.similarity import pooled
from e2kd.taught import Taught, all_known

PAIRS = {
    "B-cos ResNet-34 -> ResNet-18": (bcos.resnet34, bcos.resnet18),
    "B-cos ViT-Ti -> ViT-Ti": (bcos.vit_ti, bcos.vit_ti),
}
ARMS = ("kd", "shared", "separate", "half", "quarter", "frozen", "official")
FRACTIONS = {"half": 0.5, "quarter": 0.25}


class OfficialAttention(bcos.Attention):
    """Every value times its weight, [B, heads, N, N, d], and then the sum, as the papers' code does."""

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        values = v.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1)
        mixed = scaled(values, attention[..., None]).sum(-2)
        return self.to_out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Ready:
    """Lessons that are there already: a frozen teacher without its disk."""

    explains, explainer, choice = True, e2kd.BcosWeights(), "teacher"

    def taught(self, targets: Any, images: Tensor | None = None) -> Taught:
        return targets  # type: ignore[no-any-return]

    def labels(self, targets: Any) -> Any:
        return targets.labels


class Bench(step.Arms):
    """One pair of B-cos networks; every arm has a student of its own, of which all are equal."""

    def __init__(self, pair: str, batch: int, size: int, device: str, arms: Sequence[str] = ARMS) -> None:
        torch.manual_seed(0)
        teacher, student = PAIRS[pair]
        self.teacher = teacher().eval().to(device)
        self.bare = student().train().to(device)
        self.images = bcos.AddInverse()(torch.rand(batch, 3, size, size, device=device))
        self.students, self.criteria = {}, {}
        settings: dict[str, dict[str, Any]] = {
            "shared": {},
            "separate": {"explainer": e2kd.BcosWeights(passes="separate")},
            **{name: {"fraction": fraction} for name, fraction in FRACTIONS.items()},
            "frozen": {},
            **({"official": {}} if student is bcos.vit_ti else {}),
        }
        for name, options in settings.items():
            if name not in arms:
                continue
            own = self.students[name] = copy.deepcopy(self.bare)
            source = Ready() if name in ("frozen", "official") else self.teacher
            self.criteria[name] = e2kd.E2KDLoss(own, source, example=self.images, **options)
        for module in self.students.get("official", torch.nn.Identity()).modules():
            if isinstance(module, bcos.Attention):
                module.__class__ = OfficialAttention
        found = e2kd.explain(self.teacher, self.images)
        maps = pooled(found.maps, (56, 56))
        self.lesson = Taught(found.classes, found.logits, maps, all_known(maps), found.classes)
        parameters = [p for model in (self.bare, *self.students.values()) for p in model.parameters()]
        self.optimizer = torch.optim.SGD(parameters, 1e-4)

    def arms(self) -> dict[str, step.Step]:
        return {"kd": self.kd, **{name: lambda name=name: self.taught(name) for name in self.criteria}}

    def kd(self) -> Tensor:
        return step.plain_kd(self.bare, self.teacher, self.images)

    def taught(self, arm: str) -> Tensor:
        targets = self.lesson if arm in ("frozen", "official") else None
        return self.criteria[arm](self.students[arm](self.images), targets)

    def keep_hooks_of(self, arm: str) -> None:
        """As in a training script: the arm's own criterion, and one student."""
        super().keep_hooks_of(arm)
        kept = self.students.get(arm, self.bare)
        self.optimizer = torch.optim.SGD(kept.parameters(), 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds at batch 2, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=list(PAIRS), nargs="*", default=list(PAIRS))
    parser.add_argument("--arms", choices=ARMS, nargs="*", default=ARMS, help="beside the KD step")
    parser.add_argument("--no-peak", action="store_true", help="time alone")
    parser.add_argument("--peak", nargs=2, metavar=("PAIR", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore", e2kd.NoEffectWarning)
    if args.peak:
        pair, arm = args.peak
        print(json.dumps(step.growth(Bench(pair, args.batch, args.size, args.device, (arm,)), arm)))
        return
    if args.quick:
        args.rounds, args.batch = 2, 2
    rows = []
    for pair in args.only:
        bench = Bench(pair, args.batch, args.size, args.device, args.arms)
        row = {"pair": pair, "batch": args.batch, "size": args.size, "device": args.device, "rounds": args.rounds}
        row["command"] = command()
        row |= step.interleaved(bench, args.rounds, args.warmup)
        if not args.no_peak:
            row["peak_mib"] = {arm: step.peak(pair, arm, args, "benchmarks.bcos") for arm in bench.arms()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(table(rows))
    if not args.quick:
        name = f"bcos_{args.device}"
        rows = [row for row in read_rows(name) if row["pair"] not in args.only] + rows  # pairs measured before stay
        print(write_results(name, rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: time and, where it was measured, peak memory, as ratios to KD."""
    body = []
    for row in rows:
        for arm in row["ratio"]:
            peaks = row.get("peak_mib")
            memory = f"{peaks[arm] / peaks['kd']:.2f}x" if peaks else None
            body.append([row["pair"], arm, step.to_kd(row, arm), memory])
    return markdown_table(["teacher -> student", "arm", "time of a KD step", "peak memory of a KD step"], body)


if __name__ == "__main__":
    main()
