"""JobSpec -> the text of an sbatch file. Pure.

A job file is headers, a few lines that find the repository and its interpreter, and a shell that stays alive around
the controller: sbatch's --signal=B: reaches only this shell, and a batch step whose shell was replaced by a killed
Python ends FAILED instead of being requeued.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.spec import JobSpec

DEFAULT_WARNING_SECONDS = 120
"""Ahead of the time limit of a run that has not been measured yet."""
LEAST_WARNING_SECONDS = 30


@dataclass(frozen=True)
class Submission:
    """What is known only when a run is submitted from its run directory; a file in jobs/ has none of it."""

    run_dir: Path
    repository: Path
    python: str
    log: str
    """The batch step's own output, with Slurm's patterns (%j)."""
    stop_seconds: float | None = None
    """What stopping takes in this run, as its ledger says; None before there is a measurement."""


def render(spec: JobSpec, submission: Submission | None = None, *, words: Sequence[str] = ()) -> str:
    """The whole sbatch file, ending in a newline.

    Without a submission the file is one for jobs/: it holds no path and takes further overrides as arguments. `words`
    are the overrides that `spec` was composed with; those that the headers do not say are repeated in the file, where
    the spec is composed again.
    """
    sections = [
        "#!/bin/bash",
        "\n".join(f"#SBATCH {flag}" for flag in sbatch_flags(spec, submission)),
        _about(spec, submission),
        *([_activation(spec)] if spec.activate else []),
        "set -u\n# The controller subtracts this from its own clock: what the job spent before its tasks started.\n"
        'export LAUNCHER_BATCH_STARTED="$EPOCHREALTIME"',
        _find_repository(spec, submission),
        _find_python(spec, submission),
        _stay_alive_around(
            *(
                _command(module, spec, submission, words)
                for module in ("controller", "killed began", "killed follow")
            )
        ),
    ]
    return "\n\n".join(sections) + "\n"


def sbatch_flags(spec: JobSpec, submission: Submission | None) -> list[str]:
    """The #SBATCH flags as --key=value words, quoted as sbatch reads them (single quotes, like a shell).

    --nodes, --ntasks-per-node and --cpus-per-task are always stated: sbatch then sets their variables anew, and no
    value of an outer job can be taken for this one's.
    """
    flags: dict[str, str] = {
        "job-name": spec.recipe,
        "nodes": str(spec.nodes + spec.spares),
        "ntasks-per-node": str(spec.tasks_per_node),
        "cpus-per-task": str(spec.cpus_per_task),
    }
    if spec.gpus_per_node:
        # Per node, not per task: NCCL's peer-to-peer transport needs every rank to see the node's GPUs.
        flags["gpus-per-node"] = str(spec.gpus_per_node)
    flags["time"] = slurm_time(spec.time_minutes)
    optional = {"mem": spec.memory, "partition": spec.partition, "account": spec.account, "qos": spec.qos}
    flags.update({name: value for name, value in optional.items() if value is not None})
    if spec.exclude:
        flags["exclude"] = ",".join(spec.exclude)
    flags["output"] = submission.log if submission else "%x-%j.log"
    flags["open-mode"] = "append"  # a requeued job must not erase the log of what went before
    flags["requeue"] = ""  # many sites say JobRequeue=0, which would end the run at the first dead node
    measured = submission.stop_seconds if submission else None
    flags["signal"] = f"B:USR1@{warning_seconds(spec.time_minutes * 60, measured)}"
    if spec.spares:
        flags["no-kill"] = ""  # the job outlives a node, so that a spare can take its place
    flags.update(spec.sbatch)
    return [f"--{name}={shlex.quote(value)}" if value else f"--{name}" for name, value in flags.items()]


def warning_seconds(limit_seconds: float, measured: float | None = None) -> int:
    """How long before the time limit the ranks are asked to save and stop.

    What stopping took before, or a guess; never more than a third of the limit, because Slurm looks at the clock
    only now and then: it signals up to half a minute earlier than told.
    """
    wanted = DEFAULT_WARNING_SECONDS if measured is None else max(LEAST_WARNING_SECONDS, math.ceil(measured))
    return min(wanted, int(limit_seconds) // 3)


def slurm_time(minutes: int) -> str:
    """Minutes as D-HH:MM:00 or HH:MM:00."""
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock


def _about(spec: JobSpec, submission: Submission | None) -> str:
    if submission is not None:
        return (
            f"# Recipe {spec.recipe} on cluster {spec.cluster}, for one run; its spec.json decides what runs."
        )
    return (
        f"# Recipe {spec.recipe} with the cluster profile {spec.cluster}. Rendered, not edited by hand:\n"
        f"#   python -m launcher render recipe={spec.recipe} cluster={spec.cluster}\n"
        "# Flags given to sbatch win over the lines above; words after the file's name are overrides:\n"
        f"#   sbatch --nodes=8 jobs/{spec.recipe}.sbatch args.steps=100"
    )


def _activation(spec: JobSpec) -> str:
    return "\n".join(
        [
            "# From the cluster profile. Before `set -u`: module and conda scripts read unset variables.",
            *spec.activate,
        ]
    )


def _find_repository(spec: JobSpec, submission: Submission | None) -> str:
    if submission is not None:
        return f"repository={shlex.quote(str(submission.repository))}"
    name = f"{spec.recipe}.sbatch"
    return f"""\
# sbatch runs a copy of this file from its spool, so $0 does not say where the repository is; the job's Command does.
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\\(.*\\)/[^/]*/{name}.*|\\1|p')
repository=
for candidate in "${{LAUNCHER_REPOSITORY:-}}" "$submitted" "${{SLURM_SUBMIT_DIR:-}}"; do
  if [ -n "$candidate" ] && [ -f "$candidate/launcher/controller.py" ]; then
    repository=$candidate
    break
  fi
done
if [ -z "$repository" ]; then
  echo "{name}: no repository at '$submitted' or '${{SLURM_SUBMIT_DIR:-}}'; set LAUNCHER_REPOSITORY to its folder" >&2
  exit 2
fi"""


def _find_python(spec: JobSpec, submission: Submission | None) -> str:
    if submission is not None:
        chosen = shlex.quote(submission.python)
    elif spec.python:
        chosen = shlex.quote(spec.python)
    else:
        chosen = '"${LAUNCHER_PYTHON:-$repository/.venv/bin/python}"'
    return f"""\
python={chosen}
if ! command -v "$python" >/dev/null; then
  echo "{spec.recipe}: no interpreter $python; run 'make setup' in $repository, or set LAUNCHER_PYTHON" >&2
  exit 2
fi
export PYTHONPATH="$repository${{PYTHONPATH:+:$PYTHONPATH}}" """.rstrip()


def _command(module: str, spec: JobSpec, submission: Submission | None, words: Sequence[str]) -> str:
    """-P keeps the working folder off the module path: a folder `launcher/` of the reader's would be taken for ours."""
    if submission is not None:
        return f'"$python" -P -m launcher.{module} --run-dir={shlex.quote(str(submission.run_dir))}'
    fixed = [
        f"recipe={spec.recipe}",
        f"cluster={spec.cluster}",
        *(word for word in words if not _is_header(word)),
    ]
    return f'"$python" -P -m launcher.{module} {shlex.join(fixed)} "$@"'


def _is_header(word: str) -> bool:
    """Whether a header says it already, so that `sbatch --nodes=8` may still change it."""
    key = word.partition("=")[0]
    return key in _HEADER_KEYS or key.startswith("sbatch.")


_HEADER_KEYS = frozenset(
    "recipe cluster nodes tasks_per_node gpus_per_node cpus_per_task time memory partition account qos exclude".split()
)


def _stay_alive_around(command: str, had_begun: str, follow: str) -> str:
    return f"""\
# The controller runs in the background so that this shell can pass signals on; `wait` returns early when one arrives.
{command} &
controller=$!
signalled=
for signal in TERM INT USR1 USR2; do
  # shellcheck disable=SC2064 # $signal is meant to be expanded now
  trap "signalled=1; kill -$signal $controller 2>/dev/null" "$signal"
done
while
  signalled=
  wait "$controller"
  status=$?
  [ -n "$signalled" ] && kill -0 "$controller" 2>/dev/null
do :; done
if [ -n "$signalled" ]; then
  wait "$controller"
  final=$?
  [ "$final" -ne 127 ] && status=$final
fi
if [ "$status" -eq 137 ] && {{ [ "$SECONDS" -ge 60 ] || [ "${{SLURM_RESTART_COUNT:-0}}" -lt 3 ] || \\
  {had_begun}; }}; then
  # Killed outright, by the kernel out of memory or by hand: it could not requeue the job, and the ranks go on alone.
  # The next controller counts how often that happens; one that dies before its first attempt is not started for ever.
  # A job that may not be requeued is followed by another one.
  echo "launcher: the controller was killed (status 137); requeueing job $SLURM_JOB_ID" >&2
  tries=0
  until scontrol requeue "$SLURM_JOB_ID" || {follow} || [ "$tries" -ge 30 ]; do
    tries=$((tries + 1))
    sleep 5
  done
fi
exit "$status\""""
