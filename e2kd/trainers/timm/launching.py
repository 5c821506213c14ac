"""Runs timm's train.py as it is: `python -m e2kd.trainers.timm train.py <its arguments> <e2kd's arguments>`.

What the script imports from timm under four names is replaced before it runs: its task of logit distillation, its
data sets where a cache teaches, and `reduce_tensor` and `update_summary` for the log.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import timm.data
import timm.task
import timm.utils
import torch
import yaml  # type: ignore[import-untyped]
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from e2kd.choosing import NAMED, explainers_asked
from e2kd.classes import choice_said
from e2kd.modes import unwrap
from e2kd.normalization import expected_normalization
from e2kd.trainers.timm.logs import Logs
from e2kd.trainers.timm.replacing import replaced
from e2kd.trainers.timm.task import E2KDTask

NO_TEACHER = (
    "Expected a teacher: --kd-model-name NAME (a timm model; --teacher-checkpoint FILE for weights of your own), or "
    "--frozen-cache DIR."
)
TWO_TEACHERS = "--frozen-cache holds the teacher: leave --kd-model-name and --teacher-checkpoint out."
FROZEN_LAYER = "--frozen-cache holds the teacher's maps: leave --e2kd-teacher-layer out, or freeze again."
UNNAMED = "The cache's maps were made by no explainer of e2kd's: say --e2kd-explainer beside --e2kd-layer."
OTHER_TASK = "e2kd distills logits and explanations: leave --kd-distill-type out, but got {kind!r}."
MIXED = (
    "The cache has no lesson for images that timm mixes or erases after they were read: leave {names} out, or use a "
    "live teacher (--kd-model-name)."
)
NO_PREFETCHER = (
    "The prefetcher of timm {version} carries no lessons of a cache: add --no-prefetcher, or pip install -U timm "
    "(>= 1.0.31)."
)
NO_TASK = (
    "{script} ended without making timm's LogitDistillationTask, so nothing was distilled. Expected timm's train.py of "
    "timm >= 1.0.27, or a script that makes that task."
)
AGAIN = (
    "This process has already been one of {size} that trained together, and timm's script makes a process group for "
    "each training. torch.distributed can't make a second one where it made the first ({address}): processes would "
    "wait for addresses of the group that is gone, for ever. Start `torchrun` once for each training."
)
UNKNOWN = "The file of --config names {names}, but e2kd's options are {known}."
AFTER_READING = ("--mixup", "--cutmix", "--cutmix-minmax", "--reprob", "--aug-splits")

_met: set[str] = set()  # where this process has met others


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script of the command line; its errors and exit status are its own.

    Raises:
        RuntimeError: for a second training in the same process of several, under one MASTER_ADDR and MASTER_PORT.
    """
    args, rest = own_arguments(argv)
    launch(args, [args.script, *script_arguments(args, rest)])


def meet() -> None:
    """Raise if the processes would meet where they have met before: the keys of a group outlive it in its store."""
    size, address = (os.environ.get(name, "") for name in ("WORLD_SIZE", "MASTER_PORT"))
    if size in ("", "1") or not address:
        return
    address = f"{os.environ.get('MASTER_ADDR', '')}:{address}"
    if address in _met:
        raise RuntimeError(AGAIN.format(size=size, address=address))
    _met.add(address)


def parser() -> argparse.ArgumentParser:
    """e2kd's own arguments."""
    made = argparse.ArgumentParser(
        prog="python -m e2kd.trainers.timm",
        description="timm's train.py with explanation-enhanced distillation. All other arguments are the script's own: "
        "--kd-model-name names the teacher, --kd-temperature is τ, --distill-loss-weight and --task-loss-weight weigh "
        "the other terms.",
        allow_abbrev=False,
    )
    made.add_argument("script", help="path of timm's train.py")
    made.add_argument("--e2kd-weight", type=float, default=1.0, help="of the explanation term (default: 1)")
    made.add_argument(
        "--e2kd-explainer", choices=tuple(NAMED), help="by the kind of model, or the cache's, if not given"
    )
    made.add_argument("--e2kd-layer", help="of the student; GradCAM of it unless an explainer is given or cached")
    made.add_argument("--e2kd-teacher-layer", help="of the teacher, in the same way")
    made.add_argument(
        "--e2kd-classes",
        type=choice_said,
        help="teacher, labels, positives, all, or the teacher's top k; the cache's if none",
    )
    made.add_argument("--e2kd-max-classes", type=int, help="of these, so many are drawn in each step; all if none")
    made.add_argument("--e2kd-fraction", type=float, default=1.0, help="share of each batch that is explained")
    made.add_argument("--e2kd-every", type=int, default=1, help="explain every k-th step")
    made.add_argument(
        "--e2kd-during", type=int, nargs=2, metavar=("START", "STOP"), help="explain in these steps alone"
    )
    made.add_argument("--teacher-checkpoint", type=Path, help="the teacher's weights (.safetensors, .pth, .pth.tar)")
    made.add_argument("--frozen-cache", help="folder or URL that `e2kd freeze` wrote for the training images")
    return made


def own_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """e2kd's own arguments, and the rest, the script's; the file of `--config` says what the command line doesn't."""
    made = parser()
    args, rest = made.parse_known_args(argv)
    known = sorted(vars(args).keys() - {"script"})
    of_file = made.parse_args([args.script, *words_of(configured(rest), known)])
    return made.parse_known_args(argv, of_file)


def words_of(values: dict[str, Any], known: Sequence[str]) -> list[str]:
    """The words of a command line that say what a file does, so that both are checked in one way.

    >>> words_of({"lr": 0.1, "e2kd_weight": 7.0, "e2kd-during": [0, 9], "e2kd_every": None}, sorted(vars(
    ...     parser().parse_args(["train.py"]))))
    ['--e2kd-weight=7.0', '--e2kd-during', '0', '9']
    """
    named = {str(name).replace("-", "_"): value for name, value in values.items() if value is not None}
    unknown = sorted(name for name in named if name.startswith("e2kd_") and name not in known)
    if unknown:
        raise SystemExit(UNKNOWN.format(names=", ".join(unknown), known=", ".join(known)))
    words = []
    for name, value in named.items():
        if name in known:
            option = "--" + name.replace("_", "-")
            words += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
    return words


def script_arguments(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """What the script is given: its own arguments, and a teacher's name where a cache teaches.

    >>> args = parser().parse_args(["train.py", "--frozen-cache", "cache"])
    >>> script_arguments(args, ["--epochs", "3"])
    ['--epochs', '3', '--kd-model-name', 'frozen']
    """
    told = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    told.add_argument("--kd-model-name")
    told.add_argument("--kd-distill-type", default="logit")
    told.add_argument("--no-prefetcher", action="store_true")
    for name in AFTER_READING:
        told.add_argument(name, nargs="+", type=float, default=[0.0])
    told.set_defaults(**configured(rest))
    found, _ = told.parse_known_args(rest)
    if found.kd_distill_type != "logit":
        raise SystemExit(OTHER_TASK.format(kind=found.kd_distill_type))
    if args.frozen_cache is None:
        if found.kd_model_name is None:
            raise SystemExit(NO_TEACHER)
        return rest
    if found.kd_model_name or args.teacher_checkpoint:
        raise SystemExit(TWO_TEACHERS)
    values = {name: getattr(found, name[2:].replace("-", "_")) for name in AFTER_READING}
    mixing = [name for name, value in values.items() if (any(value) if isinstance(value, list) else value)]
    if mixing:
        raise SystemExit(MIXED.format(names=", ".join(mixing)))
    if not (found.no_prefetcher or prefetches_lessons()):
        raise SystemExit(NO_PREFETCHER.format(version=timm.__version__))
    return [*rest, "--kd-model-name", "frozen"]


def configured(rest: list[str]) -> dict[str, Any]:
    """What a script of timm's takes for its defaults: the values of the YAML file that `--config` names."""
    told = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    told.add_argument("-c", "--config", default="")
    file = told.parse_known_args(rest)[0].config
    return (yaml.safe_load(Path(file).read_text()) or {}) if file else {}


def prefetches_lessons() -> bool:
    """Whether timm's prefetching loader takes rows of numbers in the labels' place."""
    from timm.data.loader import fast_collate

    sample = torch.zeros(3, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    try:
        _, targets = fast_collate([sample, sample])
    except (TypeError, ValueError, RuntimeError):
        return False
    return tuple(targets.shape) == (2, 2)


def launch(args: argparse.Namespace, argv: list[str]) -> None:
    """Run the script `argv[0]` with timm's task, data sets and log as e2kd has them."""
    meet()
    data: Any = timm.data
    frozen = None
    if args.frozen_cache is not None:
        from e2kd.frozen.teacher import FrozenTeacher

        frozen = FrozenTeacher.open(args.frozen_cache)
    given = settings(args, frozen)
    logs = Logs()

    def task(**of_script: Any) -> E2KDTask:
        student = of_script["student_model"]
        taught_by = {"teacher_model": frozen} if frozen is not None else loaded_images(argv[1:], student)
        made = E2KDTask(**of_script | taught_by | given)
        logs.watch(made.averages)
        return made

    with ExitStack() as changes:
        changes.enter_context(replaced(timm.task, "LogitDistillationTask", task))
        changes.enter_context(logs.shown())
        if frozen is not None:
            changes.enter_context(
                replaced(data, "create_dataset", partial(taught_dataset, data.create_dataset, frozen))
            )
        changes.enter_context(replaced(sys, "argv", argv))
        changes.enter_context(replaced(sys, "path", [str(Path(argv[0]).resolve().parent), *sys.path]))
        runpy.run_path(argv[0], run_name="__main__")
    if logs.averages is None:
        raise SystemExit(NO_TASK.format(script=argv[0]))


def settings(args: argparse.Namespace, frozen: Any = None) -> dict[str, Any]:
    """The settings of `E2KDTask` that the command line names; a layer alone is one of the cache's explainer."""
    found: dict[str, Any] = {
        "explanation_loss_weight": args.e2kd_weight,
        "fraction": args.e2kd_fraction,
        "every": args.e2kd_every,
        "during": args.e2kd_during,
        "classes": args.e2kd_classes,
        "max_classes": args.e2kd_max_classes,
    }
    if args.teacher_checkpoint is not None:
        found["teacher_pretrained_path"] = args.teacher_checkpoint
    if frozen is not None and args.e2kd_teacher_layer is not None:
        raise SystemExit(FROZEN_LAYER)
    name = args.e2kd_explainer
    if frozen is not None and name is None and args.e2kd_layer is not None:
        if frozen.explainer is None:
            raise SystemExit(UNNAMED)
        name = type(frozen.explainer).__name__
    own, theirs = explainers_asked(name, args.e2kd_layer, args.e2kd_teacher_layer)
    if own is not None:
        found["explainer"] = own
    if frozen is None and theirs is not None:
        found["teacher_explainer"] = theirs
    return found


def loaded_images(rest: list[str], student: nn.Module) -> dict[str, Any]:
    """How the script normalises images where that is not as the student's configuration says: --mean and --std.

    >>> loaded_images(["--mean", "0", "0", "0", "--std", "1", "1", "1"], nn.Identity())
    {'input_normalization': ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])}
    """
    told = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("--mean", "--std"):
        told.add_argument(name, nargs="+", type=float)
    told.set_defaults(**configured(rest))
    found, _ = told.parse_known_args(rest)
    if found.mean is None and found.std is None:
        return {}
    mean, std = expected_normalization(unwrap(student), None) or (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return {"input_normalization": (found.mean or mean, found.std or std)}


def taught_dataset(create: Any, frozen: Any, *args: Any, **kwargs: Any) -> Any:
    """A data set of timm's; that for training with its lessons, packed for timm's loader."""
    from e2kd.frozen.dataset import FrozenDataset

    dataset = create(*args, **kwargs)
    return FrozenDataset(dataset, frozen, match="id", pack=True) if kwargs.get("is_training") else dataset
