"""The UniCAM paper's studies on small networks: what each way of distilling hands over, and what a gap costs.

    python -m benchmarks.transfer_studies --data cifar10                 # half an hour on one core; can be resumed
    python -m benchmarks.transfer_studies --data catsdogs --epochs 12    # photographs of ASIRRA, a quarter of an hour
    python -m benchmarks.transfer_studies --quick                        # a minute, to see that it runs; writes nothing

Teacher: a ResNet-32 trained on CIFAR-10, for cats and dogs with the rows of these classes and fine-tuned on the photos.
Equal base: a ResNet-8 that learns from labels and from the teacher's answers (Hinton et al. 2015), attention maps
(Zagoruyko and Komodakis 2017) or features (Heo et al. 2019, "overhaul"), against the same network on labels alone.
Capacity gap: a ResNet-8 a quarter as wide, distilled by the teacher's answers or by those of the wider ResNet-8 that
was distilled from it (Mirzadeh et al. 2020), against itself on labels alone.

All arms of a seed have the same images, first weights and batches; "labels again" has others of the last two, and shows
what scores two networks have that differ by chance. Scores are those of whole test images, at every stage, and of what
UniCAM maps keep: against the base, the teacher and an untrained network, with one-hot labels.
Results: benchmarks/results/transfer_studies_DATA.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from benchmarks.cifar import NORMALIZATION, ResNet, normalized
from benchmarks.cifar_data import HELD_OUT, SHARED, TEST, TRAIN, few, part
from benchmarks.cifar_families import BLOCKS, STANDARD, trained_teacher
from benchmarks.common import RESULTS, command, environment, markdown_table, write_json
from benchmarks.distilling import STAGES, ByFeatures, Teaching, Way, by_answers, by_attention, outputs_of
from benchmarks.records import read_study
from e2kd.commands.photos import find_photos, read_photos
from e2kd.demo.results import interval, summarise
from e2kd.distance import DistanceSums, Score
from e2kd.transfer import Reading, UniCAMRegions, compare, layer_features, read, scores_of, untrained

Row = dict[str, Any]
BATCH, LEARNING_RATE, MOMENTUM, DECAY = 32, 0.1, 0.9, 5e-4
STUDENT, SMALL = 16, 4  # widths of the ResNet-8s
CAT, DOG = 3, 5  # among CIFAR-10's classes
WORK = Path(tempfile.gettempdir()) / "e2kd-transfer-studies"


@dataclass(frozen=True)
class Settings:
    """The budget, the same in every arm."""

    data: str = "cifar10"
    epochs: int = 30
    per_class: int = 100  # of CIFAR-10, to train on
    side: int = 32  # of the photographs, pixels
    teacher_epochs: int = 3  # on CIFAR-10
    photo_epochs: int = 10  # of the teacher on the photographs
    test_per_class: int = 500
    scored: int = 250  # test images that the scores are of


class Data(NamedTuple):
    """Images [N, 3, h, w] as the networks expect them and labels [N], and those held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Arm(NamedTuple):
    """A way to train one of the students."""

    study: str
    name: str
    width: int
    source: str = ""  # "teacher" or "assistant"; labels alone if empty
    by: str = "answers"
    shift: int = 0  # of the seed: other first weights and batches than the base's


EQUAL, GAP, BASE, AGAIN = "equal base", "capacity gap", "labels", "labels again"
ARMS = (
    Arm(EQUAL, BASE, STUDENT),
    Arm(EQUAL, AGAIN, STUDENT, shift=1000),
    Arm(EQUAL, "answers", STUDENT, "teacher"),
    Arm(EQUAL, "attention", STUDENT, "teacher", "attention"),
    Arm(EQUAL, "features", STUDENT, "teacher", "features"),
    Arm(GAP, BASE, SMALL),
    Arm(GAP, AGAIN, SMALL, shift=1000),
    Arm(GAP, "teacher", SMALL, "teacher"),
    Arm(GAP, "assistant", SMALL, "assistant"),
)


def resnet8(num_classes: int = 10, width: int = STUDENT, blocks: int = 1) -> ResNet:
    """A student of the studies as commands make it: `e2kd report --student benchmarks.transfer_studies:resnet8`."""
    model: Any = ResNet(blocks, width, num_classes)
    model.feature_info = [{"module": stage} for stage in STAGES]
    model.pretrained_cfg = {"input_size": (3, 32, 32)} | dict(zip(("mean", "std"), NORMALIZATION, strict=True))
    return cast(ResNet, model)


def resnet8_narrow(num_classes: int = 10) -> ResNet:
    """The student across the capacity gap."""
    return resnet8(num_classes, SMALL)


def resnet32(num_classes: int = 10) -> ResNet:
    """The teacher."""
    return resnet8(num_classes, blocks=BLOCKS)


def photographs(side: int) -> Data:
    """Cats and dogs at a side of so many pixels."""
    found: list[Tensor] = []
    for name in ("train", "val"):
        photos = find_photos(SHARED / "data" / "catsdogs1400" / name, 10_000)
        found += [normalized(read_photos(photos.paths, side)), torch.tensor(photos.labels)]
    return Data(*found)


def cifar10(settings: Settings, seed: int) -> Data:
    """A few images of each class, chosen by the seed, and the first of the test part."""
    train, test = few(part(TRAIN, 0, 1000), settings.per_class, seed), part(TEST, 0, settings.test_per_class)
    return Data(normalized(train.pixels), train.labels, normalized(test.pixels), test.labels)


def teacher_of(settings: Settings, work: Path, photos: Data | None) -> ResNet:
    """The ResNet-32 of CIFAR-10; for photographs fine-tuned on them, and kept."""
    pool = part(TRAIN, 0, -HELD_OUT) if settings.teacher_epochs else part(TRAIN, 0, 1)
    teacher = trained_teacher(STANDARD, work, pool, settings.teacher_epochs)
    assert isinstance(teacher, ResNet)
    if photos is None:
        return teacher
    own = ResNet(BLOCKS, classes=2)
    state = teacher.state_dict()
    own.load_state_dict(state | {name: state[name][[CAT, DOG]] for name in ("linear.weight", "linear.bias")})
    path = work / f"teacher-photos-{settings.side}-{settings.photo_epochs}.safetensors"
    return kept(path, own, lambda: train(own, photos, settings.photo_epochs, 0, rate=LEARNING_RATE / 10))


def kept(path: Path, model: ResNet, make: Callable[[], None]) -> ResNet:
    """A network in eval mode, from its file if it was trained before."""
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        make()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return model.to(memory_format=torch.contiguous_format).eval()


def train(
    model: ResNet,
    data: Data,
    epochs: int,
    seed: int,
    teaching: Teaching | None = None,
    way: Way | None = None,
    rate: float = LEARNING_RATE,
) -> None:
    """SGD with labels and, with a teacher, by one way of distilling, in place."""
    model.train().to(memory_format=torch.channels_last)
    extra = list(way.parameters()) if isinstance(way, ByFeatures) else []
    optimizer = torch.optim.SGD([*model.parameters(), *extra], rate, MOMENTUM, weight_decay=DECAY)
    steps = epochs * -(-len(data.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for rows, mirrored in batches(len(data.images), epochs, seed):
        images = torch.where(mirrored[:, None, None, None], data.images[rows].flip(3), data.images[rows])
        own = outputs_of(model, images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(own.logits, data.labels[rows])
        if teaching is not None and way is not None:
            loss = loss + way(own, teaching.of(rows, mirrored))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def batches(count: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Places of every batch, and which of its images are mirrored."""
    generator = Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            yield rows, torch.rand(len(rows), generator=generator) < 0.5


def folder_of(settings: Settings, work: Path) -> Path:
    """Where the students of a budget are kept."""
    return work / "-".join(str(value) for value in asdict(settings).values())


class Seed:
    """All networks of one seed; those that were trained before are loaded."""

    def __init__(self, seed: int, settings: Settings, work: Path, teacher: ResNet, photos: Data | None) -> None:
        self.seed, self.settings, self.teacher = seed, settings, teacher
        self.data = photos or cifar10(settings, seed)
        self.folder = folder_of(settings, work) / str(seed)
        self.teachings: dict[str, Teaching] = {}

    def teaching(self, source: str) -> Teaching:
        """The outputs of the teacher or of the assistant, who is the student distilled by answers."""
        if source not in self.teachings:
            model = self.teacher if source == "teacher" else self.network(ARMS[2])
            self.teachings[source] = Teaching(model, self.data.images)
        return self.teachings[source]

    def network(self, arm: Arm) -> ResNet:
        """The student of an arm."""
        seed = self.seed + arm.shift
        torch.manual_seed(seed)
        model = ResNet(1, arm.width, int(self.data.labels.max()) + 1)

        def make() -> None:
            teaching = self.teaching(arm.source) if arm.source else None
            torch.manual_seed(seed)  # of the mappings of features
            ways: dict[str, Way] = {"answers": by_answers, "attention": by_attention}
            way = ByFeatures(model, teaching) if teaching and arm.by == "features" else ways.get(arm.by)
            train(model, self.data, self.settings.epochs, seed, teaching, way)

        return kept(self.folder / f"{arm.study} {arm.name}.safetensors".replace(" ", "-"), model, make)

    def row(self, arm: Arm) -> Row:
        """What is reported of a student."""
        begun = time.perf_counter()
        base = self.network(next(each for each in ARMS if each.study == arm.study))
        student = self.network(arm)
        found: Row = {"study": arm.study, "arm": arm.name, "seed": self.seed}
        found |= answered(student, base, self.teacher, self.data)
        if arm.name != BASE:  # a base has nothing beyond itself
            found["scores"] = scored(student, base, self.teacher, self.data, self.settings.scored)
        return found | {"seconds": round(time.perf_counter() - begun, 1)}


@torch.no_grad()
def answered(student: ResNet, base: ResNet, teacher: ResNet, data: Data) -> Row:
    """Accuracy of the three, and the student's agreement with the teacher, as shares."""
    tops = [
        torch.cat([model(images).argmax(1) for images in data.test_images.split(250)])
        for model in (student, base, teacher)
    ]
    names = ("accuracy", "base_accuracy", "teacher_accuracy")
    shares = {name: _share(top == data.test_labels) for name, top in zip(names, tops, strict=True)}
    return shares | {"agreement": _share(tops[0] == tops[2])}


def _share(which: Tensor) -> float:
    return round(which.double().mean().item(), 4)


def scored(student: ResNet, base: ResNet, teacher: ResNet, data: Data, count: int) -> Row:
    """All scores of every stage, on test images of all classes alike."""
    rows = torch.linspace(0, len(data.test_images) - 1, min(count, len(data.test_images))).long()
    images, labels = data.test_images[rows], data.test_labels[rows]
    mine, other, taught, blank = (_read(model, images) for model in (student, base, teacher, untrained(student)))
    against_base, against_teacher = compare(mine, other, labels).layers, compare(mine, taught, labels).layers
    seen = layer_features(student, base, images, labels, STAGES, regions=UniCAMRegions(), batch_size=125)
    found: Row = {}
    for k, name in enumerate(STAGES):
        known = against_base[name].sums
        control = DistanceSums.of_distances(
            student=mine.layers[k].distances, control=blank.layers[k].distances, labels=_distances(labels)
        )
        found[name] = {
            **_kept("", scores_of(known)),
            **_kept("teacher_", scores_of(against_teacher[name].sums)),
            **_kept("regions_", scores_of(seen[name].sums)),
            **_kept("control_", {"fss": control.score("student", "control"), "rs": control.score("control", "labels")}),
            "regions_n": int(seen[name].rows.sum()),
            "chance": round(known.score("student", "base").chance, 4),
            "blank_distilled": _share(against_base[name].distilled.blank),
            "blank_residual": _share(against_base[name].residual.blank),
        }
    return found


def _read(model: ResNet, images: Tensor) -> Reading:
    return read(model, images, STAGES, batch_size=125)


def _distances(labels: Tensor) -> Tensor:
    return (labels[:, None] != labels).double()  # one-hot rows, up to scale


def _kept(prefix: str, scores: dict[str, Score]) -> Row:
    """Values and standard errors, or why there are none."""
    return {
        prefix + name: {"reason": s.reason} if s.reason else {"value": round(s.value, 4), "error": round(s.error, 4)}
        for name, s in scores.items()
    }


def missing(rows: list[Row], seed: int) -> list[Arm]:
    """Arms of a seed that have no row yet."""
    there = {(row["study"], row["arm"]) for row in rows if row["seed"] == seed}
    return [arm for arm in ARMS if (arm.study, arm.name) not in there]


COLUMNS = {
    "FSS base": "fss",
    "FSS teacher": "teacher_fss",
    "FSS untrained": "control_fss",
    "RS": "rs_student",
    "RS distilled": "rs_distilled",
    "RS residual": "rs_residual",
}


def table(rows: list[Row], stage: str = STAGES[-1]) -> str:
    """Means and deviations over the seeds: answers in percent, scores at a stage."""
    header = ["study", "distilled by", "accuracy", "to base", "agreement", *COLUMNS]
    return markdown_table(header, [_line(rows, arm, stage) for arm in ARMS if _rows_of(rows, arm)])


def _line(rows: list[Row], arm: Arm, stage: str) -> list[str]:
    """An arm's cells; of a base its own relevance is all there is."""
    own, others = _rows_of(rows, arm), [row for row in rows if row["study"] == arm.study]
    accuracy, agreement = (_percent([row[name] for row in own]) for name in ("accuracy", "agreement"))
    if arm.name == BASE:
        relevance = {row["seed"]: value_of(row, stage, "rs_base") for row in others if "scores" in row}
        scores = ["" if name != "rs_student" else _mean(list(relevance.values())) for name in COLUMNS.values()]
        return [arm.study, arm.name, accuracy, "", agreement, *scores]
    gains = _percent([row["accuracy"] - row["base_accuracy"] for row in own], "+")
    scores = [_mean([value_of(row, stage, name) for row in own]) for name in COLUMNS.values()]
    return [arm.study, arm.name, accuracy, gains, agreement, *scores]


def _rows_of(rows: list[Row], arm: Arm) -> list[Row]:
    return [row for row in rows if (row["study"], row["arm"]) == (arm.study, arm.name)]


def facts(rows: list[Row], stage: str = STAGES[-1]) -> list[str]:
    """What the table leaves out, in sentences."""
    scores = [row["scores"][stage] for row in rows if "scores" in row]
    untrained = {row["study"]: value_of(row, stage, "control_rs") for row in rows if "scores" in row}
    teacher = rows[0]["teacher_accuracy"]
    return [
        f"Teacher: {100 * teacher:.1f} %. Spread of a score by chance: {scores[0]['chance']:.3f}.",
        f"RS of an untrained network: {', '.join(f'{value:.3f} ({study})' for study, value in untrained.items())}.",
        f"RS distilled less that of *{AGAIN}*, same seed, with 95 % interval: {said(rows, 'rs_distilled', stage)}.",
    ]


def value_of(row: Row, stage: str, name: str) -> float | None:
    """A score of a row, None where there is none."""
    found: float | None = row.get("scores", {}).get(stage, {}).get(name, {}).get("value")
    return found


def _percent(shares: list[float], sign: str = "") -> str:
    found = summarise([100 * share for share in shares])
    return f"{found['mean']:{sign}.1f}" + ("" if found["sd"] is None else f" ±{found['sd']:.1f}")


def _mean(values: list[float | None]) -> str:
    found = summarise(values)
    return "" if found["mean"] is None else f"{found['mean']:.3f}" + (f" ±{found['sd']:.3f}" if found["sd"] else "")


def against_chance(rows: list[Row], name: str, stage: str = STAGES[-1]) -> dict[str, Row]:
    """By study and arm: how far a score is from that of "labels again", seed by seed; mean, 95 % interval, each."""
    found: dict[str, Row] = {}
    for arm in ARMS:
        if arm.name in (BASE, AGAIN):
            continue
        pairs = [_values(rows, arm.study, other, name, stage) for other in (arm.name, AGAIN)]
        each = [pairs[0][seed] - pairs[1][seed] for seed in sorted(pairs[0].keys() & pairs[1].keys())]
        found[f"{arm.study}, {arm.name}"] = {**summarise(each), "interval": interval(each), "each": each}
    return found


def _values(rows: list[Row], study: str, arm: str, name: str, stage: str) -> dict[int, float]:
    own = [row for row in rows if (row["study"], row["arm"]) == (study, arm)]
    return {row["seed"]: value for row in own if (value := value_of(row, stage, name)) is not None}


def said(rows: list[Row], name: str, stage: str = STAGES[-1]) -> str:
    """`against_chance` in words."""
    lines = []
    for who, found in against_chance(rows, name, stage).items():
        between = found["interval"]
        bounds = f" ({between[0]:+.3f} to {between[1]:+.3f})" if between else ""
        lines.append(f"{who} {found['mean']:+.3f}{bounds}")
    return "; ".join(lines)


def run(settings: Settings, seeds: int, work: Path, rows: list[Row], write: Callable[[list[Row]], object]) -> None:
    """Adds the rows that are missing."""
    photos = photographs(settings.side) if settings.data == "catsdogs" else None
    teacher = teacher_of(settings, work, photos)
    for number in range(seeds):
        arms = missing(rows, number)
        networks = Seed(number, settings, work, teacher, photos) if arms else None
        for arm in arms:
            assert networks is not None
            rows.append(networks.row(arm))
            write(rows)
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "scores"}), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("cifar10", "catsdogs"), default="cifar10")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch; nothing written")
    parser.add_argument("--fresh", action="store_true", help="forgets earlier rows, and networks that were kept")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of the students")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the trained networks")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.quick:
        settings = Settings(args.data, 1, 10, teacher_epochs=0, photo_epochs=1, test_per_class=10, scored=100)
        with tempfile.TemporaryDirectory() as folder:
            run(settings, 1, Path(folder), rows, lambda rows: None)
    else:
        settings = Settings(args.data, args.epochs)
        path = RESULTS / f"transfer_studies_{args.data}.json"
        if args.fresh:
            shutil.rmtree(folder_of(settings, args.work), ignore_errors=True)
        else:
            rows = read_study(path, asdict(settings)).get("rows", [])
        more = {
            "environment": environment(),
            "command": command(),
        }
        run(
            settings,
            args.seeds,
            args.work,
            rows,
            lambda rows: write_json(path, {**more, "settings": asdict(settings), "rows": rows}),
        )
    print(table(rows))
    print("\n".join(facts(rows)))


if __name__ == "__main__":
    main()
