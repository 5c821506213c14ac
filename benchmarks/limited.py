"""Does explaining help a student that sees few images? CIFAR-10, five paired seeds (e²KD, Tables 1 to 3).

    python -m benchmarks.limited                               # standard networks, 50 images of each class
    python -m benchmarks.limited --family bcos --per-class 200 --epochs 15
    python -m benchmarks.limited --family turned --epochs 13   # 40 classes: what an image shows and how it is turned
    python -m benchmarks.limited --unrelated --per-class 200 --epochs 13   # images of other data sets (Table 5, right)
    python -m benchmarks.limited --arms kd e2kd                # some arms alone; rows of others stay
    python -m benchmarks.limited --study again                 # rows of their own, where the same was run before
    python -m benchmarks.limited --quick                       # a minute, to see that it runs; writes nothing

A run that was stopped goes on where it was; `--fresh` begins anew. Teachers are trained on the train part's JPEG
files, students from scratch with no label loss but in the arms `cross_entropy`, `one_line` and `*_labels`. A seed
decides the images, the first weights, the batches and every augmentation, so arms of one seed differ in their criterion
alone: a frozen teacher has seen the images as they are, a live one sees each as it is augmented. Every arm's τ and λ
are those of the highest mean accuracy on held-out images of the train part over two seeds that are not reported. The
ResNet-32 teachers of the families standard, turned and vit begin with weights of the whole train part, these images
included: there τ and λ are chosen where the teacher is right more often than on test images. Seeds 0 to 2 are left
out: an early run had shown their test rows before the largest λ were among the choices (limited_stopped.json).
`--study again` changes the file alone: a teacher comes out the same on one machine, but differently on another, as that
of the published rows did, and students beside that one need rows of their own. CRD's students saw other augmentations
than KD's in limited_standard_50.json (limited_loose.json has more of that kind).
Results: benchmarks/results/limited_<family>_<images>.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from benchmarks import paired
from benchmarks.cifar_data import HELD_OUT, TEST, TRAIN, part, photos
from benchmarks.cifar_families import FAMILIES, Family, predictions, trained_teacher
from benchmarks.common import markdown_table
from benchmarks.limited_training import (
    ARMS,
    EXPLAINED,
    FROZEN,
    LABELLED,
    ON_TOP,
    RIVALS,
    SIGNED_ARMS,
    UNTAUGHT,
    Data,
    Settings,
    measures,
    shift_curve,
    train,
)
from benchmarks.paired import Case, Row, Study, tested
from benchmarks.paired_tables import BETWEEN, chosen, gains, made_by, means, seeds
from benchmarks.records import Record, existing

SEEDS, TUNING_SEEDS = range(3, 8), range(100, 102)
TEMPERATURES, WEIGHTS = (1.0, 4.0), (1.0, 5.0, 10.0, 25.0, 50.0)
MULTIPLES = (0.2, 1.0, 5.0)  # of a rival's own weight
PER_CLASS = (50, 200, 4500)
MEASURES = ("accuracy", "agreement")
STUDIES = {  # what their tables add to the title
    "": "",
    "again": ", a teacher trained anew",  # on another machine
    "longer": ", longer schedule",
}
BASES = {arm: "frozen_kd" for arm in FROZEN}  # what an arm is compared with, if not KD
WORK = Path(tempfile.gettempdir()) / "e2kd-limited"


def load(family: Family, settings: Settings, work: Path, unrelated: bool) -> Data:
    """Decodes the images and trains the teacher, unless that was done."""
    kind = family.kind
    train_part = kind.seen(part(TRAIN, 0, -HELD_OUT))
    teacher: nn.Module = trained_teacher(kind, work, train_part, settings.teacher_epochs)
    pool = photos() if unrelated else train_part
    measured = {
        "validation": kind.seen(part(TRAIN, -HELD_OUT, settings.validation_per_class - HELD_OUT)),
        "test": kind.seen(part(TEST, 0, settings.test_per_class)),
    }
    taught = {name: predictions(kind, teacher, images.pixels) for name, images in measured.items()}
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
    test_seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    multiples: Sequence[float] = MULTIPLES,
) -> None:
    """Chooses on validation images, arm by arm, then trains every arm's students, seed by seed."""
    tried = [choices(arm, args.temperatures, args.weights, multiples) for arm in args.arms]
    best = [study.best(cases, tuning_seeds) for cases in tried]
    study.fill([case._replace(seed=seed) for seed, case in itertools.product(test_seeds, best)])


def result_name(family: str, per_class: int, unrelated: bool, study: str = "") -> str:
    """Of the JSON of one run.

    >>> result_name("bcos", 50, unrelated=True), result_name("standard", 50, unrelated=False, study="again")
    ('limited_bcos_50_unrelated', 'limited_standard_50_again')
    """
    return "_".join(["limited", family, str(per_class), *["unrelated"] * unrelated, *([study] if study else [])])


def all_results() -> list[Row]:
    """What was run: every family and number of images."""
    every = itertools.product(FAMILIES, PER_CLASS, (False, True), STUDIES)
    return existing(result_name(*one) for one in every)


def table(found: Row) -> str:
    """Arms with their means and what they gain, as Markdown."""
    rows, family = found["rows"], FAMILIES[found["family"]]
    teacher = [f"teacher ({family.kind.title})", f"{100 * found['teacher']['test']:.1f}"]
    body = [[*teacher, None, None, None, None, None]]
    for arm, name in ARMS.items():
        if arm in tested(rows):
            added = gains(rows, arm, BASES.get(arm, "kd"), MEASURES)
            body.append([name, *means(rows, arm, MEASURES), *added, *chosen(rows, arm)])
    images = found["settings"]["per_class"]
    seen = f"{10 * images:,} photographs of other data sets" if found["unrelated"] else f"{images} images per class"
    seen += STUDIES[found.get("study", "")]
    header = [f"{family.title}, {seen}", *MEASURES, *(f"{field}, gain" for field in MEASURES), "τ", "λ"]
    return markdown_table(header, body)


def rivals_table(rows: list[Row]) -> str:
    """What e²KD is ahead of each rival, as Markdown; empty without rivals."""
    arms = tested(rows)
    ours = [arm for arm in ("e2kd", "e2kd_all") if arm in arms]
    header = ["", *(f"{ARMS[arm]}: {field}" for arm in ours for field in MEASURES)]
    body = [
        [f"less {ARMS[rival]}", *itertools.chain(*(gains(rows, arm, rival, MEASURES) for arm in ours))]
        for rival in RIVALS
        if rival in arms
    ]
    return markdown_table(header, body) if body else ""


def on_top_table(rows: list[Row]) -> str:
    """What explanations are ahead together with a rival or with labels, as Markdown; empty without such arms."""
    arms = tested(rows)
    parts = [
        (arm, part)
        for arm, (rival, _) in ON_TOP.items()
        for part in (rival, "e2kd_all" if arm in SIGNED_ARMS else "e2kd")
    ]
    parts += [
        (arm, part)
        for arm, without in LABELLED.items()
        for part in ("cross_entropy", "kd_labels", without)
        if arm != part
    ]
    pairs = [pair for pair in parts if set(pair) <= arms]
    body = [[f"{ARMS[arm]} less {ARMS[part]}", *gains(rows, arm, part, MEASURES)] for arm, part in pairs]
    return markdown_table(["", *MEASURES], body) if body else ""


def section(found: Row) -> str:
    """A study's part of the page."""
    rows, settings = found["rows"], found["settings"]
    arms = tested(rows)
    over = ", those of frozen arms over frozen KD" if "frozen_kd" in arms else ""
    epochs = "1 epoch" if settings["epochs"] == 1 else f"{settings['epochs']} epochs"
    note = (
        f"Percent of {10 * settings['test_per_class']:,} test images, mean ± sd of {seeds(rows)}, "
        f"{epochs} in every arm. Gains are over KD{over}, {BETWEEN}."
    )
    if "frozen_kd" not in arms and arms & set(FROZEN):
        note += " No frozen KD was trained here, so frozen arms have no gain."
    rivals = rivals_table(rows)
    if rivals:
        note += f" A rival's λ is a multiple of its default weight. What e²KD is ahead of them:\n\n{rivals}"
    if together := on_top_table(rows):
        note += f"\n\n{together}"
    return f"{table(found)}\n\n{note}\n\n{made_by(found['commands'])}"


def main() -> None:
    """Command line."""
    parser = paired.parser_of(__doc__, WEIGHTS, WORK)
    parser.add_argument("--family", choices=list(FAMILIES), default="standard")
    parser.add_argument("--per-class", type=int, choices=PER_CLASS, default=50, help="images of each class")
    parser.add_argument("--unrelated", action="store_true", help="students see photographs of other data sets instead")
    parser.add_argument("--study", choices=list(STUDIES), default="", help="with rows of its own")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of the students")
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS), metavar="ARM")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES, help="to choose τ from")
    parser.add_argument(
        "--multiples", type=float, nargs="+", default=MULTIPLES, help="of a rival's own weight, to choose from"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    family, name = FAMILIES[args.family], result_name(args.family, args.per_class, args.unrelated, args.study)
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
        "settings": asdict(settings), "family": family.name, "unrelated": args.unrelated, "teacher": teacher,
        **({"study": args.study} if args.study else {}),
    }  # fmt: skip
    if family.shifted:
        found["shift"] = shift_curve(data, data.teacher)
    record = Record(None if args.quick else name, found, fresh=args.fresh)
    study = Study(measured, record.rows, record.write, args.jobs)
    trained = (SEEDS[:1], TUNING_SEEDS[:1]) if args.quick else (SEEDS, TUNING_SEEDS)
    run(study, args, *trained, args.multiples)
    print(section(record.found(study.rows)))


if __name__ == "__main__":
    main()
