"""How much memory DDP takes in its second step, where it makes its buckets anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recipes.ch3.ddp import let_go_of_first_buckets


@pytest.fixture
def group() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without the wait"])
def test_the_second_step_has_one_set_of_buckets(group: None, waits: bool) -> None:
    """Without the wait it has two: the fault that the wait prevents is there."""
    layers = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(16)]).cuda()
    gradient_bytes = sum(weight.numel() * 4 for weight in layers.parameters())
    model = DistributedDataParallel(layers, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if waits:
        let_go_of_first_buckets(optimizer)
    peaks = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model(torch.randn(64, 4096, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    more = peaks[1] - peaks[0]
    assert abs(more - (0 if waits else gradient_bytes)) < 0.1 * gradient_bytes
