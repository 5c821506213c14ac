"""The parts of timm's train.py that touch a task, in its order; `python -m e2kd.trainers.timm` runs either.

Images come in the same order in every run, so that a resumed run can be compared with an uninterrupted one.
"""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm import utils
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch import nn

_logger = logging.getLogger("train")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--num-classes", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--clip-grad", type=float)
    parser.add_argument("--no-prefetcher", action="store_true")
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--resume", default="")
    parser.add_argument("--torchcompile", default="")
    parser.add_argument("--kd-model-name")
    parser.add_argument("--kd-temperature", type=float, default=4.0)
    parser.add_argument("--distill-loss-weight", type=float)
    parser.add_argument("--task-loss-weight", type=float)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = utils.init_distributed_device(args)
    utils.random_seed(0, args.rank)
    model = create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop).to(device)
    task, optimizer = make_task(args, model, device)
    start = resume_task_checkpoint(task, args.resume, optimizer=optimizer) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=0.9)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    model, saver = task.get_trainable_module(), None
    if utils.is_primary(args):
        folder = utils.get_outdir(args.output)
        saver = utils.CheckpointSaver(
            model, optimizer, args=args, checkpoint_dir=folder, recovery_dir=folder, task=task
        )
    for epoch in range(start or 0, args.epochs):
        train_metrics = train_one_epoch(epoch, task, make_loader(args, device), optimizer, args, device)
        if args.distributed:
            utils.distribute_bn(model, args.world_size, True)
        eval_metrics = {"top1": validate(task.get_eval_model(), make_loader(args, device, train=False))}
        if saver is not None:
            summary = os.path.join(args.output, "summary.csv")
            utils.update_summary(
                epoch, train_metrics, eval_metrics, filename=summary, write_header=epoch == (start or 0)
            )
            saver.save_checkpoint(epoch, metric=eval_metrics["top1"])
    if args.distributed:
        torch.distributed.destroy_process_group()


def make_task(args: argparse.Namespace, model: nn.Module, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    criterion = nn.CrossEntropyLoss().to(device=device)
    if args.kd_model_name is not None:
        task = LogitDistillationTask(
            student_model=model,
            teacher_model=args.kd_model_name,
            criterion=criterion,
            loss_type="kl",
            distill_loss_weight=args.distill_loss_weight,
            task_loss_weight=args.task_loss_weight,
            temperature=args.kd_temperature,
            device=device,
            dtype=None,
            verbose=utils.is_primary(args),
        )
    else:
        task = ClassificationTask(model=model, criterion=criterion, device=device, dtype=None, verbose=False)
    return task, create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.05, momentum=0.9)


def make_loader(args: argparse.Namespace, device: torch.device, *, train: bool = True) -> Any:
    dataset = create_dataset("", root=args.data_dir, split="train", is_training=train)
    loader = create_loader(
        dataset,
        input_size=(3, args.size, args.size),
        batch_size=args.batch_size,
        is_training=train,
        no_aug=True,
        use_prefetcher=not args.no_prefetcher,
        num_workers=0,
        persistent_workers=False,
        distributed=args.distributed,
        device=device,
    )
    torch.manual_seed(5)  # of the loader's order
    return loader


def train_one_epoch(
    epoch: int, task: Any, loader: Any, optimizer: Any, args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    losses, model = utils.AverageMeter(), task.get_trainable_module()
    model.train()
    amp = partial(torch.autocast, device_type=device.type, dtype=torch.bfloat16) if args.amp else nullcontext
    optimizer.zero_grad()
    for index, (images, target) in enumerate(loader):
        update = (index + 1) % args.grad_accum_steps == 0
        waiting = args.distributed and not update
        with task.no_sync() if waiting else nullcontext():
            with amp():
                loss = task(images, target)["loss"]
            loss /= args.grad_accum_steps
            loss.backward()
        losses.update(loss.item() * args.grad_accum_steps, len(images))
        if not update:
            continue
        if args.clip_grad is not None:
            utils.dispatch_clip_grad(task.get_clip_parameters(), value=args.clip_grad, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=index)
        average = losses.avg
        if args.distributed:
            average = utils.reduce_tensor(loss.new_tensor([average]), args.world_size).item()
        if utils.is_primary(args):
            _logger.info(f"Train: {epoch} [{index:>4d}/{len(loader)}]  Loss: {losses.val:#.3g} ({average:#.3g})")
    if args.distributed:
        average = utils.reduce_tensor(torch.tensor([losses.avg]), args.world_size).item()
    return {"loss": average}


@torch.inference_mode()
def validate(model: nn.Module, loader: Any) -> float:
    model.eval()
    right = [float(utils.accuracy(model(images), target)[0]) for images, target in loader]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
