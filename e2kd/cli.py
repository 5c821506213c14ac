"""The command `e2kd`: demo, check, freeze, verify, inspect, merge, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from e2kd.commands import caches, checking, freezing, reporting
from e2kd.demo import run as demo
from e2kd.errors import UnsupportedModel
from e2kd.version import __version__

Main = Callable[[argparse.Namespace], int]
Arguments = Callable[[argparse.ArgumentParser], None]

COMMANDS: dict[str, tuple[str, Arguments, Main]] = {
    "demo": ("CE, KD and e²KD on digits over misleading textures, in minutes", demo.add_arguments, demo.main),
    "check": ("what e²KD will do with a student and a teacher, in seconds", checking.add_arguments, checking.main),
    "freeze": ("ask a teacher once about every image of a data set", freezing.add_arguments, freezing.main),
    "verify": ("compare a cache with its teacher, as it is and augmented", caches.add_verify, caches.verify),
    "inspect": ("what a cache holds and how it was made", caches.add_inspect, caches.inspect),
    "report": (
        "what was transferred between two or three networks, as one page",
        reporting.add_arguments,
        reporting.main,
    ),
    "merge": ("join the parts of a cache that several machines wrote", caches.add_merge, caches.merge),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (UnsupportedModel, ImportError, OSError, ValueError) as error:
        print(f"e2kd {args.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="e2kd", description="Explanation-enhanced knowledge distillation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (said, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=said)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
