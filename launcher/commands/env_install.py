"""`env install NAME`: the locked environment of a stack, on this machine; without a name, which there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.environments import make_environment, python_of
from launcher.paths import absolute, environments_root
from launcher.spec import UserError
from launcher.stacks import load_stack, load_stacks


def install(words: Sequence[str]) -> int:
    """Carry out the words after `env install`; gives the exit status. Raises UserError."""
    names = [word for word in words if "=" not in word]
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    if unknown := sorted(settings.keys() - {"into"}):
        raise UserError(f"unknown key '{unknown[0]}': env install NAME into=FOLDER")
    if len(names) > 1 or (settings and not names):
        raise UserError(f"env install takes one name, not {len(names)}: env install NAME into=FOLDER")
    if not names:
        print(listing(), end="")
        return 0
    stack = load_stack(names[0])
    chosen = settings.get("into")
    folder = absolute(chosen, Path.cwd()) if chosen else environments_root() / stack.name
    make_environment(stack, folder, say=lambda stage, what: print(f"env: {stage:<9}{what}", flush=True))
    print(f"In a job: python={python_of(folder)}")
    return 0


def listing() -> str:
    """One line per stack: its name, its main versions, what it is for."""
    lines = []
    for stack in load_stacks().values():
        pins = stack.pins()
        version = pins.get(stack.name) or pins.get(f"{stack.name}-core") or ""
        made = "made" if python_of(environments_root() / stack.name).exists() else ""
        lines.append(
            f"{stack.name:<10} {version:<8} torch {pins['torch']:<8} {made:<5} {stack.summary}".rstrip()
        )
    return "\n".join(lines) + "\n"
