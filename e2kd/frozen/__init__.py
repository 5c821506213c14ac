"""Frozen teaching: a teacher's logits and explanation maps, computed once, kept on disk, verified on every read."""

from e2kd.frozen.dataset import FrozenDataset
from e2kd.frozen.errors import CacheError
from e2kd.frozen.merging import merge
from e2kd.frozen.recording import AppearanceOnly
from e2kd.frozen.teacher import FrozenTeacher
from e2kd.frozen.views import CanonicalView
from e2kd.frozen.writing import freeze

__all__ = ["AppearanceOnly", "CacheError", "CanonicalView", "FrozenDataset", "FrozenTeacher", "freeze", "merge"]
