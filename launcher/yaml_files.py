"""Reading YAML files as people mean them: recipes, cluster profiles, fabrics. File system.

Scalars follow YAML 1.2's core schema. Under PyYAML's YAML 1.1, `preflight: off` is false, `time: 10:30:00` is
the number 37800 (base 60), `lr: 1e-4` is a string and an account named `no` is false, without a word of
warning.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.spec import UserError
from launcher.suggest import did_you_mean


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and no key twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key: object = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


# A new table: add_implicit_resolver would copy the YAML 1.1 entries of the base class.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )
# PyYAML's int constructor still reads a leading 0 as octal (010 is 8); decimal is what a person means.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_mapping(path: Path, known: frozenset[str], *, shown: str) -> dict[str, Any]:
    """The mapping in a YAML file, its `${oc.env:VAR}` resolved; an empty file is an empty mapping.

    Raises UserError, beginning with `shown` (the file as the user knows it), for a file that cannot be read,
    is not YAML, is not a mapping, holds a key outside `known`, or names a variable that is not set.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: not YAML: {_one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{shown}: a mapping of keys to values is wanted, not a {type(content).__name__}")
    check_keys(content, known, shown=shown)
    if "${" not in text:
        return {str(key): value for key, value in content.items()}
    return _interpolated(content, shown=shown)


def check_keys(mapping: Mapping[Any, Any], known: frozenset[str], *, shown: str) -> None:
    """Raise UserError for the first key of `mapping` that is not in `known`."""
    for key in mapping:
        if key not in known:
            raise UserError(f"{shown}: unknown key '{key}': {did_you_mean(str(key), sorted(known))}")


def _interpolated(content: dict[Any, Any], *, shown: str) -> dict[str, Any]:
    # Imported only for a file that has a variable: it costs as much as the rest of reading the configuration.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{shown}: {where}{_interpolation_problem(error)}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _interpolation_problem(error: Exception) -> str:
    text = str(error).splitlines()[0]
    unset = re.search(r"Environment variable '(\w+)' not found", text)
    if unset:
        name = unset[1]
        return f"the variable {name} is not set; set it, or give a default: ${{oc.env:{name},DEFAULT}}"
    # `activate: [export PATH=${HOME}/bin:$PATH]` is where people meet this one.
    return f"{text}; ${{oc.env:NAME}} is the launcher's variable, \\${{NAME}} the shell's"


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)
