"""The faults of the soak: each strikes ranks that stand still, and says how the attempt must then end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from tests.box_runs.conformance import Started
from tests.box_runs.daemons import shell_of
from tests.box_runs.support import ended


@dataclass(frozen=True)
class Fault:
    """One way in which a cluster ends an attempt."""

    cause: str
    """What the ledger has to say."""
    strike: Callable[[Started, dict[int, int], Random], None]
    """Given the run, the process of each rank, and where chance comes from."""
    requeues: bool
    """The job goes back into the queue; otherwise the tasks start again in it."""
    weight: int
    """How often, beside the others."""


def _kill_rank(started: Started, ranks: dict[int, int], chance: Random) -> None:
    os.kill(ranks[chance.choice(sorted(ranks))], signal.SIGKILL)


def _hang(started: Started, ranks: dict[int, int], chance: Random) -> None:
    """All but one go on; the attempt is over when this returns, because whoever froze it thaws it then."""
    hung = chance.choice(sorted(ranks))
    for rank, process in ranks.items():
        if rank != hung:
            os.kill(process, signal.SIGCONT)
    ended(started.run, len(started.run.attempt_dirs()))


def _damage_and_kill(started: Started, ranks: dict[int, int], chance: Random) -> None:
    """Of the newest checkpoint one bit flips; then a rank dies, and somebody has to read it."""
    newest = started.run.path / "checkpoints" / f"step-{started.saved():08d}"
    file = chance.choice(sorted(newest.glob("*.distcp")))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    _kill_rank(started, ranks, chance)


def _requeue(started: Started, ranks: dict[int, int], chance: Random) -> None:
    started.launcher.slurm("scontrol", "requeue", started.run.jobs()[-1]["job_id"])


def _warn(started: Started, ranks: dict[int, int], chance: Random) -> None:
    os.kill(shell_of(started.run), signal.SIGUSR1)


def _kill_controller(started: Started, ranks: dict[int, int], chance: Random) -> None:
    os.kill(started.run.state()["pid"], signal.SIGKILL)


FAULTS: Mapping[str, Fault] = {
    "a rank is killed": Fault("killed", _kill_rank, False, 20),
    "a rank hangs": Fault("hang", _hang, False, 5),
    "a checkpoint is damaged": Fault("killed", _damage_and_kill, False, 7),
    "scontrol requeue": Fault("requeued", _requeue, True, 8),
    "SIGUSR1": Fault("preemption", _warn, True, 5),
    "the controller is killed": Fault("controller_lost", _kill_controller, True, 5),
}
