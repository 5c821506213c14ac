"""Explanations that people can look at: what W(x) picks from an image, in its colours, and what each pixel adds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from e2kd.bcos.unit import full_precision
from e2kd.errors import shape
from e2kd.percentiles import percentile_of


def contributions(weights: Tensor, images: Tensor) -> Tensor:
    """What each pixel adds to the explained logit: W(x) * x, summed over channels.

    The pixels' sum is the logit without the bias of the logit layer, where the network adds nothing inside.

    Args:
        weights: W(x) [B, C, H, W].
        images: x [B, C, H, W], as the network got them.

    Returns:
        [B, 1, H, W], any sign.

    >>> contributions(torch.ones(1, 6, 2, 2), torch.full((1, 6, 2, 2), 0.5))[0, 0]
    tensor([[3., 3.],
            [3., 3.]])
    """
    _check(weights, images)
    return (full_precision(weights.detach()) * images.detach()).sum(1, keepdim=True)


def render(weights: Tensor, images: Tensor, *, smooth: int = 15, percentile: float = 99.5) -> Tensor:
    """The colours that W(x) looks for, as opaque as it is strong (Böhle et al. 2022).

    A colour's value is w+ / (w+ + v+) of the weights w of the colour and v of its inverse, their positive parts: 1
    where only bright pixels count, 0 where only dark ones do. Opacity is the norm of the weights, 0 where a pixel
    speaks against the class, averaged over `smooth` pixels and divided by its percentile.

    Args:
        weights: W(x) [B, 2C, H, W] with C = 3 colours and their inverse, or C = 1 of grey images.
        images: x [B, 2C, H, W], encoded by `AddInverse`.
        smooth: side of the square window, odd; 1 leaves the opacity as it is.
        percentile: of each image's opacity, in (0, 100], which and above which it is 1.

    Returns:
        RGBA [B, 4, H, W] in [0, 1].

    Raises:
        ValueError: for images that are not encoded, even windows, and percentiles out of range.

    >>> from e2kd.bcos import AddInverse, explanation_mode, resnet20
    >>> images = AddInverse()(torch.rand(2, 3, 32, 32)).requires_grad_()
    >>> with explanation_mode() as mode:
    ...     logits = resnet20().eval()(images)
    >>> render(mode.weights(logits.amax(1), images), images).shape
    torch.Size([2, 4, 32, 32])
    """
    parts = contributions(weights, images)
    if weights.shape[1] not in (2, 6):
        raise ValueError(
            f"Expected weights of colours and their inverse [B, 6, H, W], or of grey [B, 2, H, W], but got "
            f"{shape(weights.shape)}."
        )
    if smooth < 1 or smooth % 2 == 0:
        raise ValueError(f"Expected an odd window >= 1 to smooth over, but got {smooth}.")
    wide = full_precision(weights.detach())
    opacity = torch.linalg.vector_norm(wide, dim=1, keepdim=True).where(parts >= 0, 0)
    opacity = F.avg_pool2d(opacity, smooth, stride=1, padding=smooth // 2)
    return torch.cat([_colours(wide), relative(opacity, percentile).clamp(max=1)], 1)


def render_contributions(maps: Tensor, *, percentile: float = 99.5) -> Tensor:
    """Contributions in colours: red for the class, blue against it, white for nothing.

    Args:
        maps: [B, 1, H, W], as those of `contributions`.
        percentile: of each map's sizes, in (0, 100], which and above which the colour is full.

    Returns:
        RGB [B, 3, H, W] in [0, 1].

    >>> render_contributions(torch.tensor([[[[1., 0., -1.]]]]), percentile=100)[0, :, 0].T
    tensor([[1., 0., 0.],
            [1., 1., 1.],
            [0., 0., 1.]])
    """
    if maps.ndim != 4 or maps.shape[1] != 1:
        raise ValueError(f"Expected contributions [B, 1, H, W], but got {shape(maps.shape)}.")
    wide = full_precision(maps.detach())
    strength = relative(wide.abs(), percentile).clamp(max=1)
    red, blue = strength.where(wide > 0, 0), strength.where(wide < 0, 0)
    return torch.cat([1 - blue, 1 - red - blue, 1 - red], 1)


def relative(values: Tensor, percentile: float) -> Tensor:
    """Values >= 0 [B, ...] over each sample's percentile; zeros stay, and all others are infinite if that is 0.

    >>> relative(torch.tensor([[0., 1., 2.], [0., 0., 0.]]), 50)
    tensor([[0., 1., 2.],
            [0., 0., 0.]])
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"Expected a percentile in (0, 100], but got {percentile}.")
    return (values / percentile_of(values, percentile)).where(values > 0, 0)


def _colours(weights: Tensor) -> Tensor:
    """Each colour's share in the positive weights of itself and its inverse, 0 if neither is positive; grey as RGB."""
    colour, inverse = weights.clamp(min=0).chunk(2, 1)
    return (colour / (colour + inverse)).where(colour > 0, 0).expand(-1, 3, -1, -1)


def _check(weights: Tensor, images: Tensor) -> None:
    if weights.ndim != 4 or weights.shape != images.shape:
        raise ValueError(
            f"Expected weights and images [B, C, H, W] of one shape, the images encoded as the network got them, but "
            f"got {shape(weights.shape)} and {shape(images.shape)}."
        )


def save_explanation(path: str | Path, weights: Tensor, images: Tensor) -> None:
    """Save explanations as a picture, or as arrays.

    Args:
        path: `.png`, needs Pillow: a row for each image, with the image itself, `render` and `render_contributions`.
            `.safetensors` or `.npz`: `images`, `weights`, `contributions` and `rendering`, at full precision.
        weights: W(x) [B, 6, H, W], or [B, 2, H, W] of grey images.
        images: x, of the same shape, encoded by `AddInverse`.

    Raises:
        ValueError: for other kinds of files.

    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> with TemporaryDirectory() as folder:
    ...     save_explanation(f"{folder}/why.png", torch.randn(2, 6, 8, 8), torch.rand(2, 6, 8, 8))
    ...     Image.open(f"{folder}/why.png").size
    (24, 16)
    """
    kind = Path(path).suffix
    rendering, maps = render(weights, images), contributions(weights, images)
    arrays = {"images": images, "weights": weights, "contributions": maps, "rendering": rendering}
    arrays = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    if kind == ".png":
        _save_png(path, arrays)
    elif kind == ".safetensors":
        from safetensors.torch import save_file

        save_file(arrays, path)
    elif kind == ".npz":
        import numpy as np

        np.savez(path, **{name: full_precision(array).numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
    else:
        raise ValueError(f"Expected a path that ends in .png, .safetensors or .npz, but got {path}.")


def _save_png(path: str | Path, arrays: dict[str, Tensor]) -> None:
    from PIL import Image

    rendering = arrays["rendering"].float()
    opaque = torch.ones_like(rendering[:, :1])
    encoded = arrays["images"].float()
    colours = encoded[:, : encoded.shape[1] // 2].clamp(0, 1).expand(-1, 3, -1, -1)
    images = torch.cat([colours, opaque], 1)
    maps = torch.cat([render_contributions(arrays["contributions"]).float(), opaque], 1)
    rows = torch.cat([images, rendering, maps], 3).transpose(0, 1).flatten(1, 2)
    Image.fromarray((rows * 255).round().byte().permute(1, 2, 0).contiguous().numpy()).save(path)
