"""Arguments of `ch1_profile`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import TrainArgs, argument


@dataclass(frozen=True, kw_only=True)
class ProfileArgs(TrainArgs):
    """Which step is taken apart, and how."""

    steps: int = argument(6, "steps that the profiler records, and as many without it", minimum=2)
    warmup_steps: int = argument(3, "steps before that: they allocate, connect and compile", minimum=1)
    save_every: int = argument(-1, "nothing is saved: a profile is no training run", minimum=-1, maximum=-1)
    technique: str = argument(
        "auto", "auto is one device alone, or ddp on several ranks", ("auto", "single", "ddp", "fsdp")
    )
    input_delay: float = argument(
        0.0, "pretend that fetching a batch takes so many seconds longer", minimum=0
    )
    delayed_rank: int = argument(-1, "the rank with the delay; -1 is all of them", minimum=-1)
