"""Which recipes there are: recipes/chN/NAME.yaml is the recipe chN_NAME. File system."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.paths import REPOSITORY
from launcher.settings import read_settings
from launcher.spec import UserError
from launcher.suggest import did_you_mean
from launcher.yaml_files import read_mapping

_KEYS = frozenset({"summary", "entrypoint", "arguments", "max_world_size", "job", "args"})


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe as its YAML file describes it."""

    name: str
    chapter: int
    file: str
    """Path of the YAML file from the repository, as messages name it."""
    summary: str
    entrypoint: str
    """Module that every task runs: `python -m recipes.ch4.fsdp`."""
    arguments: str
    """Where the dataclass of its arguments is: `recipes.ch4.fsdp_args:FsdpArgs`. Its module imports no torch.
    """
    max_world_size: int | None
    """Most ranks that it can use; None is any number."""
    job: Mapping[str, Any]
    """Typed settings of the job that it asks for by default, with dotted keys."""
    args: Mapping[str, Any]
    """Its own values for arguments, where they differ from the dataclass's defaults."""

    def arguments_class(self) -> type[Any]:
        """The dataclass of the arguments. Raises UserError where `arguments:` names nothing that imports."""
        module_name, _, class_name = self.arguments.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise UserError(f"{self.file}: arguments: there is no module {error.name}") from None
        except SyntaxError as error:
            raise UserError(f"{error.filename}: line {error.lineno}: {error.msg}") from None
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise UserError(f"{self.file}: arguments: {module_name} has no dataclass {class_name!r}")
        return found


def recipe_files(repository: Path = REPOSITORY) -> dict[str, Path]:
    """YAML file of every recipe by name, chapters in order; reads none of them."""
    found = [
        (int(chapter[1]), f"{path.parent.name}_{path.stem}", path)
        for path in (repository / "recipes").glob("ch*/*.yaml")
        if (chapter := re.fullmatch(r"ch(\d+)", path.parent.name))
    ]
    return {name: path for _, name, path in sorted(found)}


def load_recipe(name: str, repository: Path = REPOSITORY) -> RecipeEntry:
    """The recipe called `name`. Raises UserError for an unknown one, or a mistake in its YAML file."""
    files = recipe_files(repository)
    if name not in files:
        raise UserError(f"unknown recipe '{name}' (recipe=): {did_you_mean(name, files)}")
    return _read(name, files[name], repository)


def load_recipes(repository: Path = REPOSITORY) -> list[RecipeEntry]:
    """Every recipe, chapters in order."""
    return [_read(name, path, repository) for name, path in recipe_files(repository).items()]


def recipe_for_more_ranks(
    entry: RecipeEntry, world_size: int, repository: Path = REPOSITORY
) -> RecipeEntry | None:
    """The next recipe of the book, from the chapter of `entry` on, that takes `world_size` ranks."""
    able = (
        other
        for other in load_recipes(repository)
        if other.chapter >= entry.chapter
        and (other.max_world_size is None or other.max_world_size >= world_size)
    )
    return next(able, None)


def _read(name: str, path: Path, repository: Path) -> RecipeEntry:
    file = path.relative_to(repository).as_posix()
    content = read_mapping(path, _KEYS, shown=file)
    for key in ("summary", "entrypoint", "arguments"):
        if not isinstance(content.get(key), str) or not content[key]:
            raise UserError(f"{file}: {key}: text is wanted")
    if not re.fullmatch(r"[\w.]+:\w+", content["arguments"]):
        raise UserError(f"{file}: arguments: 'module:Class' is wanted")
    most = content.get("max_world_size")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UserError(f"{file}: max_world_size: a whole number above zero is wanted")
    groups = {key: content.get(key) or {} for key in ("job", "args")}
    for key, group in groups.items():
        if not isinstance(group, dict):
            raise UserError(f"{file}: {key}: a mapping of names to values is wanted")
    return RecipeEntry(
        name=name,
        chapter=int(path.parent.name.removeprefix("ch")),
        file=file,
        summary=content["summary"],
        entrypoint=content["entrypoint"],
        arguments=content["arguments"],
        max_world_size=most,
        job=read_settings(groups["job"], shown=f"{file}: job"),
        args=groups["args"],
    )
