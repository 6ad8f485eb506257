"""Context parallelism: a sequence is split over a few ranks, each of which has some of its tokens in every layer.

Only attention looks at other tokens. Around it, ranks exchange heads for tokens (DeepSpeed Ulysses, arXiv 2309.14509):
in one all-to-all each gives every other rank a part of the heads of its own tokens and gets the tokens it lacks for the
heads it keeps; a second one undoes that. In between runs the ordinary attention kernel, over whole sequences of fewer
heads, so no rank waits for another because the causal mask leaves it less to do.

torch's own `context_parallel` is a ring of GPU kernels, and does not run on a CPU.

Suffixes of tensor names: as in `model`; C ranks of the group; N = H/C + 2K/C, the heads of all three for one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from recipes.lib.model import Attention, Transformer, causal_attention


@dataclass(frozen=True)
class Context:
    """The ranks that split every sequence among themselves, into neighbouring parts in the order of the ranks."""

    group: dist.ProcessGroup
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention
    """Over whole sequences."""

    def part(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's tokens and targets, and their positions in the whole sequence."""
        rank, ranks = self.group.rank(), self.group.size()
        positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        tokens, targets, positions = (
            each.chunk(ranks, dim=-1)[rank] for each in (tokens_BS, targets_BS, positions_S)
        )
        return tokens, targets, positions

    def attend(self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """Causal attention over whole sequences; arguments and result are of this rank's tokens."""
        ranks, kv_heads = self.group.size(), k_BKSE.shape[1]
        # Key/value heads are sent to several ranks where there are too few for one each.
        times = math.lcm(kv_heads, ranks) // kv_heads
        k_BKSE, v_BKSE = (each.repeat_interleave(times, 1) for each in (k_BKSE, v_BKSE))
        # Each rank's heads of all three side by side: one exchange instead of three.
        parts = [each.unflatten(1, (ranks, -1)) for each in (q_BHSE, k_BKSE, v_BKSE)]
        exchanged_CBNSE = self._exchange(torch.cat(parts, dim=2).movedim(1, 0))
        # What came from rank c are the tokens of part c.
        whole_BNSE = exchanged_CBNSE.permute(1, 2, 0, 3, 4).flatten(2, 3)
        y_BHSE = self.attention(*whole_BNSE.split([part.shape[2] for part in parts], dim=1))
        back_CBHSE = self._exchange(y_BHSE.unflatten(2, (ranks, -1)).movedim(2, 0))
        return back_CBHSE.movedim(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Part c goes to rank c; the result's part c came from rank c."""
        return all_to_all_single_autograd(parts.contiguous(), None, None, self.group)


def split_sequences(model: Transformer, group: dist.ProcessGroup) -> Context:
    """Make every attention of `model` exchange over `group`, whose size must divide the heads of this rank."""
    context = Context(group)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = context.attend
    return context
