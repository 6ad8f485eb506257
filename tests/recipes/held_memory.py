"""What a rank under DeepSpeed's ZeRO holds between two steps, by the memory itself: each storage, once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def held(model: nn.Module, zero: Any) -> dict[str, int]:
    """Bytes by kind, after a step of `zero`, the engine's optimizer; of gradients what is not freed with it."""
    parameters = list(model.parameters())
    slices = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    updated = list(zero.optimizer.state)  # AdamW files its state under what it updates
    sums = [getattr(zero, "grad_partitions_flat_buffer", None), *(each.grad for each in updated)]
    state = [value for values in zero.optimizer.state.values() for value in values.values()]
    return {
        "parameters": _bytes([*parameters, *slices, *updated]),
        "gradients": _bytes(each for each in sums if each is not None),
        "moments": _bytes(each for each in state if isinstance(each, Tensor) and each.ndim),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [each.untyped_storage() for each in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
