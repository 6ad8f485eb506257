"""AdamW and its learning rate, as a pure function of the step: nothing about it needs to be saved."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from recipes.lib.arguments import TrainArgs
from recipes.lib.distributed import sum_over_ranks

BETAS = (0.9, 0.95)
"""Llama's; with the usual 0.999 the second moment remembers the first, wild steps for too long."""


def build_optimizer(model: nn.Module, args: TrainArgs, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW over all parameters of `model`, which must be sharded already; decay for matrices only.

    Fused: one kernel updates many parameters and allocates nothing, where the default's temporaries are
    as large as the parameters. `sharded`: the parameters are whole on every rank, each one is updated by one rank,
    which alone has its moments, and sent to the others.
    """
    groups = parameter_groups(model, args)
    if sharded:
        # Here, not above: its package compiles a dozen optimizers at import, seconds that no other recipe should pay.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=args.peak_lr, betas=BETAS, fused=True)
    return torch.optim.AdamW(groups, lr=args.peak_lr, betas=BETAS, fused=True)


def parameter_groups(model: nn.Module, args: TrainArgs) -> list[dict[str, Any]]:
    """All parameters of `model`, those that decay and the norms' that do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that has this rank's moments: `optimizer` itself, or where it is sharded what is in it.

    ZeroRedundancyOptimizer's own way to save collects all moments on one rank, where they need not fit.
    """
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


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


def clip_gradients(
    model: nn.Module, limit: float, stage_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Scale the gradients down to the norm `limit` (0: leave them); gives the norm before that, on every
    rank.

    The norm is global: over all parameters, for sharded ones over all shards, and where the layers are spread over the
    ranks of `stage_group`, over all of their layers. What is marked as a copy is scaled, but not counted.
    """
    parts = list(_by_mesh(model).values())
    counted = [[p.grad for p in part if p.grad is not None and not hasattr(p, _COPY)] for part in parts]
    norms = [_whole(nn.utils.get_total_norm(gradients)) for gradients in counted if gradients]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if stage_group is not None:
        norm = sum_over_ranks(norm.square(), stage_group).sqrt()
    if limit > 0:
        for part in parts:
            nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm


_COPY = "is_copy_of_another_stage"


def mark_copy(parameter: nn.Parameter) -> None:
    """Say that another rank of the stage group has `parameter`, too, and counts it in the norm of the gradient."""
    setattr(parameter, _COPY, True)


def _by_mesh(model: nn.Module) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """The parameters that have gradients, in groups that one operation may take together.

    torch has no operation over tensors of different meshes, or over whole and sharded ones together
    (github.com/pytorch/pytorch/issues/180346).
    """
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if (gradient := parameter.grad) is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            found.setdefault(mesh, []).append(parameter)
    return found


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
