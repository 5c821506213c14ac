"""`e2kd verify`, `e2kd inspect` and `e2kd merge`: looking at caches, and joining their parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from e2kd.commands.models import add_data, add_teacher, make_dataset, make_teacher


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd verify`."""
    parser.add_argument("cache", help="folder or URL")
    add_data(parser)
    add_teacher(parser)
    parser.add_argument("--rows", type=int, default=64, help="random rows that the live teacher computes again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-augmentations", action="store_true", help="skip how well maps follow augmentations")


def verify(args: argparse.Namespace) -> int:
    """Prints the report; 1 if the cache is not what this teacher says."""
    from e2kd.frozen.teacher import FrozenTeacher

    dataset = make_dataset(args)
    frozen = FrozenTeacher.open(args.cache)
    report = frozen.verify(
        make_teacher(args, dataset),
        dataset,
        rows=args.rows,
        seed=args.seed,
        augmentations={} if args.no_augmentations else None,
    )
    print(report)
    return 0 if report.ok else 1


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd inspect`."""
    parser.add_argument("cache", help="folder or URL")
    parser.add_argument("--all", action="store_true", help="read and verify every byte")


def inspect(args: argparse.Namespace) -> int:
    """Prints what a cache holds and how it was made."""
    from e2kd.frozen.inspecting import describe, read_all
    from e2kd.frozen.teacher import FrozenTeacher

    frozen = FrozenTeacher.open(args.cache)
    print(describe(frozen))
    if args.all:
        print(read_all(frozen))
    return 0


def add_merge(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd merge`."""
    parser.add_argument("parts", nargs="+", type=Path, help="folders that processes on different machines wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the whole cache")


def merge(args: argparse.Namespace) -> int:
    """Joins the parts of a cache."""
    from e2kd.frozen.merging import merge as merged
    from e2kd.frozen.teacher import FrozenTeacher

    merged(args.parts, args.out)
    print(FrozenTeacher.open(args.out))
    return 0
