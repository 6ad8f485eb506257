"""Tensor and sequence parallelism of the shared model: every layer's matrices are split over a few ranks.

Column by column where a matrix widens (queries, keys, values, gate, up), row by row where the next one narrows
(attention's output, down): between the two a rank works on its own heads and features, and one sum over ranks ends each
pair. Outside of the pairs, where norms and residual sums work token by token, every rank has a part of the sequence
(sequence parallelism), so the sum is a reduce-scatter and its counterpart an all-gather: the same traffic as one
all-reduce, with activations that are split everywhere. The tables are split by rows of the vocabulary, and the loss is
computed without ever gathering logits (`fused_loss.VocabularyPart`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from recipes.lib.model import Transformer

SEQUENCE = Shard(1)
"""Activations are [B, S, D]."""


def split_layers(model: Transformer, mesh: DeviceMesh) -> None:
    """Split the layers and tables of a model on the meta device over `mesh`. Call it before sharding.

    The mesh's size must divide the heads, the key/value heads, the feed-forward width and the sequence.
    """
    gather_x = PrepareModuleInput(
        input_layouts=(SEQUENCE, None, None), desired_input_layouts=(Replicate(), None, None)
    )
    gather_only_input = PrepareModuleInput(input_layouts=SEQUENCE, desired_input_layouts=Replicate())
    scatter_sum = RowwiseParallel(output_layouts=SEQUENCE)
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
        "layers.*.input_layernorm": SequenceParallel(),
        "layers.*.self_attn": gather_x,
        "layers.*.self_attn.q_proj": ColwiseParallel(),
        "layers.*.self_attn.k_proj": ColwiseParallel(),
        "layers.*.self_attn.v_proj": ColwiseParallel(),
        "layers.*.self_attn.o_proj": scatter_sum,
        "layers.*.post_attention_layernorm": SequenceParallel(),
        "layers.*.mlp": gather_only_input,
        "layers.*.mlp.gate_proj": ColwiseParallel(),
        "layers.*.mlp.up_proj": ColwiseParallel(),
        "layers.*.mlp.down_proj": scatter_sum,
        "norm": SequenceParallel(),
        "lm_head": gather_x,
    }
    if model.lm_head.weight is not None:
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight, mesh, [Shard(0)]))
    parallelize_module(model, mesh, plan)
    # The reduce-scatter's result is a tensor that waits when it is first used. As the input of a compiled layer it
    # is taken apart, and the gradient passes by what made it (torch 2.13: wrong, no error). A copy is a plain tensor.
    model.embed_tokens.register_forward_hook(_plain)


def _plain(module: nn.Module, given: object, output: Tensor) -> Tensor:
    return output.clone()
