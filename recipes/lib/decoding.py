"""Generating text with the shared Transformer: keys and values of earlier tokens are kept, not computed again.

Suffixes of tensor names as in `recipes.lib.model`, and M: the positions that the cache has room for, of which the
longest sequence uses the first T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.lib.model import Attention, Block, Transformer, rotary_table, rotate


class Cache:
    """Keys and values of `rows` sequences, each with room for `room` tokens."""

    def __init__(self, model: Transformer, rows: int, room: int) -> None:
        size, weight = model.size, model.embed_tokens.weight
        shape = (size.layers, rows, size.kv_heads, room, size.head_dim)
        self.keys_LBKME = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values_LBKME = torch.zeros_like(self.keys_LBKME)
        self.cos_ME, self.sin_ME = rotary_table(size, room, weight.device)

    @property
    def room(self) -> int:
        """Tokens that a sequence may have."""
        return self.keys_LBKME.shape[3]


@torch.no_grad()
def advance(
    model: Transformer, cache: Cache, rows: slice, tokens_BS: Tensor, lengths_B: Tensor, longest: int
) -> Tensor:
    """Append `tokens_BS` to the sequences in `rows` of the cache; gives the logits after the last token, [B, V].

    `lengths_B` is how many tokens each of them has already, and `longest` the most that any has afterwards: a number of
    the host's, because asking the device for it would wait for it. A whole prompt in one call is the prefill, one token
    a call is decoding. Raises ValueError where the cache has no room.
    """
    if longest > cache.room:
        raise ValueError(f"{longest} tokens do not fit into a cache of {cache.room}")
    positions_BS = lengths_B[:, None] + torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    cos_B1SE, sin_B1SE = (table[positions_BS][:, None] for table in (cache.cos_ME, cache.sin_ME))
    # Each token sees the positions up to its own; what an earlier sequence left behind it does not.
    visible_B1ST = (torch.arange(longest, device=tokens_BS.device) <= positions_BS[..., None])[:, None]
    x_BSD = model.embed_tokens(tokens_BS)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        kept = cache.keys_LBKME[number, rows], cache.values_LBKME[number, rows]
        normed_BSD = layer.input_layernorm(x_BSD)
        x_BSD = x_BSD + _attend(
            layer.self_attn, normed_BSD, (cos_B1SE, sin_B1SE), kept, positions_BS, visible_B1ST, longest
        )
        x_BSD = x_BSD + layer.mlp(layer.post_attention_layernorm(x_BSD))
    tied_VD = model.embed_tokens.weight if model.size.tied else None
    logits_B1V: Tensor = model.lm_head(model.norm(x_BSD[:, -1:]), None, tied_VD)
    return logits_B1V[:, 0]


def _attend(
    attention: Attention,
    x_BSD: Tensor,
    rotation: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    positions_BS: Tensor,
    visible_B1ST: Tensor,
    longest: int,
) -> Tensor:
    def split_heads(flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], -1, attention.head_dim).transpose(1, 2)

    q_BHSE = rotate(split_heads(attention.q_proj(x_BSD)), *rotation)
    k_BKSE = rotate(split_heads(attention.k_proj(x_BSD)), *rotation)
    v_BKSE = split_heads(attention.v_proj(x_BSD))
    row_B1 = torch.arange(len(x_BSD), device=x_BSD.device)[:, None]
    for kept_BKME, new_BKSE in zip(kept, (k_BKSE, v_BKSE), strict=True):
        kept_BKME[row_B1, :, positions_BS] = new_BKSE.transpose(1, 2)
    k_BKTE, v_BKTE = (kept_BKME[:, :, :longest] for kept_BKME in kept)
    y_BHSE = F.scaled_dot_product_attention(
        q_BHSE, k_BKTE, v_BKTE, attn_mask=visible_B1ST, enable_gqa=q_BHSE.shape[1] != k_BKTE.shape[1]
    )
    output_BSD: Tensor = attention.o_proj(y_BHSE.transpose(1, 2).flatten(2))
    return output_BSD
