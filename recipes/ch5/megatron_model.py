"""The shared decoder (`recipes.lib.model`) built from Megatron-Core's parts: same shape, same values in the beginning.

Megatron-Core describes a layer by what its places are filled with (a spec). Two places are filled from here, because
what it has for them needs Transformer Engine or Apex, which are built for half an hour: a norm that works on a part of
the sequence, and an attention that does not hold the whole score matrix and can exchange heads for tokens.

Suffixes of tensor names: as in `recipes.lib.model`; P ranks of tensor parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.ch5.megatron_args import MegatronArgs
from recipes.lib.context_parallel import Context
from recipes.lib.model import Transformer, causal_attention, initial_values
from recipes.lib.model_sizes import ModelSize, RopeScaling
from recipes.lib.pretrained import published_tensors
from recipes.lib.stack import needs
from recipes.lib.training import Plan

with needs("megatron"):
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

ROWS_IN_MULTIPLES_OF = 64
"""Of the tables: as Megatron pads them, yet for any number of ranks alike, so that checkpoints fit all of them."""


class Norm(nn.RMSNorm):
    """torch's, for a part of the sequence, too."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        # By this mark Megatron sums the gain's gradient over the ranks that have seen the other tokens.
        self.weight.sequence_parallel = config.sequence_parallel


class Attention(nn.Module):
    """torch's fused causal attention; under context parallelism over whole sequences of fewer heads."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()
        self.attend = causal_attention
        if config.context_parallel_size > 1:
            self.attend = Context(parallel_state.get_context_parallel_group(), _of_two_pieces_each).attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """Of [S, B, heads, E]; gives [S, B, heads * E]."""
        y_BHSE = self.attend(*(each.permute(1, 2, 0, 3) for each in (query, key, value)))
        return y_BHSE.permute(2, 0, 1, 3).flatten(2)


def own_pieces(x_BS: Tensor) -> Tensor:
    """What this rank has of sequences that `context_parallel` ranks split: of 2C pieces, the c-th and the c-th last."""
    ranks, rank = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    pieces = x_BS.chunk(2 * ranks, dim=1)
    return x_BS if ranks == 1 else torch.cat([pieces[rank], pieces[-1 - rank]], dim=1)


def _of_two_pieces_each(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
    """Causal attention over sequences whose pieces come rank by rank (see `own_pieces`): put in order, and back.

    So Megatron splits sequences and its rotary tables, for ring attention's sake: the causal mask leaves early pieces
    less to do.
    """
    pieces = 2 * parallel_state.get_context_parallel_world_size()
    order = [piece for c in range(pieces // 2) for piece in (c, pieces - 1 - c)]

    def arrange(x: Tensor, places: Sequence[int]) -> Tensor:
        return x.unflatten(2, (pieces, -1))[:, :, list(places)].flatten(2, 3)

    in_order = [
        arrange(each, [order.index(piece) for piece in range(pieces)]) for each in (q_BHSE, k_BKSE, v_BKSE)
    ]
    return arrange(causal_attention(*in_order), order)


def config_of(plan: Plan, args: MegatronArgs) -> TransformerConfig:
    """The model as Megatron-Core describes it, and how it is split."""
    size, compute = plan.size, plan.precision.compute
    scaling, virtual = size.rope_scaling, args.stages_per_rank > 1
    if scaling is not None:
        assert scaling == RopeScaling(factor=scaling.factor), "Megatron-Core lets choose the factor alone"
    return TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.width,
        num_attention_heads=size.heads,
        num_query_groups=size.kv_heads,
        ffn_hidden_size=size.ffn_width,
        normalization="RMSNorm",
        layernorm_epsilon=size.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # How it is split.
        tensor_model_parallel_size=args.tensor_parallel,
        sequence_parallel=args.sequence_parallel and args.tensor_parallel > 1,
        pipeline_model_parallel_size=args.pipeline_parallel,
        virtual_pipeline_model_parallel_size=args.stages_per_rank if virtual else None,
        context_parallel_size=args.context_parallel,
        expert_model_parallel_size=args.expert_parallel,
        # Each message by itself where there are virtual stages: of two ranks, each is before and behind the other, and
        # in one batch an activation would be taken for a gradient. Megatron-LM refuses it, its core does not.
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
        # The gradient of the global mean, for any number of tokens in a microbatch: sums, divided once at the end.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        params_dtype=compute,
        pipeline_dtype=compute,
        bf16=compute == torch.bfloat16,
        # The values come from `fill`. Not perform_initialization=False: it would not mark what is split either, and the
        # norm of the gradient would count one rank's part of it.
        init_method=_leave,
        output_layer_init_method=_leave,
        # These fusions are kernels of Apex and Transformer Engine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        **_experts(size, args),
        **({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
           if args.activation_checkpointing == "full" else {}),
    )  # fmt: skip


def _leave(parameter: Tensor) -> None:
    pass


def _experts(size: ModelSize, args: MegatronArgs) -> dict[str, object]:
    if args.experts == 0:
        return {}
    # The router of 0.16.1 asks whether this is None and defines it with Transformer Engine alone: without, each pass
    # ends in a NameError. 0.19.2 does both.
    vars(moe_utils).setdefault("te_general_gemm", None)
    return {
        "num_moe_experts": args.experts,
        "moe_router_topk": args.experts_per_token,
        "moe_ffn_hidden_size": size.ffn_width,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
    }


def build(plan: Plan, args: MegatronArgs, config: TransformerConfig) -> list[GPTModel]:
    """This rank's stages of the model, with their initial values."""
    size, scaling = plan.size, plan.size.rope_scaling
    layer = get_gpt_layer_local_spec(num_experts=args.experts or None, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = Attention
    virtual = args.stages_per_rank > 1
    chunks = []
    for number in range(args.stages_per_rank):
        layers = size.layers // (args.pipeline_parallel * args.stages_per_rank)
        stage = {"ignore_virtual": False, "vp_stage": number if virtual else None}
        chunk = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm),
            vocab_size=padded_rows(size.vocab_size, args.tensor_parallel),
            max_sequence_length=args.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=size.tied,
            position_embedding_type="rope",
            rotary_base=size.rope_theta,
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling.factor if scaling is not None else 1.0,
            vp_stage=number if virtual else None,
        )
        fill(chunk, args, whole_values(plan), size)
        chunks.append(chunk.to(plan.world.device, plan.precision.compute))
    return chunks


def padded_rows(rows: int, ranks: int) -> int:
    """Rows of a table that `ranks` ranks split evenly."""
    multiple = ROWS_IN_MULTIPLES_OF * ranks if ROWS_IN_MULTIPLES_OF % ranks else ROWS_IN_MULTIPLES_OF
    return -(-rows // multiple) * multiple


def whole_values(plan: Plan) -> Callable[[str], Tensor]:
    """What each of the shared decoder's parameters begins with, whole, by its name there."""
    size, args, device = plan.size, plan.args, plan.world.device
    if args.init_from and plan.resume_from is None:
        published = published_tensors(args.init_from, size)
        # Of a dense model's, each expert gets a copy; the router is new, and its choice makes them differ.
        return lambda name: published(re.sub(r"\.experts\.\d+", "", name))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(size).named_parameters()}

    def drawn(name: str) -> Tensor:
        shape = shapes[re.sub(r"\.experts\.\d+", "", name)]
        return initial_values(name, shape, size.layers, args.seed, device)

    return drawn


@torch.no_grad()
def fill(chunk: GPTModel, args: MegatronArgs, whole: Callable[[str], Tensor], size: ModelSize) -> None:
    """Give each parameter of a stage this rank's part of the shared decoder's.

    Megatron keeps queries, keys and values in one matrix, as it does gate and up: one product instead of three or two.
    """
    ranks, rank = args.tensor_parallel, parallel_state.get_tensor_model_parallel_rank()
    first_expert = args.experts // args.expert_parallel * parallel_state.get_expert_model_parallel_rank()
    group = size.heads // size.kv_heads * size.head_dim

    def rows(matrix: Tensor) -> Tensor:
        return matrix.chunk(ranks)[rank]

    def table(name: str) -> Tensor:
        missing = padded_rows(size.vocab_size, ranks) - size.vocab_size
        return rows(F.pad(whole(name), (0, 0, 0, missing)))

    def part(name: str) -> Tensor:
        if name == "embedding.word_embeddings.weight":
            return table("embed_tokens.weight")
        if name == "output_layer.weight":  # of a tied model it is the last stage's copy of the embedding
            return table("embed_tokens.weight" if size.tied else "lm_head.weight")
        if name == "decoder.final_layernorm.weight":
            return whole("norm.weight")
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.weight", name)
        assert found, f"{name} is not known"
        layer, what = f"layers.{chunk.decoder.layers[int(found[1])].layer_number - 1}", found[2]
        expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(\w+)", what)
        mlp = f"{layer}.mlp"
        if expert:
            mlp, what = f"{mlp}.experts.{first_expert + int(expert[1])}", f"mlp.{expert[2]}"
        if what == "self_attention.linear_qkv":
            # The heads of a group of queries, then their key's and their value's, group by group.
            widths = {"q": group, "k": size.head_dim, "v": size.head_dim}
            parts = [
                whole(f"{layer}.self_attn.{each}_proj.weight").unflatten(0, (size.kv_heads, width))
                for each, width in widths.items()
            ]
            return rows(torch.cat(parts, dim=1).flatten(0, 1))
        if what == "self_attention.linear_proj":
            return whole(f"{layer}.self_attn.o_proj.weight").chunk(ranks, dim=1)[rank]
        if what == "mlp.linear_fc1":
            return torch.cat([rows(whole(f"{mlp}.{each}_proj.weight")) for each in ("gate", "up")])
        if what == "mlp.linear_fc2":
            return whole(f"{mlp}.down_proj.weight").chunk(ranks, dim=1)[rank]
        if what == "mlp.router":
            shape, device = (args.experts, size.width), torch.device(next(chunk.parameters()).device)
            return initial_values(f"{layer}.mlp.router.weight", shape, size.layers, args.seed, device)
        return whole(f"{layer}.{'input' if what == 'input_layernorm' else 'post_attention'}_layernorm.weight")

    for name, parameter in chunk.named_parameters():
        parameter.copy_(part(name))


def mask_padding(logits_SBV: Tensor, size: ModelSize) -> Tensor:
    """Logits of this rank's rows, those of rows that are no token's as low as can be: they have no part in the loss."""
    rows = logits_SBV.shape[-1]
    real = size.vocab_size - rows * parallel_state.get_tensor_model_parallel_rank()
    if real >= rows:
        return logits_SBV
    padding_V = torch.arange(rows, device=logits_SBV.device) >= real
    return logits_SBV.masked_fill(padding_V, float("-inf"))
