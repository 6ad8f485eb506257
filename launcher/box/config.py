"""The text of a box's configuration files. Pure."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from launcher.box.gpus import Gpu

_FIRST_NODE_ADDRESS = IPv4Address("127.0.0.11")
MAX_NODES = 1000

JOB_MARKER = "BOX_JOB"
"""Variable that every job of a box has, and nothing else: the path of the box's slurm.conf."""

PREEMPT_GRACE_SECONDS = 10
KILL_WAIT_SECONDS = 10
NODE_MEMORY_MB = 1_000_000
"""Slurm refuses a job that asks for more than this; otherwise memory is not counted, so jobs share nodes."""


@dataclass(frozen=True)
class Node:
    """One node, i.e. one slurmd on this machine."""

    name: str
    address: str
    port: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Layout:
    """Everything that the configuration files of one box say."""

    cluster: str
    user: str
    state_dir: Path
    plugin_dir: Path
    controller_port: int
    nodes: tuple[Node, ...]
    cpus_per_node: int
    accounting_port: int | None = None
    """Port of slurmdbd; None for a cluster without accounting."""

    @property
    def slurm_conf(self) -> Path:
        return self.state_dir / "slurm.conf"

    @property
    def bin_dir(self) -> Path:
        return self.state_dir / "bin"

    @property
    def munge_socket(self) -> Path:
        return self.state_dir / "run" / "munge"

    @property
    def has_gpus(self) -> bool:
        return any(node.gpus for node in self.nodes)


def node_name(index: int) -> str:
    """Name of the node at `index`, counted from 0: n1, n2, …"""
    return f"n{index + 1}"


def node_address(index: int) -> str:
    """Loopback address of the node at `index`, counted from 0. All of 127.0.0.0/8 is this machine."""
    return str(_FIRST_NODE_ADDRESS + index)


def slurm_conf(layout: Layout) -> str:
    """slurm.conf of a box: what a small cluster has, with the waits cut short for development."""
    state = layout.state_dir
    settings: dict[str, object] = {
        "ClusterName": layout.cluster,
        # The name must be one that slurmctld takes for this host's, whatever this host is called.
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmctldPort": layout.controller_port,
        "SlurmUser": layout.user,
        "SlurmdUser": layout.user,
        # slurmd listens on every interface: with auth/none, whoever reaches its port runs jobs as this user.
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job is held until its credential has expired: 120 s by default.
        "AuthInfo": f"socket={layout.munge_socket},cred_expire=5",
        "PluginDir": layout.plugin_dir,
        "PlugStackConfig": state / "plugstack.conf",
        "StateSaveLocation": state / "state",
        "SlurmdSpoolDir": state / "spool" / "%n",
        "SlurmctldPidFile": state / "run" / "slurmctld.pid",
        "SlurmdPidFile": state / "run" / "slurmd-%n.pid",
        "SlurmctldLogFile": state / "log" / "slurmctld.log",
        "SlurmdLogFile": state / "log" / "slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "TaskProlog": state / "task-prolog",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        # Jobs share nodes by CPUs; a node has as many as its line below says, not as many as the machine.
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",
        "SchedulerType": "sched/backfill",
        # A requeued job becomes eligible by the clock alone: at the default it waits out the minute.
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        # Without this the batch script of a preempted job hears nothing before it is killed.
        "SlurmctldParameters": "preempt_send_user_signal",
        "ReturnToService": 2,
        "KillWait": KILL_WAIT_SECONDS,
        # A finished job stays visible to `scontrol show job` for this many seconds.
        "MinJobAge": 3600,
        "SlurmdTimeout": 15,
        "SlurmctldTimeout": 30,
        "InactiveLimit": 0,
        "SlurmctldDebug": "info",
        "SlurmdDebug": "info",
    }
    if layout.has_gpus:
        settings["GresTypes"] = "gpu"
    if layout.accounting_port is not None:
        settings |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": layout.accounting_port,
            # Not a password: with munge it is the socket, and AuthInfo above does not count here.
            "AccountingStoragePass": layout.munge_socket,
            "JobAcctGatherType": "jobacct_gather/linux",
            "JobAcctGatherFrequency": 1,
        }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines += [_node_line(node, layout.cpus_per_node) for node in layout.nodes]
    lines += [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1"
        f" PreemptMode=REQUEUE GraceTime={PREEMPT_GRACE_SECONDS}",
        "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def _node_line(node: Node, cpus: int) -> str:
    gres = f" Gres=gpu:{len(node.gpus)}" if node.gpus else ""
    return (
        f"NodeName={node.name} NodeHostname=localhost NodeAddr={node.address} Port={node.port}"
        f" CPUs={cpus} RealMemory={NODE_MEMORY_MB}{gres}"
    )


def gres_conf(layout: Layout) -> str:
    """gres.conf: Slurm takes a node's GPU count only together with the files behind it."""
    return "".join(
        f"NodeName={node.name} Name=gpu File={gpu.device_file}\n"
        for node in layout.nodes
        for gpu in node.gpus
    )


def cgroup_conf() -> str:
    """cgroup.conf: naming a version touches no cgroup, while `autodetect` fails where none is mounted."""
    return "CgroupPlugin=cgroup/v1\n"


def task_prolog(layout: Layout) -> str:
    """Shell script that Slurm runs before each task and each batch script; its `export` lines reach the task.

    It marks the job as the box's, puts the box's commands on a PATH that lost them (`sbatch --export=NONE`),
    and says which GPUs of the machine the task has: every slurmd numbers its own from 0, so all nodes would
    share the first. As on a cluster that fences devices off, a task without GPUs sees none.
    """
    shares = [
        f"{node.name}) set -- {shlex.join(gpu.cuda_name for gpu in node.gpus)} ;;"
        for node in layout.nodes
        if node.gpus
    ]
    marker = shlex.quote(f"export {JOB_MARKER}={layout.slurm_conf}")
    return _TASK_PROLOG.format(
        marker=marker, bin=shlex.quote(str(layout.bin_dir)), shares="\n    ".join(shares)
    )


_TASK_PROLOG = """\
#!/bin/sh
echo {marker}
bin={bin}
case ":$PATH:" in
    *":$bin:"*) ;;
    *) echo "export PATH=$bin${{PATH:+:$PATH}}" ;;
esac
set --
case "$SLURMD_NODENAME" in
    {shares}
esac
# Not from CUDA_VISIBLE_DEVICES: a step without GPUs of its own inherits the batch script's, done already.
names=
for number in $(echo "${{SLURM_STEP_GPUS:-$SLURM_JOB_GPUS}}" | tr , ' '); do
    eval "names=\\$names,\\${{$((number + 1))}}"
done
echo "export CUDA_VISIBLE_DEVICES=${{names#,}}"
# Two nodes of a box are to be two hosts to NCCL too: its network transport between them, not NVLink. What somebody has
# set stays; what a step inherits from the batch script is that node's name, given here a moment before.
if [ -z "${{NCCL_HOSTID+set}}" ] || [ "$NCCL_HOSTID" = "${{BOX_HOSTID:-/}}" ]; then
    echo "export NCCL_HOSTID=$SLURMD_NODENAME"
    echo "export BOX_HOSTID=$SLURMD_NODENAME"
fi
"""


def client_wrapper(program: Path, loader: str, library_path: str, conf: Path) -> str:
    """Shell script that becomes one of Slurm's commands.

    The dynamic linker takes the libraries' folders as an argument. LD_LIBRARY_PATH would do as well here, but
    sbatch and srun copy their environment into the job, where it would change which libraries the job loads.
    """
    command = [loader, "--library-path", library_path, "--argv0", program.name, str(program)]
    setting = f"SLURM_CONF={shlex.quote(str(conf))}"
    return f'#!/bin/sh\n{setting}\nexport SLURM_CONF\nexec {shlex.join(command)} "$@"\n'
