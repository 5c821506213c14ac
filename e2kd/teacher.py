"""The live teacher: frozen, in eval mode, with its own normalisation and input size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.errors import taking_images
from e2kd.explainers import Explainer
from e2kd.inspection import inspect
from e2kd.lessons import Lesson
from e2kd.modes import device_of, dtype_of, evaluating, unwrap
from e2kd.outputs import logits_of

Normalization = tuple[Sequence[float], Sequence[float]]

OTHER_IMAGES = "Give its input size through teacher_size=, or use a teacher for images of this kind."


class Teacher:
    """A model that is asked for logits and explanations and never trained.

    Args:
        model: the teacher, or a timm name (created with its pretrained weights).
        explainer: how to explain it.
        normalization: (mean, std) the teacher expects; a timm model's own by default.
        input_normalization: (mean, std) the images come in; None leaves the images as they are.
        size: (H, W) or side the teacher expects; a timm model of fixed size tells it itself.
    """

    def __init__(
        self,
        model: nn.Module | str,
        explainer: Explainer,
        normalization: Normalization | None = None,
        input_normalization: Normalization | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        self.owned = isinstance(model, str)
        self.model = unwrap(_from_timm(model) if isinstance(model, str) else model)
        self.explainer = explainer
        self.size = (size, size) if isinstance(size, int) else size or _fixed_size(self.model)
        self.rescale = _rescale(self.model, normalization, input_normalization)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, K] for the student's images, without a graph."""
        prepared = self.prepared(images)
        with self._explained(prepared), torch.no_grad(), evaluating(self.model):
            return logits_of(self.model(prepared)).detach()

    def lesson(self, images: Tensor, *, explaining: bool) -> Lesson:
        """Logits for the student's images and, if explaining, the means to explain any class."""
        if not explaining:
            return Lesson(self.logits(images))
        prepared = self.prepared(images)
        with self._explained(prepared):
            view = inspect(self.model, prepared, self.explainer)

        def explain(classes: Tensor, rows: Tensor | None) -> Tensor:
            return view.explain(self.explainer, classes, rows).detach()

        return Lesson(view.logits.detach(), explain)

    def _explained(self, images: Tensor) -> AbstractContextManager[None]:
        return taking_images("teacher", self.model, images.shape, OTHER_IMAGES)

    def prepared(self, images: Tensor) -> Tensor:
        """The student's images as the teacher expects them: its device, normalisation and size."""
        self._move_to(images.device)
        images = images.detach().to(dtype_of(self.model))
        if self.rescale is not None:
            scale, shift = (t.to(images) for t in self.rescale)
            images = images * scale + shift
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        return images

    def _move_to(self, device: torch.device) -> None:
        where = device_of(self.model, device)
        if where == device:
            return
        if not self.owned:
            raise RuntimeError(
                f"The images are on {device} but the teacher is on {where}. The teacher is not part of the criterion, "
                f"so move it yourself: teacher.to({str(device)!r})."
            )
        self.model.to(device)


def _from_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f'The teacher {name!r} is a timm name, which needs timm: pip install "e2kd[timm]", or pass a module.'
        ) from error
    model: nn.Module = timm.create_model(name, pretrained=True)
    return model.eval()


def _configuration(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "pretrained_cfg", None)
    return found if isinstance(found, dict) else {}


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """The size of a timm model that takes no other."""
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if not (isinstance(size, (tuple, list)) and getattr(patches, "strict_img_size", False)):
        return None
    return (int(size[0]), int(size[1]))


def expected_normalization(model: nn.Module, given: Normalization | None) -> Normalization | None:
    """(mean, std) that a model expects: what was said, else what a timm model knows of itself."""
    configuration = _configuration(model)
    known = (configuration["mean"], configuration["std"]) if "mean" in configuration else None
    return known if given is None else given


def _rescale(
    model: nn.Module, wanted: Normalization | None, given: Normalization | None
) -> tuple[Tensor, Tensor] | None:
    """Factor and offset [C, 1, 1] from the images' normalisation to the teacher's."""
    wanted = expected_normalization(model, wanted)
    if given is None or wanted is None:
        return None
    (mean_in, std_in), (mean, std) = (tuple(torch.tensor(v, dtype=torch.float64) for v in n) for n in (given, wanted))
    scale, shift = std_in / std, (mean_in - mean) / std
    if torch.allclose(scale, torch.ones_like(scale)) and torch.allclose(shift, torch.zeros_like(shift)):
        return None
    return scale[:, None, None], shift[:, None, None]
