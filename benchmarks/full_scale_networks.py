"""Teachers and students by name, and the images they expect."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from e2kd.bcos import AddInverse, load_official
from e2kd.bcos.images import channels_of, colours_of, is_bcos
from e2kd.choosing import explainers_of
from e2kd.commands.models import BCOS, make_model, read_state
from e2kd.explainers import CAM, BcosContributions, Explainer, GradCAM
from e2kd.inspection import explain
from e2kd.modes import timm_configuration
from e2kd.normalization import Normalization
from e2kd.teacher import Asking, Teacher

IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNCHANGED: Normalization = ((0.0,) * 3, (1.0,) * 3)  # images in [0, 1], as B-cos networks take them
OFFICIAL, TORCHVISION = "bcos.official", "torchvision."
NAMES = "timm name, torchvision.resnet34 and the like, bcos.resnet18 and the like, or bcos.official for a checkpoint"


def network(
    name: str, classes: int, checkpoint: Path | None, *, pretrained: bool = False, logit_bias: float | None = None
) -> nn.Module:
    """A network for images of three colours; with the weights of a checkpoint, of its maker, or at random.

    Args:
        name: of timm, of torchvision, of `e2kd.bcos`, or "bcos.official": whatever the checkpoint of the B-cos
            authors says it is.
        classes: of its head.
        checkpoint: a state_dict (.safetensors, .pth).
        pretrained: the maker's weights and head, whatever its classes; they may have to be downloaded.
        logit_bias: that "bcos.official" was trained with, which no file says; None for that of the B-cos releases.

    Raises:
        ValueError: for a B-cos network without the weights that were asked for, or a bias of another network.
    """
    if logit_bias is not None and name != OFFICIAL:
        raise ValueError(f"A logit bias is an official B-cos network's, but the teacher is {name}.")
    if name == OFFICIAL:
        if checkpoint is None:
            raise ValueError(f"Expected the file of an official B-cos network beside {OFFICIAL}: --teacher-checkpoint.")
        model = taking_colours(load_official(checkpoint, logit_bias=logit_bias))
        if logit_bias is not None:
            model.register_buffer("told_logit_bias", torch.tensor(logit_bias))  # the weights' hash, a cache's, has it
        return model
    if name.startswith(TORCHVISION):
        return _torchvision(name.removeprefix(TORCHVISION), classes, checkpoint, pretrained=pretrained)
    if pretrained and name.startswith(BCOS):
        raise ValueError(f"{name} comes without weights. Pass a checkpoint, or {OFFICIAL} and the file of its authors.")
    return taking_colours(make_model(name, None if pretrained else classes, checkpoint, pretrained=pretrained))


def _torchvision(name: str, classes: int, checkpoint: Path | None, *, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model

    if pretrained:
        return get_model(name, weights="DEFAULT")
    model = get_model(name, num_classes=classes)
    if checkpoint is not None:
        model.load_state_dict(read_state(checkpoint))
    return model


def taking_colours(model: nn.Module) -> nn.Module:
    """The model, taking colours: one that expects them with their inverse gets that from a first layer."""
    return model if channels_of(model) == colours_of(model) else nn.Sequential(AddInverse(), model)


def normalization_of(model: nn.Module) -> Normalization:
    """(mean, std) that a network expects: its own where timm says so, ImageNet's of torchvision, none of B-cos."""
    if is_bcos(model):
        return UNCHANGED
    known = timm_configuration(model)
    return (tuple(known["mean"]), tuple(known["std"])) if "mean" in known else IMAGENET


def asked(teacher: nn.Module, student: nn.Module, *, signed: bool = False) -> Teacher:
    """The teacher, ready for the student's images; `signed` ones explain by `CAM`, unless a network is a B-cos one."""
    plain = signed and not is_bcos(teacher) and not is_bcos(student)
    theirs = CAM() if plain else explainers_of(student, teacher, None, None)[1]
    return Teacher(teacher, theirs, Asking(normalization_of(teacher), normalization_of(student)))


def evidence(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """What speaks for a class, >= 0: contributions in a B-cos network, else GradCAM; [B, 1, h, w]."""
    explainer: Explainer = BcosContributions(resolution=None) if is_bcos(model) else GradCAM()
    return explain(model, images, classes, explainer).maps
