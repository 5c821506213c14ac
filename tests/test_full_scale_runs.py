"""Full scale: what a run may go on from, and what its result holds, when things are not as they were."""

from __future__ import annotations

import json
import math
import multiprocessing
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import full_scale, full_scale_teaching
from benchmarks.full_scale_networks import network
from benchmarks.full_scale_random import Augmented
from benchmarks.full_scale_teaching import live_teacher, weights_of
from benchmarks.full_scale_training import Distillation, alike, distil
from e2kd import bcos
from e2kd.baselines import METHODS
from tests.full_scale_cases import Make, reset, run_on

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::e2kd.errors.NoEffectWarning"),  # networks of random weights
]


def teacher_file(path: Path, seed: int, classes: int = 2) -> Path:
    torch.manual_seed(seed)
    save_file(network("test_resnet", classes, None).state_dict(), path)
    return path


def test_checkpoints_of_other_settings_are_not_gone_on_with(folder: Make, tmp_path: Path) -> None:
    """Also where the result that would have told was moved away; what differs is named, as it was and as it is."""
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="e2kd")
    distil(run)
    other = replace(run, weight=7.0, recipe=replace(run.recipe, lr=0.5))

    def refused(said: str) -> None:
        reset()
        with pytest.raises(SystemExit, match=f"{said}.*Move the folder away, or name another --out"):
            distil(other)

    apart = "recipe.lr is 0.01 there but 0.5 here; weight is 1.0 there but 7.0 here"
    refused(f"result.json with other settings: {apart}")
    (tmp_path / "result.json").unlink()
    refused(f"checkpoints with other settings: {apart}")
    (tmp_path / "checkpoints" / "settings.json").unlink()
    refused("without the settings")
    shutil.rmtree(tmp_path / "checkpoints")
    reset()
    assert distil(other)["weight"] == 7.0


def test_checkpoints_of_another_teacher_are_not_gone_on_with(folder: Make, tmp_path: Path) -> None:
    """A file of the same name, but of other weights."""
    file = teacher_file(tmp_path / "teacher.safetensors", 1)
    run = run_on(folder("imagenet"), tmp_path / "out", "imagenet", arm="kd", teacher_checkpoint=file)
    distil(run)
    (tmp_path / "out" / "result.json").unlink()
    teacher_file(file, 2)
    reset()
    with pytest.raises(SystemExit, match="teacher is '"):
        distil(run)


def test_checkpoints_of_more_processes_are_not_gone_on_with(folder: Make, tmp_path: Path) -> None:
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="cross_entropy")
    distil(run)
    (tmp_path / "result.json").unlink()
    settings = tmp_path / "checkpoints" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"processes": 2}))
    reset()
    with pytest.raises(SystemExit, match="processes is 2 there but 1 here"):
        distil(run)


def test_kds_term_has_a_weight(folder: Make, tmp_path: Path) -> None:
    """Of arms that have the term; it is a setting of the student."""
    words = ["--data", "plantvillage", "a folder", "--kd-weight", "0.5", "--arm"]
    weights = {
        arm: full_scale.run_of(full_scale.arguments([*words, arm])).settings()["kd_weight"]
        for arm in ("kd", "frozen_e2kd", "at", "dkd", "cross_entropy")
    }
    assert weights == {"kd": 0.5, "frozen_e2kd": 0.5, "at": 0.5, "dkd": None, "cross_entropy": None}
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="e2kd", kd_weight=0.5)
    assert Distillation(run).criterion.kd_weight == 0.5


def test_a_result_says_how_it_was_made(folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--data", "plantvillage", "a folder", "--workers", "3"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/full_scale.py", *words])
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="cross_entropy")
    distil(run)
    found = json.loads((tmp_path / "result.json").read_text())
    assert shlex.split(found["command"]) == ["python", "-m", "benchmarks.full_scale", *words]
    assert len(found["teacher"]) == 32


@pytest.mark.parametrize("shared_cache", [True, False])
def test_a_cache_of_another_teacher_or_size_teaches_nobody(folder: Make, tmp_path: Path, shared_cache: bool) -> None:
    """Whether it was named, or is what a first try left in the folder."""
    one, other = (teacher_file(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    cache = tmp_path / "cache" if shared_cache else None
    run = run_on(
        folder("imagenet"), tmp_path / "out", "imagenet", arm="frozen_kd", teacher_checkpoint=one, cache=cache,
        recipe={"batch": 256},
    )  # fmt: skip
    with pytest.raises(ValueError, match="smaller --batch"):
        distil(run)
    run = replace(run, recipe=replace(run.recipe, batch=4))
    for wrong, said in (
        (replace(run, teacher_checkpoint=other), "weights"),
        (replace(run, recipe=replace(run.recipe, size=96)), r"\[64, 64\] there but \[96, 96\] here"),
    ):
        reset()
        with pytest.raises(ValueError, match=f"another teacher.*{said}.*--cache"):
            distil(wrong)
    reset()
    distil(run)


def test_a_teacher_of_other_classes_is_noticed_first(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A maker's weights with the maker's head; nothing is frozen or trained before."""
    monkeypatch.setattr(full_scale_teaching, "network", lambda name, classes, *_, **__: network(name, 7, None))
    run = run_on(folder("imagenet"), tmp_path, "imagenet", arm="frozen_kd")
    with pytest.raises(ValueError, match=r"Expected the 2 classes .* teacher has 7\..*--teacher-checkpoint"):
        Distillation(run)
    assert not list(tmp_path.iterdir())


def test_labels_of_unrelated_images_are_not_read(folder: Make, tmp_path: Path) -> None:
    for arm in ("cross_entropy", "dkd"):
        run = run_on(folder("imagenet"), tmp_path, "imagenet", arm=arm, unrelated=folder("sun397"))
        with pytest.raises(ValueError, match=f"no labels of these classes, which {arm} reads"):
            Distillation(run)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recipe": {"warmup": 5, "epochs": 2}}, "warm-up of 5 epochs never ends in 2"),
        ({"recipe": {"batch": 10}, "accumulate": 3}, "--batch in 3 equal parts, but got 10"),
    ],
)
def test_budgets_that_do_not_fit(folder: Make, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Distillation(run_on(folder("imagenet"), tmp_path, "imagenet", arm="cross_entropy", **changed))


def test_a_student_that_diverged_is_no_result(folder: Make, tmp_path: Path) -> None:
    run = run_on(
        folder("plantvillage"), tmp_path, "plantvillage", arm="cross_entropy",
        recipe={"lr": 1e30, "clip": None, "epochs": 3},
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="diverged"):
        distil(run)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("clip", [1.0, None])
def test_gradients_are_unscaled_once(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None
) -> None:
    """A scaler of half precision refuses a second time."""
    recipe = {"clip": clip, "adaptive_clip": 0.01}
    made = Distillation(run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="cross_entropy", recipe=recipe))
    for parameter in made.parameters:
        parameter.grad = torch.ones_like(parameter)
    calls: list[Any] = []
    monkeypatch.setattr(made.accelerator, "unscale_gradients", lambda *_: calls.append(1))
    made._clip()
    assert calls == [1]


def test_batches_of_seeds_have_nothing_in_common(folder: Make, tmp_path: Path) -> None:
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="cross_entropy")
    orders = []
    for seed in (0, 1):
        made = Distillation(replace(run, seed=seed))
        for epoch in (0, 1, 2):
            made.loader.set_epoch(epoch)
            orders.append(tuple(index for batch in made.loader.batch_sampler for index in batch))
        reset()
    assert len(set(orders)) == 6


def test_augmentation_is_of_a_seed_an_epoch_and_an_image() -> None:
    class Drawn(Dataset[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(())

    first, again, other = (Augmented(Drawn(), seed) for seed in (0, 0, 1))
    state = torch.get_rng_state()
    found = [first[0], first[1], first[0]]
    assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[2] == again[0]
    assert len({float(value) for value in (*found, other[0])}) == 3
    loader = DataLoader(again, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        again.set_epoch(epoch)
        first.set_epoch(epoch)
        assert torch.equal(torch.cat(list(loader)), torch.stack([first[index] for index in range(3)]))


def _with_own_buffers(rank: int, store: str, answers: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 1)
    norm.num_batches_tracked.fill_(rank + 5)
    alike(SimpleNamespace(num_processes=2), norm)  # type: ignore[arg-type]
    answers.put((rank, norm.running_mean.tolist(), int(norm.num_batches_tracked)))


def test_processes_measure_one_student(tmp_path: Path) -> None:
    """Each has BatchNorm's statistics of its own images until then."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_with_own_buffers, args=(rank, str(tmp_path / "store"), answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(answers.get() for _ in processes) == [(0, [1.0, 1.0], 5), (1, [1.0, 1.0], 5)]


def test_the_bias_of_an_official_network_is_told(folder: Make, tmp_path: Path) -> None:
    """Its file does not hold it: sigmoids, of several classes, are others, softmaxes are not; a cache knows."""
    torch.manual_seed(0)
    model, theirs = bcos.resnet20(20), math.log(0.001 / 0.999)
    torch.save(
        {"model": {f"0.{key}": value for key, value in model.state_dict().items()}, "F-Score": 0.8},
        tmp_path / "epg.pth",
    )
    words = ["--data", "voc", str(folder("voc")), "--preset", "voc-bcos", "--teacher-logit-bias", str(theirs)]
    run = full_scale.run_of(full_scale.arguments([*words, "--teacher-checkpoint", str(tmp_path / "epg.pth")]))
    assert run.settings()["teacher_logit_bias"] == theirs
    student, images = nn.Conv2d(3, 20, 1), torch.rand(2, 3, 32, 32)
    told, untold = (
        live_teacher(replace(run, teacher_logit_bias=bias), student, 20, torch.device("cpu")) for bias in (theirs, None)
    )
    assert told is not None
    assert untold is not None
    apart = told.logits(images) - untold.logits(images)
    torch.testing.assert_close(apart, torch.full_like(apart, theirs + math.log(19)))
    assert weights_of(told) != weights_of(untold)
    with pytest.raises(ValueError, match="official"):
        network("test_resnet", 2, None, logit_bias=0.0)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("kd", {"temperature": 2.0, "weight": None, "fraction": None}),
        ("at", {"temperature": 2.0, "weight": 3.0, "fraction": None}),
        ("dkd", {"temperature": None, "weight": 3.0, "fraction": None}),
        ("crd_e2kd", {"temperature": 2.0, "weight": 3.0, "max_classes": None, "fraction": 0.5}),
        ("frozen_e2kd_all", {"temperature": 2.0, "weight": 3.0, "max_classes": 2, "fraction": 0.5}),
        ("cross_entropy", {"temperature": None, "weight": None, "fraction": None}),
    ],
)
def test_settings_are_those_that_an_arm_reads(tmp_path: Path, arm: str, expected: dict[str, Any]) -> None:
    run = run_on(tmp_path, tmp_path, "imagenet", arm=arm, temperature=2.0, weight=3.0, max_classes=2, fraction=0.5)
    assert {name: run.settings()[name] for name in expected} == expected


@pytest.mark.parametrize(("arm", "outer", "inner"), [("crd", 0.0, 3.0), ("crd_e2kd", 3.0, 1.0)])
def test_a_weight_is_e2kds_or_a_multiple_of_the_rivals(
    folder: Make, tmp_path: Path, arm: str, outer: float, inner: float
) -> None:
    made = Distillation(run_on(folder("plantvillage"), tmp_path, "plantvillage", arm=arm, weight=3.0))
    assert made.criterion.weight == outer
    own = METHODS["CRD"](network("test_resnet", 3, None), network("test_resnet", 3, None)).weight
    assert made.criterion.criterion.weight == pytest.approx(inner * own)
