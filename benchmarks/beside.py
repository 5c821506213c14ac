"""The same work by e2kd and by the libraries people use for it, time and result side by side.

    python -m benchmarks.beside [--rounds 9] [--device cuda] [--quick]

timm.task distils logits; grad-cam and Captum explain; dcor correlates distances. Every pair does the same work on the
same input in one process, interleaved round by round; a pair whose results differ is an error, not a row. dcor compiles
its code and the networks settle in rounds that don't count. e²KD has no counterpart in timm: its row says what
explaining adds to a training that distils by timm.
Results: benchmarks/results/beside_<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import e2kd
from benchmarks.common import command, markdown_table, write_results
from e2kd.distance import dcor_unbiased, partial_dcor

SAME = 1e-4  # relative to the largest value
Work = Callable[[], Tensor]


class Pair(NamedTuple):
    """Two ways to do something, each with its result; `same` if the results have to agree."""

    what: str
    to: str
    ours: Work
    theirs: Work
    same: bool = True


def steps(device: str, batch: int, side: int) -> list[Pair]:
    """Training steps, ResNet-34 -> ResNet-18: the loss [] of each."""
    from timm.task import LogitDistillationTask

    teacher, student = (timm.create_model(name, num_classes=1000).to(device) for name in ("resnet34", "resnet18"))
    teacher.eval()
    images, labels = torch.randn(batch, 3, side, side, device=device), torch.arange(batch, device=device)
    networks = {name: copy.deepcopy(student).train() for name in ("task", "kd", "e2kd")}  # each with hooks of its own
    task = LogitDistillationTask(
        networks["task"], teacher, nn.CrossEntropyLoss(), temperature=4.0, device=torch.device(device), verbose=False
    ).train()
    criteria = {
        name: e2kd.E2KDLoss(networks[name], teacher, nn.CrossEntropyLoss(), temperature=4.0, weight=weight)
        for name, weight in (("kd", 0.0), ("e2kd", 1.0))
    }

    def step(name: str, loss_of: Work) -> Work:
        optimizer = torch.optim.SGD(networks[name].parameters(), 1e-4)

        def work() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return work

    def loss_of(name: str) -> Work:
        return lambda: criteria[name](networks[name](images), labels)

    theirs = step("task", lambda: task(images, labels)["loss"])
    return [
        Pair("KD step, ResNet-34 -> ResNet-18", "timm.task's KD step", step("kd", loss_of("kd")), theirs),
        Pair(
            "e²KD step, ResNet-34 -> ResNet-18",
            "timm.task's KD step",
            step("e2kd", loss_of("e2kd")),
            theirs,
            same=False,
        ),
    ]


def maps(device: str, batch: int, side: int) -> list[Pair]:
    """GradCAM of a batch at the last stage of a ResNet-34, for given classes: maps [B, h, w], largest value 1."""
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = timm.create_model("resnet34", num_classes=1000).eval().to(device)
    images, classes = torch.randn(batch, 3, side, side, device=device), torch.arange(batch, device=device)
    library, captum = GradCAM(model, [model.layer4]), LayerGradCam(model, model.layer4)
    library.compute_input_gradient = False
    targets = [ClassifierOutputTarget(int(label)) for label in classes]

    def explained() -> Tensor:
        return e2kd.explain(model, images, classes).maps[:, 0]

    def enlarged() -> Tensor:
        return nn.functional.interpolate(explained()[:, None], (side, side), mode="bilinear")[:, 0]

    return [
        Pair(
            "GradCAM of a batch, enlarged to image size",
            "grad-cam's",
            lambda: _scaled(enlarged()),
            lambda: _scaled(torch.from_numpy(library(images, targets))),
        ),
        Pair(
            "GradCAM of a batch",
            "Captum's",
            lambda: _scaled(explained()),
            lambda: _scaled(captum.attribute(images, classes, relu_attributions=True)[:, 0].detach()),
        ),
    ]


def _scaled(found: Tensor) -> Tensor:
    """Maps [B, h, w] of the range 0 to 1, as grad-cam returns them."""
    least = found.amin((1, 2), keepdim=True)
    return ((found - least) / (found - least).amax((1, 2), keepdim=True).clamp(min=1e-7)).cpu()


def correlations(device: str, count: int, width: int) -> list[Pair]:
    """Statistics of features [count, width]: values []."""
    import dcor

    x, y, given = (torch.randn(count, width, device=device) for _ in range(3))
    y, given = y + x, given + x
    arrays = [t.double().cpu().numpy() for t in (x, y, given)]
    size = f"{count} x {width:,}"
    return [
        Pair(
            f"distance correlation, bias-corrected, {size}",
            "dcor's",
            lambda: dcor_unbiased(x, y),
            lambda: torch.tensor(dcor.u_distance_correlation_sqr(*arrays[:2])),
        ),
        Pair(
            f"partial distance correlation, {size}",
            "dcor's",
            lambda: partial_dcor(x, y, given),
            lambda: torch.tensor(dcor.partial_distance_correlation(*arrays)),
        ),
    ]


def compared(pair: Pair, rounds: int, warmup: int) -> dict[str, Any]:
    """The ratio of a pair's times, ours to theirs: median and quartiles over interleaved rounds.

    Raises:
        ValueError: when results that have to agree don't.
    """
    ours, theirs = pair.ours().double().cpu(), pair.theirs().double().cpu()
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if pair.same and not apart <= SAME:
        raise ValueError(f"{pair.what}: expected the same result, but they are {apart:.1e} apart.")
    for work in (pair.ours, pair.theirs) * warmup:
        _seconds(work)
    ratios = []
    for turn in range(rounds):
        order = [pair.ours, pair.theirs][:: 1 if turn % 2 else -1]
        seconds = {work: _seconds(work) for work in order}
        ratios.append(seconds[pair.ours] / seconds[pair.theirs])
    return {
        "what": pair.what, "to": pair.to, "rounds": rounds, "apart": apart if pair.same else None,
        "ratio": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }  # fmt: skip


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work().cpu()  # waits for a GPU
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two rounds on small input; nothing written")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    batch, side, count, width = (2, 64, 8, 100) if args.quick else (8, 224, 64, 512 * 49)
    pairs = [
        *steps(args.device, batch, side),
        *maps(args.device, batch, side),
        *correlations(args.device, count, width),
    ]
    rows = [compared(pair, 2 if args.quick else args.rounds, warmup=2) for pair in pairs]
    print(
        markdown_table(
            ["time of", "to that of", "ratio"], [[row["what"], row["to"], f"{row['ratio']:.3g}x"] for row in rows]
        )
    )
    if not args.quick:
        write_results(f"beside_{args.device}", rows, command=command())


if __name__ == "__main__":
    main()
