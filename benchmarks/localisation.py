"""Does a student look where a teacher looks that was guided to look at the objects? (e²KD, Table 5, left)

    python -m benchmarks.localisation                                  # pets, then COCO; energy, L1 and no guidance
    python -m benchmarks.localisation --tasks coco --guidance energy --guidance-weight 0.3    # as the table's
    python -m benchmarks.localisation --quick                          # to see that it runs; writes nothing

Teachers are ResNet-32s, students ResNet-20s, both beginning with CIFAR-10's weights. Teachers are guided by the
animals' masks (pets) or the objects' boxes (COCO) with a loss that raises the energy pointing game (EPG) or
intersection over union (IoU), after *Studying How to Efficiently and Effectively Guide Models with Explanations* (Rao
et al. 2023); students never see a mask or a box, and no labels: on COCO the labels say which classes are explained, no
more. EPG and IoU are of GradCAM for the classes that are there; for IoU, the map is cut where it leaves as many pixels
as the object has. A seed decides the first classifier, the batches and every crop. For each arm, τ and λ are those of
the highest accuracy or F1 on validation photos, with a seed that is not reported: EPG and IoU are not looked at.
A run that was stopped goes on where it was; `--fresh` begins anew.
Results: benchmarks/results/localisation_<task>_<guidance>.json.
"""

from __future__ import annotations

import itertools
import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import e2kd
from benchmarks import paired
from benchmarks.common import markdown_table
from benchmarks.limited import run
from benchmarks.limited_training import BASIC
from benchmarks.objects import TASKS, Objects, Task
from benchmarks.paired import Case, Row, Study, tested
from benchmarks.paired_tables import BETWEEN, chosen, gains, made_by, means, seeds
from benchmarks.records import Record, existing
from benchmarks.small_networks import from_cifar, trained_once
from e2kd.demo.train import batches, train
from e2kd.guidance import GuidanceLoss, energy_loss, l1_loss

SEEDS, TUNING_SEEDS = range(5), range(100, 101)
WEIGHTS = (1.0, 5.0, 25.0)
TEACHER_BLOCKS, STUDENT_BLOCKS = 5, 3  # in each stage: ResNet-32, ResNet-20
GUIDANCE = {"energy": energy_loss, "l1": l1_loss, "none": None}
TITLES = {"energy": "guided for EPG", "l1": "guided for IoU", "none": "not guided"}
WORK = Path(tempfile.gettempdir()) / "e2kd-localisation"


@dataclass(frozen=True)
class Settings:
    """The budget, the same in every arm."""

    epochs: int
    teacher_epochs: int
    guidance_weight: float = 1.0


def trained_teacher(task: Task, guidance: str, objects: Objects, settings: Settings, path: Path) -> nn.Module:
    """A teacher that was guided with masks, kept in a file."""
    torch.manual_seed(0)
    teacher, loss = from_cifar(TEACHER_BLOCKS, task.classes), GUIDANCE[guidance]

    def fit(network: nn.Module) -> None:
        criterion = GuidanceLoss(
            network, task.loss, loss=loss or energy_loss, weight=settings.guidance_weight, example=objects.images[:2]
        )

        def guided(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
            labels, masks = targets
            return criterion(logits, labels, None if loss is None else masks)

        train(network, guided, objects.feed(), plan(objects, settings.teacher_epochs, 0), 0, learning_rate=task.peak)
        criterion.remove()

    return trained_once(path, teacher, fit)


def trained_student(case: Case, task: Task, objects: Objects, teacher: nn.Module, settings: Settings) -> nn.Module:
    """A student of one arm and seed; those of one seed see the same crops."""
    torch.manual_seed(case.seed)
    student = from_cifar(STUDENT_BLOCKS, task.classes)
    criterion = criterion_of(case, task, student, teacher, objects.images[:2])

    def distilled(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return criterion(logits, targets[0])

    crops = plan(objects, settings.epochs, case.seed)
    train(student, distilled, objects.feed(), crops, case.seed, learning_rate=task.peak)
    criterion.remove()
    return student


def criterion_of(case: Case, task: Task, student: nn.Module, teacher: nn.Module, example: Tensor) -> e2kd.E2KDLoss:
    """The one line in which the arms differ."""
    return e2kd.E2KDLoss(
        student, teacher, temperature=case.temperature or 1.0, weight=case.weight or 0.0, example=example,
        **task.distilled,
    )  # fmt: skip


def plan(objects: Objects, epochs: int, seed: int) -> list[Tensor]:
    """Indices of the batches."""
    return batches(len(objects.labels), epochs, seed)


def all_results() -> list[Row]:
    """What was run: every task and guidance."""
    return existing(f"localisation_{task}_{guidance}" for task in TASKS for guidance in GUIDANCE)


def measures(found: Row) -> tuple[str, str, str]:
    """The names of what a result measures."""
    return TASKS[found["task"]].measure, "epg", "iou"


def table(results: list[Row]) -> str:
    """Teachers with their students' means and what e²KD adds to KD, as Markdown."""
    body = []
    for found in results:
        fields, where = measures(found), f"{TASKS[found['task']].title}, {TITLES[found['guidance']]}"
        body.append([where, "teacher", *(f"{100 * found['teacher'][field]:.1f}" for field in fields), None, None])
        for arm, name in BASIC.items():
            if arm in tested(found["rows"]):
                body.append(["", name, *means(found["rows"], arm, fields), *chosen(found["rows"], arm)])
        added = gains(found["rows"], "e2kd", "kd", fields)
        if any(added):
            body.append(["", "e²KD - KD", *added, None, None])
    return markdown_table(["", "", "accuracy / F1", "EPG", "IoU", "τ", "λ"], body)


def section(results: list[Row]) -> str:
    """The page's table, with what it is of."""
    trained = seeds(row for found in results for row in found["rows"])
    note = f"Percent on test photos, mean ± sd of {trained}, the same steps in every arm. Differences, {BETWEEN}."
    commands = itertools.chain(*(found["commands"] for found in results))
    return "\n\n".join([table(results), note, made_by(commands)])


def result_of(name: str, guidance: str, args: Namespace) -> Row:
    """A teacher's study, run or gone on with."""
    task = TASKS[name]
    epochs = 1 if args.quick else args.epochs or task.epochs
    settings = Settings(epochs, epochs, args.guidance_weight)
    parts = {part: task.load(part) for part in ("train", "validation", "test")}
    file = f"{name}-{guidance}-{settings.teacher_epochs}-{settings.guidance_weight:g}.safetensors"
    with paired.work_of(args) as folder:
        teacher = trained_teacher(task, guidance, parts["train"], settings, folder / file)

    def measured(case: Case) -> Row:
        student = trained_student(case, task, parts["train"], teacher, settings)
        return task.scores(student, parts[case.split])

    found = {
        "settings": asdict(settings), "task": name, "guidance": guidance,
        "teacher": task.scores(teacher, parts["test"]),
    }  # fmt: skip
    record = Record(None if args.quick else f"localisation_{name}_{guidance}", found, fresh=args.fresh)
    study = Study(measured, record.rows, record.write, args.jobs, by=task.measure)
    chosen = Namespace(arms=args.arms, temperatures=task.temperatures, weights=args.weights)
    run(study, chosen, SEEDS[:1] if args.quick else SEEDS, TUNING_SEEDS)
    return record.found(study.rows)


def main() -> None:
    """Command line."""
    parser = paired.parser_of(__doc__, WEIGHTS, WORK)
    parser.add_argument("--tasks", choices=list(TASKS), nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--guidance", choices=list(GUIDANCE), nargs="+", default=list(GUIDANCE), metavar="GUIDANCE")
    parser.add_argument("--arms", choices=("kd", "e2kd"), nargs="+", default=("kd", "e2kd"), metavar="ARM")
    parser.add_argument("--guidance-weight", type=float, default=Settings.guidance_weight, help="of the teacher's loss")
    parser.add_argument("--epochs", type=int, help="of teachers and students; each task has its own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [result_of(task, guidance, args) for task in args.tasks for guidance in args.guidance]
    print(section(results))


if __name__ == "__main__":
    main()
