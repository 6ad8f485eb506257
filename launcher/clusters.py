"""Cluster profiles and fabrics: env/clusters/NAME.yaml, env/fabrics/NAME.yaml. File system.

A profile outside the checkout lies in a folder named in LAUNCHER_CLUSTERS (several with colons), its fabrics
in `fabrics/` below that folder. Those folders come before env/, so that a site's own `slurm.yaml` is what
`cluster=auto` finds; it may say `inherits: slurm` and means the next one of that name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from checks.fabric_facts import FabricKind
from launcher.machine import NodeFacts, box_node, this_machine
from launcher.paths import REPOSITORY
from launcher.settings import SETTINGS, read_settings, whole_number
from launcher.spec import Executor, UserError
from launcher.suggest import did_you_mean
from launcher.yaml_files import read_mapping

AUTO = "auto"
"""The profile `slurm` where `sbatch` is on PATH, else `local`."""
BOX = "box"
"""The profile whose Slurm is the box: the launcher starts it, so it needs no sbatch on PATH."""

CapacityOf = Literal["machine", "box"]
"""In place of a number: what this machine has, or what a node of the box has."""

_MEASURED = ("gpus_per_node", "cpus_per_node", "max_nodes")
_CAPACITY_KEYS = (*_MEASURED, "cpu_tasks_per_node")
_PROFILE_SETTINGS = frozenset(SETTINGS) - {"nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task"}
PROFILE_KEYS = (
    frozenset({"inherits", "executor", *_CAPACITY_KEYS, "container", "checks", "sbatch", "env"})
    | {key for key in _PROFILE_SETTINGS if "." not in key}
)  # fmt: skip
_FABRIC_KEYS = frozenset({"kind", "env"})


@dataclass(frozen=True)
class Capacity:
    """What a cluster has for one job."""

    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    """None where the profile does not say."""
    cores_per_node: int | None = None
    """Real cores behind the CPUs of a node on this machine; None elsewhere: there the CPUs are real."""
    cpu_tasks_per_node: int = 1
    """Ranks per node where there is no GPU."""
    max_nodes: int | None = None


@dataclass(frozen=True)
class ClusterProfile:
    """One cluster as its YAML file describes it."""

    name: str
    file: str
    """The YAML file as messages name it."""
    executor: Executor
    capacity: Capacity
    settings: Mapping[str, Any]
    """Typed settings of every job on it, with dotted keys; without those that are null."""


@dataclass(frozen=True)
class Fabric:
    """One fabric as its YAML file describes it."""

    name: str
    file: str
    """The YAML file as messages name it."""
    kind: FabricKind
    """What the variables of a node are derived as; `auto` where the file does not say."""
    environment: Mapping[str, str]


def profile_files(
    repository: Path = REPOSITORY, environment: Mapping[str, str] = os.environ
) -> dict[str, list[Path]]:
    """The YAML files of every profile by name; where there are several, the first one counts."""
    return _files([*_extra_folders(environment), repository / "env" / "clusters"])


def fabric_files(
    repository: Path = REPOSITORY, environment: Mapping[str, str] = os.environ
) -> dict[str, list[Path]]:
    """The YAML files of every fabric by name; where there are several, the first one counts."""
    folders = [folder / "fabrics" for folder in _extra_folders(environment)]
    return _files([*folders, repository / "env" / "fabrics"])


def resolve_auto(name: str) -> str:
    """`auto` as the profile that it stands for on this machine; any other name as it is."""
    if name != AUTO:
        return name
    return "slurm" if shutil.which("sbatch") else "local"


def auto_note() -> str:
    """What `cluster=auto` is here, and why: for a line beside the job."""
    chosen = resolve_auto(AUTO)
    return f"cluster={AUTO} is {chosen}: sbatch is {'on PATH' if chosen == 'slurm' else 'not on PATH'}"


def load_profile(
    name: str, repository: Path = REPOSITORY, environment: Mapping[str, str] = os.environ
) -> ClusterProfile:
    """The profile called `name`, `auto` resolved. Raises UserError: unknown, or a mistake in its file."""
    name = resolve_auto(name)
    files = profile_files(repository, environment)
    if name not in files:
        raise UserError(f"unknown cluster '{name}' (cluster=): {did_you_mean(name, [AUTO, *files])}")
    file = _shown(files[name][0], repository)
    content = _inherited(name, 0, files, repository, chain=())
    executor = content.pop("executor", None)
    if executor not in get_args(Executor):
        raise UserError(f"{file}: executor: one of {', '.join(get_args(Executor))} is wanted")
    capacity = _capacity({key: content.pop(key, None) for key in _CAPACITY_KEYS}, shown=file)
    settings = {key: value for key, value in content.items() if value is not None}
    return ClusterProfile(name, file, executor, capacity, settings)


def load_fabric(
    name: str, repository: Path = REPOSITORY, environment: Mapping[str, str] = os.environ
) -> Fabric:
    """The fabric called `name`. Raises UserError: unknown fabric, or a mistake in its file."""
    files = fabric_files(repository, environment)
    if name not in files:
        raise UserError(f"unknown fabric '{name}' (fabric=): {did_you_mean(name, files)}")
    path = files[name][0]
    shown = _shown(path, repository)
    content = read_mapping(path, _FABRIC_KEYS, shown=shown)
    kind = content.pop("kind", AUTO)
    if kind not in get_args(FabricKind):
        raise UserError(f"{shown}: kind: one of {', '.join(get_args(FabricKind))} is wanted")
    variables = read_settings(content, shown=shown)
    return Fabric(
        name,
        shown,
        kind,
        {key.removeprefix("env."): value for key, value in variables.items() if value is not None},
    )


def _extra_folders(environment: Mapping[str, str]) -> list[Path]:
    folders = [Path(word) for word in environment.get("LAUNCHER_CLUSTERS", "").split(os.pathsep) if word]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"LAUNCHER_CLUSTERS: there is no folder {folder}")
    return folders


def _files(folders: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, []).append(path)
    return found


def _inherited(
    name: str, index: int, files: dict[str, list[Path]], repository: Path, chain: tuple[Path, ...]
) -> dict[str, Any]:
    """Keys of the file files[name][index], over those of the profile that it inherits, with dotted keys."""
    path = files[name][index]
    shown = _shown(path, repository)
    if path in chain:
        raise UserError(f"{shown}: inherits: the profiles inherit each other")
    content = read_mapping(path, PROFILE_KEYS, shown=shown)
    parent = content.pop("inherits", None)
    own = {key: content.pop(key) for key in ("executor", *_CAPACITY_KEYS) if key in content}
    own |= read_settings(content, shown=shown)
    if parent is None:
        return own
    parent_index = index + 1 if parent == name else 0
    if parent_index >= len(files.get(parent, ())):
        others = [other for other in files if other != name]
        raise UserError(f"{shown}: inherits: unknown cluster '{parent}': {did_you_mean(str(parent), others)}")
    return _inherited(parent, parent_index, files, repository, (*chain, path)) | own


def _capacity(content: Mapping[str, Any], *, shown: str) -> Capacity:
    sources: dict[str, NodeFacts] = {}
    facts: dict[str, NodeFacts] = {}
    numbers: dict[str, int | None] = {}
    for key, value in content.items():
        if key in _MEASURED and value in get_args(CapacityOf):
            sources[value] = sources.get(value) or (this_machine() if value == "machine" else box_node())
            facts[key] = sources[value]
        else:
            numbers[key] = None if value is None else _whole_number(key, value, shown)
    gpus, cpus, nodes = (facts.get(key) for key in _MEASURED)
    return Capacity(
        gpus_per_node=gpus.gpus if gpus else numbers["gpus_per_node"] or 0,
        cpus_per_node=cpus.cpus if cpus else numbers["cpus_per_node"],
        cores_per_node=cpus.cores if cpus else None,
        cpu_tasks_per_node=numbers["cpu_tasks_per_node"] or 1,
        max_nodes=nodes.nodes if nodes else numbers["max_nodes"],
    )


def _whole_number(key: str, value: object, shown: str) -> int:
    try:
        number = whole_number(value, least=0 if key == "gpus_per_node" else 1)
    except ValueError as error:
        words = f" (or {' or '.join(get_args(CapacityOf))})" if key in _MEASURED else ""
        raise UserError(f"{shown}: {key}: {error}{words}") from None
    return number


def _shown(path: Path, repository: Path) -> str:
    return path.relative_to(repository).as_posix() if path.is_relative_to(repository) else str(path)
