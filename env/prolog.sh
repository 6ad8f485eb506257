#!/bin/bash
# For administrators: takes a node out of service when a check of the preflight fails on it. In slurm.conf, as either:
#
#   HealthCheckProgram=/path/to/checkout/env/prolog.sh
#   HealthCheckInterval=300
#   HealthCheckNodeState=IDLE
#
#   Prolog=/path/to/checkout/env/prolog.sh
#   PrologFlags=Alloc
#
# Slurm gives neither of them words, so what a node should be stands in env/prolog.conf (or the file PREFLIGHT_CONF),
# which this script reads as shell:
#
#   words=(--gpus=8 --fabric=infiniband --without=pcie.acs)   # of `python -m checks`
#   python=/path/to/python                                   # default: .venv/bin/python of the checkout
#   scontrol=/path/to/scontrol                               # default: the one on PATH
#
# Exit status: 0 nothing failed; 1 a check failed and the node is drained with the reason (after a Prolog that fails
# Slurm puts the job back into the queue); 2 a check failed and scontrol could not drain it; 64 this script is set up
# wrongly.
#
# Only `fail` drains. What could not be looked at (unknown, not permitted, no answer in time) is written to standard error
# and leaves the node alone: a fault of the looking, on every node at once, must not take a cluster away. A drain that
# somebody else set is neither changed nor ended; one of this script ends when a health check passes, nothing unknown.
# Everything together takes less than 10 s.

set -u
marker="preflight:"
repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 64
conf=${PREFLIGHT_CONF:-$repository/env/prolog.conf}
words=()
python=$repository/.venv/bin/python
scontrol=scontrol
if [ -e "$conf" ]; then
  # shellcheck source=/dev/null
  . "$conf" || exit 64
fi
node=${SLURMD_NODENAME:-$(hostname -s)}

complain() {
  echo "prolog.sh: $node: $*" >&2
}

if ! command -v "$python" >/dev/null; then
  complain "no interpreter $python"
  exit 64
fi

# A slurmctld that does not answer costs a second; the checks have a budget of their own within theirs.
ask_slurm() {
  timeout --kill-after=0.2 1 "$scontrol" "$@"
}

# First line: the verdict of the whole. Second: what is to be said of it.
judge='
import json, sys
text = sys.stdin.read()
try:
    checks = json.loads(text)["checks"]
except (ValueError, KeyError, TypeError):
    print("unknown\nthe checks gave no report")
    sys.exit()
for verdict in ("fail", "unknown"):
    found = [c for c in checks if c["verdict"] == verdict]
    if found:
        said = "; ".join("%s: %s, expected %s" % (c["check"], c["read"], c["expected"]) for c in found)
        print(verdict + "\n" + " ".join(said.replace(chr(34), "").replace(chr(39), "").split())[:250])
        sys.exit()
print("pass\n" if checks else "unknown\nno check was made")
'
report=$(
  cd / && export PYTHONPATH="$repository" SLURMD_NODENAME="$node" &&
    timeout --kill-after=0.2 5 "$python" -P -m checks --json --budget=4 "${words[@]}"
)
status=$?
if [ "$status" -eq 64 ]; then
  complain "python -m checks does not take the words of $conf"
  exit 64
fi
answer=$(printf '%s' "$report" | timeout --kill-after=0.2 1.5 "$python" -I -c "$judge")
: "${answer:=unknown}"
verdict=${answer%%$'\n'*}
said=${answer#*$'\n'}

record=$(ask_slurm show node -o "$node")
state=$(sed -n 's/.* State=\([^ ]*\).*/\1/p' <<<"$record")
reason=$(sed -n 's/.* Reason=\(.*\)/\1/p' <<<"$record")

case $verdict in
  fail)
    complain "$said"
    case $state in
      *DRAIN*) exit 1 ;; # by whom ever: it stays as it is, with its reason
    esac
    if ! ask_slurm update "nodename=$node" state=drain "reason=$marker $said"; then
      complain "scontrol does not drain it"
      exit 2
    fi
    exit 1
    ;;
  pass)
    # A prolog runs for a job that has the node already; only a health check ends a drain.
    case $state:$reason in
      *DRAIN*:"$marker"*)
        if [ -z "${SLURM_JOB_ID:-}" ]; then
          ask_slurm update "nodename=$node" state=resume || complain "scontrol does not resume it"
        fi
        ;;
    esac
    ;;
  *)
    complain "$said"
    ;;
esac
exit 0
