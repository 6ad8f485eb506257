"""`make soak`: one long training run, struck by one random fault after another, must end as if nothing had happened.

    python -m tests.soak faults=50 seed=1

A box of its own, the tiny model, and `sbatch` of the rendered file. A fault strikes once the attempt has saved
something new, in the middle of whatever the ranks then do. Afterwards every loss that any attempt wrote must equal the
undisturbed run's bit for bit, the ledger must name every fault's cause, and the ETTR of `launcher report` must be the
one that is computed here by hand. Exit status 1 where one of these does not hold.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from launcher import box, ledger
from tests.box_runs.conformance import Started, frozen, losses_by_step, start
from tests.box_runs.support import Launcher, ended
from tests.soak.faults import FAULTS, Fault

SAVE_EVERY = 5
STEPS_BETWEEN = (SAVE_EVERY + 1, 16)
"""How many steps an attempt makes before its fault: it saves something new first."""
ETTR_TOLERANCE = 0.01


class Disagreement(Exception):
    """What the soak is there to find."""


def main(argv: Sequence[str]) -> int:
    options = {
        "faults": "50",
        "seed": str(random.randrange(10**6)),
        **dict(word.split("=", 1) for word in argv),
    }
    count, seed = int(options["faults"]), int(options["seed"])
    print(f"soak: {count} faults, seed={seed}", flush=True)
    name = f"soak-{os.getpid()}"
    made = box.up(nodes=2, name=name, gpus=0)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    environment = {
        **os.environ,
        **box.environment(made),
        "LAUNCHER_BOX": name,
        "LAUNCHER_RUNS": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    try:
        soak(Launcher(environment, folder), folder, count, random.Random(seed))
    except (Disagreement, AssertionError) as found:  # the helpers of the box's tests assert
        print(f"soak: {found}\nsoak: seed={seed}; what the runs left is in {folder}", file=sys.stderr)
        return 1
    finally:
        box.down(name)
    shutil.rmtree(folder)
    return 0


def soak(launcher: Launcher, folder: Path, count: int, chance: random.Random) -> None:
    steps = (count + 2) * STEPS_BETWEEN[1]
    words = (f"args.steps={steps}", f"args.save_every={SAVE_EVERY}", "env.HANG_SECONDS=15")
    undisturbed = start(launcher, folder / "undisturbed", *words)
    if (record := ended(undisturbed.run, seconds=3600.0))["cause"] != "done":
        raise Disagreement(f"the undisturbed run ended with {record['cause']}: {record['reason']}")
    reference = losses_by_step(undisturbed.run)
    started = start(launcher, folder / "struck", *words)
    submitted = submit_time(started)
    names = chance.choices(list(FAULTS), [fault.weight for fault in FAULTS.values()], k=count)
    for attempt, name in enumerate(names, start=1):
        strike(started, attempt, FAULTS[name], chance)
        print(f"{attempt:>3}/{count}  step {started.steps(attempt)[-1]:>4}  {name}", flush=True)
    ended(started.run, count + 1, seconds=3600.0)
    check(started, reference, names, steps)
    by_hand, reported = ettr_by_hand(started, submitted), ettr_of_report(started)
    print(f"\n{count} faults, {steps} steps, {len(reference)} losses equal bit for bit")
    for name, times in Counter(names).most_common():
        print(f"  {times:>3}  {name}")
    print(f"ETTR {reported:.4f} by the report, {by_hand:.4f} by hand")
    if abs(reported - by_hand) > ETTR_TOLERANCE:
        raise Disagreement(f"the report's ETTR is {reported:.4f}, by hand it is {by_hand:.4f}")


def submit_time(started: Started) -> float:
    """When Slurm took the job, which is not asked again: a requeue sets the time anew."""
    return datetime.fromisoformat(started.job()["SubmitTime"]).timestamp()


def strike(started: Started, attempt: int, fault: Fault, chance: random.Random) -> None:
    """Wait until the attempt has saved something new, strike, and see the next one begin."""
    with frozen(started, due(started, attempt, chance.randint(*STEPS_BETWEEN)), attempt) as ranks:
        fault.strike(started, ranks, chance)
    if fault.requeues:
        started.goes_on(restarts=sum(line["action"] == "requeued" for line in before(started, attempt)) + 1)


def before(started: Started, attempt: int) -> list[dict[str, object]]:
    """The ledger's lines of the attempts before this one."""
    return [line for line in started.run.attempts() if line["attempt"] < attempt]


def due(started: Started, attempt: int, steps: int) -> Callable[[], bool]:
    """Whether the attempt has made so many steps, and announced a save of its own."""

    def reached() -> bool:
        saved = any(each["event"] == "saved" and each["attempt"] == attempt for each in started.events())
        return saved and len(started.steps(attempt)) >= steps

    return reached


def check(started: Started, reference: dict[int, float], names: Sequence[str], steps: int) -> None:
    causes = [record["cause"] for record in started.run.attempts()]
    wanted = [*(FAULTS[name].cause for name in names), "done"]
    if causes != wanted:
        which = next(
            n for n, (found, right) in enumerate(zip(causes, wanted, strict=False)) if found != right
        )
        raise Disagreement(
            f"attempt {which + 1} ended with {causes[which]}, and the fault was {names[which]}"
        )
    lines = ledger.read_lines(started.run.metrics_file)
    for line in lines:
        if line["loss"] != reference[line["step"]]:
            raise Disagreement(f"step {line['step']} of attempt {line['attempt']} has another loss")
    if {line["step"] for line in lines} != set(range(1, steps + 1)):
        raise Disagreement("steps are missing")


def ettr_by_hand(started: Started, submitted: float) -> float:
    """Seconds of the steps that count in the end, by the training's own clock, over all seconds since sbatch.

    The clock stands still in saves. Of a step that was made twice, the last time counts.
    """
    lines = {line["step"]: line for line in ledger.read_lines(started.run.metrics_file)}
    tokens_per_step = lines[1]["tokens"]
    productive = sum(tokens_per_step / line["tokens_per_second"] for line in lines.values())
    return float(productive / (started.run.attempts()[-1]["ended"] - submitted))


def ettr_of_report(started: Started) -> float:
    said = json.loads(started.launcher("report", started.run.id, "--json").stdout)
    return float(said["ettr"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
