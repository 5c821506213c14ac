"""Self-attention that an explanation takes as fixed weights on the values."""

from __future__ import annotations

from torch import Tensor, nn

from e2kd.bcos.dynamic import attended
from e2kd.bcos.linear import BcosLinear
from e2kd.bcos.norms import LayerNorm


class Attention(nn.Module):
    """Multi-head self-attention of B-cos ViTs: norm, queries, keys and values, attention, B-cos projection.

    The attention softmax(q k' / sqrt(d)) is a dynamic weight: an explanation reaches the tokens through the values.

    Args:
        dim: length of the tokens.
        heads: number of heads; each has `dim // heads` channels.
        b, max_out: of the projection.

    >>> import torch
    >>> Attention(8, heads=2)(torch.rand(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, b: float = 2, max_out: int = 1) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Expected a dim divisible by heads, but got {dim} and {heads}.")
        self.heads = heads
        self.norm = LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = BcosLinear(dim, dim, b=b, max_out=max_out)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        qkv = self.to_qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.to_out(attended(attention, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
