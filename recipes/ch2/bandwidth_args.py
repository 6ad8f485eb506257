"""Arguments of `ch2_bandwidth`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.size_arguments import SizeArgs


@dataclass(frozen=True, kw_only=True)
class BandwidthArgs(SizeArgs):
    """Which sizes."""

    smallest: str = argument("64K", "smallest size: bytes, or with K, M, G (powers of 1024)")
    budget: float = argument(0.1, "seconds of a trial; short copies are repeated so long", above=0)
