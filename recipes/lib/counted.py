"""Counts what a piece of code really does: floating-point operations, and bytes that its operations read and write.

    with Counted() as work:
        model(tokens)
    work.flops / work.bytes

Every operation of torch that runs is seen, backward pass and optimizer included. Operations are matrix products and
attention (in full, not the causal half); bytes are each operation's operands and results, as if nothing stayed in a
cache between two operations: right for tensors larger than the caches, too many for small ones. Compiled code is not
seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOOKUPS = frozenset(
    {"embedding", "embedding_dense_backward", "index", "index_put_", "_index_put_impl_", "gather"}
)
"""They touch some rows of a table, not all of it."""


class Counted(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.bytes = 0

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        read, written = (
            [each for each in tree_leaves(tree) if torch.is_tensor(each)] for tree in (args, result)
        )
        self.flops += _flops(name, read)
        if not func.is_view and name not in ("detach", "alias", "_unsafe_view", "empty", "empty_like"):
            self.bytes += _bytes(name, read, written)
        return result


def _bytes(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    if name in ("embedding", "index", "gather"):
        return 2 * written[0].nbytes
    if name in _LOOKUPS:  # into a table: what is put there
        return 2 * min(each.nbytes for each in read if each.is_floating_point())
    return sum(each.nbytes for each in (*read, *written))


def _flops(name: str, operands: list[Tensor]) -> int:
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        left, right = (each.shape for each in operands[-2:])
        return 2 * math.prod(left) * right[-1]
    if name.startswith("_scaled_dot_product"):
        backward = "backward" in name
        # Backward, the first operand is the result's gradient. Five products instead of two: the scores come again.
        q_BHSE, k_BKTE = operands[1:3] if backward else operands[:2]
        products = 5 if backward else 2
        return products * 2 * q_BHSE.numel() * k_BKTE.shape[2]
    return 0
