"""What the demo needs beyond torch, and the sentence a user sees without it."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "kornia": "kornia",
}


class MissingExtra(ImportError):
    """A package of the extra `demo` is not installed."""


def require_extras() -> None:
    """Raises at the start, not after minutes of training, when a package of the extra is missing."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise MissingExtra(f'the demo needs {", ".join(missing)}: pip install "e2kd[demo]"')
