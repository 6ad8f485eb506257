"""Matrix products in float8: twice the rate of bfloat16 on Hopper, for numbers of two or three digits.

A float8 number has 256 values, so every tensor is divided by a scale first that puts its largest number at the format's
largest: one scale for each row ("rowwise", exact for rows of very different sizes) or one for all ("tensorwise", fewer
passes over memory). The product is summed in float32, multiplied by both scales and rounded to bfloat16. Weights stay
in float32 and are rounded anew each time; only the layers' projections are concerned, not the head.

Suffixes of tensor names: T tokens, K features in, N features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recipes.lib.arguments import ArgumentError
from recipes.lib.model import Transformer

MULTIPLE = 16
"""The kernels want sizes that are multiples of it."""
_SMALLEST = 1e-12
"""Scale of a row of zeros (padding): it must not be zero."""


def use_float8(model: Transformer, scaling: str) -> None:
    """Make every projection of the layers compute in float8. Call it before sharding and compiling."""
    for layer in model.layers:
        for module in layer.modules():
            if type(module) is nn.Linear:
                # The class alone changes: parameters, names and checkpoints stay as they are.
                module.__class__ = _CLASSES[scaling]


def check_float8(scaling: str, compute: torch.dtype, device: torch.device) -> None:
    """Raises ArgumentError where float8 cannot be computed."""
    if compute != torch.bfloat16:
        shown = str(compute).removeprefix("torch.")
        raise ArgumentError("float8", scaling, f"wants dtype=bfloat16, the computation is in {shown}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ArgumentError("float8", scaling, f"{name} has no float8 units (H100, L40 and later have)")


class Float8Product(torch.autograd.Function):
    """x_TK times the transposed weight_NK; in the backward pass both gradients in float8, too."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, rowwise: bool) -> Tensor:  # type: ignore[override]
        """Gives [T, N] in bfloat16."""
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.rowwise = rowwise
        return product(x_TK, weight_NK, rowwise=rowwise, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient_TN: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """Of x and the weight, both products over another dimension, so that scales by row are taken anew."""
        x_TK, weight_NK = ctx.saved_tensors
        of_x = product(gradient_TN, weight_NK.T, rowwise=ctx.rowwise, fast=ctx.rowwise, wide=True)
        of_weight = product(gradient_TN.T, x_TK.T, rowwise=ctx.rowwise, fast=ctx.rowwise, wide=True)
        return of_x, of_weight, None


def product(a_MK: Tensor, b_NK: Tensor, *, rowwise: bool, fast: bool, wide: bool = False) -> Tensor:
    """a times the transposed b, [M, N] in bfloat16.

    `fast` sums in the matrix units' own accumulators, of less than float32. `wide`: a is a gradient; with one scale for
    all of it, it needs the format with more exponents (e5m2) to keep its small numbers.
    """
    of_a = torch.float8_e5m2 if wide and not rowwise else torch.float8_e4m3fn
    scaled_a, scale_a = scaled(a_MK, of_a, rowwise=rowwise)
    scaled_b, scale_b = scaled(b_NK, torch.float8_e4m3fn, rowwise=rowwise)
    return torch._scaled_mm(
        scaled_a,
        scaled_b.T,  # column by column, as the kernels want it
        scale_a=scale_a,
        scale_b=scale_b.T if rowwise else scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def scaled(tensor: Tensor, dtype: torch.dtype, *, rowwise: bool) -> tuple[Tensor, Tensor]:
    """The tensor in float8, row after row in memory, and what to multiply it with to have it back."""
    exact = tensor.float()
    largest = exact.abs().amax(-1, keepdim=True) if rowwise else exact.abs().amax()
    scale = (largest / torch.finfo(dtype).max).clamp(min=_SMALLEST)
    most = torch.finfo(dtype).max  # the division rounds, and above the largest number is nan
    return (exact / scale).clamp(-most, most).to(dtype).contiguous(), scale


class _RowwiseLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = Float8Product.apply(x.flatten(0, -2), self.weight, True)
        return flat.unflatten(0, x.shape[:-1])


class _TensorwiseLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = Float8Product.apply(x.flatten(0, -2), self.weight, False)
        return flat.unflatten(0, x.shape[:-1])


_CLASSES = {"rowwise": _RowwiseLinear, "tensorwise": _TensorwiseLinear}
