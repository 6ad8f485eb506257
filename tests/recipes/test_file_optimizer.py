"""AdamW over a file is AdamW: same updates bit for bit, same checkpoints; a full disk is one line."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.lib.arguments import ArgumentError
from recipes.lib.distributed import World
from recipes.lib.file_optimizer import FileAdamW

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95)}


def some_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 11), (1000,), (3, 2))]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def on_file(parameters: list[nn.Parameter], folder: Path, chunk: int = 64) -> FileAdamW:
    return FileAdamW(groups_of(parameters), **RATES, folder=str(folder), world=ALONE, chunk=chunk)


def mapped_files() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "moments-of-rank" in line]


def test_updates_are_those_of_torch_bit_for_bit(tmp_path: Path) -> None:
    """In chunks that divide no tensor."""
    ours, theirs = some_parameters(), some_parameters()
    optimizer = on_file(ours, tmp_path)
    reference = torch.optim.AdamW(groups_of(theirs), **RATES, fused=True)
    for number in range(4):
        step(optimizer, ours, number)
        step(reference, theirs, number)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert mapped_files()
    assert list(tmp_path.iterdir()) == []


def test_a_state_moves_between_the_two_and_stays_on_the_file(tmp_path: Path) -> None:
    theirs, ours, again = (some_parameters() for _ in range(3))
    reference = torch.optim.AdamW(groups_of(theirs), **RATES, fused=True)
    step(reference, theirs, 0)
    optimizer = on_file(ours, tmp_path)
    step(optimizer, ours, 0)
    fresh = on_file(again, tmp_path)
    for parameter, after in zip(again, ours, strict=True):
        parameter.data.copy_(after)
    where = [state["exp_avg"].data_ptr() for state in fresh.state.values()]
    fresh.load_state_dict(reference.state_dict())
    assert [state["exp_avg"].data_ptr() for state in fresh.state.values()] == where
    step(fresh, again, 1)
    step(reference, theirs, 1)
    for a, b in zip(again, theirs, strict=True):
        assert torch.equal(a, b)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to make any file of this process larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def one_line(parameters: list[nn.Parameter], folder: Path) -> str:
    with pytest.raises(ArgumentError) as caught:
        on_file(parameters, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_disk_without_room_is_one_line_and_nothing_stays(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(2**20))]
    with files_of_at_most(2**20):
        line = one_line(parameters, tmp_path)
    assert line.startswith(f"optimizer_folder={tmp_path}: File too large on ")
    assert line.endswith("wants 0.008 GiB a rank")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory that is small")
def test_a_disk_that_is_smaller_than_the_moments() -> None:
    """The real ENOSPC: more than the file system has. Nothing is written of what does not fit."""
    found = os.statvfs("/dev/shm")
    numbers = found.f_bavail * found.f_frsize // 8 + 2**28
    line = one_line([_pretended(numbers)], Path("/dev/shm"))
    assert "No space left on device" in line
    assert not list(Path("/dev/shm").glob("moments-of-rank*"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file or directory" in one_line(some_parameters(), tmp_path / "nowhere")


def _pretended(numbers: int) -> nn.Parameter:
    """A parameter of any size that takes no memory."""
    empty: Tensor = torch.zeros(1).expand(numbers)
    return nn.Parameter(empty, requires_grad=False)
