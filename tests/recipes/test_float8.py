"""Float8 products are the products of the rounded numbers, and their errors stay what eight bits make them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.lib.arguments import ArgumentError
from recipes.lib.float8 import Float8Product, check_float8, product, scaled, use_float8
from recipes.lib.model import Transformer, materialize
from recipes.lib.model_sizes import ModelSize

SIZE = ModelSize(
    layers=1, width=64, heads=4, kv_heads=2, ffn_width=96, vocab_size=67, rope_theta=1e4, tied=False
)


def some(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose rows are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.linspace(-3, 3, shape[0])[:, None]
    return (torch.randn(shape, generator=generator) * sizes).bfloat16()


@pytest.mark.parametrize("rowwise", [True, False])
def test_a_product_is_that_of_the_rounded_numbers(rowwise: bool) -> None:
    a, b = some(32, 48), some(16, 48, seed=1)
    (rounded_a, scale_a), (rounded_b, scale_b) = (
        scaled(each, torch.float8_e4m3fn, rowwise=rowwise) for each in (a, b)
    )
    wanted = (rounded_a.float() * scale_a) @ (rounded_b.float() * scale_b).T
    found = product(a, b, rowwise=rowwise, fast=True)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().min()))


def test_a_scale_for_each_row_keeps_small_rows() -> None:
    """One for all leaves rows that are a millionth of the largest with nothing."""
    a, exact = some(32, 48), some(32, 48).float()
    for rowwise, worst in ((True, 0.07), (False, 1.01)):
        rounded, scale = scaled(a, torch.float8_e4m3fn, rowwise=rowwise)
        errors = (rounded.float() * scale - exact).norm(dim=1) / exact.norm(dim=1)
        assert worst / 10 < errors.max() < worst
    assert scaled(torch.zeros(2, 16), torch.float8_e4m3fn, rowwise=True)[0].float().sum() == 0  # and no nan


@pytest.mark.parametrize("rowwise", [True, False])
def test_gradients_are_near_the_exact_ones(rowwise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, direction = (
        torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        for shape in ((64, 32), (48, 32), (64, 48))
    )
    exact = torch.autograd.grad((x @ weight.T * direction).sum(), (x, weight))
    ours = torch.autograd.grad((Float8Product.apply(x, weight, rowwise) * direction).sum(), (x, weight))
    for found, wanted in zip(ours, exact, strict=True):
        error = ((found - wanted).norm() / wanted.norm()).item()
        # Three bits after the point: 2**-4 at most for each factor; two of e5m2 where gradients have it.
        assert 0.01 < error < (0.06 if rowwise else 0.09)


def test_a_model_changes_neither_names_nor_head() -> None:
    plain, ours = (Transformer(SIZE).bfloat16() for _ in range(2))
    use_float8(ours, "rowwise")
    materialize(plain, 0, torch.device("cpu"))
    materialize(ours, 0, torch.device("cpu"))
    assert list(ours.state_dict()) == list(plain.state_dict())
    tokens = torch.randint(0, 67, (2, 32), generator=torch.Generator().manual_seed(0))
    error = (ours(tokens, tokens) / plain(tokens, tokens) - 1).abs().item()
    assert 1e-6 < error < 1e-2
    assert ours.lm_head(torch.ones(1, 1, 64).bfloat16(), None).equal(
        plain.lm_head(torch.ones(1, 1, 64).bfloat16(), None)
    )


@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_a_compiled_layer_has_the_same_gradients(scaling: str) -> None:
    """In one graph: a break would cost the speed that float8 is for."""
    tokens = torch.randint(0, 67, (2, 32), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiled in (False, True):
        model = Transformer(SIZE).bfloat16()
        use_float8(model, scaling)
        materialize(model, 0, torch.device("cpu"))
        if compiled:
            for layer in model.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
        model(tokens, tokens).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_other_formats_are_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"float8=rowwise: wants dtype=bfloat16, the computation is in float32"
    ):
        check_float8("rowwise", torch.float32, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="multiplies with a GPU's float8 units")
@pytest.mark.parametrize("rowwise", [True, False])
def test_a_gpu_multiplies_the_rounded_numbers(rowwise: bool) -> None:
    """Against a product of the same rounded numbers in float32: what is left is the sum's order, and bfloat16."""
    a, b = some(32, 48).cuda(), some(16, 48, seed=1).cuda()
    (rounded_a, scale_a), (rounded_b, scale_b) = (
        scaled(each, torch.float8_e4m3fn, rowwise=rowwise) for each in (a, b)
    )
    expected = (rounded_a.float() * scale_a) @ (rounded_b.float() * scale_b).T
    found = product(a, b, rowwise=rowwise, fast=False).float()
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(found, (a @ b.T).float(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
