"""Does explaining help a student that sees few images? CIFAR-10, five paired seeds (e²KD, Tables 1 to 3).

    python -m benchmarks.limited                               # standard networks, 50 images of each class
    python -m benchmarks.limited --family bcos --per-class 200 --epochs 15
    python -m benchmarks.limited --unrelated --per-class 200   # on images of other data sets (Table 5, right)
    python -m benchmarks.limited --arms kd e2kd                # some arms alone; rows of others stay
    python -m benchmarks.limited --quick                       # a minute, to see that it runs; writes nothing

A run that was stopped goes on where it was; `--fresh` begins anew. Teachers are trained on the train part's JPEG
files, students from scratch with no label loss but in the arm `cross_entropy`. A seed decides the images, the first
weights, the batches and every augmentation, so arms of one seed differ in their criterion alone: a frozen teacher has
seen the images as they are, a live one sees each as it is augmented. Every arm's τ and λ are those of the highest mean
accuracy on held-out images of the train part over two seeds that are not reported. Seeds 0 to 2 are left out: an
early run had shown their test rows before the largest λ were among the choices (limited_stopped.json).
Results: benchmarks/results/limited_<family>_<images>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from benchmarks import paired
from benchmarks.cifar_data import HELD_OUT, TEST, TRAIN, part, photos
from benchmarks.cifar_families import FAMILIES, Family, predictions, trained_teacher
from benchmarks.common import markdown_table, write_results
from benchmarks.limited_training import (
    ARMS,
    EXPLAINED,
    RIVALS,
    UNTAUGHT,
    Data,
    Settings,
    measures,
    shift_curve,
    train,
)
from benchmarks.paired import Case, Row, Study

SEEDS, TUNING_SEEDS = range(3, 8), range(100, 102)
TEMPERATURES, WEIGHTS = (1.0, 4.0), (1.0, 5.0, 10.0, 25.0, 50.0)
MULTIPLES = (0.2, 1.0, 5.0)  # of a rival's own weight
PER_CLASS = (50, 200, 4500)
MEASURES = ("accuracy", "agreement")
PAIRS = (("e2kd", "kd"), ("e2kd_all", "kd"), ("frozen_e2kd", "frozen_kd"), ("frozen_e2kd_all", "frozen_kd"))
WORK = Path(tempfile.gettempdir()) / "e2kd-limited"


def load(family: Family, settings: Settings, work: Path, unrelated: bool) -> Data:
    """Decodes the images and trains the teacher, unless that was done."""
    train_part = part(TRAIN, 0, -HELD_OUT)
    teacher: nn.Module = trained_teacher(family.kind, work, train_part, settings.teacher_epochs)
    pool = photos() if unrelated else train_part
    measured = {
        "validation": part(TRAIN, -HELD_OUT, settings.validation_per_class - HELD_OUT),
        "test": part(TEST, 0, settings.test_per_class),
    }
    taught = {name: predictions(family.kind, teacher, images.pixels) for name, images in measured.items()}
    return Data(family, teacher, pool, measured, taught)


def choices(
    arm: str, temperatures: Sequence[float], weights: Sequence[float], multiples: Sequence[float] = MULTIPLES
) -> list[Case]:
    """Every setting that an arm may have; what it does not have is None."""
    taus = (None,) if arm in UNTAUGHT else temperatures
    lambdas = weights if arm in EXPLAINED else multiples if arm in RIVALS else (None,)
    return [Case("test", arm, 0, *pair) for pair in itertools.product(taus, lambdas)]


def run(
    study: Study,
    args: argparse.Namespace,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    multiples: Sequence[float] = MULTIPLES,
) -> None:
    """Chooses on validation images, arm by arm, then trains every arm's students, seed by seed."""
    tried = [choices(arm, args.temperatures, args.weights, multiples) for arm in args.arms]
    best = [study.best(cases, tuning_seeds) for cases in tried]
    study.fill([case._replace(seed=seed) for seed, case in itertools.product(seeds, best)])


def result_name(family: str, per_class: int, unrelated: bool) -> str:
    """Of the JSON of one run.

    >>> result_name("bcos", 50, unrelated=True)
    'limited_bcos_50_unrelated'
    """
    return f"limited_{family}_{per_class}" + ("_unrelated" if unrelated else "")


def all_results() -> list[Row]:
    """What was run: every family and number of images."""
    every = itertools.product(FAMILIES, (False, True), PER_CLASS)
    paths = [paired.result_path(result_name(family, images, unrelated)) for family, unrelated, images in every]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def table(found: Row) -> str:
    """Arms with their means, as Markdown."""
    rows, family = found["rows"], FAMILIES[found["family"]]
    body = [[f"teacher ({family.kind.title})", f"{100 * found['teacher']['test']:.1f}", None, None, None]]
    for arm, name in ARMS.items():
        mine = [row for row in rows if row["split"] == "test" and row["arm"] == arm]
        if mine:
            cells = [paired.percent(list(paired.values(rows, arm, field).values())) for field in MEASURES]
            body.append([name, *cells, _plain(mine[0]["temperature"]), _plain(mine[0]["weight"])])
    images = found["settings"]["per_class"]
    seen = f"{10 * images} photographs of other data sets" if found["unrelated"] else f"{images} images per class"
    return markdown_table([f"{family.title}, {seen}", *MEASURES, "τ", "λ"], body)


def difference_lines(rows: list[Row]) -> list[str]:
    """The paired differences of the arms that were run, in words."""
    arms = {row["arm"] for row in rows if row["split"] == "test"}
    said = [
        f"{ARMS[arm]} - {ARMS[base]}, same seed: {paired.in_points(paired.differences(rows, arm, base, MEASURES))}."
        for arm, base in PAIRS
        if {arm, base} <= arms
    ]
    rivals = [(rival, paired.differences(rows, "e2kd", rival, MEASURES)) for rival in RIVALS if {"e2kd", rival} <= arms]
    if rivals:
        each = "; ".join(f"{ARMS[rival]} {paired.in_short(found)}" for rival, found in rivals)
        said.append(f"e²KD less its rivals, 95 % confidence: {each}. A rival's λ is a multiple of its default weight.")
    return said


def _plain(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def main() -> None:
    """Command line."""
    parser = paired.parser_of(__doc__, WEIGHTS, WORK)
    parser.add_argument("--family", choices=list(FAMILIES), default="standard")
    parser.add_argument("--per-class", type=int, choices=PER_CLASS, default=50, help="images of each class")
    parser.add_argument("--unrelated", action="store_true", help="students see photographs of other data sets instead")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of the students")
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS), metavar="ARM")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES, help="to choose τ from")
    parser.add_argument(
        "--multiples", type=float, nargs="+", default=MULTIPLES, help="of a rival's own weight, to choose from"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    family, name = FAMILIES[args.family], result_name(args.family, args.per_class, args.unrelated)
    settings = Settings(args.per_class, args.epochs, family.kind.epochs)
    if args.quick:
        settings = Settings(10, epochs=2, teacher_epochs=0, validation_per_class=20, test_per_class=50)
    data = load(family, settings, args.work, args.unrelated)
    teacher = {
        split: (found == data.measured[split].labels).double().mean().item() for split, found in data.taught.items()
    }

    def measured(case: Case) -> Row:
        student = train(case, data, settings)
        return measures(case, data, student)

    found = {
        "command": " ".join(["python -m benchmarks.limited", *sys.argv[1:]]),
        "settings": asdict(settings), "family": family.name, "unrelated": args.unrelated,
        "teacher": teacher,
    }  # fmt: skip
    if family.shifted:
        found["shift"] = shift_curve(data, data.teacher)
    if args.quick:
        study = Study(measured, [], lambda rows: None, args.jobs)
        run(study, args, SEEDS[:1], TUNING_SEEDS[:1], args.multiples)
    else:
        rows = [] if args.fresh else paired.earlier(paired.result_path(name), asdict(settings))
        study = Study(measured, rows, lambda rows: write_results(name, rows, **found), args.jobs)
        run(study, args, SEEDS, TUNING_SEEDS, args.multiples)
    print(table(found | {"rows": study.rows}))
    print("\n".join(difference_lines(study.rows)))


if __name__ == "__main__":
    main()
