"""`env`: what a fabric sets and what this machine's evidence adds to it, each variable with its reason.

`env install NAME` makes the environment of a stack instead: `launcher.commands.env_install`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checks.fabric_environment import Derivation, Setting, derive
from checks.fabric_reading import Glance, read_facts
from checks.fabric_report import as_json, node_name
from checks.given import Given, given_by, replaced
from launcher.clusters import AUTO, Fabric, load_fabric, load_profile
from launcher.commands.env_install import install
from launcher.overrides import last_of_each, parse_words
from launcher.settings import read_setting
from launcher.spec import UserError
from launcher.suggest import did_you_mean

EXIT_UNUSABLE = 1
YOURS = "your shell"


def run(options: argparse.Namespace) -> int:
    if options.words[:1] == ["install"]:
        if options.json or options.shell or options.root != Path("/"):
            raise UserError(
                "env install takes a name and into=FOLDER: --json, --shell and --root are of plain env"
            )
        return install(options.words[1:])
    fabric, given, taken_away = _asked(options.words)
    if not (options.root / "sys").is_dir():
        # Without it nothing would be seen, and that looks like a machine without a network.
        raise UserError(f"--root={options.root}: no folder sys/ in it")
    with Glance(str(options.root)) as source:
        facts = read_facts(source, node_name(os.environ), os.environ)
    derivation = derive(facts, fabric.kind, given)
    derivation = dataclasses.replace(derivation, warnings=(*taken_away, *derivation.warnings))
    if options.json:
        print(json.dumps({"fabric": fabric.name, **as_json(derivation)}, indent=2, ensure_ascii=False))
    elif options.shell:
        print(as_shell(derivation), end="")
    else:
        print(as_table(fabric, derivation), end="")
    if options.shell or options.json:
        for line in _complaints(derivation):
            print(line, file=sys.stderr)
    return EXIT_UNUSABLE if derivation.errors else 0


def _asked(words: Sequence[str]) -> tuple[Fabric, dict[str, Given], list[str]]:
    """The fabric, and everything that is set: this shell, the fabric's file, the profile, the words, in that order."""
    chosen: dict[str, str] = {}
    typed: dict[str, Given] = {}
    for word in last_of_each(parse_words(words)):
        if word.key in ("cluster", "fabric"):
            chosen[word.key] = word.value
        elif word.key.startswith("env."):
            name, value = read_setting(word.key, word.value, shown=str(word))
            typed[name.removeprefix("env.")] = Given(value or "", "command line")
        else:
            raise UserError(
                f"unknown key '{word.key}': {did_you_mean(word.key, ['cluster', 'fabric', 'env.NAME'])}"
            )
    settings: Mapping[str, object] = {}
    profile_file = ""
    if "cluster" in chosen:
        profile = load_profile(chosen["cluster"])
        settings, profile_file = profile.settings, profile.file
    fabric = load_fabric(chosen.get("fabric") or str(settings.get("fabric") or AUTO))
    of_profile = {
        name.removeprefix("env."): str(value) for name, value in settings.items() if name.startswith("env.")
    }
    mine = given_by(os.environ, YOURS)
    # As in a job: what was chosen for it counts more than what a shell has left over.
    configured = given_by(fabric.environment, fabric.file) | given_by(of_profile, profile_file) | typed
    return fabric, mine | configured, replaced(mine, configured)


# --- pure -----------------------------------------------------------------------------------------------------------


def as_shell(derivation: Derivation) -> str:
    """Lines for a shell: what is derived, and what files have set. What the shell has already needs no line."""
    settings = [*derivation.settings, *(one for one in derivation.kept if one.reason != YOURS)]
    return "".join(f"export {one.name}={shlex.quote(one.value)}  # {one.reason}\n" for one in settings)


def as_table(fabric: Fabric, derivation: Derivation) -> str:
    """One row per variable; then what was not used and why, where the GPUs are, what is wrong."""
    lines = [f"fabric {fabric.name} ({fabric.file}) on {derivation.node}", ""]
    rows = [("variable", "value", "why")]
    rows += [_row(one, "set by ") for one in derivation.kept]
    rows += [_row(one, "") for one in derivation.settings]
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    values = min(values, 40)
    for name, value, why in rows:
        cut = _at_commas(value, values)
        lines.append(f"{name.ljust(names)}  {cut[0].ljust(values)}  {why}".rstrip())
        lines += [f"{'':{names}}  {rest}" for rest in cut[1:]]
    if derivation.notes:
        lines += ["", "not used, not set:"]
        lines += [f"  {note.subject}: {note.reason}" for note in derivation.notes]
    if derivation.places:
        lines += ["", "GPUs and what is near them:"]
        for place in derivation.places:
            node = "unknown" if place.numa_node is None else str(place.numa_node)
            near = ", ".join(place.hcas) or "no HCA that is used"
            lines.append(
                f"  {place.gpu} {place.address}: NUMA node {node}, CPUs {place.cpus or 'unknown'}, {near}"
            )
    complaints = _complaints(derivation)
    return "\n".join([*lines, *([""] if complaints else []), *complaints]) + "\n"


def _at_commas(value: str, width: int) -> list[str]:
    """A long list on several lines, each ending with a comma."""
    lines = [""]
    for element in re.findall(r"[^,]*,?", value):
        if len(lines[-1]) + len(element) > width and lines[-1]:
            lines.append("")
        lines[-1] += element
    return lines


def _row(setting: Setting, prefix: str) -> tuple[str, str, str]:
    return setting.name, setting.value or "(empty: left to the library)", f"{prefix}{setting.reason}"


def _complaints(derivation: Derivation) -> list[str]:
    lines = [f"warning: {line}" for line in derivation.warnings] + [
        f"error: {line}" for line in derivation.errors
    ]
    if derivation.errors:
        lines.append(
            "A login node may lack what compute nodes have; `srun python -m launcher env ...` asks one of those."
        )
    return lines
