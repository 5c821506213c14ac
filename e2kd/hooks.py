"""Hooks on a network that copies and checkpoints of it do not take along."""

from __future__ import annotations

from typing import Any

from torch import nn


class Hooks:
    """Some hooks, which are taken off together."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def before(self, module: nn.Module, action: Any, *, kwargs: bool = False) -> None:
        """Call `action(args)`, or `action(args, kwargs)`, before each forward of a module; what it returns is run."""
        self.handles.append(module.register_forward_pre_hook(_Hook(module, action), with_kwargs=kwargs))

    def after(self, module: nn.Module, action: Any, *, always: bool = False) -> None:
        """Call `action(args, output)` after each forward of a module, if `always` of one that raised as well."""
        self.handles.append(module.register_forward_hook(_Hook(module, action), always_call=always))

    def remove(self) -> None:
        """Take all of them off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _inert(*_: Any) -> None:
    """What a copied or unpickled hook does."""


def _make_inert() -> Any:
    return _inert


class _Hook:
    """A hook of one module that copies and pickles to nothing, so that EMA copies and checkpoints stay clean."""

    def __init__(self, module: nn.Module, action: Any) -> None:
        self.module, self.action = module, action

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.action(*args) if module is self.module else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()
