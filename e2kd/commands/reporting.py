"""`e2kd report`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from e2kd.commands.models import (
    NAMES,
    device_for,
    device_said,
    make_model,
    taking_colours,
)
from e2kd.commands.numbers import count_said, percentage_said
from e2kd.commands.photos import (
    add_normalization,
    find_photos,
    normalization_of,
    normalized,
    read_masks,
    read_photos,
)
from e2kd.errors import UnsupportedModel, taking_images
from e2kd.folders import make_folder
from e2kd.modes import timm_configuration

if TYPE_CHECKING:
    from e2kd.report.measuring import Measured, Pictures, Subject
    from e2kd.transfer import Regions

ROLES = ("student", "base", "teacher")
SIDE = 224  # of the pictures shown and masked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd report`."""
    for role, said in zip(ROLES, ("distilled", "the same without distillation", "it learned from"), strict=True):
        parser.add_argument(f"--{role}", required=role == "student", help=f"{said}: {NAMES}")
        parser.add_argument(f"--{role}-checkpoint", type=Path, help="its state_dict; timm's own weights if not given")
        parser.add_argument(f"--{role}-layers", nargs="+", help="dotted names, early to late; found if not given")
        parser.add_argument(f"--{role}-size", type=count_said, help="side of its images; its own if not given")
    parser.add_argument("--images", type=Path, required=True, help="folder of images; with one folder for each class")
    parser.add_argument("--masks", type=Path, help="folder of masks named as the images: adds EPG and IoU")
    parser.add_argument("--mask-value", type=int, help="of the object's pixels; everything above 0 if not given")
    add_normalization(parser)
    parser.add_argument("--count", type=count_said, default=64, help="images, as many of every class")
    parser.add_argument("--num-classes", type=count_said, help="of the models; those of the folder for checkpoints")
    parser.add_argument(
        "--encoder", help="text encoder (folder or hub id) for the classes' names; one-hot if not given"
    )
    parser.add_argument("--pooled", action="store_true", help="the encoder's pooler, as in the paper")
    parser.add_argument("--regions", choices=("unicam", "gradcam", "none"), default="unicam", help="perturbed scores")
    parser.add_argument("--keep", type=percentage_said, default=50.0, help="percentage of the pixels kept in them")
    parser.add_argument("--batch-size", type=count_said, default=32)
    parser.add_argument("--device", type=device_said, help="cuda if there is one, else cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of report.html, report.json and the PNGs")


def main(args: argparse.Namespace) -> int:
    """Measures and writes the page."""
    from e2kd.report import page
    from e2kd.report.measuring import measure

    roles = [role for role in ROLES if getattr(args, role) is not None]
    if len(roles) < 2:
        raise ValueError("A report compares two or three networks. Name another one through --base or --teacher.")
    make_folder(args.out)
    photos = find_photos(args.images, args.count)
    pictures = _pictures(args, photos.paths, photos.labels, photos.classes)
    subjects = [_subject(args, role, photos.paths, photos.classes) for role in roles]
    measured: Measured = measure(
        subjects,
        pictures,
        regions=_regions(args.regions),
        keep=args.keep,
        batch_size=args.batch_size,
        say=lambda said: print(f"  {said}", file=sys.stderr),
    )
    print(page.write(measured, args.out, "e2kd " + shlex.join(sys.argv[1:])))
    return 0


def _pictures(args: argparse.Namespace, paths: list[Path], labels: list[int], classes: list[str]) -> Pictures:
    from e2kd.embeddings import label_embeddings
    from e2kd.report.measuring import Pictures

    if args.encoder is not None and not classes:
        raise ValueError("--encoder embeds the names of classes, but the images lie in no folders named after any.")
    masks = None
    if args.masks is not None:
        masks = read_masks(args.masks, args.images, paths, SIDE, args.mask_value)
    return Pictures(
        read_photos(paths, SIDE),
        torch.tensor(labels) if classes else None,
        tuple(classes),
        label_embeddings(classes, args.encoder, pooled=args.pooled) if args.encoder is not None else None,
        masks,
    )


def _subject(args: argparse.Namespace, role: str, paths: list[Path], classes: list[str]) -> Subject:
    from e2kd.report.measuring import Subject
    from e2kd.report.stages import stages

    def told(what: str) -> object:
        return getattr(args, f"{role}_{what}")

    name, checkpoint = str(getattr(args, role)), getattr(args, f"{role}_checkpoint")
    count = args.num_classes or (len(classes) or None if checkpoint is not None else None)
    model, before = taking_colours(make_model(name, count, checkpoint, pretrained=checkpoint is None))
    model = model.to(device_for(args.device)).eval()
    images = _as_expected(args, model, paths, told("size"))
    layers = [before + layer for layer in getattr(args, f"{role}_layers") or ()]
    if len(set(layers)) < len(layers):
        raise ValueError(f"Expected --{role}-layers to name every layer once, but got {' '.join(layers)}.")
    try:
        with taking_images(
            role, model, images.shape, f"Pass a network for images in colour, or another --{role}-size."
        ):
            layers = layers or stages(model, images)
    except UnsupportedModel as error:
        raise UnsupportedModel(str(error).replace("--layers", f"--{role}-layers")) from error
    short = name.rpartition(":")[2]  # of a function its own name
    label = short if checkpoint is None else f"{short} ({checkpoint.name})"
    return Subject(role, label, model, images, list(layers))


def _as_expected(args: argparse.Namespace, model: nn.Module, paths: list[Path], side: object) -> Tensor:
    own = timm_configuration(model).get("input_size", (3, SIDE, SIDE))
    size = side if isinstance(side, int) else int(own[-1])
    images = normalized(read_photos(paths, size), normalization_of(model, args))
    return images.to(device_for(args.device))


def _regions(name: str) -> Regions | None:
    from e2kd.transfer import GradCAMRegions, UniCAMRegions

    found: dict[str, Regions | None] = {"unicam": UniCAMRegions(), "gradcam": GradCAMRegions(), "none": None}
    return found[name]
