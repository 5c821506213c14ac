"""One short training in each host, as its users write it. Each saves after its first epoch and can go on from there."""

from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import e2kd

CLASSES, SIDE, IMAGES, BATCH, EPOCHS = 4, 64, 16, 4, 2
State = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """A way to train."""

    host: str
    bf16: bool = False
    backend: str = ""  # of torch.compile; none in eager mode


@dataclass(frozen=True)
class Trained:
    """What a training ended with; `average` is the exponential moving average of the weights, if the host has one."""

    student: State
    average: State | None = None


def images() -> tuple[Tensor, Tensor]:
    """Noise [N, 3, H, W] and labels [N]."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator), torch.arange(IMAGES) % CLASSES


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model("test_resnet", num_classes=CLASSES)
    return model


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)


def state_of(model: nn.Module) -> State:
    """A state_dict without the names that wrappers add."""
    unwrapped = {name.replace("_orig_mod.", "").removeprefix("module."): v for name, v in model.state_dict().items()}
    return {name: value.detach().clone() for name, value in unwrapped.items() if name != "n_averaged"}


def plain(cell: Cell, folder: Path, resume: Path | None) -> Trained:
    """A loop in plain PyTorch."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    student, average = network(1), averaged(network(1))
    criterion = e2kd.E2KDLoss(student, network(2), nn.CrossEntropyLoss())
    model: Any = torch.compile(student, backend=cell.backend) if cell.backend else student
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    dataset, start = TensorDataset(*images()), 0
    sampler: Any = DistributedSampler(dataset, shuffle=False) if dist.is_initialized() else None
    loader = DataLoader(dataset, BATCH, sampler=sampler)
    file = folder / "epoch_0.pt"
    if resume is not None:
        saved = torch.load(resume / file.name, weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
        start = 1
    for epoch in range(start, EPOCHS):
        model.train()
        for inputs, targets in loader:
            with autocast(cell):
                loss = criterion(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(student)
        evaluate(average, criterion)
        if epoch == 0 and (not dist.is_initialized() or dist.get_rank() == 0):
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"average": average.state_dict()}, file)
    return Trained(state_of(student), state_of(average))


def autocast(cell: Cell) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if cell.bf16 else nullcontext()


def evaluate(model: nn.Module, criterion: nn.Module) -> None:
    """The criterion is what it wraps, also for an average of the student."""
    inputs, targets = images()
    with torch.no_grad():
        outputs = model.eval()(inputs)
        assert torch.equal(criterion(outputs, targets), nn.functional.cross_entropy(outputs, targets))


def accelerate(cell: Cell, folder: Path, resume: Path | None) -> Trained:
    """A loop with Accelerate."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from e2kd.trainers.accelerate import Parts

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if cell.bf16 else "no", dynamo_backend=cell.backend or None
    )
    student, average = network(1), averaged(network(1))
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(student, optimizer, DataLoader(TensorDataset(*images()), BATCH))
    criterion = e2kd.E2KDLoss(model, network(2), nn.CrossEntropyLoss(), fraction=0.5)
    parts = Parts(accelerator, criterion)
    accelerator.register_for_checkpointing(average, parts)
    if resume is not None:
        accelerator.load_state(str(resume / "epoch_0"))
    for epoch in range(resume is not None, EPOCHS):
        model.train()
        for inputs, targets in loader:
            loss = criterion(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(student)
        evaluate(average, criterion)
        parts.log(epoch)
        if epoch == 0:
            accelerator.save_state(str(folder / "epoch_0"))
    return Trained(state_of(student), state_of(average))


def timm_script(cell: Cell, folder: Path, resume: Path | None) -> Trained:
    """The launcher, with a script that does what timm's train.py does."""
    from e2kd.trainers.timm.launching import main

    data, weights = folder / "data", folder / "teacher.pth"
    if not data.exists():
        write_images(data)
        torch.save(network(2).state_dict(), weights)
    words = [str(Path(__file__).with_name("timm_train.py")), "--data-dir", str(data), "--output", str(folder / "out")]
    words += ["--kd-model-name", "test_resnet", "--teacher-checkpoint", str(weights), "--model-ema", "--clip-grad", "5"]
    words += ["--amp"] * cell.bf16 + (["--torchcompile", cell.backend] if cell.backend else [])
    if resume is not None:
        words += ["--resume", str(resume / "out" / "checkpoint-0.pth.tar")]
    main(words)
    done = folder / "done"
    if os.environ.get("RANK", "0") == "0":  # which alone saves, and has left the process group by now
        done.touch()
    wait_for(done)
    return saved_by_timm(folder / "out" / "last.pth.tar")


def write_images(folder: Path) -> None:
    """The images as an ImageFolder, once however many processes ask."""
    partial_folder = folder.with_name(f"{folder.name}.{os.getpid()}")
    pixels, labels = images()
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = partial_folder / str(int(label))
        place.mkdir(parents=True, exist_ok=True)
        array = (image * 255).byte().permute(1, 2, 0).numpy().astype(np.uint8)
        Image.fromarray(array).save(place / f"{index}.png")
    try:
        partial_folder.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial_folder)


def saved_by_timm(file: Path) -> Trained:
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(file, weights_only=True)
    return Trained(saved["state_dict"], saved["state_dict_ema"])


def transformers(cell: Cell, folder: Path, resume: Path | None) -> Trained:
    """Hugging Face's Trainer, which has no average of its own."""
    import transformers as hf

    from e2kd.trainers.transformers import E2KDCallback, FrozenCollator

    torch.manual_seed(1)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.num_labels = CLASSES
    student = hf.ResNetForImageClassification(config)
    dataset = TensorDataset(*images())
    arguments = hf.TrainingArguments(
        str(folder), use_cpu=True, bf16=cell.bf16, torch_compile=bool(cell.backend), num_train_epochs=EPOCHS,
        torch_compile_backend=cell.backend or None, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2, save_strategy="epoch", eval_strategy="epoch", logging_steps=1, report_to=[],
        learning_rate=0.01, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = hf.Trainer(
        student, arguments, train_dataset=dataset, eval_dataset=dataset, data_collator=FrozenCollator(),
        compute_loss_func=e2kd.E2KDLoss(student, network(2), nn.CrossEntropyLoss(), every=2),
    )  # fmt: skip
    trainer.add_callback(E2KDCallback(trainer))
    first = None if resume is None else min(resume.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=None if first is None else str(first))
    assert any("e2kd/explanation" in entry for entry in trainer.state.log_history)
    return Trained(state_of(student))


def meet_anew(file: Path) -> None:
    """A port for the next process group, told to the others in a file.

    The keys of a group that was destroyed stay in its store, and a second group of the same store may wait for the
    addresses in them for ever (pytorch/pytorch#55967): every group gets a store of its own.
    """
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            told = file.with_suffix(".told")
            told.write_text(str(free.getsockname()[1]), encoding="ascii")
        told.rename(file)
    wait_for(file)
    os.environ["MASTER_PORT"] = file.read_text(encoding="ascii")


def wait_for(file: Path, seconds: float = 60) -> None:
    """Until another process has made it. Raises a TimeoutError if that does not happen."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file} has not come in {seconds:g} s")
        time.sleep(0.05)


HOSTS = {"timm": timm_script, "plain": plain, "accelerate": accelerate, "transformers": transformers}


def trained(cell: Cell, folder: Path, resume: Path | None = None) -> Trained:
    """Train in a host.

    Args:
        cell: how.
        folder: where it saves; the same for all processes.
        resume: the folder of another training, whose first epoch this one goes on from.
    """
    if cell.backend:
        torch._dynamo.reset()
    folder.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ and not dist.is_initialized():
        meet_anew(folder / "port")
    return partial(HOSTS[cell.host], cell, folder, resume)()
