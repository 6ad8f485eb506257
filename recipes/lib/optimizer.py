"""AdamW and its learning rate, as a pure function of the step: nothing about it needs to be saved."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from recipes.lib.arguments import TrainArgs

BETAS = (0.9, 0.95)
"""Llama's; with the usual 0.999 the second moment remembers the first, wild steps for too long."""


def build_optimizer(model: nn.Module, args: TrainArgs) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`, which must be sharded already; decay for matrices only.

    Fused: one kernel updates many parameters and allocates nothing, where the default's temporaries are
    as large as the parameters.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.peak_lr, betas=BETAS, fused=True)


def learning_rate(step: int, args: TrainArgs) -> float:
    """Rate of optimizer step `step` (from 1): a linear rise, then a cosine to `min_lr_ratio` of the peak."""
    if step <= args.warmup_steps:
        return args.peak_lr * step / args.warmup_steps
    decaying = max(1, args.steps - args.warmup_steps)
    progress = min(1.0, (step - args.warmup_steps) / decaying)
    floor = args.peak_lr * args.min_lr_ratio
    return floor + (args.peak_lr - floor) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Put `rate` into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Scale the gradients down to the norm `limit` (0: leave them); gives the norm before that, on every
    rank.

    The norm is global: over all parameters, and for sharded ones over all shards.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm
