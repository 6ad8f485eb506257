"""Which GPUs this machine has, and which node of a box gets which. Reads /dev and CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launcher.spec import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU: the file that Slurm counts and the name under which CUDA finds it."""

    device_file: str
    """For gres.conf, e.g. /dev/nvidia3."""
    cuda_name: str
    """Entry for CUDA_VISIBLE_DEVICES: an index among the visible GPUs, or a UUID."""


def detect(
    device_files: Sequence[Path] | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[Gpu, ...]:
    """The GPUs that this process may use.

    CUDA counts what it can see from 0, whatever the device files are called: in a container that holds only
    /dev/nvidia5, that GPU is CUDA's 0. A CUDA_VISIBLE_DEVICES that a scheduler has set already narrows the
    choice.
    """
    if device_files is None:
        device_files = [
            path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)
        ]
    files = sorted(map(str, device_files), key=lambda file: (len(file), file))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(len(files))] if visible is None else _as_cuda_reads(visible)
    return tuple(Gpu(file, name) for file, name in zip(files, names, strict=False))


def _as_cuda_reads(visible: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES that count: the first empty or negative one ends the list."""
    entries = (entry.strip() for entry in visible.split(","))
    return list(itertools.takewhile(lambda entry: entry and not entry.startswith("-"), entries))


def share_out(gpus: Sequence[T], nodes: int) -> tuple[tuple[T, ...], ...]:
    """Deal the GPUs to `nodes` nodes in order; if they do not divide evenly the first get one more.

    Fewer GPUs than nodes are shared: a job of two nodes is then two ranks of NCCL over its network transport on one
    GPU, which NCCL allows to ranks of differing NCCL_HOSTID alone. Slow, and the same code as on two hosts. A node
    without any would join that job with a rank on the CPU.
    """
    if 0 < len(gpus) < nodes:
        return tuple((gpus[node % len(gpus)],) for node in range(nodes))
    each, rest = divmod(len(gpus), nodes)
    shares, start = [], 0
    for node in range(nodes):
        end = start + each + (node < rest)
        shares.append(tuple(gpus[start:end]))
        start = end
    return tuple(shares)


def choose(available: Sequence[Gpu], wanted: int | None) -> tuple[Gpu, ...]:
    """The first `wanted` GPUs, or all for None. Raises UserError if there are fewer."""
    if wanted is None:
        return tuple(available)
    if not 0 <= wanted <= len(available):
        raise UserError(f"gpus={wanted}: this machine has {len(available)}")
    return tuple(available[:wanted])
