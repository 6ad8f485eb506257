"""Tensor parallelism by DTensor: the same slices and messages as by hand, from a table of layouts.

A DTensor is a slice that knows the whole, and every operation on it works out what has to be sent. What is left to say
is how each module's weight is sliced, and in which layout activations come and go: Replicate (all ranks have the same),
Shard(1) (each a part of the sequence).
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from recipes.lib.model import Transformer


def parallelize_with_dtensor(model: Transformer, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Slice the model's parameters over the one-dimensional `mesh`; see `parallelize_by_hand` for what goes where.

    The head takes the loss from each rank's rows of the vocabulary (`recipes.lib.fused_loss`): no logits are gathered.
    """
    between = Shard(1) if sequence_parallel else Replicate()
    whole = Replicate()
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=between),
        # The head is given hidden states, targets and a tied weight, and gives the loss. Targets stay plain tensors.
        "lm_head": PrepareModuleInputOutput(
            input_layouts=(between, None, None),
            desired_input_layouts=(whole, None, None),
            output_layouts=whole,
            desired_output_layouts=whole,
        ),
        # Once for q, k and v (gate and up): else each of them would sum its gradient of the input by itself.
        "layers.*.self_attn": PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(whole, None, None)
        ),
        # Local tensors between q, k, v and o: each rank has whole heads of its own, as the model expects them.
        "layers.*.self_attn.q_proj": ColwiseParallel(),
        "layers.*.self_attn.k_proj": ColwiseParallel(),
        "layers.*.self_attn.v_proj": ColwiseParallel(),
        "layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=between),
        "layers.*.mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
        # DTensors between these: of a local part nobody could tell how uneven the slices are.
        "layers.*.mlp.gate_proj": ColwiseParallel(use_local_output=False),
        "layers.*.mlp.up_proj": ColwiseParallel(use_local_output=False),
        "layers.*.mlp.down_proj": RowwiseParallel(output_layouts=between),
    }
    if sequence_parallel:
        plan["norm"] = plan["layers.*.*_layernorm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)
    head = model.lm_head
    if head.weight is not None:
        # By itself: ColwiseParallel takes nn.Linear only. None: nothing is sent, values come later.
        head.weight = nn.Parameter(
            distribute_tensor(head.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        )
