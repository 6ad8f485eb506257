"""Arguments of `ch1_baseline`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import TrainArgs


@dataclass(frozen=True, kw_only=True)
class BaselineArgs(TrainArgs):
    """What the baseline takes: nothing of its own."""
