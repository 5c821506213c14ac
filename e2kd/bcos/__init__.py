"""B-cos networks: networks whose weights W(x) on the image explain their logits."""

from e2kd.bcos.attention import Attention
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import GELU, AddInverse, LogitLayer
from e2kd.bcos.linear import BcosLinear
from e2kd.bcos.mode import ExplanationMode, explanation_mode
from e2kd.bcos.norms import BatchNormUncentered2d, GroupNorm2d, LayerNorm, LayerNorm2d, PositionNorm2d

__all__ = [
    "GELU",
    "AddInverse",
    "Attention",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "ExplanationMode",
    "GroupNorm2d",
    "LayerNorm",
    "LayerNorm2d",
    "LogitLayer",
    "PositionNorm2d",
    "explanation_mode",
]
