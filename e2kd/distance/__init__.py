"""Distance correlation of features: how much of what one network sees another sees too.

`dcor_unbiased`, `partial_dcor` and their relatives take features and are differentiable; `DistanceSums` gathers batches
and ranks and gives scores with their errors; the pieces they are made of (`distance_matrix`, `u_center`, `inner`,
`residual`, `correlation`) are here too.
"""

from e2kd.distance.centring import PAPERS, PAPERS_BIASED, Guards, double_center, inner, residual, u_center
from e2kd.distance.correlation import correlation, dcor, dcor_unbiased, partial_dcor, semi_partial_dcor
from e2kd.distance.estimates import null_spread, permutation_null
from e2kd.distance.matrices import distance_matrix
from e2kd.distance.scores import DistanceSums, Score

__all__ = [
    "PAPERS",
    "PAPERS_BIASED",
    "DistanceSums",
    "Guards",
    "Score",
    "correlation",
    "dcor",
    "dcor_unbiased",
    "distance_matrix",
    "double_center",
    "inner",
    "null_spread",
    "partial_dcor",
    "permutation_null",
    "residual",
    "semi_partial_dcor",
    "u_center",
]
