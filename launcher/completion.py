"""What the Tab key offers: recipes, clusters, keys, choices, runs. File system (reads only).

A mistake in a file is no reason to print into the line that somebody is typing: completion then offers
nothing, and the command itself says what is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from launcher.spec import UserError

Completer = Callable[..., Mapping[str, str]]
"""Called by argcomplete with `prefix` and `parsed_args`; returns whole words and what they mean."""


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks (argcomplete's protocol) and exit."""
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options=False)


def attach_completers(parser: argparse.ArgumentParser) -> bool:
    """Give a command's positional `words` and `run` their completers; True if it takes words."""
    completers: dict[str, Completer] = {
        "words": complete_word,
        "run": complete_run,
        "nodes": complete_node,
    }
    for action in parser._actions:  # argparse has no public list of them
        if action.dest in completers and not action.option_strings:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]
    return any(action.dest == "words" for action in parser._actions)


def complete_run(prefix: str, **_: Any) -> dict[str, str]:
    """Ids of the runs below the run root, with the names of their directories."""
    from launcher.paths import run_root

    directories = (path.parent.name for path in run_root().glob("*/run.json"))
    return {directory.rpartition("-")[2]: directory for directory in directories}


def complete_node(prefix: str, **_: Any) -> dict[str, str]:
    """Nodes that are on record, with the reason."""
    from launcher import badnodes
    from launcher.paths import known_run_roots

    records = [
        bad
        for root in known_run_roots()
        for cluster in badnodes.clusters(root)
        for bad in badnodes.everything(root, cluster)
    ]
    return {bad.node: bad.reason for bad in records}


def complete_word(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> dict[str, str]:
    """The words that `prefix` can become, after the words that are there already."""
    words = [word for word in getattr(parsed_args, "words", None) or () if isinstance(word, str)]
    chosen = dict(word.partition("=")[::2] for word in words)
    key, equals, value = prefix.partition("=")
    try:
        if not equals:
            return _keys(chosen)
        # In a sweep (args.model=tiny,sm) only the element after the last comma is being typed.
        done, comma, _typing = value.rpartition(",")
        return {
            f"{key}={done}{comma}{word}": meaning for word, meaning in _values(key, value, chosen).items()
        }
    except UserError:
        return {}


def _keys(chosen: Mapping[str, str]) -> dict[str, str]:
    from launcher.settings import SETTINGS

    keys = {"recipe=": "what to run", "cluster=": "where to run it"}
    keys |= {f"{key}=": setting.help for key, setting in SETTINGS.items()}
    keys |= _OFTEN_USED
    keys |= {f"args.{name}=": known.help for name, known in _arguments(chosen).items()}
    return {key: meaning for key, meaning in keys.items() if key.rstrip("=") not in chosen}


_OFTEN_USED = {
    "sbatch.exclusive=": "the whole node",
    "sbatch.reservation=": "a Slurm reservation",
    "sbatch.constraint=": "features that the nodes must have",
    "sbatch.gres=": "further generic resources",
    "sbatch.mail-type=": "when Slurm writes a mail",
    "env.NCCL_DEBUG=": "how much NCCL prints",
    "env.OMP_NUM_THREADS=": "threads of each rank",
}
"""Keys of the groups where any name is taken."""


def _values(key: str, typed: str, chosen: Mapping[str, str]) -> Mapping[str, str]:
    from launcher.clusters import AUTO, fabric_files, profile_files
    from launcher.recipes import load_recipes
    from launcher.settings import SETTINGS

    if key == "recipe":
        return {entry.name: entry.summary for entry in load_recipes()}
    if key == "cluster":
        return dict.fromkeys((AUTO, *profile_files()), "")
    if key == "fabric":
        return dict.fromkeys(fabric_files(), "")
    if key in ("run_root", "python", "container.image", "args.data", "args.init_from"):
        return dict.fromkeys(_files(typed), "")
    if key in SETTINGS:
        return dict.fromkeys(SETTINGS[key].choices, SETTINGS[key].help)
    known = _arguments(chosen).get(key.removeprefix("args.")) if key.startswith("args.") else None
    if known is None:
        return {}
    choices = ("true", "false") if known.kind is bool else known.choices
    return dict.fromkeys(choices or (_default(known.default),), known.help)


def _arguments(chosen: Mapping[str, str]) -> Mapping[str, Any]:
    """The arguments of the recipe that is typed already; none without one."""
    if "recipe" not in chosen:
        return {}
    from launcher.recipes import load_recipe
    from recipes.lib.arguments import arguments_of

    return arguments_of(load_recipe(chosen["recipe"]).arguments_class())


def _default(value: object) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _files(typed: str) -> Iterable[str]:
    folder, slash, _ = typed.rpartition("/")
    start = Path(folder or slash or ".").expanduser()
    if not start.is_dir():
        return ()
    names = (f"{path.name}/" if path.is_dir() else path.name for path in sorted(start.iterdir()))
    return [f"{folder}{slash}{name}" for name in names if not name.startswith(".")]
