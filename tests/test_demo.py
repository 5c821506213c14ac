"""The demo: its data, its measures, its report, and a tiny run from end to end."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Generator, Tensor, nn

import e2kd
from e2kd.demo import run as demo
from e2kd.demo.data import INK, SIDES, SIZE, Mode, Part, Scenes, all_digits, digits_of, make_scenes, painted, placed
from e2kd.demo.experiment import SeedRun, criterion_for, example_places, make_data, train_student
from e2kd.demo.extras import MissingExtra
from e2kd.demo.lessons import SHIFT, Lessons, frozen_lessons
from e2kd.demo.measure import Scores, evaluate, mean_and_missing, predictions, worst_group
from e2kd.demo.progress import Tracker
from e2kd.demo.report import COLUMNS, NAMES, difference_lines, rows
from e2kd.demo.results import interval, results_of, t95
from e2kd.demo.settings import EXPLAINED, FROZEN, PAIRS, Arm, Settings
from e2kd.demo.show import typical
from e2kd.demo.textures import BLOBS, STRIPES, texture_heights
from e2kd.demo.train import batches, small_net, train

# maps of nets that have learnt nothing may be zero, which E2KDLoss rightly warns of
UNTRAINED = pytest.mark.filterwarnings("ignore::e2kd.errors.NoEffectWarning")
TINY = Settings(teacher_images=100, teacher_epochs=1, student_images=100, student_epochs=1, test_images=60)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def correlation(scenes: Scenes) -> float:
    return float(torch.corrcoef(torch.stack([scenes.labels, scenes.textures]).double())[0, 1])


# The data


def test_a_seed_fixes_the_scenes_and_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (make_scenes(Part.TRAIN, Mode.RANDOM, 30, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)
    assert torch.equal(before, torch.get_rng_state())


def test_scenes_have_the_promised_shapes_and_range() -> None:
    scenes = make_scenes(Part.TRAIN, Mode.RANDOM, 30, 0)
    assert scenes.images.shape == (30, 3, SIZE, SIZE)
    assert scenes.images.dtype == torch.float32
    assert scenes.masks.shape == (30, SIZE, SIZE)
    assert scenes.masks.dtype == torch.bool
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1


def test_the_label_says_whether_the_digit_is_5_or_more() -> None:
    scenes = make_scenes(Part.TEST, Mode.RANDOM, 100, 0)
    assert torch.equal(scenes.labels == 1, all_digits().classes[scenes.places] >= 5)


@pytest.mark.parametrize(("mode", "expected"), [(Mode.ALIGNED, 1.0), (Mode.REVERSED, -1.0)])
def test_texture_gives_the_label_away(mode: Mode, expected: float) -> None:
    assert correlation(make_scenes(Part.TRAIN, mode, 500, 0)) == pytest.approx(expected, abs=1e-12)


def test_texture_is_unrelated_to_the_label_in_the_teachers_data() -> None:
    assert abs(correlation(make_scenes(Part.TRAIN, Mode.RANDOM, 4000, 0))) < 3 / math.sqrt(4000)


def test_the_parts_share_no_digit_and_leave_none_out() -> None:
    places = torch.cat([digits_of(part).places for part in Part])
    assert torch.equal(places.sort().values, torch.arange(len(all_digits().classes)))


def test_the_sets_of_a_run_share_no_digit_between_training_and_measuring() -> None:
    for part in (Part.VALIDATION, Part.TEST):
        data = make_data(3, Settings(part=part))
        trained = set(torch.cat([data.unbiased.places, data.biased.places]).tolist())
        measured = set(torch.cat([data.aligned.places, data.reversed_.places]).tolist())
        assert not trained & measured
        assert measured == set(digits_of(part).places.tolist())


def test_digits_are_enlarged_within_bounds_and_lie_whole_on_the_canvas() -> None:
    """A digit that is ink all over covers a square whose side was drawn from SIDES, cut off nowhere."""
    masks = placed(torch.ones(300, 8, 8), seeded(0)) > 0.5
    width, height = masks.any(1).sum(1), masks.any(2).sum(1)
    assert width.min() >= SIDES[0] - 1
    assert width.max() <= SIDES[1] + 1
    assert (width - height).abs().max() <= 1
    assert (masks.flatten(1).sum(1) > 0.85 * width * height).all()
    assert width.float().std() > 1


def test_the_mask_is_where_the_digit_was_painted() -> None:
    textures = torch.arange(200) % 2
    coverage = placed(digits_of(Part.TEST).ink[:200], seeded(0))
    with_digit = painted(coverage, textures, seeded(1))
    without = painted(torch.zeros_like(coverage), textures, seeded(1))
    changed = (with_digit - without).abs().amax(1)
    assert not changed[coverage == 0].any()
    mask = coverage > INK
    assert mask.flatten(1).any(1).all()
    assert (changed * mask).sum() / changed.sum() > 0.7  # the rest is the digits' soft edge


def test_every_texture_has_the_same_histogram() -> None:
    heights = texture_heights(torch.arange(40) % 2, SIZE, seeded(0)).flatten(1).sort(1).values
    assert torch.equal(heights, heights[:1].expand_as(heights))


def test_colours_tell_nothing_about_the_texture() -> None:
    scenes = make_scenes(Part.TRAIN, Mode.RANDOM, 4000, 0)
    for statistic in (scenes.images.mean((2, 3)), scenes.images.std((2, 3))):
        stripes, blobs = (statistic[scenes.textures == texture] for texture in (STRIPES, BLOBS))
        error = (stripes.var(0) / len(stripes) + blobs.var(0) / len(blobs)).sqrt()
        assert ((stripes.mean(0) - blobs.mean(0)).abs() < 3.5 * error).all()


def coherence(heights: Tensor) -> Tensor:
    """How far an image [N, h, w] is made of one direction, in [0, 1]: from its structure tensor."""
    across, down = (heights - heights.roll(1, dim) for dim in (2, 1))
    inner = (slice(None), slice(1, None), slice(1, None))
    xx, yy, xy = ((a[inner] * b[inner]).mean((1, 2)) for a, b in ((across, across), (down, down), (across, down)))
    return ((xx - yy) ** 2 + 4 * xy**2).sqrt() / (xx + yy)


def test_direction_tells_the_textures_apart() -> None:
    stripes, blobs = (coherence(texture_heights(torch.full((200,), t), SIZE, seeded(0))) for t in (STRIPES, BLOBS))
    assert stripes.quantile(0.1) > blobs.quantile(0.8)


# The measures


def test_zero_maps_are_left_out_and_counted() -> None:
    assert mean_and_missing(torch.tensor([0.5, math.nan, 1.0, math.nan])) == (0.75, 2)
    assert math.isnan(mean_and_missing(torch.tensor([math.nan]))[0])


def test_worst_group_is_the_lowest_of_class_times_texture() -> None:
    labels, textures = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    correct = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1]).bool()
    assert worst_group(correct, labels, textures) == 0.0
    assert worst_group(correct[:4], labels[:4], textures[:4]) == 0.5


def test_a_net_measured_against_itself() -> None:
    """Its own classes are the teacher's: full agreement, one EPG, and accuracies that are shares of its hits."""
    net = small_net(4, seed=0).eval()
    data = make_data(0, TINY)
    own = predictions(net, data.reversed_.images)
    scores = evaluate(net, data.aligned, data.reversed_, own)
    assert scores.ood_agreement == 1.0
    assert (scores.epg, scores.zero_maps) == (scores.epg_teacher_class, scores.zero_maps_teacher_class)
    assert scores.ood_accuracy == pytest.approx((own == data.reversed_.labels).float().mean().item())
    assert scores.worst_group_accuracy <= min(scores.id_accuracy, scores.ood_accuracy)
    assert evaluate(net, data.aligned, data.reversed_, 1 - own).ood_agreement == 0.0


# The training


def test_students_of_a_seed_are_paired() -> None:
    """One seed, one start and one order of batches; an epoch sees every image once."""
    before = torch.get_rng_state()
    first, again, other = (small_net(3, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert torch.equal(before, torch.get_rng_state())
    orders = [torch.cat(batches(100, epochs=2, seed=seed)) for seed in (5, 5, 6)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0][:100].sort().values, torch.arange(100))


@UNTRAINED
def test_the_arms_differ_in_the_criterion_only() -> None:
    teacher = small_net(4, seed=0)
    made = criterion_for(Arm.CROSS_ENTROPY, small_net(3, seed=1), teacher, Settings())
    assert isinstance(made, nn.CrossEntropyLoss)
    images, labels = torch.rand(4, 3, SIZE, SIZE, generator=seeded(0)), torch.tensor([0, 1, 0, 1])
    parts: dict[Arm, dict[str, Tensor]] = {}
    for arm, weight in ((Arm.KD, 0.0), (Arm.E2KD, 0.7)):
        student = small_net(3, seed=1)
        criterion = criterion_for(arm, student, teacher, Settings(weight=0.7))
        assert isinstance(criterion, e2kd.E2KDLoss)
        loss = criterion(student(images), labels)
        parts[arm] = dict(criterion.parts)
        rest = weight * parts[arm]["explanation"] if weight else torch.tensor(0.0)
        torch.testing.assert_close(loss.detach(), parts[arm]["kd"] + rest)
    torch.testing.assert_close(parts[Arm.KD]["kd"], parts[Arm.E2KD]["kd"])
    assert parts[Arm.E2KD]["explanation"] > 0


def test_training_learns() -> None:
    """A teacher on its own images: the loss falls, the net ends in eval mode, every step is reported."""
    scenes = make_scenes(Part.TRAIN, Mode.ALIGNED, 100, 0)
    net, losses, steps, plan = small_net(4, seed=0), [], [], batches(100, epochs=10, seed=0)

    def criterion(outputs: Tensor, labels: Tensor) -> Tensor:
        losses.append(nn.functional.cross_entropy(outputs, labels))
        return losses[-1]

    train(net, criterion, lambda batch: (scenes.images[batch], scenes.labels[batch]), plan, 0, lambda: steps.append(1))
    assert len(steps) == len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert not net.training


# The frozen teacher


class Silent:
    """A tracker that shows nothing."""

    @contextmanager
    def stage(self, name: str, steps: int, cost: float) -> Iterator[Callable[[], None]]:
        yield lambda: None


SILENT = cast(Tracker, Silent())


@pytest.fixture(scope="module")
def taught() -> Iterator[tuple[nn.Module, Lessons]]:
    """A teacher that has learnt a little, and its lessons on a hundred images."""
    scenes, teacher = make_scenes(Part.TRAIN, Mode.ALIGNED, 100, 0), small_net(8, seed=0)
    plan = batches(100, epochs=5, seed=0)
    train(teacher, nn.CrossEntropyLoss(), lambda b: (scenes.images[b], scenes.labels[b]), plan, 0, lambda: None)
    with frozen_lessons(teacher, scenes) as lessons:
        yield teacher, lessons


def test_a_frozen_lesson_is_what_the_teacher_says_of_the_image(taught: tuple[nn.Module, Lessons]) -> None:
    teacher, lessons = taught
    found = e2kd.explain(teacher, lessons.images)
    torch.testing.assert_close(lessons.taught.logits, found.logits, atol=2e-3, rtol=2e-3)
    assert torch.equal(lessons.taught.classes, found.classes)
    assert e2kd.cosine(lessons.taught.maps, found.maps)[found.maps.flatten(1).any(1)].min() > 1 - 1e-5


def test_all_students_of_a_seed_see_the_same_augmented_images(taught: tuple[nn.Module, Lessons]) -> None:
    """Live or frozen: one draw; what is frozen moves with its image and is known where that was not cut off."""
    _, lessons = taught
    batch, seen = torch.arange(50), []
    for frozen in (True, False, True):
        feed = lessons.feed(frozen=frozen)
        torch.manual_seed(3)
        seen += [feed(batch), feed(batch)]
    assert torch.equal(seen[0][0], seen[2][0])
    assert torch.equal(seen[1][0], seen[3][0])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[2][1], lessons.taught.labels[:50])
    known = seen[0][1]
    assert torch.equal(known.labels, lessons.taught.labels[:50])
    assert torch.equal(known.logits, lessons.taught.logits[:50])
    assert (known.valid.mean((1, 2, 3)) >= (1 - SHIFT) ** 2 - 1e-6).all()
    moved = (known.valid.mean((1, 2, 3)) < 1).float().mean()
    assert 0.2 < moved < 0.8
    assert all(torch.equal(a, b) for a, b in zip(known, seen[4][1], strict=True))


def test_a_frozen_student_never_asks_the_teacher(taught: tuple[nn.Module, Lessons]) -> None:
    _, lessons = taught

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher was asked")

    teacher = small_net(8, seed=0)
    teacher.register_forward_pre_hook(refuse)
    settings = Settings(student_images=100, student_epochs=1)
    trained = {arm: train_student(arm, 0, lessons, teacher, settings, SILENT).state_dict() for arm in FROZEN}
    kd, e2kd_ = (trained[arm]["head.weight"] for arm in FROZEN)
    assert not torch.equal(kd, e2kd_)
    with pytest.raises(ValueError, match="the teacher was asked"):
        train_student(Arm.KD, 0, lessons, teacher, settings, SILENT)


def test_what_is_compared_differs_in_the_explanation_alone() -> None:
    assert all((arm in EXPLAINED) and (base not in EXPLAINED) for arm, base in PAIRS)
    assert all((arm in FROZEN) == (base in FROZEN) for arm, base in PAIRS)


# The report


def fake_runs() -> list[SeedRun]:
    """Two seeds of scores that are all different, one EPG missing in the second."""
    runs: list[SeedRun] = []
    for seed in (0, 1):
        scores = {}
        for k, arm in enumerate(Arm):
            shares = [0.05 + 0.11 * k + 0.013 * n + 0.07 * seed * (1 + k % 2) for n in range(6)]
            scores[arm] = Scores(*shares, 0, 7)
        if seed:
            scores[Arm.KD] = scores[Arm.KD]._replace(epg=math.nan)
        runs.append(SeedRun(seed, scores, dict.fromkeys(Arm, 1.5), 0.5, {}, None))  # type: ignore[arg-type]
    return runs


@pytest.fixture(scope="module")
def fake_results() -> dict[str, Any]:
    found = results_of(fake_runs(), Settings(), "e2kd demo", 3.0)
    read: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return read


def test_the_tables_numbers_are_the_jsons(fake_results: dict[str, Any]) -> None:
    body = {row[0]: row[1:] for row in rows(fake_results)}
    for arm in Arm:
        for column, cell in zip(COLUMNS, body[NAMES[arm.value]], strict=True):
            if (arm, column.field) == (Arm.TEACHER, "ood_agreement"):
                assert cell == ""
                continue
            each = [seed["scores"][arm.value][column.field] for seed in fake_results["seeds"]]
            known = [(100 if column.percent else 1) * value for value in each if value is not None]
            spread = [statistics.stdev(known)] if len(known) > 1 else []
            shown = [float(number) for number in cell.split(" ±")]
            assert shown == pytest.approx([statistics.mean(known), *spread], abs=0.051 if column.percent else 0.0051)


def test_differences_are_paired_by_seed(fake_results: dict[str, Any]) -> None:
    seeds = fake_results["seeds"]
    for (arm, base), line in zip(PAIRS, difference_lines(fake_results), strict=True):
        found = fake_results[f"{arm.value}_minus_{base.value}"]["ood_accuracy"]
        pairs = [tuple(seed["scores"][a.value]["ood_accuracy"] for a in (arm, base)) for seed in seeds]
        expected = [first - second for first, second in pairs]
        assert expected[0] != pytest.approx(expected[1])
        assert found["each"] == pytest.approx(expected)
        assert found["mean"] == pytest.approx(statistics.mean(expected))
        assert found["interval"] == pytest.approx(interval(expected))
        assert NAMES[arm.value] in line
        assert f"OOD accuracy {100 * found['mean']:+.1f} points" in line
    assert fake_results["e2kd_minus_kd"]["epg"]["each"][1] is None


def test_the_confidence_interval_is_students() -> None:
    """Against a table of t: 2.776 for five values, and none for one value or none."""
    reach = 2.776 * statistics.stdev([1, 2, 3, 4, 9]) / math.sqrt(5)
    assert interval([1.0, 2.0, 3.0, None, 4.0, 9.0]) == pytest.approx([3.8 - reach, 3.8 + reach])
    assert interval([1.0]) is None
    assert interval([None, None]) is None


def test_quantiles_are_those_of_a_table_of_t() -> None:
    known = {1: 12.706, 4: 2.776, 9: 2.262, 10: 2.228, 11: 2.201, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000}
    assert {degrees: round(t95(degrees), 3) for degrees in known} == known
    reach = 2.228 * statistics.stdev(range(11)) / math.sqrt(11)
    assert interval([*range(11)]) == pytest.approx([5 - reach, 5 + reach], rel=1e-3)


def test_the_figure_shows_the_median_seed() -> None:
    runs = [*fake_runs(), *fake_runs()[:1]]
    for run, gain in zip(runs, (0.3, 0.1, 0.2), strict=True):
        run.scores[Arm.E2KD] = run.scores[Arm.E2KD]._replace(ood_accuracy=run.scores[Arm.KD].ood_accuracy + gain)
    assert typical(runs) is runs[2]
    assert typical(runs[:2]) is runs[1]


def test_the_figures_images_are_the_first_of_each_class_that_the_teacher_gets_right() -> None:
    labels, taught = torch.tensor([1, 0] * 10), torch.tensor([0, 1] + [1, 0] * 9)
    assert example_places(labels, taught).tolist() == [3, 5, 7, 9, 2, 4, 6, 8]
    assert example_places(labels[:6], taught[:6]).tolist() == [3, 5, 1, 2, 4, 0]


# The command


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--seeds", "two"], ["--split", "train"]])
def test_bad_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(words)
    assert words[0] in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r'^the demo needs matplotlib: pip install "e2kd\[demo\]"$'):
        demo.run(out=tmp_path)
    assert not list(tmp_path.iterdir())


@UNTRAINED
def test_a_tiny_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    threads, out = torch.get_num_threads(), tmp_path / "new" / "folder"
    assert demo.main(parsed(["--quick", "--seeds", "2", "--out", str(out), "--split", "validation"])) == 0
    results = json.loads((out / "demo.json").read_text())
    compared = {"e2kd_minus_kd", "frozen_e2kd_minus_frozen_kd"}
    assert set(results) == {"command", "settings", "versions", "seconds", "seeds", "summary"} | compared
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
    assert all(set(scores) == set(Scores._fields) for seed in results["seeds"] for scores in seed["scores"].values())
    assert set(results["summary"]) == {arm.value for arm in Arm}
    assert results["settings"]["part"] == "validation"
    assert set(results["versions"]) == {"e2kd", "torch", "python", "platform", "threads"}
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(cell in printed for row in rows(results) for cell in row)
    assert str(out / "demo.png") in printed
    again = parsed(shlex.split(results["command"])[2:])
    assert (again.seeds, again.quick, again.split, again.out) == (2, True, "validation", out)
    assert (again.weight, again.frozen_weight, again.temperature) == (1.0, 5.0, 2.0)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_the_quick_demo_shows_e2kd_ahead(tmp_path: Path) -> None:
    results = demo.run(quick=True, out=tmp_path, part=Part.VALIDATION)
    for pair in ("e2kd_minus_kd", "frozen_e2kd_minus_frozen_kd"):
        gained = results[pair]
        assert gained["ood_accuracy"]["mean"] > 0.1
        assert gained["ood_agreement"]["mean"] > 0.1
