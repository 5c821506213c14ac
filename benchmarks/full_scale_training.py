"""One student at full scale: its training through Accelerate, its checkpoints, its result."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.utils.agc import adaptive_clip_grad
from torch import Generator, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

import e2kd
from benchmarks.common import command, environment, write_json
from benchmarks.full_scale_arms import ARMS
from benchmarks.full_scale_checkpoints import CHECKPOINTS, RESULT, begin, checkpoints, epoch_of, result_of
from benchmarks.full_scale_data import Measured, Split
from benchmarks.full_scale_layouts import READERS
from benchmarks.full_scale_networks import network, normalization_of
from benchmarks.full_scale_random import Augmented, seed_of
from benchmarks.full_scale_run import Run, augmentation, centre, encoding, images_of, schedule_of, whole
from benchmarks.full_scale_scores import Scores, measured
from benchmarks.full_scale_teaching import check_heads, frozen_teacher, live_teacher, weights_of
from benchmarks.limited_training import FROZEN, INDEXED
from benchmarks.paired import Row
from e2kd.baselines import IndexedDataset
from e2kd.trainers.accelerate import Parts

OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def accelerator_of(run: Run) -> Accelerator:
    """With the whole batch in the loader, and an order of the images that is the seed's."""
    order = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed_of(run.seed))
    return Accelerator(
        cpu=run.cpu,
        mixed_precision=run.mixed_precision,
        gradient_accumulation_steps=run.accumulate,
        log_with=run.track,
        project_dir=run.out,
        dataloader_config=order,
    )


class Distillation:
    """A student with everything its training needs, prepared by Accelerate."""

    def __init__(self, run: Run) -> None:
        self.run, recipe = run, run.recipe
        if recipe.warmup > recipe.epochs > 0:
            raise ValueError(f"A warm-up of {recipe.warmup:g} epochs never ends in {recipe.epochs}. Pass --warmup.")
        self.accelerator = accelerator_of(run)
        layout = READERS[run.data](run.path)
        train, self.measured = images_of(run, layout)
        self.groups, classes = layout.groups, len(layout.test.classes)
        set_seed(run.seed)
        student = network(recipe.student, classes, run.student_checkpoint).to(self.accelerator.device)
        self.teacher = live_teacher(run, student, classes, self.accelerator.device)
        self.normalization = normalization_of(student)
        self._check_heads(student, train, classes)
        source, dataset = self._lessons(train, augmentation(recipe, self.normalization))
        self.weights = weights_of(self.teacher if source is None else source)
        self.images = Augmented(dataset, run.seed)
        self._prepare(student, ARMS[run.arm](student, source, run, layout.train.multilabel))

    def _prepare(self, student: nn.Module, criterion: nn.Module) -> None:
        """What trains, by Accelerate."""
        run, recipe = self.run, self.run.recipe
        self.parameters = [*student.parameters(), *criterion.parameters()]
        optimizer = OPTIMIZERS[recipe.optimizer](self.parameters, recipe.lr, weight_decay=recipe.weight_decay)
        loader = self._loader(self.images)
        steps = -(-len(loader) // run.accumulate)
        schedule = schedule_of(optimizer, round(recipe.warmup * steps), recipe.epochs * steps)
        self.student, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            student, optimizer, loader, schedule
        )
        trains = any(True for _ in criterion.parameters())
        self.criterion = self.accelerator.prepare(criterion) if trains else criterion
        self.parts = Parts(self.accelerator, criterion) if isinstance(criterion, e2kd.E2KDLoss) else None
        if self.parts is not None:
            self.accelerator.register_for_checkpointing(self.parts)
        if run.track is not None:
            self.accelerator.init_trackers("e2kd")

    def _check_heads(self, student: nn.Module, train: Split, classes: int) -> None:
        image = encoding(self.normalization)(centre(self.run.recipe.size)(train[0][0]))
        models = {"student": student} if self.teacher is None else {"student": student, "teacher": self.teacher.model}
        check_heads(models, image, classes)

    def _lessons(self, train: Split, transform: v2.Compose) -> tuple[Any, Dataset[Any]]:
        """Who teaches, and what the loader reads."""
        if self.run.arm not in FROZEN:
            if self.teacher is None and self.run.arm != "cross_entropy":
                raise ValueError(f"The arm {self.run.arm} asks a live teacher. Name one: --teacher.")
            if self.run.arm in INDEXED and self.accelerator.num_processes > 1:
                raise ValueError("CRD keeps one memory per process, which this script does not join. Run one process.")
            images = replace(train, transform=transform)
            return self.teacher, IndexedDataset(images) if self.run.arm in INDEXED else images
        frozen = frozen_teacher(self.run, self.teacher, train, len(self.measured.classes), self.accelerator)
        return frozen, e2kd.FrozenDataset(train, frozen, match="id", transform=transform)

    def _loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        batch, run = self.run.recipe.batch // self.run.accumulate, self.run
        if batch * run.accumulate != run.recipe.batch:
            raise ValueError(f"Expected a --batch in {run.accumulate} equal parts, but got {run.recipe.batch}.")
        loader = DataLoader(
            dataset,
            batch,
            shuffle=True,
            num_workers=run.workers,
            drop_last=True,
            persistent_workers=run.workers > 0,
            generator=Generator(),
        )
        if not len(loader):
            raise ValueError(f"Expected at least one batch of {batch} training images. Pass a smaller --batch.")
        return loader

    def epoch(self, number: int) -> float:
        """One pass over the training images; its last loss.

        Raises:
            FloatingPointError: when that is not finite.
        """
        self.student.train()
        self.criterion.train()
        self.loader.set_epoch(number)
        self.images.set_epoch(number)
        set_seed(seed_of(self.run.seed, number, self.accelerator.process_index))
        loss = torch.tensor(torch.nan)
        for images, targets in self.loader:
            with self.accelerator.accumulate(self.student):
                loss = self.criterion(self.student(images), targets)
                self.accelerator.backward(loss)
                self._clip()
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        last = float(self.accelerator.reduce(loss.detach(), "mean"))  # of all processes, so that all stop
        if not math.isfinite(last):
            raise FloatingPointError(f"The loss of epoch {number} is {last}: the student diverged. Lower --lr.")
        return last

    def _clip(self) -> None:
        recipe = self.run.recipe
        if not self.accelerator.sync_gradients:
            return
        if recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self.parameters, recipe.clip)  # it unscales, which is for once
        elif recipe.adaptive_clip is not None:
            self.accelerator.unscale_gradients()
        if recipe.adaptive_clip is not None:
            adaptive_clip_grad(self.parameters, recipe.adaptive_clip)

    def measure(self) -> Row:
        """What the student is worth; every process takes its share of the images, each of them once."""
        alike(self.accelerator, self.student)
        split, size, device = self.measured, self.run.recipe.size, self.accelerator.device
        with self.accelerator.split_between_processes(list(range(len(split)))) as mine:
            share = Subset(Measured(split, centre(size), whole(size), encoding(self.normalization)), mine)
        batches = DataLoader(share, self.run.recipe.batch, num_workers=self.run.workers, generator=Generator())
        scores = Scores(
            len(split.classes),
            multilabel=split.multilabel,
            groups=self.groups,
            regions=split.boxes is not None,
            taught=self.teacher is not None,
        )
        student = self.accelerator.unwrap_model(self.student)  # wrapped, processes would wait for each other's batches
        return measured(student, self.teacher, batches, scores.to(device), device)

    def save(self, number: int) -> None:
        """All that a resumed run needs; whole under its name, or not there."""
        folder = self.run.out / CHECKPOINTS
        self.accelerator.save_state(str(folder / "partial"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            older = checkpoints(self.run.out)
            (folder / "partial").rename(folder / f"epoch_{number}")
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Goes on from the newest checkpoint; the epoch to train next."""
        found = checkpoints(self.run.out)
        if not found:
            return 0
        self.accelerator.load_state(str(found[-1]))
        return epoch_of(found[-1]) + 1


def alike(accelerator: Accelerator, model: nn.Module) -> None:
    """Gives all processes the first one's buffers: BatchNorm's statistics are of a process's own images."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def distil(run: Run) -> Row:
    """Trains a student, or goes on with one, and measures it; `result.json` in its folder says what it is worth.

    Raises:
        SystemExit: when the folder has another student's result or checkpoints.
    """
    settings = run.settings()
    rows = result_of(run.out, settings).get("rows")
    if rows:
        return rows[0]
    made = Distillation(run)
    accelerator, about = made.accelerator, {"settings": settings, "teacher": made.weights}
    begin(run.out, about | {"processes": accelerator.num_processes}, write=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    for number in range(made.resume(), run.recipe.epochs):
        accelerator.print(f"epoch {number}: loss {made.epoch(number):.3f}")
        if made.parts is not None:
            made.parts.log(step=number)
        if run.evaluate_every and (number + 1) % run.evaluate_every == 0:
            found = made.measure()
            accelerator.log({name: value for name, value in found.items() if value is not None}, step=number)
            accelerator.print(json.dumps(found))
        made.save(number)
    row = {name: settings[name] for name in ("split", "arm", "seed", "temperature", "weight")}
    row |= {"processes": accelerator.num_processes, **made.measure()}
    accelerator.save_model(made.student, str(run.out))
    if accelerator.is_main_process:
        write_json(run.out / RESULT, {"environment": environment(), "command": command(), **about, "rows": [row]})
    accelerator.end_training()
    return row
