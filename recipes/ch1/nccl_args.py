"""Arguments of `ch1_nccl`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.size_arguments import parse_size


@dataclass(frozen=True, kw_only=True)
class NcclArgs:
    """How large, how often, and what to pretend."""

    small: str = argument("8", "size whose time is the latency: bytes, or with K, M, G")
    large: str = argument("16M", "size whose bandwidth is shown")
    trials: int = argument(5, "trials of each measurement; the median counts", minimum=2)
    budget: float = argument(0.1, "seconds of a trial; short calls are repeated so long", above=0)
    partners: int = argument(3, "with how many others each rank talks alone", minimum=1)
    spoilt_rank: int = argument(-1, "pretend that this rank sends a wrong number; -1: none", minimum=-1)
    slow_rank: int = argument(-1, "pretend that this rank is slow; -1: none", minimum=-1)
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for key in ("small", "large"):
            parse_size(key, getattr(self, key))

    @property
    def small_bytes(self) -> int:
        return parse_size("small", self.small)

    @property
    def large_bytes(self) -> int:
        return parse_size("large", self.large)
