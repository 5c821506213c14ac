"""Copies, pickles and scripts of a student have none of its criterion's hooks, and everybody else's."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import e2kd
from e2kd.baselines import AT, FitNets
from e2kd.hooks import KINDS, Hooks

X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4)
CE = nn.CrossEntropyLoss()


def net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    body = [nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5))


def loaded(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def entries(model: nn.Module) -> list[Any]:
    """All that is in the dictionaries of hooks of a network, and on them."""
    found = [getattr(module, kind) for module in model.modules() for kind in KINDS]
    return [*(entry for hooks in found for entry in hooks.items()), *(it for hooks in found for it in vars(hooks))]


CRITERIA: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "e2kd": lambda s, t: e2kd.E2KDLoss(s, t, CE),
    "images": lambda s, t: e2kd.E2KDLoss(s, t, CE, explainer=e2kd.InputGradient()),
    "rivals": lambda s, t: e2kd.E2KDLoss(s, t, AT(s, t, FitNets(s, t, CE, example=X))),
}
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": loaded,
    "swa": lambda model: AveragedModel(model).module,
    "timm": lambda model: timm.utils.ModelEmaV3(model).module,
    "of a shallow copy": lambda model: copy.deepcopy(copy.copy(model)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", CRITERIA)
def test_copies_have_none_of_a_criterions_hooks(name: str, copied: str) -> None:
    student = net(4)
    criterion = CRITERIA[name](student, net(8))
    twin = COPIES[copied](student)
    criterion(student(X), Y).backward()
    assert entries(student)
    assert not entries(twin)
    assert not entries(COPIES[copied](student))
    assert torch.equal(torch.jit.script(twin.eval())(X), twin(X))
    assert b"e2kd" not in pickle.dumps(student)
    criterion.remove()
    assert not entries(student)


def test_a_saved_student_is_loaded_where_e2kd_is_not(tmp_path: Path) -> None:
    student = net(4)
    criterion = CRITERIA["rivals"](student, net(8))
    torch.save(student, tmp_path / "student.pt")
    load = "import sys, torch; sys.modules['e2kd'] = None; torch.load(sys.argv[1], weights_only=False)"
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "student.pt")], check=True)
    criterion(student(X), Y).backward()


SEEN: list[str] = []


def before(module: nn.Module, args: Any) -> None:
    SEEN.append("before")


def before_too(module: nn.Module, args: Any, kwargs: Any) -> None:
    SEEN.append("before too")


def after(module: nn.Module, args: Any, output: Any) -> None:
    SEEN.append("after")


def after_too(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    SEEN.append("after too")


@pytest.mark.parametrize("copied", COPIES)
def test_hooks_of_others_travel_and_stay_theirs(copied: str) -> None:
    student = net(4)
    theirs: list[Any] = [student.register_forward_pre_hook(before), student.register_forward_hook(after)]
    criterion = CRITERIA["images"](student, net(8))
    dictionaries = [getattr(student, kind) for kind in KINDS]
    theirs.append(student.register_forward_pre_hook(before_too, with_kwargs=True, prepend=True))
    theirs.append(student.register_forward_hook(after_too, with_kwargs=True, always_call=True))
    other = AT(student, net(8), CE)
    twin = COPIES[copied](student)
    first, second, third, fourth = (handle.id for handle in theirs)
    wanted = [[third, first], [third], [second, fourth], [fourth], [fourth]]
    assert [list(getattr(twin, kind)) for kind in KINDS] == wanted
    for model in (student, twin):
        SEEN.clear()
        model(X)
        assert SEEN == ["before too", "before", "after", "after too"]
    criterion.remove()
    assert len(entries(COPIES[copied](student))) == len(entries(twin))
    other.remove()
    assert all(getattr(student, kind) is hooks for kind, hooks in zip(KINDS, dictionaries, strict=True))
    assert len(entries(student)) == len(entries(twin))
    for handle in theirs:
        handle.remove()
    assert not entries(student)


def test_a_student_that_is_hooked_can_be_scripted_as_a_copy_alone() -> None:
    student = net(4).eval()
    criterion = CRITERIA["e2kd"](student, net(8))
    with pytest.raises(AttributeError, match="A criterion of e2kd has hooks on this network"):
        torch.jit.script(student)
    torch.jit.script(copy.deepcopy(student))
    criterion.remove()
    torch.jit.script(student)


def test_a_dictionary_of_hooks_that_somebody_copied_does_nothing_elsewhere() -> None:
    student, seen = net(4), list[Tensor]()
    hooks = Hooks()
    hooks.after(student, lambda args, output: seen.append(output))
    twin = net(4)
    twin._forward_hooks = student._forward_hooks.copy()
    for model in (copy.deepcopy(twin), loaded(twin)):
        assert torch.equal(model(X), net(4)(X))
    assert b"e2kd" not in pickle.dumps(twin)
    assert not seen
    hooks.remove()
    assert not entries(student)
