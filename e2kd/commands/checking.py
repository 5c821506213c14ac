"""`e2kd check`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from e2kd.bcos import AddInverse
from e2kd.bcos.images import channels_of, colours_of, is_bcos
from e2kd.classes import choice_said
from e2kd.commands.models import NAMES, make_model
from e2kd.commands.photos import find_photos, normalized, read_photos
from e2kd.explainers import NAMED

CLASSES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd check`."""
    parser.add_argument("--student", required=True, help=NAMES)
    parser.add_argument("--teacher", required=True, help=NAMES)
    parser.add_argument("--student-checkpoint", type=Path, help="state_dict (.safetensors or .pth) for the student")
    parser.add_argument("--teacher-checkpoint", type=Path, help="state_dict (.safetensors or .pth) for the teacher")
    parser.add_argument("--pretrained", action="store_true", help="load timm's pretrained weights for the teacher")
    parser.add_argument("--num-classes", type=int, default=CLASSES)
    parser.add_argument("--images", type=Path, help="folder of images to look at; noise if not given")
    parser.add_argument("--size", type=int, help="side of the images; the student's own by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--explainer", choices=tuple(NAMED), help="of both; by the kind of model if not given")
    parser.add_argument("--student-layer", help="dotted name; found if not given")
    parser.add_argument("--teacher-layer", help="dotted name; found if not given")
    parser.add_argument(
        "--classes", type=choice_said, help="teacher, all, or the teacher's top k; teacher if not given"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the report; 1 if something stands in the way of training."""
    from e2kd.dryrun import check
    from e2kd.explainers import Explainer, default_explainer, explainer_named

    def at(layer: str | None) -> Explainer | None:
        return explainer_named(args.explainer or "gradcam", layer) if layer or args.explainer else None

    student = make_model(args.student, args.num_classes, args.student_checkpoint, pretrained=False)
    teacher = make_model(args.teacher, args.num_classes, args.teacher_checkpoint, pretrained=args.pretrained)
    if channels_of(student) != colours_of(student):
        student = nn.Sequential(AddInverse(), student)
    theirs = at(args.teacher_layer) or (default_explainer(teacher) if args.student_layer else None)
    images = _images(args, student)
    report = check(
        student, teacher, images, explainer=at(args.student_layer), teacher_explainer=theirs, classes=args.classes
    )
    print(report)
    return 0 if report.ok else 1


def _images(args: argparse.Namespace, student: nn.Module) -> Tensor:
    from e2kd.probing import example_images

    example = example_images(student)
    side = args.size or (example.shape[-1] if example is not None else 224)
    if args.images is None:
        noise = torch.rand if is_bcos(student) else torch.randn
        return noise(args.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    photos = read_photos(find_photos(args.images, args.batch).paths, side)
    return photos if is_bcos(student) else normalized(photos, student)
