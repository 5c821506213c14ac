"""Models and data sets from the words of a command line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import re
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos import AddInverse
from e2kd.bcos.images import channels_of, colours_of
from e2kd.commands.numbers import count_said

UNREADABLE = (
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    UnpicklingError,
    struct.error,
)
BCOS = "bcos."
WEIGHTS = "pass a state_dict for it (.safetensors, .pth), --teacher-checkpoint FILE where it is the teacher."
OWN = re.compile(r"(?!hf_hub:)[a-zA-Z_][\w.]*:[a-zA-Z_]\w*")  # not timm's hf-hub:owner/name
NAMES = f"timm name, {BCOS}resnet18 and the like for networks of e2kd.bcos, or package.module:function for your own"


def make_model(
    name: str, classes: int | None, checkpoint: Path | None, *, pretrained: bool, **settings: Any
) -> nn.Module:
    """A model with the weights of a checkpoint, of timm's hub or at random; its own head if `classes` is None.

    `settings` are for timm, and for functions that make a network, as `num_classes` is.
    """
    if OWN.fullmatch(name):
        model = _own(name, {**settings} if classes is None else {**settings, "num_classes": classes})
    elif name.startswith(BCOS):
        model = _bcos(name, classes, **settings)
        if pretrained and checkpoint is None:
            raise ValueError(f"{name} has no pretrained weights: {WEIGHTS}")
    else:
        model = _timm(name, classes, pretrained=pretrained, **settings)
    if checkpoint is not None:
        state = read_state(checkpoint)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # names every key that does not fit
            said = shorten(" ".join(str(error).splitlines()[1:]), 160, placeholder=" ...")
            raise ValueError(f"{checkpoint} holds other weights than {name} has: {said}") from error
    return model


def _own(name: str, settings: dict[str, Any]) -> nn.Module:
    """What a function makes, from an installed module or one in the working folder."""
    module, function = name.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Expected {name} to name a function that makes a network, but: {error}.") from error
    try:
        model = make(**settings)
    except TypeError as error:
        raise ValueError(f"{name} can't be called with {', '.join(settings) or 'nothing'}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"Expected {name} to make a network, but it returned {type(model).__name__}.")
    return model


def _bcos(name: str, classes: int | None, **settings: Any) -> nn.Module:
    from e2kd import bcos

    build = getattr(bcos, name.removeprefix(BCOS), None)
    if not inspect.isfunction(build) or "num_classes" not in inspect.signature(build).parameters:
        raise ValueError(f"e2kd.bcos has no network {name.removeprefix(BCOS)!r}, but resnet18, vit_ti and so on.")
    if settings:
        raise ValueError(f"The networks of e2kd.bcos take no {', '.join(settings)}. Leave it out for {name}.")
    model: nn.Module = build() if classes is None else build(classes)
    return model


def _timm(name: str, classes: int | None, **settings: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError('models are made by timm: pip install "e2kd[timm]"') from error
    head: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    try:
        model: nn.Module = timm.create_model(name, **head, **settings)
    except RuntimeError as error:
        if not str(error).startswith("Unknown model"):
            raise
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"timm {timm.__version__} knows no model {name!r}.{hint} Expected a {NAMES}.") from error
    return model


def read_state(path: Path) -> dict[str, Tensor]:
    """A state_dict from safetensors or a checkpoint, such as those of timm's train.py: averaged weights if it has any.

    Nothing is unpickled but tensors and plain values.
    """
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint (.safetensors, .pth, .pth.tar), but there is no file {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm saves its arguments along
            state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except (*UNREADABLE, SafetensorError) as error:
        said = shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        raise ValueError(
            f"{path} could not be read as a state_dict, of tensors and plain values alone (.safetensors, .pth): {said}"
        ) from error
    return state


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that name a data set."""
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder of images for each class")
    parser.add_argument("--dataset", help="instead a data set that timm knows, such as hfds/NAME; --data is its root")
    parser.add_argument("--split", default="train", help="of --dataset")


def make_dataset(args: argparse.Namespace) -> Any:
    """The data set of `add_data`, without a transform."""
    if args.dataset is not None:
        from timm.data.dataset_factory import create_dataset

        return create_dataset(args.dataset, args.data, split=args.split)
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(args.data))


def add_teacher(parser: argparse.ArgumentParser) -> None:
    """The options that name a teacher."""
    own = "timm's with pretrained weights if no checkpoint is given"
    parser.add_argument("--teacher", required=True, help=f"{NAMES}; {own}")
    parser.add_argument("--teacher-checkpoint", type=Path, help="state_dict (.safetensors or .pth) for the teacher")
    parser.add_argument("--num-classes", type=count_said, help="of the teacher; those of the data set for a checkpoint")
    parser.add_argument("--device", type=device_said, help="cuda if there is one, else cpu")
    parser.add_argument("--batch-size", type=count_said, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")


def make_teacher(args: argparse.Namespace, dataset: Any) -> nn.Module:
    """The teacher of `add_teacher`, on its device: its process's own under a launcher."""
    from e2kd.frozen.samples import class_names_of

    classes = args.num_classes
    if classes is None and args.teacher_checkpoint is not None:
        names = class_names_of(dataset)
        classes = None if names is None else len(names)
    model = make_model(args.teacher, classes, args.teacher_checkpoint, pretrained=args.teacher_checkpoint is None)
    return model.to(device_for(args.device)).eval()


def taking_colours(model: nn.Module) -> tuple[nn.Module, str]:
    """A network that takes images of colours alone, and what stands before the names of its layers then."""
    if channels_of(model) == colours_of(model):
        return model, ""
    return nn.Sequential(OrderedDict(inverse=AddInverse(), network=model)), "network."


def device_said(text: str) -> torch.device:
    """A device of torch's, for a command line.

    >>> device_said("cpu")
    device(type='cpu')
    """
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1 or the like, but got {text!r}") from error


def device_for(wanted: torch.device | None) -> torch.device:
    """The device that was asked for, else this process's GPU, else the CPU.

    Raises:
        ValueError: for a device that this machine doesn't have.
    """
    if wanted is not None:
        try:
            torch.empty(1, device=wanted)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
            said = shorten(str(error), 160, placeholder=" ...")
            raise ValueError(
                f"Expected a device of this machine, but --device {wanted} can't be used: {said} Pass --device cpu, or "
                "leave it out."
            ) from error
        return wanted
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
