"""The command `e2kd`: demo, check."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from e2kd.errors import UnsupportedModel
from e2kd.version import __version__

CLASSES = 1000
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (UnsupportedModel, ImportError, FileNotFoundError, ValueError) as error:
        print(f"e2kd {args.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="e2kd", description="Explanation-enhanced knowledge distillation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands.add_parser("demo", help="CE, KD and e²KD on digits over misleading textures, in minutes"))
    _add_check(commands.add_parser("check", help="what e²KD will do with a student and a teacher, in seconds"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from e2kd.demo import run

    run.add_arguments(parser)
    parser.set_defaults(run=run.main)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", required=True, help="timm name")
    parser.add_argument("--teacher", required=True, help="timm name")
    parser.add_argument("--student-checkpoint", type=Path, help="state_dict (.safetensors or .pth) for the student")
    parser.add_argument("--teacher-checkpoint", type=Path, help="state_dict (.safetensors or .pth) for the teacher")
    parser.add_argument("--pretrained", action="store_true", help="load timm's pretrained weights for the teacher")
    parser.add_argument("--num-classes", type=int, default=CLASSES)
    parser.add_argument("--images", type=Path, help="folder of images to look at; noise if not given")
    parser.add_argument("--size", type=int, help="side of the images; the student's own by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--student-layer", help="dotted name; found if not given")
    parser.add_argument("--teacher-layer", help="dotted name; found if not given")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from e2kd.dryrun import check
    from e2kd.explainers import GradCAM

    student = _model(args.student, args.num_classes, args.student_checkpoint, pretrained=False)
    teacher = _model(args.teacher, args.num_classes, args.teacher_checkpoint, pretrained=args.pretrained)
    images = _images(args, student)
    report = check(
        student,
        teacher,
        images,
        explainer=GradCAM(args.student_layer),
        teacher_explainer=GradCAM(args.teacher_layer),
    )
    print(report)
    return 0 if report.ok else 1


def _model(name: str, classes: int, checkpoint: Path | None, *, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError('models are made by timm: pip install "e2kd[timm]"') from error
    model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    if checkpoint is not None:
        model.load_state_dict(_state(checkpoint))
    return model


def _state(path: Path) -> dict[str, Tensor]:
    """A state_dict from safetensors, or from a checkpoint that holds nothing but tensors and plain values."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return dict(loaded.get("state_dict", loaded))


def _images(args: argparse.Namespace, student: nn.Module) -> Tensor:
    from e2kd.probing import example_images

    example = example_images(student)
    side = args.size or (example.shape[-1] if example is not None else 224)
    if args.images is None:
        return torch.randn(args.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return _photos(args.images, args.batch, side, getattr(student, "pretrained_cfg", {}))


def _photos(folder: Path, count: int, side: int, configuration: dict[str, tuple[float, ...]]) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional as transform

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]
    if not paths:
        raise FileNotFoundError(f"Expected images ({', '.join(SUFFIXES)}) in {folder}, but found none.")
    photos = [
        transform.center_crop(transform.resize(decode_image(str(path), ImageReadMode.RGB), [side]), [side, side])
        for path in paths
    ]
    images = torch.stack(photos).float() / 255
    mean, std = (
        list(configuration.get(name, default)) for name, default in (("mean", (0.5,) * 3), ("std", (0.5,) * 3))
    )
    normalized: Tensor = transform.normalize(images, mean, std)
    return normalized


if __name__ == "__main__":
    sys.exit(main())
