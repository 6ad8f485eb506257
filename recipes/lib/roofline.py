"""What a device can do at most, measured, and which of the two limits an operation runs into.

A matrix product of m x k by k x n makes 2mkn operations from mk + kn + mn numbers. The quotient, its arithmetic
intensity, is large for large matrices. Below the device's own quotient (FLOP/s over bytes/s, the ridge) memory is the
limit, and faster arithmetic would not help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipes.lib.distributed import World
from recipes.lib.timing import measure

ELEMENT_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2}
"""By the name that the profiler gives a type."""


@dataclass(frozen=True)
class Roof:
    """The two limits of one device."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOP per byte from which on arithmetic is the limit."""
        return self.flops_per_second / self.bytes_per_second

    def limit(self, intensity: float) -> str:
        """ "compute" or "memory"."""
        return "compute" if intensity >= self.ridge else "memory"

    def text(self) -> str:
        """As a line for people."""
        return (
            f"measured here: {self.flops_per_second / 1e12:.3g} TFLOP/s in matrix products, "
            f"{self.bytes_per_second / 1e9:.3g} GB/s in copies, "
            f"so {self.ridge:.3g} FLOP for every byte"
        )


def measure_roof(world: World, dtype: torch.dtype, *, trials: int = 3, budget: float = 0.1) -> Roof:
    """The rates of a large matrix product and of a large copy. All ranks measure at once, as they train at once."""
    cuda = world.device.type == "cuda"
    side, size = (8192, 2**30) if cuda else (768, 2**26)
    left = torch.randn(side, side, device=world.device, dtype=dtype)
    right, product = torch.randn_like(left), torch.empty_like(left)
    source = torch.zeros(size, device=world.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    # Without autograd: `out=` is refused beside it, and nothing here is learned.
    with torch.no_grad():
        multiply = measure(lambda: _multiply(left, right, product), world, trials=trials, budget=budget)
        copy = measure(lambda: _copy(target, source), world, trials=trials, budget=budget)
    # The fastest trial: a limit, of which a disturbed trial shows a part.
    return Roof(2 * side**3 / min(multiply.trials), 2 * size / min(copy.trials))


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(left, right, out=out)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


# --- pure -------------------------------------------------------------------------------------------------


def product_intensity(name: str, dims: Sequence[Sequence[int]], kind: str) -> float | None:
    """FLOP per byte of one matrix product or attention, from its arguments' sizes; None for another operation.

    `kind` is the profiler's name of the element type. Each operand counts once: what caches cannot hold is read again,
    so that this is the most that the operation can have.
    """
    operation = name.removeprefix("aten::")
    size = ELEMENT_BYTES.get(kind, 4)
    if operation == "addmm":
        dims = dims[1:]
    if operation in ("mm", "addmm", "bmm") and len(dims) >= 2 and len(dims[0]) >= 2 and len(dims[1]) >= 2:
        *batch, m, k = dims[0]
        n = dims[1][-1]
        return math.prod(batch) * 2 * m * k * n / (size * math.prod(batch) * (m * k + k * n + m * n))
    if operation.startswith("_scaled_dot_product") and dims:
        # Forward and backward alike: queries of S and keys of T positions, E wide; scores never reach memory.
        shapes = [each for each in dims if len(each) == 4]
        if len(shapes) < 3:
            return None
        batch, heads, rows, width = shapes[-3] if "backward" in operation else shapes[0]
        columns = max(each[2] for each in shapes)
        flops = 4 * batch * heads * rows * columns * width
        return flops / (size * sum(math.prod(each) for each in shapes))
    return None
