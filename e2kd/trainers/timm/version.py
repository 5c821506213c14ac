"""Which timm it takes."""

from __future__ import annotations

from importlib.util import find_spec

OLDEST = "1.0.27"  # the first whose tasks compile, average, save and resume


def check_version() -> None:
    """Raise an ImportError for a timm without what tasks need; found by what it has, not by its number."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'e2kd.trainers.timm needs timm >= {OLDEST}: pip install "e2kd[timm]"') from error
    if find_spec("timm.task") is not None:
        from timm.task import TrainingTask

        if hasattr(TrainingTask, "get_checkpoint_state"):
            return
    raise ImportError(f"e2kd.trainers.timm needs timm >= {OLDEST}, but found {timm.__version__}: pip install -U timm")
