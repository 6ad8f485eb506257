"""The stacks that have an environment of their own, from env/requirements. File system (reads)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.paths import REPOSITORY
from launcher.spec import UserError
from launcher.suggest import did_you_mean
from launcher.yaml_files import read_mapping

FOLDER = Path("env/requirements")
_KEYS = frozenset({"summary", "python", "glibc", "from_source", "base", "system"})


@dataclass(frozen=True)
class Stack:
    """One locked environment."""

    name: str
    summary: str
    python: str
    """Version that it was resolved for: "3.12"."""
    glibc: str
    """Oldest that its wheels run on."""
    from_source: tuple[str, ...]
    """Packages that have no wheel."""
    base: tuple[str, str]
    """Flavour of the CUDA image, and why."""
    system: Mapping[str, str]
    """Ubuntu's packages that its image has beyond those of all, with reasons."""
    repository: Path

    @property
    def wanted(self) -> Path:
        """What a person wrote: packages with reasons."""
        return self.repository / FOLDER / f"{self.name}.in"

    @property
    def lock(self) -> Path:
        """Every package in one version."""
        return self.repository / FOLDER / f"{self.name}.txt"

    def pins(self) -> dict[str, str]:
        """Version of every package, by name. Raises UserError without a lock."""
        if not self.lock.is_file():
            raise UserError(f"{self.lock.name} is missing in {FOLDER}: make lock writes it")
        return dict(
            re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*?\])?==([^\s;]+)", self.lock.read_text(), re.MULTILINE)
        )


def load_stacks(repository: Path = REPOSITORY) -> dict[str, Stack]:
    """Every stack by name. Raises UserError for a mistake in stacks.yaml."""
    file = repository / FOLDER / "stacks.yaml"
    shown = file.relative_to(repository).as_posix()
    found: dict[str, Stack] = {}
    described = frozenset(path.stem for path in file.parent.glob("*.in"))  # no stack without its reasons
    for name, content in read_mapping(file, described, shown=shown).items():
        if (
            not isinstance(content, dict)
            or not {"summary", "python", "glibc", "base"} <= content.keys() <= _KEYS
        ):
            raise UserError(
                f"{shown}: {name}: wants summary, python, glibc and base; may have from_source and system"
            )
        found[name] = _stack(name, content, repository)
    return found


def load_stack(name: str, repository: Path = REPOSITORY) -> Stack:
    """The stack called `name`. Raises UserError for an unknown one."""
    stacks = load_stacks(repository)
    if name not in stacks:
        raise UserError(f"unknown stack '{name}': {did_you_mean(name, stacks)}")
    return stacks[name]


def _stack(name: str, content: Mapping[str, Any], repository: Path) -> Stack:
    ((flavour, reason),) = content["base"].items()
    return Stack(
        name=name,
        summary=str(content["summary"]),
        python=str(content["python"]),
        glibc=str(content["glibc"]),
        from_source=tuple(content.get("from_source", ())),
        base=(str(flavour), str(reason)),
        system=dict(content.get("system", {})),
        repository=repository,
    )
