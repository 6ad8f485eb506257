"""One Llama-type decoder in plain PyTorch, for every training recipe.

Parameters carry the names that Hugging Face gives them (without the leading `model.`), and rotary positions
pair dimension i with i + E/2 as Hugging Face does, so published weights load without permutation.

Suffixes of tensor names are their dimensions:
B batch, S sequence, T tokens (B and S flattened, or a chunk of them), D model width, H query heads, K
key/value heads, E width of one head, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from recipes.lib.fused_loss import IGNORE as IGNORE  # of the targets that this model takes
from recipes.lib.fused_loss import Chunk, VocabularyPart, fused_loss, loss_and_gradients
from recipes.lib.model_sizes import ModelSize, RopeScaling

MAX_LOGITS = 2**29
"""Logits held at once (2 GiB in float32); a longer batch is projected onto the vocabulary in chunks."""


class Transformer(nn.Module):
    """The whole decoder. Build it under `torch.device("meta")`, shard it, then call `materialize`.

    `forward(tokens_BS)` gives the logits [B, S, V]; `forward(tokens_BS, targets_BS)` gives the *summed*
    cross-entropy of all targets (a scalar, float32 or wider). It is a sum because the mean is over the global
    batch: only the training loop knows how many tokens the other ranks and microbatches hold.
    """

    def __init__(self, size: ModelSize) -> None:
        if size.vocab_size <= 0:
            raise ValueError("the model needs a vocabulary: replace vocab_size=0 with the tokenizer's first")
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(size.vocab_size, size.width)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=size.norm_epsilon)
        self.lm_head = Head(size)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None = None, positions_S: Tensor | None = None
    ) -> Tensor:
        # Positions are given where the tokens are a part of a sequence (context parallelism).
        rotation = rotary_table(self.size, tokens_BS.shape[1], tokens_BS.device, positions_S)
        x_BSD = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, *rotation)
        tied_VD = self.embed_tokens.weight if self.size.tied else None
        output: Tensor = self.lm_head(self.norm(x_BSD), targets_BS, tied_VD)
        return output


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.width, eps=size.norm_epsilon)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = nn.RMSNorm(size.width, eps=size.norm_epsilon)
        self.mlp = FeedForward(size)
        # Set by `parallelism.checkpoint_activations`. A wrapper module would do the same but put its own name
        # into every parameter's, and so into every checkpoint.
        self.recompute: Callable[..., Any] | None = None

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
        if self.recompute is None or not torch.is_grad_enabled():
            return self._layer(x_BSD, cos_SE, sin_SE)
        output_BSD: Tensor = self.recompute(self._layer, x_BSD, cos_SE, sin_SE)
        return output_BSD

    def _layer(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SE, sin_SE)
        x_BSD = x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key/value head."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        # A field, so that context parallelism can put an exchange between ranks around it.
        self.attend = causal_attention
        self.q_proj = nn.Linear(size.width, size.heads * size.head_dim, bias=False)
        self.k_proj = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.v_proj = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.o_proj = nn.Linear(size.heads * size.head_dim, size.width, bias=False)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
        def split_heads(flat: Tensor) -> Tensor:
            return flat.view(*flat.shape[:-1], -1, self.head_dim).transpose(1, 2)

        q_BHSE = rotate(split_heads(self.q_proj(x_BSD)), cos_SE, sin_SE)
        k_BKSE = rotate(split_heads(self.k_proj(x_BSD)), cos_SE, sin_SE)
        v_BKSE = split_heads(self.v_proj(x_BSD))
        y_BHSE = self.attend(q_BHSE, k_BKSE, v_BKSE)
        output_BSD: Tensor = self.o_proj(y_BHSE.transpose(1, 2).flatten(2))
        return output_BSD


def causal_attention(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
    """Attention of each position to itself and those before it; gives [B, H, S, E]."""
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(q_BHSE, k_BKSE, v_BKSE, is_causal=True, enable_gqa=grouped)


class FeedForward(nn.Module):
    """SwiGLU: a gate and a value, multiplied, projected back."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.ffn_width, bias=False)
        self.up_proj = nn.Linear(size.width, size.ffn_width, bias=False)
        self.down_proj = nn.Linear(size.ffn_width, size.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        output_BSD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))
        return output_BSD


class Head(nn.Module):
    """The projection onto the vocabulary and the loss over it.

    Both in one module, so that no caller ever holds the logits of a whole batch: 16k tokens of Llama 3's
    vocabulary are 8 GiB in float32, twice that with their gradient. A tied head owns no weight and is handed
    the embedding's.
    """

    def __init__(self, size: ModelSize, max_logits: int = MAX_LOGITS) -> None:
        super().__init__()
        self.max_logits = max_logits
        self.weight = None if size.tied else nn.Parameter(torch.empty(size.vocab_size, size.width))
        # A field, so that `parallelism.compile_blocks` can put the compiled function here.
        self.chunk_loss: Chunk = loss_and_gradients

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None, tied_VD: Tensor | None = None) -> Tensor:
        weight_VD = self.weight if tied_VD is None else tied_VD
        assert weight_VD is not None, "an untied head owns its weight"
        if targets_BS is None:
            return F.linear(x_BSD, weight_VD)
        compute, rows = self.chunk_loss, weight_VD.shape[0]
        if isinstance(weight_VD, DTensor):  # tensor parallelism: this rank has some of the rows
            assert isinstance(x_BSD, DTensor)
            part = VocabularyPart.of(weight_VD)
            # Not this rank's own number: all of them must make equally many chunks.
            compute, rows = part.loss_and_gradients, part.most_rows
            # The rows of each rank give a part of x's gradient; their sum is taken on the way back.
            x_BSD, weight_VD = x_BSD.to_local(grad_placements=[Partial()]), weight_VD.to_local()
        device = x_BSD.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Here, not inside: what autocast rounds in there, it would keep without its gradient.
            rounded = torch.get_autocast_dtype(device)
            x_BSD, weight_VD = x_BSD.to(rounded), weight_VD.to(rounded)
        x_TD, targets_T = x_BSD.flatten(0, 1), targets_BS.flatten()
        chunks = max(1, math.ceil(targets_T.numel() * rows / self.max_logits))
        return fused_loss(x_TD, weight_VD, targets_T, chunks, compute)


def rotary_table(
    size: ModelSize, length: int, device: torch.device, positions_S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and dimension, two [S, E] tensors in float32.

    The positions are the first `length`, or those given.

    Computed in each forward pass (microseconds) instead of kept as a buffer: buffers on the meta device lose
    their values, and under FSDP nothing else in the model is left unsharded.
    """
    half = torch.arange(0, size.head_dim, 2, device=device, dtype=torch.float64)
    frequencies = size.rope_theta ** -(half / size.head_dim)
    if size.rope_scaling is not None:
        frequencies = _stretched(frequencies, size.rope_scaling)
    if positions_S is None:
        positions_S = torch.arange(length, device=device)
    angles = torch.outer(positions_S.double(), frequencies).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's scaling: slow dimensions are divided by the factor, fast ones kept, the rest blended."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Rotary positions. A bfloat16 `x` is promoted by the float32 tables and rounded once, at the end."""
    first, second = x_BHSE.chunk(2, dim=-1)
    turned = x_BHSE * cos_SE + torch.cat((-second, first), dim=-1) * sin_SE
    return turned.to(x_BHSE.dtype)


@torch.no_grad()
def materialize(model: Transformer, seed: int, device: torch.device, storage: str | None = None) -> None:
    """Give a model that was built on the meta device its memory and its initial values.

    Each parameter is drawn whole, on `device`, from a generator seeded with (seed, its name), and a rank
    keeps its own shard. So the weights are the same bit for bit for any world size and any sharding, ranks
    exchange nothing, and no rank ever holds more than its shards and one whole parameter (2 GiB for
    Llama-3-8B's embedding). A CPU and a GPU draw different numbers. `storage` is where the shards live
    ("cpu" when the parameters are offloaded); by default on `device`.
    """
    model.to_empty(device=storage or device)
    for name, parameter in model.named_parameters():
        whole = initial_values(name, parameter.shape, model.size.layers, seed, device)
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every rank has drawn the same values, nothing needs to be sent.
            shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(whole)


def initial_values(name: str, shape: Sequence[int], layers: int, seed: int, device: torch.device) -> Tensor:
    """What `materialize` gives the parameter `name` of a model of so many layers, whole and in float32."""
    # Drawn in float32 for every dtype, so that float64 runs start from the same point as float32 ones.
    whole = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    std = _initial_std(name, layers)
    if std is None:
        return whole.fill_(1.0)
    return whole.normal_(0.0, std, generator=_generator(f"{seed}/{name}", device))


def _initial_std(name: str, layers: int) -> float | None:
    """Standard deviation of a parameter's initial values; None is a norm's gain, which starts at one.

    `layers` are those of the whole model, of which this rank may hold a part.
    """
    if "norm" in name:
        return None
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        # Two of these are added to the residual stream per layer: keep its variance independent of depth.
        return 0.02 / math.sqrt(2 * layers)
    return 0.02


def _generator(key: str, device: torch.device) -> torch.Generator:
    # hashlib, not hash(): Python salts the latter differently in every process.
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
