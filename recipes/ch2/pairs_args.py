"""Arguments of `ch2_pairs`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.size_arguments import parse_size


@dataclass(frozen=True, kw_only=True)
class PairsArgs:
    """How large, how often, how many at once."""

    size: str = argument("16M", "size of a message: bytes, or with K, M, G")
    schedule: str = argument(
        "alone",
        "alone: one message at a time, so that nothing disturbs it; parallel: as many pairs at once as there are, "
        "which takes 2(n-1) measurements instead of n(n-1)",
        ("alone", "parallel"),
    )
    trials: int = argument(5, "trials of each measurement; the median counts", minimum=2)
    budget: float = argument(0.05, "seconds of a trial; short messages are repeated so long", above=0)
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        parse_size("size", self.size)

    @property
    def bytes(self) -> int:
        return parse_size("size", self.size)
