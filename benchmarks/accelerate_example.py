"""timm models, a folder of images, Accelerate, and one line of e2kd: copy this file and make it yours.

    accelerate launch benchmarks/accelerate_example.py --data photos --teacher resnet50 --student resnet18

`photos` has the folders train/CLASS and val/CLASS; `--teacher-checkpoint` is a state_dict for its classes. Lines that
are there for distillation end with "# e2kd".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import e2kd  # e2kd
from e2kd.commands.models import make_model  # e2kd
from e2kd.trainers.accelerate import Parts  # e2kd


def loaders(args: argparse.Namespace, configuration: dict[str, tuple[float, ...]]) -> tuple[DataLoader, DataLoader]:
    last = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(configuration["mean"], configuration["std"]),
    ]
    train = v2.Compose([v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip(), *last])
    test = v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size), *last])
    return (
        DataLoader(ImageFolder(args.data / "train", train), args.batch_size, shuffle=True, num_workers=args.workers),
        DataLoader(ImageFolder(args.data / "val", test), args.batch_size, num_workers=args.workers),
    )


def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = []
    for images, labels in loader:
        with torch.no_grad():
            predicted = model(images).argmax(1)
        right.append(torch.eq(*accelerator.gather_for_metrics((predicted, labels))))
    return float(torch.cat(right).float().mean())


def main() -> None:
    args = arguments()
    set_seed(args.seed)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        log_with=args.track,
        project_dir=args.out,
    )
    accelerator.init_trackers("e2kd")
    classes = len(ImageFolder(args.data / "train").classes)
    student = timm.create_model(args.student, num_classes=classes)
    train, test = loaders(args, student.pretrained_cfg)
    optimizer = torch.optim.AdamW(student.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, epochs=args.epochs, steps_per_epoch=len(train))
    model, optimizer, train, test, schedule = accelerator.prepare(student, optimizer, train, test, schedule)

    weights = args.teacher_checkpoint  # e2kd
    teacher = make_model(args.teacher, classes, weights, pretrained=weights is None)  # e2kd
    criterion = e2kd.E2KDLoss(model, teacher.to(accelerator.device), nn.CrossEntropyLoss(), weight=args.weight)  # e2kd
    parts = Parts(accelerator, criterion)  # e2kd

    start = 0
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        start = int(args.resume.name.split("_")[1]) + 1
    for epoch in range(start, args.epochs):
        model.train()
        for images, labels in train:
            with accelerator.accumulate(model):
                loss = criterion(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        parts.log(step=epoch)  # e2kd
        accuracy = evaluate(accelerator, model, test)
        accelerator.log({"accuracy": accuracy}, step=epoch)
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.1%}, loss {float(loss.detach()):.3f}")
        accelerator.save_state(str(args.out / f"epoch_{epoch}"))
    accelerator.end_training()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--teacher-checkpoint", type=Path, help="timm's pretrained weights if not given")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--track", help="a tracker of Accelerate, such as tensorboard")
    parser.add_argument("--resume", type=Path, help="a folder epoch_N of --out")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
