"""The papers' tables at full scale: one student of one arm, on a CPU, a GPU or several.

    python -m benchmarks.full_scale --data imagenet ILSVRC2012 --preset imagenet-50-shot --arm e2kd --out runs/e2kd-0
    accelerate launch -m benchmarks.full_scale --data voc VOC --arm e2kd --teacher-checkpoint epg.pth --out runs/voc
    python -m benchmarks.full_scale --presets                  # what there is
    python -m benchmarks.full_scale --data voc VOC --grid      # the commands that choose τ and λ
    python -m benchmarks.full_scale --table runs               # what was run, paired; what a grid found
    python -m benchmarks.full_scale --quick                    # tiny noise and networks, to see that it runs

The layouts are those the data sets are unpacked in:

    imagenet      train/n01440764/*.JPEG, val/n01440764/*.JPEG
    sun397        a/abbey/*.jpg, ClassName.txt, Partitions/Training_01.txt and Testing_01.txt
    waterbirds    metadata.csv and the folders of images it names
    voc           VOCdevkit/VOC2012 or VOCdevkit/VOC2007
    plantvillage  train/CLASS and val/CLASS, test/CLASS or both; or CLASS alone

A run that was stopped goes on from its last epoch when the same command is given again. Every number of a preset can
be set by an option of its name. Nothing is downloaded but the pretrained weights of a teacher named without a
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table
from benchmarks.full_scale_arms import ARMS
from benchmarks.full_scale_folders import FOLDERS
from benchmarks.full_scale_layouts import READERS
from benchmarks.full_scale_networks import NAMES
from benchmarks.full_scale_presets import PRESETS, Recipe
from benchmarks.full_scale_run import Run, read_by
from benchmarks.full_scale_table import report
from benchmarks.full_scale_training import OPTIMIZERS, distil

QUICK = {
    "epochs": 1,
    "warmup": 0,
    "batch": 4,
    "held_out": 0,
    "size": 64,
    "teacher": "test_resnet",
    "student": "test_resnet",
}


def _or_all(word: str) -> int | None:
    return None if word == "all" else int(word)


def _or_none(word: str) -> float | None:
    return None if word == "none" else float(word)


def _none(word: str) -> str | None:
    return None if word == "none" else word


OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "teacher": (str, f"{NAMES}; none with a complete cache"),
    "student": (str, NAMES),
    "per_class": (_or_all, "training images of each class, or all"),
    "held_out": (int, "training images of each class to choose settings on, where the data set has no others"),
    "epochs": (int, "over the training images"),
    "batch": (int, "of all processes together"),
    "warmup": (float, "epochs"),
    "optimizer": (str, " or ".join(OPTIMIZERS)),
    "lr": (float, "at its highest"),
    "weight_decay": (float, "of all parameters"),
    "clip": (_or_none, "largest norm of the gradient, or none"),
    "adaptive_clip": (_or_none, "of AGC, or none"),
    "size": (int, "side of the images"),
    "least_area": (float, "of a random crop"),
    "rand_augment": (int, "magnitude of RandAugment"),
    "resize": (_none, "image, to compare maps at its size as the paper does, or none: on the student's grid"),
}


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The preset with what was set beside it."""
    return replace(PRESETS[args.preset], **{name: getattr(args, name) for name in OPTIONS if hasattr(args, name)})


def run_of(args: argparse.Namespace) -> Run:
    """The run that a command line asks for.

    Raises:
        ValueError: for images to distil on that are missing.
    """
    recipe = recipe_of(args)
    if recipe.unrelated and args.unrelated is None:
        raise ValueError(f"The preset {args.preset} distils on images of another data set: --unrelated FOLDER.")
    layout, path = args.data
    names = {field.name for field in fields(Run)} & vars(args).keys() - {"data"}
    given = {name: getattr(args, name) for name in names}
    return Run(**given, recipe=recipe, data=layout, path=Path(path), hold_out=getattr(args, "held_out", 0) > 0)


def presets() -> str:
    """All presets, as a table."""
    header = ["preset", "table", "teacher → student", "images per class", "epochs", "batch", "optimizer", "τ", "λ", ""]
    return markdown_table(header, [_described(name, recipe) for name, recipe in PRESETS.items()])


def _described(name: str, recipe: Recipe) -> list[Any]:
    decay = f", decay {recipe.weight_decay:g}" if recipe.weight_decay else ""
    return [
        name, recipe.table, f"{recipe.teacher} → {recipe.student}", recipe.per_class or "all", recipe.epochs,
        recipe.batch, f"{recipe.optimizer} {recipe.lr:g}{decay}", _listed(recipe.temperatures),
        _listed(recipe.weights), recipe.source,
    ]  # fmt: skip


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def grid(args: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """The same command line for each τ and λ that the paper tries, as far as the arm reads them, measured on images
    kept from all students."""
    recipe, reads = recipe_of(args), read_by(args.arm)
    given = shlex.join(word for word in words if word != "--grid")
    tried = {"temperature": recipe.temperatures, "weight": recipe.weights}
    names = [name for name in tried if name in reads]
    commands = []
    for values in product(*(tried[name] for name in names)):
        chosen = " ".join(f"--{name} {value:g}" for name, value in zip(names, values, strict=True))
        out = args.out / "-".join([args.arm, *(f"{value:g}" for value in values)])
        parts = [f"accelerate launch -m benchmarks.full_scale {given} --split validation", chosen]
        commands.append(" ".join([*filter(None, parts), f"--out {shlex.quote(str(out))}"]))
    return commands


def quick() -> None:
    """Every layout for one epoch: noise, networks of a minute, nothing left behind."""
    for layout, make in FOLDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            make(root / "data")
            recipe = replace(PRESETS[layout], **QUICK)
            run = Run(
                recipe, layout, root / "data", root / "out", arm="frozen_e2kd", pretrained=False, workers=0, cpu=True
            )
            print(layout, json.dumps(distil(run)), flush=True)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; options of a recipe are there only where they were given."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.full_scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", nargs=2, metavar=("LAYOUT", "FOLDER"), help=" or ".join(READERS))
    parser.add_argument("--preset", choices=list(PRESETS), metavar="NAME", help="the layout's own if not given")
    parser.add_argument("--arm", choices=list(ARMS), default=Run.arm)
    parser.add_argument("--unrelated", type=Path, help="folder of images to distil on instead")
    parser.add_argument("--seed", type=int, default=Run.seed)
    parser.add_argument("--temperature", type=float, default=Run.temperature, help="τ")
    parser.add_argument("--weight", type=float, default=Run.weight, help="λ; of a rival a multiple of its own weight")
    parser.add_argument("--kd-weight", type=float, default=Run.kd_weight, help="of KD's term; the paper also tries 0.5")
    parser.add_argument("--max-classes", type=int, help="of all classes, so many are drawn in each step; all if none")
    parser.add_argument("--fraction", type=float, default=Run.fraction, help="of each batch that is explained")
    parser.add_argument("--split", choices=("test", "validation"), default=Run.split)
    parser.add_argument("--teacher-checkpoint", type=Path, help="its maker's weights if not given")
    parser.add_argument(
        "--teacher-logit-bias", type=float, help="of bcos.official; that of the B-cos releases if not given"
    )
    parser.add_argument("--student-checkpoint", type=Path, help="weights to start from")
    parser.add_argument("--cache", type=Path, help="of a frozen teacher; below --out if not given")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of this student, or of a grid")
    parser.add_argument("--accumulate", type=int, default=Run.accumulate, help="parts to compute a batch in")
    parser.add_argument("--workers", type=int, default=Run.workers, help="of each process")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default=Run.mixed_precision)
    parser.add_argument("--evaluate-every", type=int, default=Run.evaluate_every, help="epochs; 0: at the end alone")
    parser.add_argument("--track", help="a tracker of Accelerate, such as tensorboard")
    parser.add_argument("--cpu", action="store_true")
    for name, (kind, said) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=said)
    parser.add_argument("--presets", action="store_true", help="print them")
    parser.add_argument("--grid", action="store_true", help="print the commands that choose τ and λ")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print what the runs below it came to")
    parser.add_argument("--quick", action="store_true", help="noise in every layout; nothing written")
    args = parser.parse_args(words)
    if args.presets or args.quick or args.table is not None:
        return args
    if args.data is None or args.data[0] not in READERS:
        parser.error(f"expected --data LAYOUT FOLDER, the layout one of {', '.join(READERS)}")
    args.preset = args.preset or args.data[0]
    return args


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    words = sys.argv[1:] if words is None else words
    args = arguments(words)
    if args.presets:
        print(presets())
    elif args.table is not None:
        print(report(args.table))
    elif args.quick:
        quick()
    elif args.grid:
        print("\n".join(grid(args, words)))
    else:
        print(json.dumps(distil(run_of(args))))


if __name__ == "__main__":
    main()
