"""Lay a box out, write its folder, start its daemons and wait for its nodes."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.box import accounting, config, processes
from launcher.box.config import Layout, Node
from launcher.box.gpus import Gpu
from launcher.box.packages import Packages
from launcher.box.paths import BoxUnavailable
from launcher.box.processes import Daemon, DaemonFailed

_PORTS = range(20000, 32768)
"""Below what Linux gives to outgoing connections, so that none takes a port between choice and use."""


@dataclass(frozen=True)
class Plan:
    """What a box is to be, before ports are chosen for it."""

    cluster: str
    state_dir: Path
    cpus_per_node: int
    accounting: bool
    gpus_of_nodes: tuple[tuple[Gpu, ...], ...]
    """One entry per node."""


def lay_out(plan: Plan, packages: Packages) -> Layout:
    """Give the box ports that are free now. Raises BoxUnavailable if too few are, or for a nameless user."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise BoxUnavailable(f"Slurm needs a user name, and user id {os.getuid()} has none here") from None
    controller, slurmdbd, *node_ports = _free_ports(2 + len(plan.gpus_of_nodes))
    return Layout(
        cluster=plan.cluster,
        user=user,
        state_dir=plan.state_dir,
        plugin_dir=packages.plugin_dir,
        controller_port=controller,
        nodes=tuple(
            Node(config.node_name(index), config.node_address(index), port, gpus)
            for index, (port, gpus) in enumerate(zip(node_ports, plan.gpus_of_nodes, strict=True))
        ),
        cpus_per_node=plan.cpus_per_node,
        accounting_port=slurmdbd if plan.accounting else None,
    )


def write(layout: Layout, packages: Packages) -> None:
    """Fill the box's folder, which exists and is empty but for what its owner noted there."""
    folder = layout.state_dir
    for part in ("bin", "log", "run", "spool", "state"):
        (folder / part).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    layout.slurm_conf.write_text(config.slurm_conf(layout), "utf-8")
    (folder / "plugstack.conf").touch()
    (folder / "cgroup.conf").write_text(config.cgroup_conf(), "utf-8")
    if layout.has_gpus:
        (folder / "gres.conf").write_text(config.gres_conf(layout), "utf-8")
    if layout.accounting_port is not None:
        secret = folder / "slurmdbd.conf"
        secret.touch(0o600)  # slurmdbd refuses a file that others may read
        secret.write_text(accounting.slurmdbd_conf(layout, packages), "utf-8")
    _write_script(folder / "task-prolog", config.task_prolog(layout))
    for program in packages.clients():
        wrapper = config.client_wrapper(program, packages.loader, packages.library_path, layout.slurm_conf)
        _write_script(layout.bin_dir / program.name, wrapper)


def _write_script(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")
    path.chmod(0o755)


def start(layout: Layout, packages: Packages) -> None:
    """Start all daemons and return when every node is idle.

    Raises DaemonFailed, with the daemon's own last word, if one does not get there.
    """
    conf = layout.slurm_conf
    controller = Daemon(
        (str(packages.program("slurmctld")), "-f", str(conf)), layout.state_dir / "log" / "slurmctld.log"
    )
    processes.start([_munged(layout, packages)], packages, conf)
    if layout.accounting_port is not None:
        accounting.start(layout, packages)
    processes.start([controller], packages, conf)
    # A slurmd that finds no controller tries again only seconds later.
    _wait_for_controller(layout, controller)
    processes.start([_slurmd(layout, packages, node) for node in layout.nodes], packages, conf)
    _wait_for_nodes(layout)


def answers(bin_dir: Path) -> bool:
    """Whether the box's own slurmctld answers."""
    said = processes.ask([bin_dir / "scontrol", "ping"])
    return said is not None and re.search(r"\bis UP\b", said) is not None


def node_states(bin_dir: Path) -> dict[str, str]:
    """Slurm's word for each node's state: idle, mixed, allocated, down, … Empty if it does not answer."""
    output = processes.ask([bin_dir / "sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]) or ""
    words = output.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def port_was_taken(layout: Layout) -> bool:
    """Whether a start failed only because somebody else took one of its ports meanwhile."""
    logs = (layout.state_dir / "log").glob("slurm*.log")
    return any("already in use" in log.read_text("utf-8", errors="replace") for log in logs)


def _munged(layout: Layout, packages: Packages) -> Daemon:
    folder = layout.state_dir
    log = folder / "log" / "munged.log"
    command = (
        str(packages.program("munged")),
        # munged wants every folder above its socket open to all. The box's is closed: it is its user's alone.
        "--force",
        f"--socket={layout.munge_socket}",
        f"--key-file={folder / 'munge.key'}",
        f"--seed-file={folder / 'munge.seed'}",
        f"--pid-file={folder / 'run' / 'munged.pid'}",
        f"--log-file={log}",
    )
    return Daemon(command, log)


def _slurmd(layout: Layout, packages: Packages, node: Node) -> Daemon:
    step = str(packages.program("slurmstepd"))
    command = (str(packages.program("slurmd")), "-N", node.name, "-f", str(layout.slurm_conf), "-d", step)
    return Daemon(command, _slurmd_log(layout, node))


def _slurmd_log(layout: Layout, node: Node) -> Path:
    return layout.state_dir / "log" / f"slurmd-{node.name}.log"


def _wait_for_controller(layout: Layout, daemon: Daemon, timeout: float = 20.0) -> None:
    """Ask, instead of knocking at the port: behind it there may be somebody else's slurmctld."""
    deadline = time.monotonic() + timeout
    while not answers(layout.bin_dir):
        said = processes.last_line(daemon.log)
        if "fatal:" in said or time.monotonic() > deadline:
            raise DaemonFailed(f"slurmctld: {said or 'does not answer'}")
        time.sleep(0.02)


def _wait_for_nodes(layout: Layout) -> None:
    deadline = time.monotonic() + 20 + 0.25 * len(layout.nodes)
    while True:
        states = node_states(layout.bin_dir)
        missing = [node for node in layout.nodes if states.get(node.name) != "idle"]
        if not missing:
            return
        said = {node.name: processes.last_line(_slurmd_log(layout, node)) for node in missing}
        late = time.monotonic() > deadline
        for name, line in said.items():
            if late or "fatal:" in line:
                raise DaemonFailed(f"node {name} is {states.get(name, 'unknown')}: {line}")
        time.sleep(0.03)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, chosen at random so that boxes that start together differ."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in random.sample(_PORTS, len(_PORTS)):
            listener = held.enter_context(socket.socket())
            try:
                listener.bind(("", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise BoxUnavailable(f"no {count} free ports in {_PORTS.start} to {_PORTS.stop - 1}")
