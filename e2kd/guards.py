"""Checks of settings and batches, before anything is changed by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from e2kd.errors import UnsupportedModel, check_temperature, check_weight, shape, warn_user
from e2kd.explainers import Explainer, is_signed
from e2kd.lessons import Prepared
from e2kd.logits import KDLoss, MultiLabelKDLoss, multilabel_kd_loss

EXAMPLE = "Pass images as it will be given through example=."
PROBABILITIES = (
    "look like probabilities: none is below 0, and each sample's sum to 1. Expected what comes before the softmax; "
    "leave it out of the network and of the call"
)


def check_settings(
    weight: float,
    kd_weight: float,
    task_weight: float | None,
    temperature: float,
    fraction: float,
    every: int,
    during: tuple[int, int] | None,
    max_classes: int | None,
    resize: str | None,
) -> None:
    """Raise a ValueError for settings outside their range."""
    for name, value in (("weight", weight), ("kd_weight", kd_weight), ("task_weight", task_weight or 0.0)):
        check_weight(name, value)
    check_temperature(temperature)
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected fraction in (0, 1], but got {fraction}. weight=0 switches explanations off.")
    if not every >= 1 or every % 1:
        raise ValueError(f"Expected every to be an integer >= 1, but got {every}. weight=0 switches explanations off.")
    if during is not None and (len(during) != 2 or any(step % 1 for step in during) or not 0 <= during[0] < during[1]):
        raise ValueError(f"Expected during to be (start, stop) in steps, 0 <= start < stop, but got {during}.")
    if max_classes is not None and (isinstance(max_classes, bool) or not max_classes >= 1 or max_classes % 1):
        raise ValueError(
            f"Expected max_classes to be an integer >= 1, or None for all that classes= says, but got {max_classes}."
        )
    if resize not in (None, "image"):
        raise ValueError(f'Expected resize to be None or "image", but got {resize!r}.')


def check_prepared(
    teacher: Prepared,
    explainer: Explainer | None,
    classes: object,
    weight: float,
    distillation: object,
    settings: tuple[object, ...],
) -> None:
    """Raise a ValueError for settings that a frozen teacher decided when it was frozen."""
    check_settled(settings)
    if is_multilabel(distillation) and not teacher.complete:
        raise ValueError(
            "Expected all logits of a multi-label teacher, but the cache holds the largest alone (top=): of the others "
            "the sum of their softmax is known, which says nothing of their sigmoids. Freeze again without top=."
        )
    if weight != 0 and not teacher.explains:
        raise ValueError(
            f"Expected explanations for weight={weight}, but the cache holds logits alone. Pass weight=0 for plain KD, "
            "or freeze the teacher with an explainer."
        )
    if weight != 0 and explainer is None and teacher.explainer is None:
        raise ValueError(
            "The cached maps were made by an explainer of your own. Pass it for the student as well: explainer=..."
        )
    _check_signs(teacher, explainer)
    if teacher.explains and classes != teacher.choice:
        raise ValueError(
            f"The cached maps explain classes={teacher.choice!r}, but the criterion was asked for {classes!r}. Pass "
            f"classes={teacher.choice!r}, or freeze again with the other choice."
        )


def is_multilabel(distillation: object) -> bool:
    """Whether logits are distilled as those of classes that don't exclude one another.

    >>> is_multilabel(MultiLabelKDLoss()), is_multilabel(KDLoss())
    (True, False)
    """
    return isinstance(distillation, MultiLabelKDLoss) or distillation is multilabel_kd_loss


def check_settled(settings: tuple[object, ...]) -> None:
    """Raise a ValueError for settings that a frozen teacher decided when it was frozen."""
    if any(value is not None for value in settings):
        raise ValueError(
            "teacher_explainer, teacher_normalization, input_normalization and teacher_size were settled when the "
            "teacher was frozen. Leave them out, or freeze again with other ones."
        )


def _check_signs(teacher: Prepared, explainer: Explainer | None) -> None:
    """Raise where one of the explainers gives maps below 0 and the other can't: they could never be alike."""
    if explainer is None or teacher.explainer is None:
        return
    signs = is_signed(explainer), is_signed(teacher.explainer)
    if None not in signs and signs[0] != signs[1]:
        raise ValueError(
            f"The cached maps were made by {type(teacher.explainer).__name__}, which is "
            f"{'signed' if signs[1] else '>= 0'}, but the student would be explained by {type(explainer).__name__}, "
            f"which is {'signed' if signs[0] else '>= 0'}. Leave explainer= out to have it chosen, or freeze again."
        )


def check_module(value: object, role: str, order: str = "student, teacher, criterion") -> None:
    """Raise a TypeError for a student or teacher that is no module.

    Args:
        role: what it is called.
        order: of what the criterion is built from.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"Expected the {role} to be a torch.nn.Module, but got {type(value).__name__}: {value!r:.60}.")
    if isinstance(value, torch.jit.ScriptModule):
        raise UnsupportedModel(
            f"The {role} is TorchScript, whose layers can't be heard or differentiated twice. Pass the network that it "
            "was made of."
        )
    if isinstance(value, _Loss):
        raise TypeError(f"Expected the {role} to be a network, but got {type(value).__name__}. The order is {order}.")


def check_example(example: object) -> None:
    """Raise a TypeError or ValueError for what is no batch of images to find layers with; None is none."""
    if example is None:
        return
    if not isinstance(example, Tensor):
        raise TypeError(
            f"Expected example to be images [B, C, H, W], but got {type(example).__name__}: {example!r:.60}."
        )
    if example.ndim != 4 or len(example) == 0:
        raise ValueError(
            f"Expected example to be a batch of images [B, C, H, W], but got {shape(example.shape)}. Pass images as "
            "the student will be given."
        )


def check_not_empty(logits: Tensor) -> None:
    """Raise a ValueError for a batch of no images."""
    if len(logits) == 0:
        raise ValueError("Expected a batch of at least one image, but got an empty one. Skip empty batches.")


def check_batch(logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise a ValueError for logits that can't be compared.

    Non-finite values are looked for on the CPU only: on an accelerator that would wait for the device at every step,
    and they show as a non-finite loss.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"The student's logits are {shape(logits.shape)} and the teacher's {shape(teacher_logits.shape)}. "
            "Both must be classifiers of the same classes in the same order."
        )
    if logits.device.type == "cpu":
        for name, values in (("student", logits), ("teacher", teacher_logits)):
            _warn_probabilities(name, values.detach())
            if not values.isfinite().all():
                raise ValueError(
                    f"The {name}'s logits hold {int((~values.isfinite()).sum())} values that are nan or infinite. "
                    "Nothing was changed by this step; look at the images, the learning rate and the precision."
                )


def _warn_probabilities(name: str, values: Tensor) -> None:
    """Warn of a softmax at the end of a network, whose KL would be that of a second softmax, all but uniform."""
    if are_probabilities(values):
        warn_user(f"The {name}'s logits {PROBABILITIES}.")


def are_probabilities(logits: Tensor) -> bool:
    """Whether logits [B, K] look like the output of a softmax.

    >>> are_probabilities(torch.tensor([[0.25, 0.75]])), are_probabilities(torch.tensor([[-0.5, 1.5]]))
    (True, False)
    """
    return logits.shape[1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all())


def check_task(criterion: object) -> None:
    """Raise a TypeError for a loss between two networks in the place of the task's."""
    if isinstance(criterion, (KDLoss, MultiLabelKDLoss)):
        raise TypeError(
            f"Expected criterion to be the task's loss of outputs and targets, but got {type(criterion).__name__}, "
            f"which compares logits with a teacher's. Pass distillation={type(criterion).__name__}() to E2KDLoss, and "
            "as criterion what you trained with before, or None."
        )


def check_explainers(**explainers: object) -> None:
    """Raise a TypeError for what is no explainer, by the names of the options."""
    for option, explainer in explainers.items():
        if explainer is not None and (isinstance(explainer, type) or not hasattr(explainer, "layer")):
            raise TypeError(
                f"Expected {option} to be an object with a layer and __call__(features, gradient), such as e2kd.CAM() "
                f'or e2kd.GradCAM("layer3"), but got {explainer!r}.'
            )


def check_grid(maps: Tensor, whose: str, option: str = "explainer") -> None:
    """Raise when a map has one cell, where any two positive maps look alike."""
    if maps.shape[-2] * maps.shape[-1] == 1:
        raise UnsupportedModel(
            f"The {whose} maps have one cell, which says nothing about where it looks. Use larger images, or name an "
            f"earlier layer: {option}=GradCAM(layer=...)."
        )


def check_maps_of(maps: Tensor, weights: Tensor, whose: str) -> None:
    """Raise a ValueError unless there is a map of every explained class [B, k, ...], whose weights are [B, k]."""
    if maps.shape[:2] != weights.shape:
        raise ValueError(
            f"Expected the {whose} maps to be of {len(weights)} samples, but got {len(maps)}. An explainer returns as "
            "many maps as it is given features, in their order."
        )


def warn_graph(term: Tensor) -> None:
    """Warn of a term that can't reach the student, for want of a graph."""
    if not term.requires_grad:
        warn_user(
            "The similarity of the explanations has no graph, so it teaches nothing: all that could change the maps is "
            "frozen, or the explainer or similarity leaves torch (detach, NumPy, comparisons)."
        )


def warn_dead(dead: Tensor, total: Tensor, place: str) -> None:
    """Warn when most explained samples have an all-zero map. On an accelerator `.parts["zero_maps"]` tells."""
    if dead.device.type == "cpu" and float(dead.sum()) > 0.5 * float(total.sum()) > 0:
        warn_user(
            f"In this batch more than half of the maps are zero everywhere (the student's at {place}, or the "
            "teacher's), so their explanations teach nothing. Expected in the first steps of an untrained student; if "
            '`.parts["zero_maps"]` stays high, name another layer or use another explainer.'
        )


def is_teaching(criterion: nn.Module, student: nn.Module, logits: Tensor, role: str = "student") -> bool:
    """Whether a criterion is asked to teach a network by these logits, or for the plain task loss.

    Args:
        role: what the network is called where it is in eval mode although gradients are on, of which a warning tells.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    if criterion.training != student.training:
        warn_eval(role if criterion.training else "criterion", role)
    return criterion.training and student.training


def warn_eval(evaluated: str, role: str) -> None:
    """Warn that a loss with gradients was asked for while the network that learns or the criterion is in eval mode."""
    also = " (BatchNorm layers may stay in eval mode)" if evaluated == role else ""
    warn_user(
        f"The criterion returns the plain task loss because the {evaluated} is in eval mode, although gradients are "
        f"on: the {role} is taught nothing else. Call {evaluated}.train() to teach it{also}, or evaluate under "
        "torch.no_grad()."
    )
