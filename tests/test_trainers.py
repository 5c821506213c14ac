"""timm's task and launcher, the Trainer's callback, Accelerate's parts: what they add to a host and what they leave."""

from __future__ import annotations

import argparse
import csv
import gc
import logging
import math
import re
import runpy
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.task
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from reference import CLASSES, Case, case, error, gradient, reference_step
from timm.task import DistillationTeacher, LogitDistillationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

import benchmarks.timm_train
import e2kd
from benchmarks.hosts import cells, in_two_processes, row, start_two, works
from benchmarks.hosts_loops import HOSTS, Cell, network, saved_by_timm, write_images
from e2kd.commands.models import read_state
from e2kd.trainers.accelerate import Parts
from e2kd.trainers.averages import Averages
from e2kd.trainers.timm import E2KDTask, launching
from e2kd.trainers.timm.launching import (
    loaded_images,
    main,
    meet,
    own_arguments,
    parser,
    prefetches_lessons,
    script_arguments,
)
from e2kd.trainers.transformers import E2KDCallback, FrozenCollator

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::e2kd.NoEffectWarning")]
SCRIPT = benchmarks.timm_train.__file__


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# Means of the parts


def test_averages_are_means_over_the_training_calls_that_had_a_part() -> None:
    made = case("cnn")
    student = made.copy()
    criterion = e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss(), every=2)
    averages, seen = Averages(criterion), []
    for step in range(4):
        criterion(student(made.images + step), made.targets)
        seen.append(criterion.parts)
        with torch.no_grad():
            criterion(student.eval()(made.images), made.targets)
        student.train()
    found = averages.take()
    for name in ("task", "kd", "explanation", "agreement"):
        assert found[name] == pytest.approx(sum(float(parts[name]) for parts in seen) / 4, rel=1e-6)
    assert found["cosine"] == pytest.approx(sum(float(seen[step]["cosine"]) for step in (0, 2)) / 2, rel=1e-6)
    assert averages.take() == {}


@pytest.mark.parametrize("order", ["AT", "e2kd(AT)", "AT(e2kd)", "e2kd(DKD(AT))"])
def test_averages_have_the_terms_of_every_method(order: str) -> None:
    made = case("cnn")
    student, criterion = made.copy(), nn.CrossEntropyLoss()
    makers = {"AT": e2kd.baselines.AT, "DKD": e2kd.baselines.DKD, "e2kd": e2kd.E2KDLoss}
    for name in reversed(order.replace(")", "").split("(")):
        criterion = makers[name](student, made.teacher, criterion)
    averages, seen = Averages(criterion), []
    for step in range(3):
        criterion(student(made.images + step), made.targets)
        seen.append(criterion.parts)
    with torch.no_grad():
        criterion(student(made.images), made.targets)
    found = averages.take()
    assert found.keys() == seen[0].keys() - {"loss"}
    for name, value in found.items():
        assert value == pytest.approx(sum(float(parts[name]) for parts in seen) / 3, rel=1e-5)
    averages.resume(7)
    assert averages.step == (7 if "e2kd" in order else 0)


def test_averages_of_a_wrapped_criterion_are_those_of_what_it_holds() -> None:
    made = case("cnn")
    student = made.copy()
    criterion = e2kd.E2KDLoss(student, made.teacher, e2kd.baselines.FitNets(student, made.teacher))
    wrapped = nn.DataParallel(criterion)
    averages = Averages(wrapped)
    wrapped(student(made.images), made.targets)
    assert averages.take()["hint"] == pytest.approx(float(criterion.parts["hint"]))


def test_averages_of_another_criterion_are_refused() -> None:
    with pytest.raises(TypeError, match="around any other criterion, but got CrossEntropyLoss"):
        Averages(nn.CrossEntropyLoss())


def test_a_method_inside_that_is_not_asked_has_no_average() -> None:
    made = case("cnn")
    student = made.copy()
    criterion = e2kd.E2KDLoss(student, made.teacher, e2kd.baselines.AT(student, made.teacher), task_weight=0)
    averages = Averages(criterion)
    criterion(student(made.images), made.targets)
    assert "at" in averages.names
    assert "at" not in averages.take()


def test_averages_show_a_nan_of_the_training() -> None:
    made = case("cnn")
    student = made.copy()
    criterion = e2kd.E2KDLoss(student, made.teacher, lambda outputs, targets: outputs.sum() * torch.nan)
    averages = Averages(criterion)
    criterion(student(made.images), made.targets)
    assert math.isnan(averages.take()["task"])


def test_parts_are_those_of_the_call_whatever_the_trainer_does_to_the_loss() -> None:
    made = case("cnn")
    student = made.copy()
    criterion = e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss())
    loss = criterion(student(made.images), made.targets)
    before = float(loss)
    loss /= 4
    assert float(criterion.parts["loss"]) == before


# Ways to train


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_resumed_run_is_the_uninterrupted_one(host: str, bf16: bool, tmp_path: Path) -> None:
    found = row(Cell(host, bf16), tmp_path)
    assert works(found), found


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_a_resumed_run_of_a_compiled_student_is_the_uninterrupted_one(host: str, tmp_path: Path) -> None:
    found = row(Cell(host, backend="aot_eager"), tmp_path)
    assert works(found), found


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(tmp_path: Path) -> None:
    for found in in_two_processes(cells(quick=True), tmp_path):
        assert works(found), found


@pytest.mark.slow
def test_a_run_whose_process_was_killed_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("killed_worker.py"))
    codes = start_two([worker, "train", str(tmp_path)])
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL), "the other process notices; gloo's threads may abort as it ends"
    assert not (tmp_path / "killed" / "done").exists()
    assert start_two([worker, "resume", str(tmp_path)]) == [0, 0]
    assert (tmp_path / "equal").exists()


TRAININGS = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from torch import nn
from benchmarks.hosts_loops import meet_anew

left_over = []
for training in range(4):
    if os.environ["RANK"] == str(training % 2):
        time.sleep(0.5)
    meet_anew(Path(sys.argv[1]) / str(training))
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    left_over.append(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_process_groups_after_one_another_have_stores_of_their_own(tmp_path: Path) -> None:
    """Whichever process is late, and whatever is left of the last training; with one store for all this hangs."""
    assert start_two(["-c", TRAININGS, str(tmp_path)]) == [0, 0]


# timm's task


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_task_gives_the_reference_step_and_its_parts(name: str) -> None:
    made = case(name)
    loss, wanted = reference_step(made.copy(), made)
    student = made.copy()
    result = E2KDTask(student, made.teacher, nn.CrossEntropyLoss(), verbose=False).train()(made.images, made.targets)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"].detach(), loss, rtol=1e-5, atol=0)
    assert error(gradient(student), wanted) < 1e-5
    total = result["task_loss"] + result["kd_loss"] + result["explanation_loss"]
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=0)
    assert result["output"].shape == (4, CLASSES)


@pytest.mark.parametrize("task", [None, 0.3])
@pytest.mark.parametrize("distill", [None, 2.0])
def test_task_without_explanations_is_timms_logit_distillation(task: float | None, distill: float | None) -> None:
    made = case("cnn")
    made.teacher.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)  # its own normalisation counts
    settings: dict[str, Any] = {"task_loss_weight": task, "distill_loss_weight": distill, "temperature": 3.0}
    found, wanted = [], []
    for kind, results, more in (
        (LogitDistillationTask, wanted, {}),
        (E2KDTask, found, {"explanation_loss_weight": 0.0}),
    ):
        student = made.copy()
        step = kind(student, made.teacher, nn.CrossEntropyLoss(), verbose=False, **settings, **more).train()
        made.teacher.eval()  # timm's task in 1.0.27 trains its teacher's BatchNorm
        result = step(made.images, made.targets)
        result["loss"].backward()
        results += [
            result["loss"].detach(),
            result["kd_loss"].detach(),
            result["task_loss"].detach(),
            gradient(student),
        ]
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-5


def test_task_takes_a_named_teacher_with_a_checkpoint_and_leaves_random_numbers_alone(tmp_path: Path) -> None:
    made = case("cnn")
    state = made.teacher.state_dict()
    blank = {name: torch.zeros_like(value) for name, value in state.items()}
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    saved = {"state_dict": blank, "state_dict_ema": compiled, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(saved, tmp_path / "last.pth.tar")
    before = torch.get_rng_state()
    task = E2KDTask(made.copy(), "test_resnet", teacher_pretrained_path=tmp_path / "last.pth.tar", verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
    teacher = task.averages.criterion.teacher.model
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert all(key.startswith("trainable_module.") for key in task.state_dict())
    task.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64


def test_checkpoints_that_hold_code_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": runpy.run_path}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_state(tmp_path / "evil.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_state(tmp_path / "nothing.pth")


def test_task_takes_timms_teacher_and_refuses_other_losses() -> None:
    made = case("cnn")
    teacher = DistillationTeacher(made.teacher)
    assert E2KDTask(made.copy(), teacher, verbose=False).averages.criterion.teacher.model is made.teacher
    with pytest.raises(ValueError, match="loss_type"):
        E2KDTask(made.copy(), made.teacher, loss_type="mse")


def test_task_state_lets_a_resumed_run_explain_the_samples_it_would_have() -> None:
    made = case("cnn")
    whole = E2KDTask(made.copy(), made.teacher, nn.CrossEntropyLoss(), fraction=0.5, verbose=False).train()
    values = [float(whole(made.images, made.targets)["explanation_loss"]) for _ in range(4)]
    resumed = E2KDTask(made.copy(), made.teacher, nn.CrossEntropyLoss(), fraction=0.5, verbose=False).train()
    resumed.load_task_state({"step": 2})
    resumed.averages.criterion.seed = whole.averages.criterion.seed
    assert [float(resumed(made.images, made.targets)["explanation_loss"]) for _ in range(2)] == values[2:]
    assert resumed.get_task_state() == whole.get_task_state() == {"step": 4}
    assert whole.get_task_state(ema=True) == {}


# timm's script


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the matrix as files, with a teacher's weights beside them."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "train")
    torch.save(network(2).state_dict(), folder / "teacher.pth")
    return folder


def words(photos: Path, out: Path, *more: str) -> list[str]:
    return ["--data-dir", str(photos / "train"), "--output", str(out), *more]


def live(photos: Path) -> list[str]:
    return ["--kd-model-name", "test_resnet", "--teacher-checkpoint", str(photos / "teacher.pth")]


def test_launcher_shows_the_parts_and_saves_the_student_alone(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = timm.task.LogitDistillationTask, timm.utils.update_summary, timm.utils.reduce_tensor, sys.argv
    with caplog.at_level(logging.INFO, logger="train"):
        main([SCRIPT, *words(photos, tmp_path, "--model-ema", "--clip-grad", "1"), *live(photos), "--e2kd-weight", "2"])
    lines = [record.getMessage() for record in caplog.records if record.name == "train"]
    assert lines
    assert all(re.search(r"Kd: \d.*Explanation: \d", line) for line in lines)
    with open(tmp_path / "summary.csv") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == 2
    for epoch in epochs:
        terms = (("train_task", 1), ("train_kd", 1), ("train_explanation", 2))
        total = sum(weight * float(epoch[name]) for name, weight in terms)
        assert total == pytest.approx(float(epoch["train_loss"]), rel=1e-4)
    saved = saved_by_timm(tmp_path / "last.pth.tar")
    assert saved.student.keys() == network(1).state_dict().keys()
    assert (timm.task.LogitDistillationTask, timm.utils.update_summary, timm.utils.reduce_tensor, sys.argv) == before
    assert not logging.getLogger("train").filters


def test_launcher_with_weights_of_zero_is_the_script_bit_by_bit(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--amp", "--drop", "0.3", "--model-ema", "--clip-grad", "1", "--grad-accum-steps", "2", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *words(photos, tmp_path / "plain", *options)])
    runpy.run_path(SCRIPT, run_name="__main__")
    zero = ["--e2kd-weight", "0", "--distill-loss-weight", "0"]
    main([SCRIPT, *words(photos, tmp_path / "zero", *options), *live(photos), *zero])
    plain, found = (saved_by_timm(tmp_path / name / "last.pth.tar") for name in ("plain", "zero"))
    assert plain.average is not None
    assert found.average is not None
    assert all(torch.equal(found.student[name], value) for name, value in plain.student.items())
    assert all(torch.equal(found.average[name], value) for name, value in plain.average.items())


@pytest.fixture(scope="module")
def cache(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    view = e2kd.CanonicalView((64, 64))
    e2kd.freeze(network(2), ImageFolder(str(photos / "train")), folder, view=view, workers=0, progress=False)
    return folder


def test_launcher_explains_all_classes_live_and_from_a_cache(photos: Path, tmp_path: Path) -> None:
    """Maps of a cache of all classes are taken as they are; live the command line says so."""
    options = ["--epochs", "1", *(["--no-prefetcher"] if not prefetches_lessons() else [])]
    signed = ["--e2kd-explainer", "cam", "--e2kd-classes", "all"]
    main([SCRIPT, *words(photos, tmp_path / "live", *options), *live(photos), *signed, "--e2kd-max-classes", "1"])
    view, images = e2kd.CanonicalView((64, 64)), ImageFolder(str(photos / "train"))
    every: dict[str, Any] = {"explainer": e2kd.CAM(), "classes": "all"}
    e2kd.freeze(network(2), images, tmp_path / "cache", view=view, progress=False, **every)
    main([SCRIPT, *words(photos, tmp_path / "frozen", *options), "--frozen-cache", str(tmp_path / "cache")])
    for name in ("live", "frozen"):
        with open(tmp_path / name / "summary.csv") as file:
            assert 0 < float(next(csv.DictReader(file))["train_explanation"]) < 2
    with pytest.raises(ValueError, match="Expected classes to be"):
        main([SCRIPT, *words(photos, tmp_path / "bad", *options), *live(photos), "--e2kd-classes", "some"])


def test_launcher_takes_its_lessons_from_a_cache(photos: Path, cache: Path, tmp_path: Path) -> None:
    options = ["--epochs", "1", *(["--no-prefetcher"] if not prefetches_lessons() else [])]
    main([SCRIPT, *words(photos, tmp_path, *options), "--frozen-cache", str(cache)])
    with open(tmp_path / "summary.csv") as file:
        epoch = next(csv.DictReader(file))
    assert float(epoch["train_explanation"]) > 0
    assert float(epoch["train_kd"]) > 0


@pytest.mark.parametrize(
    ("mine", "script", "sentence"),
    [
        ([], [], "Expected a teacher"),
        ([], ["--kd-model-name", "resnet18", "--kd-distill-type", "feature"], "'feature'"),
        (["--frozen-cache", "x"], ["--kd-model-name", "resnet18"], "leave --kd-model-name"),
        (["--frozen-cache", "x"], ["--mixup", "0.2", "--reprob", "0.1"], "leave --mixup, --reprob out"),
    ],
)
def test_launcher_refuses_what_would_not_be_what_was_asked(mine: list[str], script: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        script_arguments(parser().parse_args(["train.py", *mine]), script)


def test_launcher_reads_the_scripts_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("kd_model_name: resnet18\n")
    words = ["-c", str(tmp_path / "conf.yaml")]
    assert script_arguments(parser().parse_args(["train.py"]), words) == words
    frozen = parser().parse_args(["train.py", "--frozen-cache", "x"])
    with pytest.raises(SystemExit, match="leave --kd-model-name"):
        script_arguments(frozen, words)
    (tmp_path / "conf.yaml").write_text("mixup: 0.8\ncutmix_minmax: [0.2, 0.8]\nreprob: 0.0\nno_prefetcher: true\n")
    with pytest.raises(SystemExit, match="leave --mixup, --cutmix-minmax out"):
        script_arguments(frozen, words)
    found = script_arguments(
        frozen, [*words, "--mixup", "0", "--cutmix-minmax", "0"]
    )  # the command line has the last word
    assert found[-2:] == ["--kd-model-name", "frozen"]
    (tmp_path / "conf.yaml").write_text("")
    with pytest.raises(SystemExit, match="Expected a teacher"):
        script_arguments(parser().parse_args(["train.py"]), words)


def test_launcher_reads_its_own_options_from_the_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "conf.yaml"
    file.write_text(
        "kd_model_name: resnet18\nlr: 0.1\nscript: other.py\ne2kd_weight: 7.0\nteacher_checkpoint: t.pth\n"
        "e2kd-during: [-1, 9]\ne2kd_classes: 3\ne2kd_max_classes: 2\ne2kd_layer: null\n"
    )
    args, rest = own_arguments(["train.py", "-c", str(file), "--e2kd-classes", "labels", "--epochs", "3"])
    assert rest == ["-c", str(file), "--epochs", "3"]
    assert (args.script, args.e2kd_weight, args.teacher_checkpoint) == ("train.py", 7.0, Path("t.pth"))
    assert (args.e2kd_during, args.e2kd_classes, args.e2kd_layer, args.e2kd_every) == ([-1, 9], "labels", None, 1)
    of_file = own_arguments(["train.py", "-c", str(file)])[0]
    assert (of_file.e2kd_classes, of_file.e2kd_max_classes) == (3, 2)
    assert launching.settings(of_file)["max_classes"] == 2
    for wrong in ("e2kd_every: often", "e2kd_layer: [a, b]", "e2kd_explainer: nothing"):
        file.write_text(wrong)
        with pytest.raises(SystemExit):
            own_arguments(["train.py", "-c", str(file)])
        assert "e2kd.trainers.timm: error" in capsys.readouterr().err
    file.write_text("e2kd_wieght: 7.0")
    with pytest.raises(SystemExit, match=r"names e2kd_wieght, but e2kd's options are .*e2kd_weight"):
        own_arguments(["train.py", "-c", str(file)])


def test_launcher_says_when_a_script_distilled_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("import timm\n")
    with pytest.raises(SystemExit, match="nothing was distilled"):
        main([str(tmp_path / "other.py"), "--kd-model-name", "test_resnet"])


def test_launcher_trains_once_in_a_process_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process group of one store may wait for ever."""
    monkeypatch.setattr("e2kd.trainers.timm.launching._met", set())
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    meet()
    with pytest.raises(RuntimeError, match="Start `torchrun` once for each training"):
        main([SCRIPT, "--kd-model-name", "test_resnet"])
    monkeypatch.setenv("MASTER_PORT", "2")
    meet()
    monkeypatch.setenv("WORLD_SIZE", "1")
    meet()


def test_images_are_what_the_scripts_options_say(tmp_path: Path) -> None:
    student = timm.create_model("test_resnet")
    known = student.pretrained_cfg["mean"], student.pretrained_cfg["std"]
    (tmp_path / "run.yaml").write_text("std: [1.0, 1.0, 1.0]")
    for said, wanted in {
        (): {},
        ("--mean", "0.1"): {"input_normalization": ([0.1], known[1])},
        ("-c", str(tmp_path / "run.yaml")): {"input_normalization": (known[0], [1.0, 1.0, 1.0])},
    }.items():
        assert loaded_images(["--epochs", "1", *said], student) == wanted


# Hugging Face's Trainer


def hf_student() -> nn.Module:
    torch.manual_seed(1)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    config.num_labels = CLASSES
    model: nn.Module = hf.ResNetForImageClassification(config)
    return model


def hf_convnext() -> nn.Module:
    """Without BatchNorm a batch is the sum of its parts."""
    torch.manual_seed(1)
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24], depths=[1, 1, 1], num_stages=3, num_labels=CLASSES)
    model: nn.Module = hf.ConvNextForImageClassification(config)
    return model


def hf_trainer(made: Case, folder: Path, loss: Any, data: Any = None, **settings: Any) -> hf.Trainer:
    data = TensorDataset(made.images, made.targets) if data is None else data
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd"} | settings
    arguments = hf.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0,
        **{"save_strategy": "no", "logging_steps": 1} | settings,
    )  # fmt: skip
    student = getattr(loss, "student", None) or hf_student()
    return hf.Trainer(
        student, arguments, train_dataset=data, eval_dataset=TensorDataset(made.images, made.targets),
        compute_loss_func=loss, data_collator=FrozenCollator(),
    )  # fmt: skip


def test_callback_logs_the_parts_beside_the_loss(tmp_path: Path) -> None:
    made = case("cnn", batch=8)
    criterion = e2kd.E2KDLoss(hf_student(), made.teacher, nn.CrossEntropyLoss(), weight=2)
    trainer = hf_trainer(made, tmp_path, criterion, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(E2KDCallback(trainer))
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    parts = [entry for entry in history if "e2kd/kd" in entry]
    assert len(losses) == len(parts) == 2
    for loss, found in zip(losses, parts, strict=True):
        total = found["e2kd/task"] + found["e2kd/kd"] + 2 * found["e2kd/explanation"]
        assert total == pytest.approx(loss, rel=1e-4)
        assert "step" in found


def test_callback_wants_the_criterion(tmp_path: Path) -> None:
    made = case("cnn")
    with pytest.raises(TypeError, match="E2KDLoss"):
        E2KDCallback(hf_trainer(made, tmp_path, lambda outputs, labels, **_: outputs["logits"].sum()))


def test_trainer_with_weights_of_zero_is_the_trainer_bit_by_bit(tmp_path: Path) -> None:
    made = case("cnn", batch=8)
    plain = hf_trainer(made, tmp_path, None)
    zero = hf_trainer(
        made, tmp_path, e2kd.E2KDLoss(hf_student(), made.teacher, nn.CrossEntropyLoss(), weight=0, kd_weight=0)
    )
    states = []
    for trainer in (plain, zero):
        hf.set_seed(0)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_a_resumed_trainer_goes_on_where_it_was_in_an_epoch_of_odd_length(tmp_path: Path) -> None:
    """Four batches are accumulated as three and one."""
    made, students, steps = case("cnn", batch=8), [], []
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "save_strategy": "epoch"}
    for resume in (None, str(tmp_path / "checkpoint-2")):
        criterion = e2kd.E2KDLoss(hf_student(), made.teacher, nn.CrossEntropyLoss(), every=3)
        trainer = hf_trainer(made, tmp_path, criterion, max_steps=4, **settings)
        trainer.add_callback(E2KDCallback(trainer))
        trainer.train(resume_from_checkpoint=resume)
        steps.append(criterion.step)
        students.append(trainer.model.state_dict())
    assert steps == [8, 8]
    assert all(torch.equal(students[1][name], value) for name, value in students[0].items())


class KeepGradients(hf.TrainerCallback):
    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.found.append(gradient(model))


def test_lessons_of_a_cache_are_accumulated_to_the_gradient_of_all(tmp_path: Path) -> None:
    made = case("cnn", batch=8)
    data = TensorDataset(made.images, made.targets)
    frozen = e2kd.freeze(made.teacher, data, tmp_path / "cache", view=e2kd.CanonicalView((96, 96)), progress=False)
    gradients = []
    for accumulated in (1, 4):
        criterion = e2kd.E2KDLoss(hf_convnext(), frozen, nn.CrossEntropyLoss())
        size = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
        lessons = e2kd.FrozenDataset(data, frozen)
        trainer = hf_trainer(made, tmp_path, criterion, lessons, max_steps=1, learning_rate=0.0, **size)
        trainer.add_callback(keep := KeepGradients())
        trainer.train()
        gradients += keep.found
    assert len(gradients) == 2
    assert error(gradients[1], gradients[0]) < 1e-4


def images_alone(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([image for image, _ in samples])}


@pytest.mark.parametrize(("size", "parts"), [(2, 4), (4, 3)])
def test_batches_without_labels_are_accumulated_to_the_gradient_of_all(size: int, parts: int, tmp_path: Path) -> None:
    """An epoch's last step may have fewer batches than the others."""
    made, gradients, losses = case("cnn", batch=8), [], []
    for each, accumulated in ((8, 1), (size, parts)):
        settings = {"per_device_train_batch_size": each, "gradient_accumulation_steps": accumulated}
        criterion = e2kd.E2KDLoss(hf_convnext(), made.teacher)
        trainer = hf_trainer(made, tmp_path, criterion, max_steps=1, learning_rate=0.0, **settings)
        trainer.data_collator = images_alone
        trainer.add_callback(E2KDCallback(trainer))
        trainer.add_callback(keep := KeepGradients())
        trainer.train()
        gradients += keep.found
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(gradients) == len(losses) == 2
    assert error(gradients[1], gradients[0]) < 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 2, 3]), torch.eye(4, CLASSES)], ids=["indices", "multi_hot"])
def test_a_call_weighs_its_share_of_the_labels_that_hugging_face_counts(labels: Tensor) -> None:
    made = case("cnn")
    student = made.copy()
    loss = nn.BCEWithLogitsLoss() if labels.ndim == 2 else nn.CrossEntropyLoss()
    criterion = e2kd.E2KDLoss(student, made.teacher, loss)
    whole = criterion(student(made.images), labels)
    items = 3 * labels.ne(-100).sum()
    shared = criterion(student(made.images), labels, num_items_in_batch=items)
    assert float(shared) == pytest.approx(float(whole) / 3, rel=1e-5)
    around = e2kd.baselines.AT(student, made.teacher, criterion)
    with torch.no_grad():  # an evaluation of several processes, whose losses the Trainer adds up
        whole = loss(student.eval()(made.images), labels)
        for evaluated in (criterion, around):
            shared = evaluated(student(made.images), labels, num_items_in_batch=items)
            assert float(shared) == pytest.approx(float(whole) / 3, rel=1e-5)


def test_a_criterion_may_be_the_next_trainers(tmp_path: Path) -> None:
    """Nothing of the first stays on it, which would divide accumulated batches twice."""
    made, gradients, trainers = case("cnn", batch=8), [], []
    criterion = e2kd.E2KDLoss(hf_convnext(), made.teacher)
    for _ in range(2):
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
        trainer = hf_trainer(made, tmp_path, criterion, max_steps=1, **settings)
        trainer.data_collator = images_alone
        trainer.add_callback(E2KDCallback(trainer))
        trainer.add_callback(keep := KeepGradients())
        trainer.train()
        gradients += keep.found
        assert sum("e2kd/kd" in entry for entry in trainer.state.log_history) == 1
        trainers.append(weakref.ref(trainer))
        del trainer
    gc.collect()
    assert trainers[0]() is None
    assert error(gradients[1], gradients[0]) < 1e-4


def test_the_first_log_of_a_training_has_nothing_of_the_training_before(tmp_path: Path) -> None:
    made = case("cnn", batch=8)
    criterion = e2kd.E2KDLoss(hf_convnext(), made.teacher)
    trainer = hf_trainer(made, tmp_path, criterion, max_steps=3, logging_steps=2, learning_rate=0.0)
    trainer.add_callback(callback := E2KDCallback(trainer))
    trainer.train()
    assert callback.averages.sums is not None, "of the third step, which was not logged"
    callback.averages.sums += 1000
    trainer.train()
    logged = [entry["e2kd/kd"] for entry in trainer.state.log_history if "e2kd/kd" in entry]
    assert logged[-1] == pytest.approx(logged[0], rel=1e-4)


def test_a_method_alone_is_logged(tmp_path: Path) -> None:
    made = case("cnn", batch=8)
    trainer = hf_trainer(made, tmp_path, e2kd.baselines.DKD(hf_convnext(), made.teacher, nn.CrossEntropyLoss()))
    trainer.add_callback(E2KDCallback(trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "e2kd/dkd" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]


# Accelerate


class KeepLogs(GeneralTracker):
    name, requires_logging_directory = "keep", False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[dict[str, Any], int | None]] = []

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing to store."""

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append((values, step))


def test_parts_reach_the_trackers_as_numbers_and_survive_a_checkpoint(tmp_path: Path) -> None:
    made = case("cnn")
    student, tracker = made.copy(), KeepLogs()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    criterion = e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss(), fraction=0.5)
    model, parts = accelerator.prepare(student), Parts(accelerator, criterion)
    accelerator.register_for_checkpointing(parts)
    for _ in range(2):
        accelerator.backward(criterion(model(made.images), made.targets))
    parts.log(step=7)
    (values, step) = tracker.logged[-1]
    assert step == 7
    assert values["e2kd/explanation"] > 0
    assert all(type(value) is float for value in values.values())
    accelerator.save_state(str(tmp_path))
    criterion.step = 0
    accelerator.load_state(str(tmp_path))
    assert criterion.step == 2


def test_accelerate_with_weights_of_zero_is_the_loop_bit_by_bit() -> None:
    made = case("cnn", batch=8)
    states = []
    for distilled in (False, True):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        student = made.copy()
        optimizer = torch.optim.AdamW(student.parameters(), 0.01)
        loader = DataLoader(TensorDataset(made.images, made.targets), 2)
        model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
        criterion: nn.Module = nn.CrossEntropyLoss()
        if distilled:
            criterion = e2kd.E2KDLoss(model, made.teacher, criterion, weight=0, kd_weight=0)
        for images, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(images), targets))
                optimizer.step()
                optimizer.zero_grad()
        states.append(student.state_dict())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
