"""What the techniques have in common: number formats, recomputation, compilation, backends of attention.

A technique itself (which module is wrapped or sharded how) is in its chapter's file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from recipes.lib.model import Block, Transformer


@dataclass(frozen=True)
class Precision:
    """The two number formats of a run."""

    compute: torch.dtype
    """Of matrix products and activations."""
    master: torch.dtype
    """Of the parameters that the optimizer updates, and of its moments."""
    products: torch.dtype | None = None
    """Of the layers' matrix products, where they are rounded further than the rest."""

    @property
    def is_mixed(self) -> bool:
        """Whether parameters are rounded to another format before they are multiplied."""
        return self.compute != self.master

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """For models that keep whole master parameters: round to `compute` at each matrix product."""
        return torch.autocast(device.type, self.compute) if self.is_mixed else nullcontext()


def precision(dtype: str, device: torch.device) -> Precision:
    """What the argument `dtype` means on `device`.

    Master parameters stay in float32 under bfloat16: an update of 1e-4 of a weight is below bfloat16's
    resolution (1/256) and would round to nothing. Under float16 they do, too, and the loss has to be scaled
    (loss_scale.py).
    """
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    compute = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }[dtype]
    return Precision(compute, master=torch.float64 if compute == torch.float64 else torch.float32)


_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_OPERATIONS = {
    "matmul": [_aten.mm.default, _aten._scaled_mm.default],
    "attention": [
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    ],
    # Of tensor and context parallelism, within layers. FSDP's own are outside of what is recomputed.
    "collectives": [
        _c10d.all_gather_into_tensor.default,
        _c10d.reduce_scatter_tensor.default,
        _c10d.all_to_all_single.default,
    ],
}


def checkpoint_activations(
    model: Transformer, mode: str, kept: Sequence[str] = ("matmul", "attention"), layers: int = 0
) -> None:
    """Trade memory for arithmetic: recompute activations in the backward pass instead of keeping them.

    "full" keeps each layer's input only and repeats its whole forward pass: a third more arithmetic.
    "selective" keeps the results of the operations that `kept` names, by default those that are expensive, and repeats
    what is cheap between them (norms, rotation, SiLU, products of elements): almost no more arithmetic. "none" keeps
    everything. With `layers`, only the first so many recompute: where memory is left, the others need not.
    """
    if mode == "none":
        return
    # The random state is not preserved: the model draws no random numbers (no dropout).
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        operations = [operation for name in kept for operation in _OPERATIONS[name]]
        contexts = functools.partial(create_selective_checkpoint_contexts, operations)
        recompute = functools.partial(recompute, context_fn=contexts)
    for layer in list(model.layers)[: layers or len(model.layers)]:
        assert isinstance(layer, Block)
        layer.recompute = recompute


def compile_blocks(model: Transformer) -> None:
    """Compile each layer's forward, and the loss.

    By layer, not as a whole: all layers share one compiled graph, so that compile time does not grow with
    depth, and the hooks by which FSDP gathers a layer's parameters stay outside the graphs. Call it after
    `checkpoint_activations` and before sharding. `fullgraph`: a graph break would cost speed silently.
    """
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True)
    model.lm_head.chunk_loss = torch.compile(model.lm_head.chunk_loss, fullgraph=True)


def attention_backends(device: torch.device) -> AbstractContextManager[None]:
    """The order in which attention kernels are tried: cuDNN's is fastest on Hopper, yet not torch's first."""
    if device.type != "cuda":
        return nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)
