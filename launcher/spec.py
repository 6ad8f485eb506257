"""The types that every other part of the launcher speaks. Imports nothing of this project. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SPEC_VERSION = 1
"""Written into every frozen spec; a run directory of a newer launcher is refused instead of misread."""

Executor = Literal["slurm", "local", "debug"]
Launch = Literal["srun", "torchrun"]
ContainerKind = Literal["none", "pyxis", "apptainer"]
Preflight = Literal["off", "minimal", "passive", "full"]
Links = Literal["leave_out", "go_on"]
"""Each tier holds the one before it: a few things, everything that can be read without load, everything under load."""


class UserError(Exception):
    """A mistake of the person at the keyboard: one line that says what is wrong, where, and the nearest right thing.

    The CLI prints it without a traceback and exits with status 2.
    """


@dataclass(frozen=True)
class Container:
    """What the tasks run in. The controller itself always runs on the host, where `scontrol` is."""

    kind: ContainerKind = "none"
    image: str = ""
    mounts: tuple[str, ...] = ()
    python: str = "python3"
    """The interpreter inside the image."""


@dataclass(frozen=True)
class Expected:
    """What a cluster's profile says of its nodes, for the preflight, beyond the sizes of the job."""

    sku: str | None = None
    """Part of the GPU's name."""
    rails: int | None = None
    """RDMA devices that are up."""
    without: tuple[str, ...] = ()
    """Checks and subjects that the nodes have no evidence for."""
    links: Links = "leave_out"
    """What a link between two nodes does that fell short or hung: one of its ends is left out, or the run goes on."""


@dataclass(frozen=True)
class JobSpec:
    """Everything that is decided before a job is submitted: recipe + cluster + overrides, resolved and validated."""

    recipe: str
    entrypoint: str
    args: Mapping[str, Any]
    """The recipe's own arguments, complete: every field of its dataclass, as plain JSON values."""

    cluster: str
    executor: Executor

    nodes: int
    """Nodes that work; `spares` come on top."""
    tasks_per_node: int
    """One task is one rank: one process per GPU, or per CPU device where `gpus_per_node` is 0."""
    gpus_per_node: int
    cpus_per_task: int
    time_minutes: int
    spares: int = 0
    """Nodes that the job holds in reserve, to take the place of one that fails."""
    memory: str | None = None
    """Memory per node in Slurm's notation ("64G", "0" is all of it); None leaves the cluster's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclude: tuple[str, ...] = ()
    sbatch: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further sbatch flags by long name; an empty value is a flag without one ({"exclusive": ""})."""

    launch: Launch = "srun"
    preflight: Preflight = "minimal"
    checks: Expected = Expected()
    container: Container = Container()
    activate: tuple[str, ...] = ()
    """Shell lines of the cluster profile that run on the batch node before the controller (module load …)."""
    python: str = ""
    """Interpreter of the job; empty is .venv/bin/python of the repository."""
    fabric: str = "tcp"
    fabric_kind: str = "auto"
    """What the fabric's variables are derived as on each node: one of checks.fabric_facts.FabricKind."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables for the tasks: the fabric's, the profile's and `env.*` overrides, in that order."""
    run_root: str = ""
    """Folder that holds the run directories; empty is decided by `launcher.paths` where the launcher runs."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.tasks_per_node

    def recipe_argv(self) -> list[str]:
        """The recipe's arguments as it takes them on its command line: `key=value` words."""
        return [f"{key}={_as_word(value)}" for key, value in self.args.items()]

    def to_json(self) -> str:
        """The frozen form kept in the run directory."""
        return json.dumps({"version": SPEC_VERSION, **dataclasses.asdict(self)}, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        """Read back `to_json`. Raises UserError for the spec of a newer launcher."""
        fields = json.loads(text)
        version = fields.pop("version", None)
        if version != SPEC_VERSION:
            raise UserError(
                f"the run's spec has version {version}; this launcher reads version {SPEC_VERSION}"
            )
        container = fields.pop("container")
        checks = fields.pop("checks")
        return cls(
            **{**fields, "exclude": tuple(fields["exclude"]), "activate": tuple(fields["activate"])},
            checks=Expected(**{**checks, "without": tuple(checks["without"])}),
            container=Container(**{**container, "mounts": tuple(container["mounts"])}),
        )


def _as_word(value: Any) -> str:
    """One value as the recipe's argument parser reads it: strings raw, everything else as JSON (null, true, 1e-4)."""
    return value if isinstance(value, str) else json.dumps(value)
