"""Arguments of `ch2_patterns`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.schedules import SCHEDULES
from recipes.lib.size_arguments import SizeArgs


@dataclass(frozen=True, kw_only=True)
class PatternsArgs(SizeArgs):
    """Which patterns, drawn for how many ranks."""

    patterns: list[str] = argument(list(SCHEDULES), "what is carried out and drawn", tuple(SCHEDULES))
    largest: str = argument("16M", "largest size")
    draw_ranks: int = argument(
        0, "ranks in the pictures; 0: those of the run, where they are 3 to 8, else 4", minimum=0, maximum=8
    )
