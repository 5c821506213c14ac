"""The live teacher: frozen, in eval mode, with its own normalisation and input size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.bcos.images import channels_of, check_range, decoded, encoded, encoder_of, is_bcos
from e2kd.errors import taking_images
from e2kd.explainers import Explainer, reads_images
from e2kd.inspection import inspect
from e2kd.lessons import Lesson
from e2kd.listening import Ear, Heard, Place, hearing
from e2kd.modes import as_computed, as_written, device_of, evaluating, unwrap
from e2kd.normalization import Normalization, check_pairs, expected_normalization, rescaled
from e2kd.outputs import logits_of
from e2kd.similarity import at_least_float32

FIRST_CHECKS = 3  # on an accelerator, batches that are looked at although that waits for the device
OTHER_IMAGES = "Give its input size through teacher_size=, or use a teacher for images of this kind."
INTEGERS = (
    "The images are {dtype}, and they would have to be normalised, resized or encoded for the teacher. Make floats of "
    "them before the student is called, or leave normalisations and sizes out and pass a teacher that takes them as "
    "the student does."
)


class Asking(NamedTuple):
    """How a teacher is to be asked, in the words of the criteria's arguments; None where nothing was said.

    Attributes:
        teacher_normalization: (mean, std) the teacher expects; a timm model's own by default.
        input_normalization: (mean, std) the images come in; None leaves the images as they are.
        teacher_size: (H, W) or side the teacher expects; a timm model of fixed size tells it itself.
    """

    teacher_normalization: Normalization | None = None
    input_normalization: Normalization | None = None
    teacher_size: int | tuple[int, int] | None = None

    def said(self) -> dict[str, object]:
        """What was said.

        >>> Asking(teacher_size=224).said()
        {'teacher_size': 224}
        """
        return {name: value for name, value in self._asdict().items() if value is not None}


class Teacher:
    """A model that is asked for logits and explanations and never trained.

    Args:
        model: the teacher, or a timm name (created with its pretrained weights).
        explainer: how to explain it; None for a teacher that is never asked to.
        asking: how to ask it.
    """

    def __init__(self, model: nn.Module | str, explainer: Explainer | None, asking: Asking | None = None) -> None:
        self.owned = isinstance(model, str)
        self.model = unwrap(_from_timm(model) if isinstance(model, str) else model)
        self.explainer = explainer
        self.ears: list[Ear] = []
        self.asking = asking = asking or Asking()
        size = asking.teacher_size
        self.size = (size, size) if isinstance(size, int) else size or _fixed_size(self.model)
        self.channels, self.bcos = channels_of(self.model), is_bcos(self.model)
        wanted, self.given = asking.teacher_normalization, asking.input_normalization
        check_pairs(teacher_normalization=wanted, input_normalization=self.given)
        self.wanted = expected_normalization(self.model, wanted)
        self.checks, self.encoding = 0, False

    def beside(self, student: nn.Module) -> Teacher:
        """Itself, told that images are in [0, 1] if the student is a B-cos network that encodes them, which wants that.

        What was said of the images comes first.
        """
        if self.given is None and is_bcos(student) and encoder_of(student) is not None:
            self.given, self.encoding = ((0.0,), (1.0,)), True
        return self

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, K] for the student's images, without a graph."""
        prepared = self.prepared(images)
        with self._hearing() as tensors:
            logits = self._logits(prepared)
        self._tell(images, prepared, logits, tensors)
        return logits

    def listen(self, places: Iterable[Place]) -> Ear:
        """An ear that will hear these places whenever the teacher is asked, until it is dismissed."""
        self.ears.append(Ear(places))
        return self.ears[-1]

    def dismiss(self, ear: Ear | None) -> None:
        """Tell this ear nothing any more."""
        self.ears = [one for one in self.ears if one is not ear]

    @property
    def unset(self) -> bool:
        """Whether nothing was said of how the model is to be asked."""
        return not self.asking.said()

    def follow(self, other: Teacher) -> None:
        """Ask the model as another teacher of it was told to."""
        self.asking, self.size, self.given, self.wanted = other.asking, other.size, other.given, other.wanted
        self.encoding = other.encoding

    def serves(self, other: Teacher) -> bool:
        """Whether this one may answer in another's place: for the same model, asked in the same way."""
        same = other.model is self.model and (other.unset or other.asking == self.asking)
        return same and (other.explainer is None or other.explainer == self.explainer)

    def answer_for(self, other: Teacher) -> None:
        """Tell what another's ears want to hear, in whose place this one will be asked."""
        self.ears += other.ears

    @contextmanager
    def _hearing(self) -> Iterator[dict[str, Tensor]]:
        places = {place for ear in self.ears for place in ear.places}
        if not places:
            yield {}
            return
        with as_written(self.model), hearing(self.model, places) as tensors:
            yield tensors

    def _tell(self, images: Tensor, prepared: Tensor, logits: Tensor, tensors: dict[str, Tensor]) -> None:
        size = (prepared.shape[-2], prepared.shape[-1])
        for ear in self.ears:
            own = {place.key: tensors[place.key] for place in ear.places if place.key in tensors}
            if len(own) == len(ear.places):
                ear.heard = Heard(images, size, logits, own)

    def _logits(self, prepared: Tensor) -> Tensor:
        with self._explained(prepared), torch.no_grad(), evaluating(self.model):
            return logits_of(self.model(prepared)).detach()

    def lesson(self, images: Tensor, *, explaining: bool, rows: Tensor | None = None) -> Lesson:
        """Logits for the student's images and, if explaining, the means to explain any class, of `rows` if given."""
        if not explaining:
            return Lesson(self.logits(images))
        prepared, explainer = self.prepared(images), self.explainer
        assert explainer is not None
        if rows is not None and reads_images(explainer):
            with self._explained(prepared):
                view = replace(inspect(self.model, prepared[rows], explainer), rows=rows)
            logits = self._completed(view.logits.detach(), prepared, rows)
            self._tell(images, prepared, logits, {})
        else:
            with self._explained(prepared), self._hearing() as tensors:
                view = inspect(self.model, prepared, explainer)
            logits = view.logits.detach()
            self._tell(images, prepared, logits, tensors)

        def explain(classes: Tensor, rows: Tensor | None) -> Tensor:
            return view.explain_each(explainer, classes, rows).detach()

        return Lesson(logits, explain)

    def _completed(self, logits: Tensor, prepared: Tensor, rows: Tensor) -> Tensor:
        """The logits of a whole batch: those of `rows`, which are known, and of the others."""
        known = torch.zeros(len(prepared), dtype=torch.int8, device=prepared.device).index_fill(0, rows, 1)
        others = known.argsort(stable=True)[: len(prepared) - len(rows)]  # not by nonzero, which waits for the device
        whole = logits.new_empty(len(prepared), logits.shape[1])
        whole[rows] = logits
        if len(others):
            whole[others] = self._logits(prepared[others]).to(logits.dtype)
        return whole

    def _explained(self, images: Tensor) -> AbstractContextManager[None]:
        return taking_images("teacher", self.model, images.shape, OTHER_IMAGES)

    def prepared(self, images: Tensor) -> Tensor:
        """The student's images as the teacher expects them: its device, colours, normalisation, size and encoding."""
        self._move_to(images.device)
        images, given = as_computed(self.model, images.detach()), self.given
        if not images.is_floating_point():
            return self._integers(images)
        if images.shape[1] == 2 * self.channels:  # a student that is a B-cos network was given them encoded
            images, given = decoded(images), ((0.0,) * self.channels, (1.0,) * self.channels)
        self._check_normalization(given)
        if self.encoding and self.wanted is not None:
            self._check(images, "student")
        images = rescaled(images, given, self.wanted)
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            wide = at_least_float32(images)
            resized = F.interpolate(wide, self.size, mode="bilinear", align_corners=False, antialias=True)
            images = resized.to(images.dtype)
        if self.bcos:
            self._check(images, "teacher")
            images = encoded(images, self.channels)
        return images

    def _integers(self, images: Tensor) -> Tensor:
        """Images that the networks themselves make floats of: nothing else can be done with them before."""
        told = self.asking._replace(teacher_size=None).said()
        other_size = self.size is not None and tuple(images.shape[-2:]) != self.size
        if told or other_size or self.bcos:
            raise ValueError(INTEGERS.format(dtype=images.dtype))
        return images

    def _check_normalization(self, given: Normalization | None) -> None:
        """Raise a ValueError where one normalisation was said and the other is not known: nothing would be done."""
        if self.asking.input_normalization is not None and self.wanted is None:
            raise ValueError(
                "Expected to know what normalisation the teacher expects, since input_normalization= was given, but it "
                "has no timm configuration. Pass teacher_normalization=(mean, std) too, or leave both out if the "
                "teacher expects the images as they are."
            )
        if self.asking.teacher_normalization is not None and given is None:
            raise ValueError(
                "Expected input_normalization=(mean, std) of your images beside teacher_normalization=, but got none. "
                "Pass ((0.0,), (1.0,)) for images in [0, 1], or leave both out if the teacher expects the images as "
                "they are."
            )

    def _check(self, images: Tensor, who: str) -> None:
        """Images in [0, 1]; after the first batches on the CPU alone, where looking does not wait."""
        self.checks += 1
        if images.device.type == "cpu" or self.checks <= FIRST_CHECKS:
            check_range(images, who)

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
    if Path(name).is_dir():
        raise ValueError(
            f"The teacher {name!r} is a folder, not a timm name. A cache of a frozen teacher is opened first: "
            f"FrozenTeacher.open({name!r})."
        )
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f'The teacher {name!r} is a timm name, which needs timm: pip install "e2kd[timm]", or pass a module.'
        ) from error
    model: nn.Module = timm.create_model(name, pretrained=True)
    return model.eval()


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """The size of a timm model that takes no other."""
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if not (isinstance(size, (tuple, list)) and getattr(patches, "strict_img_size", False)):
        return None
    return (int(size[0]), int(size[1]))
