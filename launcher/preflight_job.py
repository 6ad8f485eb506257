"""jobs/preflight.sbatch: no recipe and no run, so no controller; the checks of an allocation. Pure."""

from __future__ import annotations

NAME = "preflight"


def render_preflight() -> str:
    """The whole file, ending in a newline. Words after the file's name are options of `python -m checks`."""
    return r"""#!/bin/bash

#SBATCH --job-name=preflight
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=00:10:00
#SBATCH --output=%x-%j.log

# Every node of the allocation: what it has, what it is compared with the others, what its GPUs and network give.
# Rendered, not edited by hand: python -m launcher render --all --write
# Flags given to sbatch win over the lines above; words after the file's name are options of `python -m checks`:
#   sbatch -N 16 --gpus-per-node=8 jobs/preflight.sbatch --gpus=8 --fabric=infiniband

set -u
# sbatch runs a copy of this file from its spool, so $0 does not say where the repository is; the job's Command does.
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/[^/]*/preflight.sbatch.*|\1|p')
repository=
for candidate in "${LAUNCHER_REPOSITORY:-}" "$submitted" "${SLURM_SUBMIT_DIR:-}"; do
  if [ -n "$candidate" ] && [ -f "$candidate/checks/__main__.py" ]; then
    repository=$candidate
    break
  fi
done
if [ -z "$repository" ]; then
  echo "preflight.sbatch: no repository at '$submitted' or '${SLURM_SUBMIT_DIR:-}'; set LAUNCHER_REPOSITORY" >&2
  exit 2
fi

python="${LAUNCHER_PYTHON:-$repository/.venv/bin/python}"
if ! command -v "$python" >/dev/null; then
  echo "preflight: no interpreter $python; run 'make setup' in $repository, or set LAUNCHER_PYTHON" >&2
  exit 2
fi
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

echo "preflight: what each node has, and how it compares with the others"
# srun reports every status but 0 as an error; here they are verdicts, and the last line says which.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --mpi=none \
  "$python" -P -m checks "$@" 2> >(grep --line-buffered -v 'Exited with exit code' >&2)
passive=$?
case $passive in 0 | 1 | 2 | 3) ;; *) exit "$passive" ;; esac
echo
echo "preflight: what GPUs and network give, measured for at most 90 s"
"$python" -P -m checks --tier=active "$@"
active=$?
case $active in 0 | 1 | 2 | 3) ;; *) exit "$active" ;; esac
names=(pass fail warn unknown)
for status in 1 3 2 0; do # the worse of the two
  if [ "$passive" -eq "$status" ] || [ "$active" -eq "$status" ]; then
    echo
    echo "preflight: ${names[status]} (exit status $status; 0 pass, 1 fail, 2 warn, 3 unknown)"
    exit "$status"
  fi
done
"""
