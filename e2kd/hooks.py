"""Hooks on a network that copies and checkpoints of it do not take along."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

KINDS = (  # a module's dictionaries by the numbers of its hooks, or of some of them
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
SCRIPTED = (
    "A criterion of e2kd has hooks on this network, and torch.jit.script would compile them into it. Script a copy, "
    "which has none of them: torch.jit.script(copy.deepcopy(student)), or call criterion.remove() before."
)


class Hooks:
    """Some hooks, which are taken off together."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.left_out: list[_LeftOut] = []

    def before(self, module: nn.Module, action: Any, *, kwargs: bool = False) -> None:
        """Call `action(args)`, or `action(args, kwargs)`, before each forward of a module; what it returns is run."""
        self._put(module, module.register_forward_pre_hook(_Hook(module, action), with_kwargs=kwargs))

    def after(self, module: nn.Module, action: Any, *, always: bool = False) -> None:
        """Call `action(args, output)` after each forward of a module, if `always` of one that raised as well."""
        self._put(module, module.register_forward_hook(_Hook(module, action), always_call=always))

    def remove(self) -> None:
        """Take all of them off."""
        for handle in self.handles:
            handle.remove()
        for left_out in self.left_out:
            left_out.forget(handle.id for handle in self.handles)
        self.handles.clear()
        self.left_out.clear()

    def _put(self, module: nn.Module, handle: RemovableHandle) -> None:
        self.handles.append(handle)
        for entries in (getattr(module, kind) for kind in KINDS):
            if handle.id in entries:
                self.left_out.append(_LeftOut.of(entries))
                self.left_out[-1].numbers.add(handle.id)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return Hooks()


class _LeftOut:
    """Entries of one of a module's dictionaries of hooks that its copies and pickles are made without.

    It is called in the place of the dictionary's own `__reduce_ex__`, as an attribute of this one dictionary: others
    hold references to it, so it can't be replaced.
    """

    def __init__(self, entries: dict[int, Any]) -> None:
        self.entries = weakref.ref(entries)
        self.numbers: set[int] = set()

    @staticmethod
    def of(entries: dict[int, Any]) -> _LeftOut:
        """That of a dictionary."""
        found = vars(entries).get("__reduce_ex__")
        if not isinstance(found, _LeftOut):
            found = vars(entries)["__reduce_ex__"] = _LeftOut(entries)
        return found

    def forget(self, numbers: Any) -> None:
        """Those that were taken off; with the last of them the dictionary is as it was."""
        self.numbers.difference_update(numbers)
        entries = self.entries()
        if entries is not None and not self.numbers:
            vars(entries).pop("__reduce_ex__", None)

    def __call__(self, protocol: Any) -> Any:
        entries = self.entries()
        assert entries is not None
        kept = entries.copy()  # an OrderedDict's attributes are not copied
        for number in self.numbers:
            kept.pop(number, None)
        return kept.__reduce_ex__(protocol)


class _Hook:
    """A hook of one module, that does nothing in another one."""

    def __init__(self, module: nn.Module, action: Any) -> None:
        self.module, self.action = module, action

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.action(*args) if module is self.module else None

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks every hook for."""
        raise AttributeError(SCRIPTED)

    def __reduce__(self) -> Any:
        """A function that does nothing, needs no e2kd and takes anything: for who copies a module's dictionary."""
        return getattr, (nullcontext(), "__exit__")
