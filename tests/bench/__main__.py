"""`make bench`: what the launcher costs, beside submitit's own submission and bare sbatch, in one run.

The three ways take turns (A B C A B C …), so that a machine that slows down slows all of them. Each submits the same
script to the same box, to start in an hour, and is timed as a whole process. Printed: minimum, median and maximum, and
differences and ratios of turns, not of medians. Then the controller: from the first line of the batch script to the
start of the tasks, preflight included. Then what a thousand ranks cost, by simulation (tests/bench/scale.py),
and what the preflight of a thousand nodes costs, from synthetic evidence (tests/bench/preflight.py).
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launcher import box, runs
from launcher.codeversion import version_of
from launcher.paths import REPOSITORY
from tests.bench import preflight, scale

TURNS = 9
CONTROLLED_RUNS = 7
WORDS = ("recipe=ch3_ddp", "cluster=box", "nodes=2", "tasks_per_node=1", "sbatch.begin=now+1hour")

SUBMITIT = """
import sys, submitit
executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(time=60, nodes=2, ntasks_per_node=1, cpus_per_task=1,
                           additional_parameters={"begin": "now+1hour"})
print(executor.submit(print, "hello").job_id)
"""


def main() -> int:
    name = f"bench-{os.getpid()}"
    made = box.up(nodes=2, name=name, gpus=0)
    try:
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            environment = {
                **os.environ,
                **box.environment(made),
                "LAUNCHER_BOX": name,
                "LAUNCHER_RUNS": folder,
            }
            print(f"# Launcher, {time.strftime('%Y-%m-%d')}\n\n{_machine()}\n")
            _submission(Path(folder), environment)
            _controller(Path(folder), environment)
    finally:
        box.down(name)
    print()
    status = scale.main()
    print("\n# Preflight\n")
    return status or preflight.main()


def _machine() -> str:
    cores, load = os.cpu_count(), os.getloadavg()[0]
    versions = ", ".join(f"{package} {version_of(package)}" for package in ("submitit", "omegaconf", "torch"))
    return f"{cores} cores, load {load:.1f} at the start, Python {platform.python_version()}, {versions}."


def _submission(folder: Path, environment: dict[str, str]) -> None:
    script = folder / "job.sbatch"
    launcher = [sys.executable, "-m", "launcher"]
    text = subprocess.run(
        [*launcher, "render", *WORDS], env=environment, capture_output=True, text=True, check=True
    )
    script.write_text(text.stdout)
    commands = {
        "launcher submit": [*launcher, "submit", "--json", *WORDS],
        "submitit": [sys.executable, "-c", SUBMITIT, str(folder / "submitit")],
        "sbatch": ["sbatch", f"--output={folder}/%j.log", str(script)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(TURNS + 1):
        for name, command in commands.items():
            took = _timed(command, environment)
            if turn:  # the first turn only fills caches
                seconds[name].append(took)
    subprocess.run(["scancel", "--state=PENDING", f"--user={os.getuid()}"], env=environment, check=True)
    print("| seconds per submission | min | median | max |\n|---|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {_spread(values)} |")
    ours, theirs, bare = seconds.values()
    more = [a - b for a, b in zip(ours, theirs, strict=True)]
    print(f"| launcher submit - submitit (aim: at most 0.5) | {_spread(more)} |")
    print(f"| launcher submit / submitit | {_spread([a / b for a, b in zip(ours, theirs, strict=True)])} |")
    print(f"| launcher submit / sbatch | {_spread([a / b for a, b in zip(ours, bare, strict=True)])} |\n")


def _controller(folder: Path, environment: dict[str, str]) -> None:
    words = [
        "recipe=ch3_ddp",
        "cluster=box",
        "nodes=2",
        "tasks_per_node=1",
        "args.steps=1",
        "args.save_every=-1",
    ]
    command = [sys.executable, "-m", "launcher", "submit", *words, "--wait"]
    for _ in range(CONTROLLED_RUNS):
        subprocess.run(command, env=environment, check=True, capture_output=True)
    ledger = [run.attempts()[0] for run in runs.all_runs([folder]) if run.attempts()]
    assert len(ledger) == CONTROLLED_RUNS, ledger
    print("| seconds in the job | min | median | max |\n|---|---|---|---|")
    print(
        f"| batch script to srun of the tasks (aim: under 1) | {_spread([_part(r, 'controller') for r in ledger])} |"
    )
    print(f"| of which preflight on both nodes | {_spread([_part(r, 'preflight') for r in ledger])} |")


def _part(record: dict[str, dict[str, float]], name: str) -> float:
    return record["seconds"][name]


def _timed(command: Sequence[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True)
    return time.perf_counter() - began


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} | {statistics.median(values):.2f} | {max(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
