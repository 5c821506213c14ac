"""Does a frozen teacher's explanation still teach? CIFAR-10 with 50 images of each class, five paired seeds.

    python -m benchmarks.frozen_quality                # some hours on two cores; goes on where it was stopped
    python -m benchmarks.frozen_quality --arms frozen_kd frozen_e2kd --epochs 50    # the frozen pair alone, an hour
    python -m benchmarks.frozen_quality --fresh        # forgets earlier rows
    python -m benchmarks.frozen_quality --quick        # a minute, to see that it runs; writes nothing

Teacher: the shared ResNet-32, fine-tuned on the train part's JPEG files. Students: ResNet-20 from scratch, with no
label loss but in the arm `cross_entropy`. A seed decides the 500 images, the first weights, the batches and every
augmentation, so arms of one seed differ in their criterion alone: a frozen teacher has seen the 500 images as they
are, a live one sees each as it is augmented. Every arm has its own temperature and λ, chosen by mean accuracy on
held-out images of the train part over two seeds that are not reported. Seeds 0 to 2 are left out: their test rows were
seen before λ of 25 and 50 were among the choices (frozen_quality_stopped.json).
Results: benchmarks/results/frozen_quality.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

import e2kd
from benchmarks.cifar import NORMALIZATION, ResNet, normalized
from benchmarks.cifar_data import HELD_OUT, TEST, TRAIN, Images, few, fine_tuned, operations, orders, part, predictions
from benchmarks.common import RESULTS, markdown_table, write_results
from e2kd.demo.results import interval, summarise

Row = dict[str, Any]
NAME = "frozen_quality"
BATCH, LEARNING_RATE = 50, 3e-3  # the peak of the one-cycle schedule
SEEDS, TUNING_SEEDS = range(3, 8), range(100, 102)
TEMPERATURES, WEIGHTS = (1.0, 4.0), (1.0, 5.0, 10.0, 25.0, 50.0)
WORK = Path(tempfile.gettempdir()) / "e2kd-frozen-quality"


class Arm(Enum):
    """What a student is trained with. The value is its name in the JSON."""

    CROSS_ENTROPY = "cross_entropy"
    KD = "kd"
    E2KD = "e2kd"
    FROZEN_KD = "frozen_kd"
    FROZEN_E2KD = "frozen_e2kd"


NAMES = {
    "cross_entropy": "cross-entropy, no teacher", "kd": "live KD", "e2kd": "live e²KD", "frozen_kd": "frozen KD",
    "frozen_e2kd": "frozen e²KD",
}  # fmt: skip
FROZEN, EXPLAINED = (Arm.FROZEN_KD, Arm.FROZEN_E2KD), (Arm.E2KD, Arm.FROZEN_E2KD)


@dataclass(frozen=True)
class Settings:
    """The budget, the same in every arm."""

    per_class: int = 50
    epochs: int = 100
    teacher_epochs: int = 3
    validation_per_class: int = 200
    test_per_class: int = 500


@dataclass(frozen=True)
class Data:
    """The teacher, what students may draw their images from, and what they are measured on."""

    teacher: nn.Module
    pool: Images
    validation: Images
    test: Images


def load(settings: Settings, work: Path) -> Data:
    """Decodes the images and fine-tunes the teacher, unless that was done."""
    pool = part(TRAIN, 0, -HELD_OUT)
    validation = part(TRAIN, -HELD_OUT, settings.validation_per_class - HELD_OUT)
    teacher = fine_tuned(work, pool, settings.teacher_epochs)
    return Data(teacher, pool, validation, part(TEST, 0, settings.test_per_class))


def criterion_of(
    arm: Arm, student: nn.Module, teacher: nn.Module | e2kd.FrozenTeacher, temperature: float, weight: float
) -> nn.Module:
    """The one line in which the arms differ."""
    if arm is Arm.CROSS_ENTROPY:
        return nn.CrossEntropyLoss()
    return e2kd.E2KDLoss(student, teacher, temperature=temperature, weight=weight if arm in EXPLAINED else 0.0)


def train(arm: Arm, seed: int, data: Data, settings: Settings, temperature: float, weight: float) -> nn.Module:
    """A student of one arm and seed.

    All arms take their images from the same reader and the same augmentation, so that a seed's draws are the same.
    """
    images = few(data.pool, settings.per_class, seed)
    with tempfile.TemporaryDirectory() as folder:
        pairs = TensorDataset(*images)
        frozen = e2kd.freeze(data.teacher, pairs, folder, normalization=NORMALIZATION, progress=False)
        assert frozen is not None
        pixels, lessons = default_collate(e2kd.FrozenDataset(pairs, frozen).__getitems__(list(range(len(pairs)))))
    torch.manual_seed(seed)
    student, augmentation = ResNet(3), e2kd.JointAugmentation(*operations())
    criterion = criterion_of(arm, student, frozen if arm in FROZEN else data.teacher, temperature, weight)
    plan = list(orders(len(pairs), BATCH, settings.epochs, seed))
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(plan))
    student.train()
    for batch in plan:
        augmented, taught = augmentation(pixels[batch], e2kd.Taught(*(field[batch] for field in lessons)))
        loss = criterion(student(normalized(augmented)), taught if arm in FROZEN else taught.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if isinstance(criterion, e2kd.E2KDLoss):
        criterion.remove()
    return student.eval()


def measured(student: nn.Module, images: Images, taught: Tensor) -> Row:
    """Accuracy, and agreement with the teacher's top classes [N], as shares."""
    found = predictions(student, images.pixels)
    return {
        "accuracy": (found == images.labels).double().mean().item(),
        "agreement": (found == taught).double().mean().item(),
    }


class Case(NamedTuple):
    """One student to train, and the images it is measured on: "validation" or "test"."""

    split: str
    arm: Arm
    seed: int
    temperature: float
    weight: float

    def key(self) -> Row:
        """What tells its row from others: settings that its arm does not have are None."""
        return {
            "split": self.split,
            "arm": self.arm.value,
            "seed": self.seed,
            "temperature": None if self.arm is Arm.CROSS_ENTROPY else self.temperature,
            "weight": self.weight if self.arm in EXPLAINED else None,
        }


class Study:
    """All rows so far; new ones are written at once. Students are trained in `jobs` processes."""

    def __init__(
        self, data: Data, settings: Settings, rows: list[Row], write: Callable[[list[Row]], object], jobs: int
    ) -> None:
        self.data, self.settings, self.rows, self.write, self.jobs = data, settings, rows, write, jobs
        self.taught = {name: predictions(data.teacher, self.images(name).pixels) for name in ("validation", "test")}

    def images(self, split: str) -> Images:
        """What a split's students are measured on."""
        return self.data.test if split == "test" else self.data.validation

    def found(self, case: Case) -> Row | None:
        """A student's row, if it is there."""
        key = case.key()
        return next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)

    def trained(self, case: Case) -> Row:
        """A student's row, by training it."""
        torch.set_num_threads(1)
        begun = time.perf_counter()
        student = train(case.arm, case.seed, self.data, self.settings, case.temperature, case.weight)
        seconds = round(time.perf_counter() - begun, 1)
        return case.key() | measured(student, self.images(case.split), self.taught[case.split]) | {"seconds": seconds}

    def fill(self, cases: list[Case]) -> None:
        """Trains the students that have no row yet."""
        todo = [case for case in cases if self.found(case) is None]
        with ThreadPoolExecutor(self.jobs) as pool:
            for done in as_completed([pool.submit(self.in_process, case) for case in todo]):
                self.rows.append(done.result())
                self.write(self.rows)
                print(json.dumps(self.rows[-1]), flush=True)

    def in_process(self, case: Case) -> Row:
        """`trained` in a forked process, which shares the images and has random numbers of its own."""
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=lambda: there.send(self.trained(case)))
        process.start()
        there.close()
        try:
            row: Row = here.recv()  # raises EOFError when the process died
        finally:
            process.join()
        return row

    def choices(self, arm: Arm, tuning_seeds: Sequence[int]) -> list[list[Case]]:
        """Every temperature and weight that an arm may have, each with the students by which it is judged."""
        temperatures = TEMPERATURES if arm is not Arm.CROSS_ENTROPY else TEMPERATURES[:1]
        weights = WEIGHTS if arm in EXPLAINED else (0.0,)
        pairs = itertools.product(temperatures, weights)
        return [[Case("validation", arm, seed, *pair) for seed in tuning_seeds] for pair in pairs]

    def best(self, choices: list[list[Case]]) -> Case:
        """The choice of the highest mean accuracy on validation images."""
        if len(choices) > 1:
            self.fill(list(itertools.chain(*choices)))
        return max(choices, key=self.mean_accuracy)[0]

    def mean_accuracy(self, cases: list[Case]) -> float:
        """Over the cases that have a row."""
        return summarise([row["accuracy"] for case in cases if (row := self.found(case))])["mean"] or 0.0

    def run(self, wanted: Sequence[Arm], seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
        """Chooses on validation images, then trains every wanted arm; the frozen ones first."""
        for frozen in (True, False):
            arms = [arm for arm in wanted if (arm in FROZEN) is frozen]
            best = {arm: self.best(self.choices(arm, tuning_seeds)) for arm in arms}
            pairs = itertools.product(seeds, arms)
            self.fill([best[arm]._replace(split="test", seed=seed) for seed, arm in pairs])

    def teacher(self) -> dict[str, float]:
        """The teacher's accuracy on both splits."""
        return {name: (self.taught[name] == self.images(name).labels).double().mean().item() for name in self.taught}


def values(rows: list[Row], arm: str, field: str) -> dict[int, float]:
    """A measure of an arm's students on the test images, by seed."""
    return {row["seed"]: row[field] for row in rows if row["split"] == "test" and row["arm"] == arm}


def differences(rows: list[Row], arm: str, base: str) -> Row:
    """Paired differences of the two measures: mean, sd, 95 % confidence interval, and each seed's."""
    found = {}
    for field in ("accuracy", "agreement"):
        first, second = values(rows, arm, field), values(rows, base, field)
        each = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
        found[field] = {**summarise(each), "interval": interval(each), "each": each}
    return found


def table(rows: list[Row], teacher: dict[str, float]) -> str:
    """Arms with their means, and the two paired comparisons, as Markdown."""
    body = [["teacher (ResNet-32)", f"{100 * teacher['test']:.1f}", None, None, None]]
    for arm in Arm:
        mine = [row for row in rows if row["split"] == "test" and row["arm"] == arm.value]
        if mine:
            cells = [_percent(list(values(rows, arm.value, field).values())) for field in ("accuracy", "agreement")]
            body.append([NAMES[arm.value], *cells, _plain(mine[0]["temperature"]), _plain(mine[0]["weight"])])
    return markdown_table(["CIFAR-10, 50 images per class", "accuracy", "agreement", "τ", "λ"], body)


def difference_line(rows: list[Row], arm: str, base: str) -> str:
    """The paired differences in points, in words."""
    said = []
    for field, found in differences(rows, arm, base).items():
        each = ", ".join(f"{100 * value:+.1f}" for value in found["each"])
        between = found["interval"]
        bounds = f", 95 % confidence {100 * between[0]:+.1f} to {100 * between[1]:+.1f}" if between else ""
        said.append(f"{field} {100 * found['mean']:+.1f} points ({each}{bounds})")
    return f"{NAMES[arm]} - {NAMES[base]}, same seed: {'; '.join(said)}."


def _percent(shares: list[float]) -> str:
    found = summarise([100 * share for share in shares])
    return f"{found['mean']:.1f}" + ("" if found["sd"] is None else f" ±{found['sd']:.1f}")


def _plain(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def earlier(settings: Settings) -> list[Row]:
    """The rows of a run that was stopped.

    Raises:
        SystemExit: when it was run with other settings.
    """
    path = RESULTS / f"{NAME}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != asdict(settings):
        raise SystemExit(f"{path} has rows with other settings, {found['settings']}: move it away, or pass --fresh.")
    rows: list[Row] = found["rows"]
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs; nothing written")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of the students")
    parser.add_argument("--arms", type=Arm, choices=list(Arm), nargs="+", default=list(Arm), metavar="ARM")
    parser.add_argument("--jobs", type=int, default=2, help="students trained at a time, on one core each")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the fine-tuned teacher")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        settings = Settings(per_class=10, epochs=2, teacher_epochs=0, validation_per_class=20, test_per_class=50)
        study = Study(load(settings, args.work), settings, [], lambda rows: None, args.jobs)
        study.run(args.arms, SEEDS[:1], TUNING_SEEDS[:1])
    else:
        settings = Settings(epochs=args.epochs)
        rows = [] if args.fresh else earlier(settings)
        command = " ".join(["python -m benchmarks.frozen_quality", *sys.argv[1:]])
        more = {"command": command, "settings": asdict(settings)}
        study = Study(load(settings, args.work), settings, rows, lambda rows: None, args.jobs)
        study.write = lambda rows: write_results(NAME, rows, **more, teacher=study.teacher())
        study.run(args.arms, SEEDS, TUNING_SEEDS)
    print(table(study.rows, study.teacher()))
    print(difference_line(study.rows, "frozen_e2kd", "frozen_kd"))


if __name__ == "__main__":
    main()
