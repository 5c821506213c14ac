"""B-cos layers: golden parity, the three derivatives, explanation mode, corners of the number range."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from e2kd.bcos import (
    GELU,
    AddInverse,
    Attention,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    GroupNorm2d,
    LayerNorm,
    LayerNorm2d,
    LogitLayer,
    PositionNorm2d,
    explanation_mode,
)
from e2kd.bcos.mode import current_mode
from e2kd.errors import UnsupportedModel
from e2kd.modes import kept_statistics

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
GOLDEN: dict[str, Callable[[], nn.Module]] = {
    "conv3x3_b2": lambda: BcosConv2d(4, 5, 3, 2, 1),
    "conv1x1_b2": lambda: BcosConv2d(4, 5),
    "conv_groups_b2": lambda: BcosConv2d(4, 6, 3, 1, 1, groups=2),
    "conv_maxout2_b2": lambda: BcosConv2d(4, 3, 3, 1, 1, max_out=2),
    "conv_b1.5": lambda: BcosConv2d(4, 3, 3, 1, 1, b=1.5),
    "conv_b1": lambda: BcosConv2d(4, 3, 3, 1, 1, b=1),
    "linear_b2": lambda: BcosLinear(6, 5),
    "linear_maxout2_b1.25": lambda: BcosLinear(6, 5, b=1.25, max_out=2),
    "bnu_train": lambda: BatchNormUncentered2d(4),
    "bnu_eval": lambda: BatchNormUncentered2d(4).eval(),
    "gn_layernorm2d": lambda: LayerNorm2d(4),
    "layernorm": lambda: LayerNorm(6),
    "attention": lambda: Attention(8, heads=2),
}
MAPS = (3, 4, 5, 5)
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depthwise": (lambda: BcosConv2d(4, 4, 3, padding=1, groups=4), MAPS),
    "dilated": (lambda: BcosConv2d(4, 6, 3, padding=2, dilation=2, groups=2), MAPS),
    "reflected": (lambda: BcosConv2d(4, 3, (3, 1), (1, 2), (1, 0), padding_mode="reflect"), MAPS),
    "biased": (lambda: BcosConv2d(4, 6, 3, groups=2, bias=True), MAPS),
    "biased linear": (lambda: BcosLinear(5, 3, unit_weights=False, bias=True), MAPS),
    "raw weights": (lambda: BcosConv2d(4, 3, 3, unit_weights=False), MAPS),
    "b 3": (lambda: BcosLinear(5, 3, b=3), MAPS),
    "max-out groups": (lambda: BcosConv2d(4, 4, 3, groups=2, max_out=3), MAPS),
    "batch": (lambda: BatchNormUncentered2d(4, bias=True), MAPS),
    "group": (lambda: GroupNorm2d(2, 4), MAPS),
    "group uncentred": (lambda: GroupNorm2d(2, 4, centred=False, bias=True), MAPS),
    "position": (lambda: PositionNorm2d(4), MAPS),
    "position uncentred": (lambda: PositionNorm2d(4, centred=False, bias=True), MAPS),
    "attention": (lambda: Attention(8, heads=2), (2, 5, 8)),
    "gelu": (lambda: nn.Sequential(nn.Linear(5, 3), GELU()), MAPS),
    "network": (
        lambda: nn.Sequential(
            BcosConv2d(4, 4, 3), BatchNormUncentered2d(4), GELU(), BcosConv2d(4, 6, 2, b=1.5), PositionNorm2d(6)
        ),
        MAPS,
    ),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A layer of OTHERS with random parameters, and an input that requires a gradient."""
    make, shape = OTHERS[name]
    torch.manual_seed(0)
    layer = make().double()
    for i, p in enumerate(layer.parameters()):
        p.data.add_(noise(*p.shape, seed=i), alpha=0.3)
    return layer, noise(*shape, seed=99).requires_grad_()


def explained(
    layer: nn.Module, x: Tensor, r: Tensor | None = None, compact: bool = False, **options: bool
) -> tuple[Tensor, Tensor]:
    """Output and W(x) under the cotangent r, ones if None."""
    with explanation_mode(compact=compact) as mode:
        y = layer(x)
    return y, mode.weights(y if r is None else y * r, x, **options)


@pytest.fixture(scope="module")
def golden(shared: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(shared("golden/e2kd/layers.safetensors"))


@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
@pytest.mark.parametrize("name", GOLDEN)
def test_equal_the_papers_layers_in_all_three_derivatives(golden: dict[str, Tensor], name: str, compact: bool) -> None:
    case = {key[len(name) + 1 :]: value for key, value in golden.items() if key.startswith(f"{name}.")}
    layer = GOLDEN[name]().double()
    layer.load_state_dict({key[6:]: value for key, value in case.items() if key.startswith("state.")})
    x = case["x"].clone().requires_grad_()
    y, w = explained(layer, x, case["r"], compact, create_graph=True)
    torch.testing.assert_close(y, case["y"], **TIGHT)
    torch.testing.assert_close(w, case["W_expl"], **TIGHT)
    leaves = {"x": x, **dict(layer.named_parameters())}
    for kind, scalar in (("d2", (w * case["v"]).sum()), ("full", (y * case["r"]).sum())):
        found = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True, retain_graph=True)
        for key, gradient in zip(leaves, found, strict=True):
            expected = case[f"{kind}.{key}"]
            if expected.ndim:  # the fixtures keep a number 0 where there is no gradient
                torch.testing.assert_close(gradient, expected, **TIGHT)
            else:
                assert gradient is None or not gradient.any()
    for key in ("running_mean", "running_var"):
        if f"after.{key}" in case:
            torch.testing.assert_close(layer.get_buffer(key), case[f"after.{key}"], **TIGHT)


@pytest.mark.parametrize("name", OTHERS)
def test_second_derivative_equals_finite_differences_of_the_weights(name: str) -> None:
    layer, x = made(name)
    _, w = explained(layer, x, create_graph=True)
    v, leaves = noise(*w.shape, seed=7), [x, *layer.parameters()]
    directions = [noise(*leaf.shape, seed=11 + i) for i, leaf in enumerate(leaves)]
    found = torch.autograd.grad((w * v).sum(), leaves, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None)
    assert slope != 0

    def at(step: float) -> Tensor:
        for leaf, direction in zip(leaves, directions, strict=True):
            leaf.data.add_(direction, alpha=step)
        value = (explained(layer, x)[1] * v).sum()
        for leaf, direction in zip(leaves, directions, strict=True):
            leaf.data.sub_(direction, alpha=step)
        return value

    eps = 1e-6
    torch.testing.assert_close(slope, (at(eps) - at(-eps)) / (2 * eps), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*OTHERS, "zero norm"])
def test_a_compact_pass_gives_the_same_outputs_weights_and_derivatives(name: str) -> None:
    """Also where a patch, a product or the weight of a norm is zero."""
    layer, x = made("network" if name == "zero norm" else name)
    if name == "zero norm":
        norm = layer.get_submodule("1")
        norm.weight.data[0] = 0
    x.data[0] = 0
    leaves, found = [x, *layer.parameters()], []
    for compact in (False, True):
        y, w = explained(layer, x, None, compact, create_graph=True)
        r, v = noise(*y.shape, seed=3), noise(*w.shape, seed=7)
        both = torch.autograd.grad((y * r).sum() + (w * v).sum(), leaves, allow_unused=True)
        found.append((y, w, *both))
    for plain, short in zip(*found, strict=True):
        assert (plain is None) == (short is None)
        if plain is not None:
            torch.testing.assert_close(short, plain, **TIGHT)


def test_a_compact_pass_keeps_one_gradient_for_each_layer() -> None:
    """Of the explanation: the gradient at the norm's output, not another one at the layer's."""
    layer = nn.Sequential(
        BcosConv2d(6, 8, 3, 1, 1), BatchNormUncentered2d(8), BcosConv2d(8, 8), BatchNormUncentered2d(8)
    )
    x, kept = torch.rand(2, 6, 16, 16, requires_grad=True), []
    for compact in (False, True):
        with explanation_mode(compact=compact) as mode:
            y = layer(x)
        before, alive = {t.data_ptr() for t in (x, y)}, dict[int, int]()

        def keep(t: Tensor, alive: dict[int, int] = alive, before: set[int] = before) -> Tensor:
            if t.shape[-2:] == (16, 16) and t.shape[1] == 8 and t.data_ptr() not in before:
                alive[t.data_ptr()] = 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            w = mode.weights((y * torch.rand_like(y)), x, create_graph=True)
        kept.append(len(alive))
        del w
    assert kept[1] <= kept[0] - 2


def test_a_compact_pass_is_ordinary_where_layers_have_hooks_or_are_run_again() -> None:
    layer, x = made("network")
    _, wanted = explained(layer, x)
    seen: list[Tensor] = []
    layer[0].linear.register_forward_hook(lambda module, args, out: seen.append(out))  # type: ignore[index]
    _, found = explained(layer, x, None, True)
    assert len(seen) == 1
    torch.testing.assert_close(found, wanted, **TIGHT)
    with explanation_mode(compact=True) as mode:
        y = checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(mode.weights(y, x), wanted, **TIGHT)


@pytest.mark.parametrize("layer", [BcosConv2d(6, 4, 3), BcosLinear(6, 4), BcosLinear(6, 4, b=1.5)])
def test_jacobians_of_all_outputs_at_once_are_those_one_by_one(layer: nn.Module) -> None:
    layer = layer.double().requires_grad_(False)
    x = noise(2, 6, 5, 5) if isinstance(layer, BcosConv2d) else noise(2, 6)
    wanted = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), wanted, **TIGHT)
    torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x, vectorize=True), wanted, **TIGHT)


def test_a_linear_layer_takes_a_single_vector_in_a_compact_pass_too() -> None:
    layer, x = BcosLinear(6, 4).double(), noise(6).requires_grad_()
    gradients = []
    for compact in (False, True):
        with explanation_mode(compact=compact) as mode:
            y = layer(x)
        weights = mode.weights(y.sum(), x, create_graph=True)
        gradients.append(torch.autograd.grad(weights.square().sum(), layer.parameters()))
    torch.testing.assert_close(*gradients, **TIGHT)


@pytest.mark.parametrize("name", OTHERS)
def test_the_mode_changes_neither_outputs_nor_ordinary_gradients(name: str) -> None:
    layer, x = made(name)
    r = noise(*layer(x).shape)
    plain = layer(x)
    y, _ = explained(layer, x, r, create_graph=True)
    assert torch.equal(y, plain)
    leaves = [x, *layer.parameters()]
    inside, outside = (torch.autograd.grad((out * r).sum(), leaves) for out in (y, plain))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("name", ["depthwise", "dilated", "reflected", "raw weights", "b 3", "max-out groups", "gelu"])
def test_weights_times_input_is_the_output(name: str) -> None:
    layer, x = made(name)
    if isinstance(layer, nn.Sequential):
        assert isinstance(layer[0], nn.Linear)
        layer[0].bias.data.zero_()
    y, w = explained(layer, x)
    torch.testing.assert_close((w * x).sum(), y.sum(), **TIGHT)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [(3, 1, 1, 1, 1), ((3, 2), (1, 2), (2, 1), 1, 2), (2, 2, 1, 2, 4), (1, 1, 1, 1, 1), (3, 1, "same", 2, 2)],
)
@pytest.mark.parametrize(("b", "max_out"), [(2, 1), (1.5, 2)])
def test_convolution_equals_its_patches_one_by_one(mode: str, kernel, stride, padding, dilation, groups, b, max_out):  # type: ignore[no-untyped-def]
    """The obviously right way: cut the padded patches out, and compare each with each filter by its cosine."""
    layer = BcosConv2d(4, 8, kernel, stride, padding, dilation, groups, mode, b=b, max_out=max_out).double()
    x = noise(2, 4, 6, 7)
    conv = layer.linear
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
    patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride).unflatten(1, (groups, -1))
    filters = conv.weight.flatten(1).unflatten(0, (groups, -1))
    dots = torch.einsum("bgpn,gop->bgon", patches, filters / filters.norm(dim=2, keepdim=True))
    dots = dots.flatten(1, 2).unflatten(1, (8, max_out)).amax(2)
    norms = (patches.square().sum(2) + 1e-6).sqrt().repeat_interleave(8 // groups, 1)
    expected = dots * ((dots / norms).abs() + (0 if b == 2 else 1e-6)) ** (b - 1)
    found = layer(x)
    torch.testing.assert_close(found.flatten(2), expected, **TIGHT)
    assert found.shape == conv(x)[:, : found.shape[1]].shape


class TestExplanationMode:
    def test_is_off_outside_and_after_an_exception(self) -> None:
        assert current_mode() is None
        with pytest.raises(KeyError), explanation_mode():  # noqa: PT012
            assert current_mode() is not None
            raise KeyError
        assert current_mode() is None

    def test_entered_twice_it_is_one(self) -> None:
        layer, x = made("network")
        _, expected = explained(layer, x)
        with explanation_mode() as outer:
            with explanation_mode() as inner:
                assert inner is outer
                y = layer(x)
            assert current_mode() is outer
        torch.testing.assert_close(outer.weights(y, x, retain_graph=True), expected, **TIGHT)
        torch.testing.assert_close(inner.weights(y, x), expected, **TIGHT)

    def test_an_exception_in_an_explanation_leaves_ordinary_gradients(self) -> None:
        layer, x = made("network")
        with explanation_mode() as mode:
            y = layer(x)
        with pytest.raises(RuntimeError, match="not have been used"):
            mode.weights(y, torch.zeros(3, requires_grad=True), retain_graph=True)
        assert mode.holding == 0
        expected = torch.autograd.grad(layer(x).sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected, **TIGHT)

    def test_scores_made_elsewhere_are_refused(self) -> None:
        layer, x = made("network")
        with explanation_mode() as mode:
            layer(x)
        with pytest.raises(RuntimeError, match="Run the forward pass inside"):
            mode.weights(layer(x), x)

    def test_two_classes_of_one_pass(self) -> None:
        layer, x = made("network")
        with explanation_mode() as mode:
            y = layer(x)
        first, second = (mode.weights(y[:, k], x, retain_graph=True) for k in (0, 1))
        torch.testing.assert_close(first + second, mode.weights(y[:, :2], x), **TIGHT)

    def test_threads_do_not_see_each_other(self) -> None:
        """One thread explains while another takes ordinary gradients of the same modules, many times."""
        layer, x = made("network")
        w, g = explained(layer, x)[1], torch.autograd.grad(layer(x).sum(), x)[0]
        assert not torch.allclose(w, g)
        barrier, failures = threading.Barrier(2), []

        def check(explain: bool) -> None:
            own = x.detach().clone().requires_grad_()
            for _ in range(20):
                barrier.wait()
                if explain:
                    found, expected = explained(layer, own)[1], w
                else:
                    failures.extend([current_mode()] if current_mode() else [])
                    found, expected = torch.autograd.grad(layer(own).sum(), own)[0], g
                if not torch.allclose(found, expected, **TIGHT):
                    failures.append(explain)

        with explanation_mode():  # the thread that starts others keeps its mode to itself
            threads = [threading.Thread(target=check, args=(explain,)) for explain in (True, False)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert failures == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["depthwise", "dilated", "b 3", "batch", "group", "position", "attention", "network"])
def test_zero_inputs_and_half_precision_are_finite(name: str, dtype: torch.dtype) -> None:
    """Values, W(x), ordinary and second-order gradients, for samples that are zero, tiny or large."""
    layer, x = made(name)
    layer = layer.to(dtype)
    x = x.detach().to(dtype)
    x[0], x[1] = 0, x[1] * (200 if name != "network" else 1)
    x[-1, :2] *= 1e-4
    x.requires_grad_()
    y, w = explained(layer, x, create_graph=True)
    assert y.dtype == w.dtype == dtype
    ordinary = torch.autograd.grad(y.float().sum(), [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(w.float().sum(), [x, *layer.parameters()], allow_unused=True)
    for value in (y, w, *ordinary, *second):
        assert value is None or value.isfinite().all()


def test_half_precision_follows_full_precision() -> None:
    layer, x = made("network")
    y, w = explained(layer.float(), x.detach().float().requires_grad_())
    y_half, w_half = explained(layer.bfloat16(), x.detach().bfloat16().requires_grad_())
    torch.testing.assert_close(y_half.float(), y, rtol=0.1, atol=0.1)
    assert F.cosine_similarity(w_half.float().flatten(), w.flatten(), 0) > 0.98


def test_works_under_autocast() -> None:
    layer, x = made("attention")
    layer, x = layer.float(), x.detach().float().requires_grad_()
    y, w = explained(layer, x, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16), explanation_mode() as mode:
        y_cast = layer(x)
    w_cast = mode.weights(y_cast.float(), x, create_graph=True)
    torch.testing.assert_close(y_cast.float(), y, rtol=0.1, atol=0.05)
    assert F.cosine_similarity(w_cast.flatten(), w.flatten(), 0) > 0.98
    (w_cast.sum() + y_cast.float().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_filters_of_zeros_give_zero_and_a_finite_gradient() -> None:
    layer = BcosConv2d(2, 3, 3)
    nn.init.zeros_(layer.linear.weight)
    y = layer(torch.rand(1, 2, 4, 4))
    y.square().sum().backward()
    assert not y.any()
    assert layer.linear.weight.grad is not None
    assert layer.linear.weight.grad.isfinite().all()


class TestBatchNormUncentered:
    def test_cumulative_average_of_biased_variances(self) -> None:
        norm, seen = BatchNormUncentered2d(4, momentum=None).double(), []
        for i in range(3):
            x = noise(*MAPS, seed=i)
            norm(x)
            seen.append(x.var((0, 2, 3), correction=0))
        torch.testing.assert_close(norm.running_var, torch.stack(seen).mean(0), **TIGHT)
        assert not norm.running_mean.any()
        assert norm.num_batches_tracked == 3

    def test_statistics_can_be_kept(self) -> None:
        norm = BatchNormUncentered2d(4).double()
        before = {k: v.clone() for k, v in norm.state_dict().items()}
        with kept_statistics(norm):
            y = norm(noise(*MAPS))
        assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
        assert torch.equal(y, norm(noise(*MAPS)))
        assert norm.num_batches_tracked == 1

    def test_is_never_made_a_centred_synchronised_norm(self) -> None:
        model = nn.Sequential(BcosConv2d(6, 4, 3), BatchNormUncentered2d(4))
        with pytest.raises(UnsupportedModel, match="subtract the mean"):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert model[1].affine
        assert type(copy.deepcopy(model)[1]) is BatchNormUncentered2d
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))
        assert type(plain[0]) is nn.SyncBatchNorm

    def test_without_statistics_eval_uses_the_batch(self) -> None:
        norm = BatchNormUncentered2d(4, track_running_stats=False).double()
        assert torch.equal(norm(noise(*MAPS)), norm.eval()(noise(*MAPS)))


def test_norms_equal_torch_where_they_are_centred() -> None:
    x = noise(*MAPS)
    tokens = x.permute(0, 2, 3, 1)
    torch.testing.assert_close(GroupNorm2d(2, 4).double()(x), F.group_norm(x, 2), **TIGHT)
    torch.testing.assert_close(LayerNorm2d(4).double()(x), F.group_norm(x, 1), **TIGHT)
    torch.testing.assert_close(LayerNorm(4).double()(tokens), F.layer_norm(tokens, (4,)), **TIGHT)
    torch.testing.assert_close(PositionNorm2d(4).double()(x).permute(0, 2, 3, 1), F.layer_norm(tokens, (4,)), **TIGHT)
    torch.testing.assert_close(GELU()(x), F.gelu(x), **TIGHT)


def test_keys_are_the_official_ones() -> None:
    names = {
        BcosConv2d(1, 1): ["linear.weight"],
        BcosLinear(1, 1): ["linear.weight"],
        PositionNorm2d(1): ["weight"],
        LayerNorm2d(1, bias=True): ["weight", "bias"],
        LayerNorm(1, affine=False): [],
        Attention(4, heads=1): ["norm.weight", "to_qkv.weight", "to_out.linear.weight"],
        LogitLayer(0.5): [],
        AddInverse(): [],
    }
    for layer, keys in names.items():
        assert list(layer.state_dict()) == keys


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BcosConv2d(6, 4, 3)(torch.rand(1, 3, 8, 8)), r"\[B, 6, H, W\], but got \[1, 3, 8, 8\].*AddInverse"),
        (lambda: BcosConv2d(6, 4, 3)(torch.rand(6, 8, 8)), r"\[B, 6, H, W\], but got \[6, 8, 8\]"),
        (lambda: BcosConv2d(4, 3, groups=2), "divisible by groups"),
        (lambda: BcosLinear(4, 3, b=0.5), "b >= 1"),
        (lambda: BcosLinear(4, 3, max_out=0), "max_out >= 1"),
        (lambda: PositionNorm2d(4)(torch.rand(1, 3, 2, 2)), r"\[B, 4, H, W\], but got \[1, 3, 2, 2\]"),
        (lambda: Attention(6, heads=4), "divisible by heads"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
