"""timm: a task for its trainers, and `python -m e2kd.trainers.timm train.py ...` for its own, unmodified script."""

from e2kd.trainers.timm.version import check_version

check_version()  # before timm's tasks are imported

from e2kd.trainers.timm.task import E2KDTask  # noqa: E402

__all__ = ["E2KDTask"]
