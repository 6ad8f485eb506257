"""Arguments of `ch1_first_steps`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument


@dataclass(frozen=True, kw_only=True)
class FirstStepsArgs(TrainArgs):
    """How much is trained, answered and served."""

    steps: int = argument(5, "training steps that are timed, each way", minimum=2)
    warmup_steps: int = argument(2, "steps before that: they allocate, connect and compile", minimum=1)
    save_every: int = argument(-1, "nothing is saved: nothing is trained to an end", minimum=-1, maximum=-1)
    prompt_tokens: int = argument(128, "tokens of a prompt", minimum=1)
    new_tokens: int = argument(32, "tokens of an answer", minimum=2)
    requests: int = argument(24, "requests of the stream", minimum=2)
    rows: int = argument(8, "requests that are answered at a time", minimum=1)
    load: float = argument(
        0.8, "of the stream, as a part of what the batch can do; above 1 the queue grows without end", above=0
    )

    def __post_init__(self) -> None:
        """Refuse what would make the counted figures wrong. Raises ArgumentError."""
        if self.compile:
            raise ArgumentError("compile", True, "wants false: operations are counted one by one")
