"""Example scripts of other projects on real photographs, as they are or with the lines that the README names changed.

No package ships them: set E2KD_HOST_SCRIPTS to a folder with copies of timm's `train.py`, Accelerate's
`examples/cv_example.py` and `complete_cv_example.py`, and transformers' `run_image_classification.py` and
`run_image_classification_no_trainer.py`.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers as hf

from benchmarks.common import ROOT

pytestmark = pytest.mark.slow
EACH = 12  # photographs of a class
TEACHER = 'timm.create_model("test_resnet", num_classes={classes})'
CRITERION = f"e2kd.E2KDLoss(model, {TEACHER}, torch.nn.functional.cross_entropy)"
EVALUATE = '''
class load:
    """In the place of `evaluate`, which downloads its metrics."""
    def __init__(self, *_, **__): self.right = []
    def add_batch(self, predictions, references): self.right += (predictions == references).tolist()
    def compute(self, predictions=None, references=None):
        if predictions is not None: self.right = (predictions == references).tolist()
        return {"accuracy": sum(self.right) / len(self.right)}
'''
Changes = dict[str, str]
LOOP = {  # smaller, and Accelerate's two examples
    "num_workers=4": "num_workers=0",
    'create_model("resnet50d", pretrained=True': 'create_model("test_resnet", pretrained=False',
    '"num_epochs": 3': '"num_epochs": 1',
    '"batch_size": 64, "image_size": 224': '"batch_size": 8, "image_size": 64',
}
CV = LOOP | {
    "import argparse\n": "import argparse\nimport e2kd, timm\n",
    "    # Now we train the model\n": f"    criterion = {CRITERION.format(classes='len(label_to_id)')}\n",
    'torch.nn.functional.cross_entropy(outputs, batch["label"])': 'criterion(outputs, batch["label"])',
}
OLD = {  # what transformers' scripts of 4.56 import and 5 does not have
    "import check_min_version, send_example_telemetry": "import check_min_version\nsend_example_telemetry = print",
}
NO_TRAINER = OLD | {
    "import argparse\n": "import argparse\nimport e2kd, timm\n",
    'default="cifar10"': "default=None",
    "    # Train!\n": f"    criterion = {CRITERION.format(classes='model.config.num_labels')}\n",
    "loss = outputs.loss\n": 'loss = criterion(outputs, batch["labels"])\n',
}
TRAINER = OLD | {
    "import logging\n": "import logging\nimport e2kd, timm\nfrom e2kd.trainers.transformers import E2KDCallback\n",
    "        data_collator=collate_fn,\n    )\n": "        data_collator=collate_fn,\n        compute_loss_func="
    f"{CRITERION.format(classes='model.config.num_labels')},\n    )\n    trainer.add_callback(E2KDCallback(trainer))\n",
}


@pytest.fixture(scope="module")
def photos(shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cats and dogs: `train` and `validation` with a folder for each class, `flat` with cat_0.jpg, dog_0.jpg ..."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "flat").mkdir()
    for kind in ("cat", "dog"):
        files = sorted(path for path in shared(f"data/catsdogs1400/train/{kind}").iterdir())[:EACH]
        for split in ("train", "validation"):
            (folder / split / kind).mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder / split / kind)
        for index, file in enumerate(files):
            shutil.copy(file, folder / "flat" / f"{kind}_{index}.jpg")
    return folder


def changed(script: str, changes: Changes, folder: Path) -> Path:
    """A copy of a script; every change is made, and some in several places."""
    place = os.environ.get("E2KD_HOST_SCRIPTS")
    if not place:
        pytest.skip(f"set E2KD_HOST_SCRIPTS to a folder with {script}")
    text = (Path(place) / script).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{script} has no {old!r}"
        text = text.replace(old, new)
    (folder / script).write_text(text, encoding="utf-8")
    (folder / "evaluate.py").write_text(EVALUATE, encoding="utf-8")
    return folder / script


def run(*words: object) -> str:
    """What Python says of these words. Raises if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_timms_train_py_as_it_is(photos: Path, tmp_path: Path) -> None:
    script = changed("train.py", {}, tmp_path)
    weights = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), weights)
    options = [
        "--data-dir", photos, "--output", tmp_path, "--experiment", "out", "--device", "cpu", "-j", 1, "-b", 4,
        "--model", "test_resnet", "--num-classes", 2, "--img-size", 64, "--epochs", 1, "--model-ema", "--amp",
        "--amp-dtype", "bfloat16", "--clip-grad", 1, "--kd-model-name", "test_resnet",
    ]  # fmt: skip
    run("-m", "e2kd.trainers.timm", script, *options, "--teacher-checkpoint", weights)
    with open(tmp_path / "out" / "summary.csv") as file:
        assert float(next(csv.DictReader(file))["train_explanation"]) > 0


@pytest.mark.parametrize("script", ["cv_example.py", "complete_cv_example.py"])
def test_accelerates_examples_with_two_changed_lines(script: str, photos: Path, tmp_path: Path) -> None:
    said = run(changed(script, CV, tmp_path), "--data_dir", photos / "flat", "--cpu")
    assert "epoch 0: " in said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network and its processor, as a hub has them."""
    folder = tmp_path_factory.mktemp("model")
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    hf.ResNetForImageClassification(config).save_pretrained(folder)
    hf.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


def folders(photos: Path, model: Path) -> list[object]:
    """What both scripts of transformers are told: the photographs, the model, one epoch."""
    return [
        "--train_dir", photos / "train", "--validation_dir", photos / "validation", "--model_name_or_path", model,
        "--num_train_epochs", 1, "--per_device_train_batch_size", 8, "--ignore_mismatched_sizes",
    ]  # fmt: skip


def test_transformers_example_with_a_loss_and_a_callback(photos: Path, model: Path, tmp_path: Path) -> None:
    script, out = changed("run_image_classification.py", TRAINER, tmp_path), tmp_path / "out"
    options = ["--output_dir", out, "--do_train", "--do_eval", "--remove_unused_columns", "False"]
    options += ["--logging_steps", 1, "--use_cpu", "--report_to", "none"]
    assert "e2kd/explanation" in run(script, *folders(photos, model), *options)


def test_transformers_loop_with_one_changed_line(photos: Path, model: Path, tmp_path: Path) -> None:
    script = changed("run_image_classification_no_trainer.py", NO_TRAINER, tmp_path)
    options = [*folders(photos, model), "--output_dir", tmp_path / "out"]
    assert "epoch 0: {'accuracy'" in run(script, *options)


def test_our_own_example_on_two_processes_goes_on_where_it_was(photos: Path, tmp_path: Path) -> None:
    """`accelerate launch benchmarks/accelerate_example.py`, which the README compares with Accelerate's."""
    (tmp_path / "data").mkdir()
    for name, split in (("train", "train"), ("val", "validation")):
        (tmp_path / "data" / name).symlink_to(photos / split)
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "teacher.pt")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = ["--data", tmp_path / "data", "--teacher", "test_resnet", "--student", "test_resnet", "--size", "64"]
    options += ["--teacher-checkpoint", tmp_path / "teacher.pt", "--batch-size", "4", "--workers", "0", "--cpu"]
    script = ROOT / "benchmarks" / "accelerate_example.py"
    options += ["--epochs", "2", "--out", tmp_path / "out"]
    said = run(*launch, script, *options, "--track", "tensorboard")
    assert (tmp_path / "out" / "epoch_1" / "random_states_1.pkl").exists(), "two processes"
    again = run(*launch, script, *options, "--resume", tmp_path / "out" / "epoch_0")
    line = next(line for line in said.splitlines() if line.startswith("epoch 1:"))
    assert line in again
    assert "epoch 0:" not in again
