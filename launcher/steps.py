"""Starting the tasks of an attempt and watching them: through srun, or as processes of this machine. Subprocess.

One task per rank (`launch=srun`) or one torchrun agent per node (`launch=torchrun`). Command lines are built by pure
functions below, so that a test can read them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.allocation import Allocation
from launcher.slurm import TaskExit, parse_task_exits
from launcher.spec import Container, JobSpec

KILL_AFTER_SECONDS = 10.0
"""From SIGTERM to SIGKILL for processes that this machine's controller started itself."""


@dataclass(frozen=True)
class Launch:
    """What every way of starting the tasks needs to know."""

    spec: JobSpec
    allocation: Allocation
    repository: Path
    run_dir: Path
    attempt_dir: Path
    master: str
    python: str
    environment: Mapping[str, str]
    beside_a_dead_step: bool = False
    """An earlier step of the job lost a node. Until the dead node's part of it is given up, a minute later, Slurm
    keeps its CPUs on the living nodes, and would let this step wait for them."""


# --- pure -----------------------------------------------------------------------------------------------------------


def task_command(launch: Launch, *, mounts: Sequence[Path]) -> list[str]:
    """The command of one task, container included: what srun or this machine runs once per rank or per agent."""
    spec = launch.spec
    inside = spec.container.python if spec.container.kind != "none" else launch.python
    command = [inside, "-m", "launcher.task", "agent" if spec.launch == "torchrun" else "rank"]
    command += [f"--attempt-dir={launch.attempt_dir}", f"--master={launch.master}"]
    if spec.launch == "torchrun":
        command.append(f"--workers={spec.tasks_per_node}")
    command += ["--", spec.entrypoint, *spec.recipe_argv()]
    if spec.container.kind == "apptainer":
        return [
            *_apptainer(spec.container, mounts, launch.environment, gpus=bool(spec.gpus_per_node)),
            *command,
        ]
    return command


def srun_command(launch: Launch) -> list[str]:
    """The job step that runs the tasks.

    Sizes are passed here and nowhere else: since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch, and an
    option given by variable as well as by flag is fatal on 25.05. Every option is --key=value, as 25.11 wants it.
    """
    spec, nodes = launch.spec, len(launch.allocation.nodes)
    per_node = 1 if spec.launch == "torchrun" else spec.tasks_per_node
    cpus = spec.cpus_per_task * (spec.tasks_per_node if spec.launch == "torchrun" else 1)
    log = "agent-%n.log" if spec.launch == "torchrun" else "rank-%t.log"
    command = [
        "srun",
        f"--nodes={nodes}",
        f"--nodelist={','.join(launch.allocation.nodes)}",  # a job with spares has more
        f"--ntasks={nodes * per_node}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={cpus}",
        "--distribution=block",  # ranks of one node are neighbours: RANK // LOCAL_WORLD_SIZE is the node
        "--kill-on-bad-exit=1",
        *(["--overlap"] if launch.beside_a_dead_step else []),
        "--mpi=none",  # torch needs no PMI; a broken default plugin hangs the step before the first task
        "--export=ALL",
        f"--chdir={launch.repository}",  # `python -m` looks in the working folder first: a reader's own recipes/ there
        "--open-mode=append",
        f"--output={escape_pattern(str(launch.attempt_dir))}/{log}",
    ]
    mounts = [launch.repository, launch.run_dir]
    if spec.container.kind == "pyxis":
        command += _pyxis(spec.container, mounts, launch.environment)
    return command + task_command(launch, mounts=mounts)


def escape_pattern(path: str) -> str:
    """A path as Slurm's filename patterns read it: a lone % would start a replacement symbol."""
    return path.replace("%", "%%")


def _pyxis(container: Container, mounts: Sequence[Path], environment: Mapping[str, str]) -> list[str]:
    """Pyxis' flags. --container-env names our variables: without it the image's ENV silently wins (NeMo-Run#128)."""
    every = [f"{mount}:{mount}" for mount in mounts] + list(container.mounts)
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(every)}",
        f"--container-env={','.join(sorted(environment))}",
    ]


def _apptainer(
    container: Container, mounts: Sequence[Path], environment: Mapping[str, str], *, gpus: bool
) -> list[str]:
    every = [f"{mount}:{mount}" for mount in mounts] + list(container.mounts)
    command = ["apptainer", "exec", *(["--nv"] if gpus else [])]
    command += [f"--bind={mount}" for mount in every]
    command += [f"--env={name}={value}" for name, value in sorted(environment.items())]
    return [*command, container.image]


# --- processes ------------------------------------------------------------------------------------------------------


class SlurmStep:
    """The tasks as one job step."""

    def __init__(self, launch: Launch, environment: Mapping[str, str]) -> None:
        self._stderr = launch.attempt_dir / "srun.log"
        with open(self._stderr, "ab") as stderr:
            self._process = subprocess.Popen(
                srun_command(launch),
                env={**environment, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,  # signals reach the tasks through Slurm, not through our process group too
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Nothing: what ends the job signals its tasks too, and the stop file reaches them in any case."""

    def dump_stacks(self) -> None:
        """srun hands SIGUSR2 on to the tasks; unlike scancel it needs no slurmctld for that."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)

    def kill(self) -> None:
        """srun answers SIGTERM with SIGKILL for every task of the step."""
        if self._process.poll() is None:
            self._process.terminate()

    def last_lines(self) -> list[str]:
        return self._stderr.read_text(errors="replace").splitlines()[-20:]

    def task_exits(self) -> list[TaskExit]:
        return parse_task_exits(self._stderr.read_text(errors="replace"))


class LocalStep:
    """The tasks as processes of this machine. The first that fails ends the others, as srun --kill-on-bad-exit does."""

    def __init__(self, launch: Launch, environment: Mapping[str, str], *, attached: bool = False) -> None:
        torchrun = launch.spec.launch == "torchrun"
        count = 1 if torchrun else launch.spec.tasks_per_node
        command = task_command(launch, mounts=[launch.repository, launch.run_dir])
        self._processes: list[subprocess.Popen[bytes]] = []
        self._exits: list[TaskExit] = []
        self._terminated_at: float | None = None
        self._attached, self._folder = attached, launch.repository
        self._logs = [
            launch.attempt_dir / (f"agent-{n}.log" if torchrun else f"rank-{n}.log") for n in range(count)
        ]
        for number, log in enumerate(self._logs):
            ranks = {
                "SUBMITIT_LOCAL_GLOBALID": str(number),
                "SUBMITIT_LOCAL_LOCALID": str(number),
                "SUBMITIT_LOCAL_NTASKS": str(count),
            }
            self._processes.append(self._run(command, {**environment, **launch.environment, **ranks}, log))

    def _run(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        if self._attached:  # the debugger's prompt needs this terminal: same session, stdin and stdout
            return subprocess.Popen(command, env=environment, cwd=self._folder)
        with open(log, "ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """None while a task runs; afterwards 0, or the first bad status (a signal as 128 + its number)."""
        codes = [process.poll() for process in self._processes]
        known = {exit_.tasks[0] for exit_ in self._exits}
        for number, code in enumerate(codes):
            if code not in (None, 0) and number not in known:
                name = signal.strsignal(-code) or f"signal {-code}" if code is not None and code < 0 else ""
                self._exits.append(TaskExit("localhost", (number,), None if name else code, name))
        if self._exits and any(code is None for code in codes):
            self.ask_to_stop()
        if any(code is None for code in codes):
            self._kill_late_ones()
            return None
        first = codes[self._exits[0].tasks[0]] if self._exits else 0
        return 128 - first if first is not None and first < 0 else first

    def ask_to_stop(self) -> None:
        if self._terminated_at is None:
            self._terminated_at = time.monotonic()
            self._signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        self._signal(signal.SIGUSR2)

    def kill(self) -> None:
        self._terminated_at = self._terminated_at or time.monotonic()
        self._signal(signal.SIGKILL)

    def _kill_late_ones(self) -> None:
        if self._terminated_at is not None and time.monotonic() - self._terminated_at > KILL_AFTER_SECONDS:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """To each task's whole session: a torchrun agent's workers are its children."""
        for process in self._processes:
            if process.poll() is None and self._attached:
                process.send_signal(number)
            elif process.poll() is None:
                os.killpg(process.pid, number)

    def last_lines(self) -> list[str]:
        return [
            line
            for log in self._logs
            if log.exists()
            for line in log.read_text(errors="replace").splitlines()[-5:]
        ]

    def task_exits(self) -> list[TaskExit]:
        return list(self._exits)
