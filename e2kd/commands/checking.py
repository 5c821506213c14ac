"""`e2kd check`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from e2kd.bcos.images import is_bcos
from e2kd.choosing import NAMED, explainers_asked
from e2kd.classes import choice_said
from e2kd.commands.models import NAMES, make_model, taking_colours
from e2kd.commands.numbers import count_said
from e2kd.commands.photos import add_normalization, find_photos, normalization_of, normalized, read_photos
from e2kd.normalization import Normalization, expected_normalization, told_to

CLASSES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd check`."""
    parser.add_argument("--student", required=True, help=NAMES)
    parser.add_argument("--teacher", required=True, help=NAMES)
    parser.add_argument("--student-checkpoint", type=Path, help="state_dict (.safetensors or .pth) for the student")
    parser.add_argument("--teacher-checkpoint", type=Path, help="state_dict (.safetensors or .pth) for the teacher")
    parser.add_argument("--pretrained", action="store_true", help="load timm's pretrained weights for the teacher")
    parser.add_argument("--num-classes", type=count_said, default=CLASSES)
    parser.add_argument("--images", type=Path, help="folder of images to look at; noise if not given")
    parser.add_argument("--size", type=count_said, help="side of the images; the student's own by default")
    add_normalization(parser)
    parser.add_argument("--batch", type=count_said, default=8)
    parser.add_argument("--explainer", choices=tuple(NAMED), help="of both; by the kind of model if not given")
    parser.add_argument("--student-layer", help="dotted name; GradCAM of it unless --explainer is given; else found")
    parser.add_argument("--teacher-layer", help="dotted name, in the same way")
    parser.add_argument(
        "--classes", type=choice_said, help="teacher, all, or the teacher's top k; teacher if not given"
    )
    parser.add_argument("--max-classes", type=count_said, help="of these, so many are drawn in each step")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 1 if something stands in the way of training."""
    from e2kd.dryrun import check

    student = make_model(args.student, args.num_classes, args.student_checkpoint, pretrained=False)
    teacher = make_model(args.teacher, args.num_classes, args.teacher_checkpoint, pretrained=args.pretrained)
    student, before = taking_colours(student)
    layer = args.student_layer and before + args.student_layer
    own, theirs = explainers_asked(args.explainer, layer, args.teacher_layer)
    images, normalization = _images(args, student, colours=is_bcos(student) or is_bcos(teacher))
    report = check(
        student, teacher, images,
        explainer=own, teacher_explainer=theirs, classes=args.classes, max_classes=args.max_classes,
        input_normalization=told_to(teacher, normalization),
    )  # fmt: skip
    print(report)
    return 0 if report.ok else 1


def _images(args: argparse.Namespace, student: nn.Module, *, colours: bool) -> tuple[Tensor, Normalization | None]:
    """Photos, or noise, as the student expects them, and how that is; `colours` are in [0, 1] before."""
    from e2kd.probing import example_images

    example = example_images(student)
    side = args.size or (example.shape[-1] if example is not None else 224)
    generator = torch.Generator().manual_seed(0)
    if args.images is None and not colours:
        return torch.randn(args.batch, 3, side, side, generator=generator), expected_normalization(student, None)
    if args.images is None:
        images = torch.rand(args.batch, 3, side, side, generator=generator)
    else:
        images = read_photos(find_photos(args.images, args.batch).paths, side)
    how = normalization_of(student, args)
    return normalized(images, how), how
