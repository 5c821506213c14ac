"""ROAD: images without the pixels that a map calls irrelevant, or relevant, and the score of maps that follows."""

from e2kd.perturb.curves import RoadCurves, road_curves
from e2kd.perturb.imputation import Perturbed, impute, keep_least, keep_most, road

__all__ = ["Perturbed", "RoadCurves", "impute", "keep_least", "keep_most", "road", "road_curves"]
