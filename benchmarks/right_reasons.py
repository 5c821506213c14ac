"""Right for the right reasons? Cats and dogs on misleading photos (e²KD, Fig. 2 and Table 4), many architectures.

    python -m benchmarks.right_reasons                                # every student, two to three hours on two cores
    python -m benchmarks.right_reasons --students vit convnext
    python -m benchmarks.right_reasons --students resnet --again      # rows of their own, where the same was run before
    python -m benchmarks.right_reasons --quick                        # to see that it runs; writes nothing

The teacher, a ResNet-32 that begins with CIFAR-10's weights, has seen cats and dogs on water and greenery alike.
Students, from scratch, see dogs on greenery and cats on water alone, and no labels but in the arm `cross_entropy`.
Out of distribution it is the other way round. The arm `unbiased` shows what the same budget is worth where nothing
misleads: labels, and animals on either background. A seed decides the composites, the first weights, the batches and
every shift, so students of one seed differ in their criterion alone. For each architecture and arm, τ and λ are those
of the highest accuracy over both kinds of composites of validation animals on validation backgrounds, with a seed
that is not reported. A run that was stopped goes on where it was; `--fresh` begins anew.
`--again` changes the file alone: a teacher comes out the same on one machine, but differently on another, and students
beside that one need rows of their own.
Results: benchmarks/results/right_reasons_<student>.json, with _again before the dot of what was run once more.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn

import e2kd
from benchmarks import paired
from benchmarks.common import markdown_table
from benchmarks.composites import composites
from benchmarks.limited import run
from benchmarks.limited_training import BASIC, EVERY_CLASS, FROZEN, settings_of
from benchmarks.paired import Case, Row, Study, tested
from benchmarks.paired_tables import BETWEEN, chosen, gains, made_by, means, seeds
from benchmarks.records import Record, existing
from benchmarks.small_networks import STUDENTS, Student, from_cifar, trained_once
from e2kd.demo.data import Mode, Scenes
from e2kd.demo.lessons import frozen_lessons
from e2kd.demo.measure import evaluate, predictions
from e2kd.demo.train import batches, train

SEEDS, TUNING_SEEDS = range(5), range(100, 101)
TEMPERATURES, WEIGHTS = (1.0, 4.0), (1.0, 5.0, 25.0)
ARMS = BASIC | {"e2kd_all": EVERY_CLASS["e2kd_all"], "unbiased": "cross-entropy, either background"}
LIVE = [arm for arm in ARMS if arm not in FROZEN]
CLASSES, BLOCKS, PEAK = 2, 5, 1e-3  # of the teacher: blocks in a stage, peak of its schedule
TITLES = {
    "id_accuracy": "ID accuracy", "ood_accuracy": "OOD accuracy", "ood_agreement": "OOD agreement",
    "worst_group_accuracy": "worst group", "epg": "EPG own class", "epg_teacher_class": "EPG teacher's",
}  # fmt: skip
COMPARED = ("ood_accuracy", "ood_agreement", "worst_group_accuracy", "epg")
PAIRS = (("e2kd", "kd"), ("e2kd_all", "kd"), ("frozen_e2kd", "frozen_kd"))
WORK = Path(tempfile.gettempdir()) / "e2kd-right-reasons"


@dataclass(frozen=True)
class Settings:
    """The budget, the same in every arm."""

    images: int = 2000
    epochs: int = 10
    teacher_images: int = 6000
    teacher_epochs: int = 2
    measured: int = 600


@dataclass(frozen=True)
class Test:
    """A part's composites, aligned and reversed, and the teacher's classes of the reversed ones."""

    aligned: Scenes
    reversed_: Scenes
    taught: Tensor

    def scores(self, model: nn.Module) -> Row:
        """What a network is worth here; "accuracy" is that over both kinds of composites."""
        found = evaluate(model, self.aligned, self.reversed_, self.taught)._asdict()
        return {"accuracy": (found["id_accuracy"] + found["ood_accuracy"]) / 2, **found}


def trained_teacher(settings: Settings, work: Path) -> nn.Module:
    """The teacher, kept in the work folder."""
    torch.manual_seed(0)
    teacher = from_cifar(BLOCKS, CLASSES)

    def fit(network: nn.Module) -> None:
        scenes = composites("train", Mode.RANDOM, settings.teacher_images, seed=0)
        plan = batches(len(scenes.labels), settings.teacher_epochs, seed=0)

        def feed(batch: Tensor) -> tuple[Tensor, Tensor]:
            return scenes.images[batch], scenes.labels[batch]

        train(network, nn.CrossEntropyLoss(), feed, plan, 0, learning_rate=PEAK)

    path = work / f"teacher-{settings.teacher_images}-{settings.teacher_epochs}.safetensors"
    return trained_once(path, teacher, fit)


def tests(teacher: nn.Module, count: int) -> dict[str, Test]:
    """What students are measured on, by part."""
    found = {}
    for seed, part in enumerate(("validation", "test")):
        aligned, reversed_ = (composites(part, mode, count, seed) for mode in (Mode.ALIGNED, Mode.REVERSED))
        found[part] = Test(aligned, reversed_, predictions(teacher, reversed_.images))
    return found


def trained_student(case: Case, student: Student, teacher: nn.Module, settings: Settings) -> nn.Module:
    """A student of one arm and seed; those of one seed see the same images, shifted alike."""
    mode = Mode.RANDOM if case.arm == "unbiased" else Mode.ALIGNED
    scenes = composites("train", mode, settings.images, 1000 + case.seed)
    torch.manual_seed(case.seed)
    network = student.make(CLASSES)
    with frozen_lessons(teacher, scenes) as lessons:
        taught_by = lessons.frozen if case.arm in FROZEN else teacher
        plan = batches(settings.images, settings.epochs, case.seed)
        criterion = criterion_of(case, network, taught_by, scenes.images[:2], len(plan))
        feed = lessons.feed(frozen=case.arm in FROZEN)
        train(network, criterion, feed, plan, case.seed, learning_rate=student.learning_rate)
    if isinstance(criterion, e2kd.E2KDLoss):
        criterion.remove()
    return network


def criterion_of(
    case: Case, student: nn.Module, teacher: nn.Module | e2kd.FrozenTeacher, example: Tensor, steps: int
) -> nn.Module:
    """The one line in which the arms differ; steps are the training's."""
    if case.temperature is None:
        return nn.CrossEntropyLoss()
    return e2kd.E2KDLoss(
        student, teacher,
        temperature=case.temperature, weight=case.weight or 0.0, example=example, **settings_of(case.arm, steps),
    )  # fmt: skip


def measured(case: Case, student: Student, teacher: nn.Module, parts: dict[str, Test], settings: Settings) -> Row:
    """A case's student, trained and measured."""
    network = trained_student(case, student, teacher, settings)
    return parts[case.split].scores(network)


def result_name(student: str, again: bool) -> str:
    """Of a student's file.

    >>> result_name("vit", again=False), result_name("vit", again=True)
    ('right_reasons_vit', 'right_reasons_vit_again')
    """
    return "_".join(["right_reasons", student, *["again"] * again])


def all_results() -> list[Row]:
    """What was run: every student, those of one teacher together."""
    found = existing(result_name(*each) for each in itertools.product(STUDENTS, (False, True)))
    teachers = [one["teacher"] for one in found]
    return sorted(found, key=lambda one: teachers.index(one["teacher"]))


def table(results: list[Row]) -> str:
    """Students and arms with their means, under their teacher's, as Markdown."""
    body: list[list[str]] = []
    for teacher, taught in itertools.groupby(results, key=itemgetter("teacher")):
        title = "teacher (ResNet-32), trained anew" if body else "teacher (ResNet-32)"
        body.append([title, "", *(f"{100 * teacher[field]:.1f}" for field in TITLES), "", ""])
        body += [row for found in taught for row in arms_of(found)]
    return markdown_table(["", "", *TITLES.values(), "τ", "λ"], body)


def arms_of(found: Row) -> list[list[str]]:
    """A student's rows of the table."""
    rows, student = found["rows"], title_of(found)
    arms = tested(rows)
    return [[student, name, *means(rows, arm, TITLES), *chosen(rows, arm)] for arm, name in ARMS.items() if arm in arms]


def title_of(found: Row) -> str:
    """A student's, as the tables have it."""
    return STUDENTS[found["student"]].title + ", again" * found.get("again", False)


def gains_table(results: list[Row]) -> str:
    """What explanations add to KD, as Markdown."""
    body = []
    for found, (arm, base) in itertools.product(results, PAIRS):
        cells = gains(found["rows"], arm, base, COMPARED)
        if any(cells):
            body.append([title_of(found), f"{ARMS[arm]} - {ARMS[base]}", *cells])
    return markdown_table(["", "", *(TITLES[field] for field in COMPARED)], body)


def section(results: list[Row]) -> str:
    """The page's tables, with what they are of."""
    settings = results[0]["settings"]
    trained = seeds(row for found in results for row in found["rows"])
    note = (
        f"Percent of {settings['measured']} composites each in and out of distribution, EPG out of it, mean ± sd of "
        f"{trained}, {settings['epochs']} epochs of {settings['images']:,} images in every arm. "
        f"Differences, {BETWEEN}:"
    )
    commands = itertools.chain(*(found["commands"] for found in results))
    return "\n\n".join([table(results), note, gains_table(results), made_by(commands)])


def main() -> None:
    """Command line."""
    parser = paired.parser_of(__doc__, WEIGHTS, WORK)
    parser.add_argument("--students", choices=list(STUDENTS), nargs="+", default=list(STUDENTS), metavar="STUDENT")
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=LIVE, metavar="ARM", help="frozen ones too")
    parser.add_argument("--again", action="store_true", help="rows of their own, where the same was run before")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of the students")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES, help="to choose τ from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(epochs=args.epochs)
    if args.quick:
        settings = Settings(images=100, epochs=1, teacher_images=100, teacher_epochs=1, measured=60)
    with paired.work_of(args) as folder:
        teacher = trained_teacher(settings, folder)
    parts = tests(teacher, settings.measured)
    head = {"settings": asdict(settings), "teacher": parts["test"].scores(teacher)}
    again = {"again": True} if args.again else {}
    results = []
    for name in args.students:
        work = partial(measured, student=STUDENTS[name], teacher=teacher, parts=parts, settings=settings)
        path = None if args.quick else result_name(name, args.again)
        record = Record(path, {"student": name, **again, **head}, fresh=args.fresh)
        study = Study(work, record.rows, record.write, args.jobs)
        run(study, args, SEEDS[:1] if args.quick else SEEDS, TUNING_SEEDS)
        results.append(record.found(study.rows))
    print(section(results))


if __name__ == "__main__":
    main()
