"""Arguments of `python -m recipes.ch2.predictions`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument


@dataclass(frozen=True, kw_only=True)
class PredictionsArgs:
    """What is compared with what."""

    measured: str = argument(
        "",
        "folder of NAME.jsonl, a run's metrics each: compare them with the predictions that were committed",
    )
    json: bool = argument(False, "the predictions as JSON: how the committed file was made")
