r"""timm models, a folder of images, Accelerate, and one line of e2kd: copy this file and make it yours.

    accelerate launch benchmarks/accelerate_example.py --data photos \
        --teacher resnet50 --teacher-checkpoint teacher.safetensors --student resnet18

`photos` has the folders train/CLASS and val/CLASS, for which the teacher was trained. Names and
order are those of Accelerate's own cv_example.py; lines that are there for distillation end with "# e2kd".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm import create_model
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomResizedCrop, Resize, ToTensor

import e2kd  # e2kd
from e2kd.commands.models import make_model  # e2kd
from e2kd.trainers.accelerate import Parts  # e2kd


def main() -> None:
    args = arguments()
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        log_with=args.track,
        project_dir=args.out,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # or a resumed epoch has another order
    )
    accelerator.init_trackers("e2kd")
    set_seed(args.seed)

    size = (args.size, args.size)
    train_dataset = ImageFolder(args.data / "train", Compose([RandomResizedCrop(size, scale=(0.5, 1.0)), ToTensor()]))
    eval_dataset = ImageFolder(args.data / "val", Compose([Resize(size), ToTensor()]))
    train_dataloader = DataLoader(train_dataset, shuffle=True, batch_size=args.batch_size, num_workers=args.workers)
    eval_dataloader = DataLoader(eval_dataset, shuffle=False, batch_size=args.batch_size, num_workers=args.workers)

    classes = len(train_dataset.classes)
    model = create_model(args.student, num_classes=classes)
    mean = torch.tensor(model.default_cfg["mean"])[None, :, None, None].to(accelerator.device)
    std = torch.tensor(model.default_cfg["std"])[None, :, None, None].to(accelerator.device)

    optimizer = torch.optim.Adam(params=model.parameters(), lr=args.lr / 25)
    lr_scheduler = OneCycleLR(
        optimizer=optimizer, max_lr=args.lr, epochs=args.epochs, steps_per_epoch=len(train_dataloader)
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    teacher = make_model(args.teacher, classes, args.teacher_checkpoint, pretrained=False)  # e2kd
    teacher.to(accelerator.device)  # e2kd
    criterion = e2kd.E2KDLoss(model, teacher, torch.nn.functional.cross_entropy, weight=args.weight)  # e2kd
    parts = Parts(accelerator, criterion)  # e2kd

    start = 0
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        start = int(args.resume.name.split("_")[1]) + 1
    for epoch in range(start, args.epochs):
        model.train()
        for images, labels in train_dataloader:
            with accelerator.accumulate(model):
                inputs = (images - mean) / std
                outputs = model(inputs)
                loss = criterion(outputs, labels)  # e2kd
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        parts.log(step=epoch)  # e2kd

        model.eval()
        accurate = num_elems = 0
        for images, labels in eval_dataloader:
            inputs = (images - mean) / std
            with torch.no_grad():
                outputs = model(inputs)
            predictions, references = accelerator.gather_for_metrics((outputs.argmax(dim=-1), labels))
            num_elems += len(references)
            accurate += int((predictions == references).sum())
        accelerator.log({"accuracy": accurate / num_elems}, step=epoch)
        accelerator.print(f"epoch {epoch}: {100 * accurate / num_elems:.2f}")
        accelerator.save_state(str(args.out / f"epoch_{epoch}"))
    accelerator.end_training()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--teacher-checkpoint", type=Path, required=True, help="trained on the classes of --data")
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
