"""Pictures of explanations: the papers' rule pixel by pixel, ranges, corners, and files that read back equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from e2kd import bcos
from e2kd.bcos import AddInverse, contributions, explanation_mode, render, render_contributions, save_explanation


def case(batch: int = 2, side: int = 20) -> tuple[Tensor, Tensor]:
    """Weights of both signs and encoded images."""
    torch.manual_seed(0)
    return torch.randn(batch, 6, side, side), AddInverse()(torch.rand(batch, 3, side, side))


def by_the_pixel(w: Tensor, x: Tensor, smooth: int, percentile: float) -> Tensor:
    """The papers' picture of one image [6, H, W], written as loops."""
    height, width = w.shape[1:]
    picture, strength = torch.zeros(4, height, width), torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            pixel = w[:, i, j]
            for c in range(3):
                bright, dark = max(float(pixel[c]), 0), max(float(pixel[c + 3]), 0)
                picture[c, i, j] = bright / (bright + dark) if bright + dark else 0
            strength[i, j] = 0 if float(pixel @ x[:, i, j]) < 0 else float(pixel @ pixel) ** 0.5
    reach = smooth // 2
    for i in range(height):
        for j in range(width):
            window = strength[max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
            picture[3, i, j] = window.sum() / smooth**2
    picture[3] = (picture[3] / picture[3].quantile(percentile / 100)).clamp(0, 1)
    return picture


@pytest.mark.parametrize(("smooth", "percentile"), [(15, 99.5), (3, 90.0), (1, 100.0)])
def test_equals_the_papers_rule_pixel_by_pixel(smooth: int, percentile: float) -> None:
    w, x = case()
    found = render(w, x, smooth=smooth, percentile=percentile)
    assert found.shape == (2, 4, 20, 20)
    assert found.min() >= 0
    assert found.max() <= 1
    for i in range(2):
        torch.testing.assert_close(found[i], by_the_pixel(w[i], x[i], smooth, percentile), rtol=1e-5, atol=1e-6)


def test_equals_the_papers_code() -> None:
    golden = load_file(Path(__file__).parent / "golden" / "bcosification.safetensors")
    torch.testing.assert_close(render(golden["W"], golden["x"]), golden["rendering"], rtol=0, atol=1e-7)


def test_contributions_are_those_of_the_pixels_and_sum_to_the_logit() -> None:
    torch.manual_seed(0)
    model, x = bcos.resnet20().eval(), AddInverse()(torch.rand(2, 3, 32, 32)).requires_grad_()
    with explanation_mode() as mode:
        logits = model(x)
    w = mode.weights(logits.amax(1), x)
    maps = contributions(w, x)
    assert maps.shape == (2, 1, 32, 32)
    assert not maps.requires_grad
    scores = logits.amax(1) - model.get_submodule("logit_layer").bias
    torch.testing.assert_close(maps.sum((1, 2, 3)), scores, rtol=1e-3, atol=1e-8)


def test_transparent_where_there_is_no_weight_and_where_a_pixel_speaks_against() -> None:
    w, x = case()
    w[:, :, :10] = 0
    alpha = render(w, x, smooth=1)[:, 3]
    assert not alpha[:, :10].any()
    assert torch.equal(alpha > 0, (contributions(w, x) > 0)[:, 0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_the_weights_does_not_matter(scale: float) -> None:
    w, x = case()
    torch.testing.assert_close(render(w.double() * scale, x), render(w.double(), x))


def test_nothing_to_see_and_one_pixel_to_see() -> None:
    w, x = torch.zeros(2, 6, 40, 40), case(2, 40)[1]
    w[1, 0, 20, 20] = 1e-7
    found = render(w, x, smooth=1)
    assert not found[0].any()
    assert found[1, :, 20, 20].tolist() == [1, 0, 0, 1]
    assert found[1].sum() == 2


def test_half_precision_weights_are_seen() -> None:
    w, x = case()
    torch.testing.assert_close(render(w.half(), x.half()), render(w.half().float(), x.half().float()))
    assert render(w.half(), x.half()).dtype == torch.float32


def test_contributions_in_colours() -> None:
    maps = torch.tensor([[[[0.0, 1.0, 2.0, 4.0, -2.0, -8.0]]]])
    found = render_contributions(maps, percentile=60)  # of 0 1 2 2 4 8: 2
    red, white, half, blue = [1, 0, 0], [1, 1, 1], [1, 0.5, 0.5], [0, 0, 1]
    assert found[0, :, 0].T.tolist() == [white, half, red, red, blue, blue]
    assert render_contributions(torch.zeros(1, 1, 2, 2)).min() == 1


def test_a_picture_reads_back_equal(tmp_path: Path) -> None:
    w, x = case()
    save_explanation(tmp_path / "why.png", w, x)
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.mode == "RGBA"
        read = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    assert read.shape == (4, 40, 60)
    for i in range(2):
        image, rendering, maps = read[:, 20 * i : 20 * i + 20].split(20, 2)
        assert torch.equal(image[:3], (x[i, :3] * 255).round().byte())
        assert torch.equal(rendering, (render(w, x)[i] * 255).round().byte())
        assert torch.equal(maps[:3], (render_contributions(contributions(w, x))[i] * 255).round().byte())
        assert image[3].min() == maps[3].min() == 255


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_read_back_equal(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    w, x = (t.to(dtype) for t in case())
    path = tmp_path / f"why.{kind}"
    save_explanation(path, w.requires_grad_(), x)
    if kind == "npz":
        with np.load(path) as arrays:
            read = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    else:
        read = load_file(path)
    expected = {"images": x, "weights": w, "contributions": contributions(w, x), "rendering": render(w, x)}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, x: render(w, x[:, :3]), r"of one shape.* got \[2, 6, 20, 20\] and \[2, 3, 20, 20\]"),
        (
            lambda w, x: render(w[:, :3], x[:, :3]),
            r"colours and their inverse \[B, 6, H, W\], or of grey \[B, 2, H, W\], but got \[2, 3",
        ),
        (lambda w, x: render(w[0], x[0]), r"got \[6, 20, 20\]"),
        (lambda w, x: render(w, x, smooth=4), "odd window"),
        (lambda w, x: render(w, x, percentile=0), r"percentile in \(0, 100\]"),
        (lambda w, x: render_contributions(w), r"contributions \[B, 1, H, W\]"),
        (lambda w, x: save_explanation("why.jpg", w, x), r"\.png, \.safetensors or \.npz, but got why.jpg"),
    ],
)
def test_bad_input_is_named(call: Callable[[Tensor, Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*case())


def test_grey_images(tmp_path: Path) -> None:
    """A pixel that is looked for bright is white, one that is looked for dark black."""
    w, x = torch.tensor([[[[1.0, -1.0]], [[-1.0, 1.0]]]]), torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]])
    found = render(w, x, smooth=1)
    assert found.shape == (1, 4, 1, 2)
    torch.testing.assert_close(found[0, :3, 0], torch.tensor([[1.0, 0.0]] * 3))
    save_explanation(tmp_path / "grey.png", w, x)
    assert Image.open(tmp_path / "grey.png").size == (6, 1)
