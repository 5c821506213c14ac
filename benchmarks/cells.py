"""Why do some e²KD students look right and are wrong? What the cells of their maps know, on misleading photographs.

    python -m benchmarks.cells                           # students of benchmarks.right_reasons, trained again
    python -m benchmarks.cells --students vit convnext
    python -m benchmarks.cells --quick                   # to see that it runs; writes nothing

A GradCAM map says in which cells of the last features a class is seen, not what these cells were made of. Here the
classifier of an e²KD student is given the mean of the cells that lie wholly on the animal, in the place of all, out of
distribution: if these cells tell of the animal, it is right. And the gradient of the student's class with respect to
the pixels is measured: how much of it lies on the animal, whose pixels are a sixth of the image. Every student is that
of the table of `right_reasons`: its accuracy has to come out as it is there, or the run ends with an error.
Results: benchmarks/results/cells.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import e2kd
from benchmarks import right_reasons
from benchmarks.common import markdown_table
from benchmarks.paired import Case, Row, Study, parser_of, work_of
from benchmarks.paired_tables import made_by, percent, seeds
from benchmarks.records import Record
from benchmarks.right_reasons import Settings, Test
from benchmarks.small_networks import SIDE, STUDENTS
from e2kd.demo.data import Scenes
from e2kd.demo.measure import mean_and_missing, predictions
from e2kd.localization import energy_on_mask
from e2kd.plans import plan_for

SEEDS = range(3)
CHUNK = 100  # images at a time
TITLES = {
    "ood_accuracy": "OOD accuracy",
    "on_animal": "by cells on the animal",
    "pixels": "input gradient on the animal",
}


@contextmanager
def reading(model: nn.Module, images: Tensor, kept: Tensor) -> Iterator[None]:
    """Where GradCAM reads, every cell becomes the mean over `kept`, [B, 1, H, W] in [0, 1], of cells wholly in it."""
    site = plan_for(model, e2kd.GradCAM(), images).site
    assert site is not None
    inside = (F.adaptive_avg_pool2d(kept.float(), site.grid) > 0.999).float()

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        maps = site.layout.to_maps(output, (SIDE, SIDE))
        mean = (maps * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
        return (mean[:, None] if output.ndim == 3 else mean[:, :, None, None]).expand_as(output)

    handle = model.get_submodule(site.heard_by_name()).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def by_cells_on_the_animal(model: nn.Module, scenes: Scenes) -> float:
    """Accuracy, if the classifier is given the mean of the cells on the animal."""
    found = []
    for images, masks in zip(scenes.images.split(CHUNK), scenes.masks.split(CHUNK), strict=True):
        with reading(model, images, masks[:, None]):
            found.append(predictions(model, images))
    return (torch.cat(found) == scenes.labels).double().mean().item()


def gradient_on_the_animal(model: nn.Module, scenes: Scenes) -> float:
    """Mean share of the absolute input gradient of the student's class that lies on the animal."""
    shares = []
    for images, masks in zip(scenes.images.split(CHUNK), scenes.masks.split(CHUNK), strict=True):
        found = e2kd.explain(model, images, explainer=e2kd.InputGradient()).maps
        shares.append(energy_on_mask(found.abs().sum(1, keepdim=True), masks))
    return mean_and_missing(torch.cat(shares))[0]


def knows(model: nn.Module, test: Test) -> Row:
    """What a network's cells know, out of distribution."""
    scenes = test.reversed_
    return {
        "ood_accuracy": (predictions(model, scenes.images) == scenes.labels).double().mean().item(),
        "on_animal": by_cells_on_the_animal(model, scenes),
        "pixels": gradient_on_the_animal(model, scenes),
    }


def measured(
    case: Case, student: str, teacher: nn.Module, test: Test, settings: Settings, known: dict[Case, float]
) -> Row:
    """A student of the table, trained again and looked into."""
    found = knows(right_reasons.trained_student(case, STUDENTS[student], teacher, settings), test)
    now, before = found["ood_accuracy"], known.get(case)
    if before is not None and abs(now - before) > 1e-9:
        raise ValueError(f"{student}, {case}: expected OOD accuracy {before}, but got {now}.")
    return {"student": student, **found}


def of_the_table(rows: list[Row]) -> dict[Case, float]:
    """The e²KD students of a result, with the τ and λ that were chosen for them: their OOD accuracy."""
    tested = (row for row in rows if row["split"] == "test" and row["arm"] == "e2kd" and row["seed"] in SEEDS)
    return {Case(**{name: row[name] for name in Case._fields}): row["ood_accuracy"] for row in tested}


def first_results() -> list[Row]:
    """The students' first runs, not those beside another teacher."""
    return [found for found in right_reasons.all_results() if not found.get("again")]


def table(found: Row) -> str:
    """Teacher and students with their means, as Markdown."""
    body = [["teacher (ResNet-32)", *(f"{100 * found['teacher'][name]:.1f}" for name in TITLES)]]
    for student in dict.fromkeys(row["student"] for row in found["rows"]):
        mine = [row for row in found["rows"] if row["student"] == student]
        cells = [percent([row[name] for row in sorted(mine, key=lambda row: row["seed"])]) for name in TITLES]
        body.append([f"{STUDENTS[student].title}, e²KD", *cells])
    note = (
        f"Percent of {found['settings']['measured']} composites out of distribution, mean ± sd of "
        f"{seeds(found['rows'], 'seed')}. {100 * found['animal']:.1f} % of the pixels are the animal's."
    )
    return "\n\n".join([markdown_table(["", *TITLES.values()], body), note, made_by(found["commands"])])


def main() -> None:
    """Command line."""
    parser = parser_of(__doc__, right_reasons.WEIGHTS, right_reasons.WORK)
    parser.add_argument("--students", choices=list(STUDENTS), nargs="+", default=list(STUDENTS), metavar="STUDENT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {found["student"]: found for found in first_results() if found["student"] in args.students}
    settings = Settings(**next(iter(results.values()))["settings"])
    if args.quick:
        settings = Settings(images=100, epochs=1, teacher_images=100, teacher_epochs=1, measured=60)
    with work_of(args) as folder:
        teacher = right_reasons.trained_teacher(settings, folder)
    test = right_reasons.tests(teacher, settings.measured)["test"]
    head: Row = {
        "settings": vars(settings), "teacher": knows(teacher, test),
        "animal": test.reversed_.masks.float().mean().item(),
    }  # fmt: skip
    record = Record(None if args.quick else "cells", head, fresh=args.fresh)
    rows = record.rows
    for student, known in ((name, of_the_table(found["rows"])) for name, found in results.items()):
        others = [row for row in rows if row["student"] != student]
        mine = [row for row in rows if row["student"] == student]
        write = partial(_write, record, others)
        expected = {} if args.quick else known
        work = partial(measured, student=student, teacher=teacher, test=test, settings=settings, known=expected)
        study = Study(work, mine, write, args.jobs)
        study.fill(list(known)[: 1 if args.quick else None])
        rows = others + study.rows
    print(table(record.found(rows)))


def _write(record: Record, others: list[Row], rows: list[Row]) -> None:
    record.write(others + rows)


if __name__ == "__main__":
    main()
