"""From the tensors networks pass around to maps [B, C, h, w], and which layout a tensor has."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from e2kd.errors import UnsupportedModel, shape

MAX_PREFIX = 16  # class, distillation and register tokens in front of the patch tokens
DROPPED = (
    "A network that drops patches in training has no map of the whole image: switch that off (timm: patch_drop_rate=0)."
)


@dataclass(frozen=True)
class Layout:
    """How features are laid out: "NCHW", "NHWC" or "NLC" with `prefix` tokens before the patch tokens.

    Attributes:
        found: (h, w, H, W), the grid of tokens and the size of the images they were found with; None for any.

    >>> import torch
    >>> Layout("NLC", prefix=1).to_maps(torch.zeros(2, 197, 8), (224, 224)).shape
    torch.Size([2, 8, 14, 14])
    """

    order: str
    prefix: int = 0
    found: tuple[int, int, int, int] | None = field(default=None, repr=False)

    def to_maps(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Features in this layout -> maps [B, C, h, w]; a view where possible.

        Raises:
            UnsupportedModel: when the tokens don't form a grid of the image's aspect ratio, or one of other patches
                than those they were found with.
        """
        if self.order == "NCHW":
            return features
        if self.order == "NHWC":
            return features.movedim(-1, 1)
        grid = grid_of(features.shape[1] - self.prefix, image_size)
        if grid is None:
            raise UnsupportedModel(
                f"{features.shape[1]} tokens with {self.prefix} prefix tokens don't form a grid with the aspect "
                f"ratio of images {shape(image_size)}. {DROPPED} Else name a layer with spatial output through layer=."
            )
        if not self._same_patches(grid, image_size):
            assert self.found is not None
            raise UnsupportedModel(
                f"{grid[0]} x {grid[1]} tokens came of images {shape(image_size)}, but {self.found[0]} x "
                f"{self.found[1]} of images {shape(self.found[2:])} where this layer was found. {DROPPED}"
            )
        tokens = features[:, self.prefix :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], *grid)

    def _same_patches(self, grid: tuple[int, int], image_size: tuple[int, int]) -> bool:
        """Whether a grid is as fine as that which was found, up to the rounding of other image sizes."""
        if self.found is None:
            return True
        expected = [n * new / old for n, new, old in zip(self.found[:2], image_size, self.found[2:], strict=True)]
        slack = 0 if image_size == self.found[2:] else 1
        return all(abs(n - wanted) <= slack for n, wanted in zip(grid, expected, strict=True))


def grid_of(tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid (h, w) of `tokens` patch tokens with the image's aspect ratio, if there is one.

    >>> grid_of(98, (224, 448)), grid_of(197, (224, 224))
    ((7, 14), None)
    """
    if tokens < 1:
        return None
    height = round((tokens * image_size[0] / image_size[1]) ** 0.5)
    if height < 1 or tokens % height:
        return None
    width = tokens // height
    return (height, width) if _same_aspect(height, width, image_size) else None


def _same_aspect(height: int, width: int, image_size: tuple[int, int]) -> bool:
    """Whether a grid may come from the image: square from square, else up to the rounding of a stride."""
    if image_size[0] == image_size[1]:
        return height == width
    return abs(height * image_size[1] - width * image_size[0]) <= max(image_size) * 1.01


def _is_like(height: int, width: int, image_size: tuple[int, int]) -> bool:
    """Whether a grid may be what convolutions without padding left of the image: not [tokens, pixels of each]."""
    return min(height, width) > 1 and 0.5 < height * image_size[1] / (width * image_size[0]) < 2


def layout_of(
    shape: tuple[int, ...],
    image_size: tuple[int, int],
    prefer: str = "NCHW",
    prefix: int | None = None,
    *,
    convolved: bool = False,
) -> Layout | None:
    """The layout of a feature tensor of this shape, or None when it holds no map of more than one cell.

    Args:
        shape: [B, C, h, w], [B, h, w, C] or [B, tokens, C].
        image_size: (H, W) of the images the features come from.
        prefer: which order to take for a 4-D shape that could be both.
        prefix: tokens before the patch tokens, as the network says; taken where the others form a grid.
        convolved: whether convolutions made such a tensor, [B, C, h, w]: then (h, w) may have somewhat another aspect
            ratio than the images, as without padding.

    >>> layout_of((2, 7, 7, 768), (224, 224)).order, layout_of((2, 198, 192), (224, 224))
    ('NHWC', Layout(order='NLC', prefix=2))
    """
    if len(shape) == 4:
        return _layout_of_image(shape, image_size, prefer, convolved)
    if len(shape) == 3 and shape[2] > 1:  # one-dimensional pools end as [B, C, 1]
        return _layout_of_tokens(shape[1], image_size, prefix)
    return None


def _layout_of_image(
    shape: tuple[int, ...], image_size: tuple[int, int], prefer: str, convolved: bool
) -> Layout | None:
    sides = {"NCHW": (shape[2], shape[3]), "NHWC": (shape[1], shape[2])}
    inside = {o: (h, w) for o, (h, w) in sides.items() if h * w > 1 and h <= image_size[0] and w <= image_size[1]}
    fitting = [order for order, (h, w) in inside.items() if _same_aspect(h, w, image_size)]
    if convolved and "NCHW" not in fitting and "NCHW" in inside and _is_like(*inside["NCHW"], image_size):
        return Layout("NCHW")
    if not fitting:
        return None
    return Layout(prefer if prefer in fitting else fitting[0])


def _layout_of_tokens(tokens: int, image_size: tuple[int, int], known: int | None) -> Layout | None:
    grids = {prefix: grid_of(tokens - prefix, image_size) for prefix in range(min(MAX_PREFIX, tokens - 2) + 1)}
    found = {prefix: grid for prefix, grid in grids.items() if grid is not None and grid[0] * grid[1] > 1}
    exact = (prefix for prefix, (h, w) in found.items() if h * image_size[1] == w * image_size[0])
    prefix = known if known in found else next(exact, next(iter(found), None))
    return None if prefix is None else Layout("NLC", prefix, (*found[prefix], *image_size))
