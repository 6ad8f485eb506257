"""What several tests of recipes need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from recipes.lib.distributed import World, joined


@pytest.fixture
def one_rank() -> Iterator[World]:
    """A process group of this process alone, left also when the test fails."""
    try:
        with joined("cpu") as world:
            yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
