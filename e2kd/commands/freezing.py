"""`e2kd freeze`."""

from __future__ import annotations

import argparse
from pathlib import Path

from e2kd.choosing import NAMED, explainers_asked
from e2kd.commands.models import add_data, add_teacher, make_dataset, make_teacher
from e2kd.commands.numbers import count_said
from e2kd.commands.photos import add_normalization, normalization_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd freeze`."""
    add_data(parser)
    add_teacher(parser)
    add_normalization(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache; an unfinished one is completed")
    parser.add_argument(
        "--view", type=count_said, default=256, help="side that images are brought to before anything random"
    )
    parser.add_argument("--fit", choices=("crop", "squash"), default="crop", help="cut to a square, or squeeze")
    parser.add_argument(
        "--teacher-size", type=count_said, help="side the teacher expects; a timm model's own if not given"
    )
    parser.add_argument(
        "--explainer", choices=(*NAMED, "none"), help="by the kind of model if not given; none: logits alone"
    )
    parser.add_argument("--layer", help="dotted name; found if not given")
    parser.add_argument("--classes", choices=("teacher", "labels", "all"), default="teacher", help="what to explain")
    parser.add_argument(
        "--top", type=count_said, help="store the largest logits alone, and the probability of the rest"
    )
    parser.add_argument("--map-type", choices=("float16", "int8", "uint8"), help="by the maps' size if not given")
    parser.add_argument("--shard-rows", type=count_said, help="images that a kill can lose; about a 64th if not given")


def main(args: argparse.Namespace) -> int:
    """Freezes; under a launcher each process its share."""
    from e2kd.frozen.views import CanonicalView
    from e2kd.frozen.writing import freeze

    if args.layer is not None and args.explainer == "none":
        raise ValueError(f"--explainer none reads no layer, but --layer {args.layer} was given. Leave it out.")
    dataset = make_dataset(args)
    teacher = make_teacher(args, dataset)
    frozen = freeze(
        teacher,
        dataset,
        args.out,
        explainer=None if args.explainer == "none" else explainers_asked(args.explainer, None, args.layer)[1],
        maps=args.explainer != "none",
        classes=args.classes,
        view=CanonicalView((args.view, args.view), args.fit),
        normalization=normalization_of(teacher, args),
        teacher_size=args.teacher_size,
        top=args.top,
        map_type=args.map_type,
        batch_size=args.batch_size,
        workers=args.workers,
        shard_rows=args.shard_rows,
    )
    print(frozen if frozen is not None else "This process is done; the cache is complete when the others are.")
    return 0
