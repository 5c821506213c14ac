"""One file for each host: timm, Accelerate, Hugging Face's Trainer. Each loads its host when it is asked for."""

from typing import Any

_HOSTS = ("accelerate", "timm", "transformers")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOSTS:
        raise AttributeError(f"module 'e2kd.trainers' has no attribute {name!r}")
    return import_module(f"e2kd.trainers.{name}")


def __dir__() -> list[str]:
    return list(_HOSTS)
