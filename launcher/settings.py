"""The keys of a job: their names, help lines and types, in one table for files and command line. Pure."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from launcher.spec import ContainerKind, Launch, Links, Preflight, UserError
from launcher.suggest import did_you_mean, nearest


@dataclass(frozen=True)
class Setting:
    """One key: `read` turns a word or a YAML value into its type, or raises ValueError: what is wanted."""

    help: str
    read: Callable[[object], Any]
    choices: tuple[str, ...] = ()
    sweeps: bool = False
    """Whether a comma in a word makes a sweep. Not where a comma already means something to Slurm."""


def split_at_commas(text: str) -> list[str]:
    """The elements of `text` between its top-level commas.

    A comma inside brackets belongs to its element (`n[1,3]`), and so does one inside an element that is
    quoted. One pair of quotes around a whole element is taken off, spaces around elements too.
    """
    elements, start, depth, quote = [], 0, 0, ""
    for position, character in enumerate(text):
        if quote:
            closes = character == quote and text[position + 1 : position + 2] in ("", ",")
            quote = "" if closes else quote
        elif character in "'\"" and not text[start:position].strip() and _is_closed(text, position):
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character == "," and depth == 0:
            elements.append(text[start:position])
            start = position + 1
    elements.append(text[start:])
    if len(elements) > 1:
        elements = [element.strip() for element in elements]
    return [_without_quotes(element) for element in elements]


def _is_closed(text: str, opening: int) -> bool:
    quote = text[opening]
    return f"{quote}," in text[opening + 1 :] or (text.endswith(quote) and len(text) > opening + 1)


def _without_quotes(element: str) -> str:
    quoted = len(element) >= 2 and element[0] in "'\"" and element[-1] == element[0]
    return element[1:-1] if quoted else element


def minutes(value: object) -> int:
    """A time limit in minutes, rounded up: 90, "90m", "2h", "1h30m", "HH:MM:SS", or Slurm's "D-HH[:MM[:SS]]".

    Two numbers with one colon are refused: Slurm reads 10:30 as minutes and seconds, most people as hours.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        seconds = value * 60
    elif not isinstance(value, str):
        raise ValueError(_TIME_WANTED)
    elif re.fullmatch(r"\d+", value):
        seconds = int(value) * 60
    elif (
        units := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?", value)
        if value
        else None
    ):
        seconds = _seconds(*units.groups(default="0"))
    elif days := re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", value):
        seconds = _seconds(*days.groups(default="0"))
    elif clock := re.fullmatch(r"(\d+):(\d\d):(\d\d)", value):
        seconds = _seconds("0", *clock.groups())
    elif pair := re.fullmatch(r"(\d+):(\d\d)", value):
        first, second = pair.groups()
        raise ValueError(f"write {first}:{second}:00 for hours or {first}m{second}s for minutes")
    else:
        raise ValueError(_TIME_WANTED)
    if seconds <= 0:
        raise ValueError("a time limit above zero is wanted")
    return math.ceil(seconds / 60)


_TIME_WANTED = "a time limit is wanted: minutes, 90m, 2h, HH:MM:SS or D-HH:MM:SS"


def _seconds(days: str, hours: str, minutes: str, seconds: str) -> int:
    return ((int(days) * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)


def whole_number(value: object, *, least: int) -> int:
    """A whole number from `least` on, typed or as a word."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,9}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("a whole number is wanted")
    if value < least:
        raise ValueError(f"{least} or more is wanted")
    return value


def _whole(least: int) -> Callable[[object], int]:
    return functools.partial(whole_number, least=least)


def _choice(choices: tuple[str, ...]) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in choices:
            best = nearest(str(value), choices)
            hint = f"; did you mean {best}?" if best else ""
            raise ValueError(f"one of {', '.join(choices)} is wanted{hint}")
        return str(value)

    return read


def text(value: object) -> str:
    """Text of one line. A YAML number is taken where its spelling is sure (1, not 1.0 or true)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("text is wanted; in YAML, put quotes around it")
    return one_line(value)


def one_line(value: str) -> str:
    """`value` itself; ValueError where a line break in it would end its #SBATCH line."""
    if len(value.splitlines()) > 1 or value.endswith(("\n", "\r")):
        raise ValueError("a line break cannot be part of it")
    return value


def optional_text(value: object) -> str | None:
    """Text, or None for nothing: `partition=` and `partition=null` take a profile's partition away."""
    return None if value in (None, "", "null") else text(value)


def memory(value: object) -> str | None:
    """Memory per node in Slurm's notation; a bare number is refused because Slurm takes it for megabytes."""
    amount = optional_text(value)
    if amount is None or re.fullmatch(r"\d+[KMGT]|0", amount):
        return amount
    number, unit = re.match(r"\d+", amount), re.search(r"[KMGT]", amount.upper())
    example = f"{number[0] if number else 64}{unit[0] if unit else 'G'}"
    raise ValueError(f"memory per node is wanted with one of K, M, G, T: {example}; 0 is all of it")


def items(value: object) -> tuple[str, ...]:
    """A list of texts: elements between commas in a word, a list in YAML."""
    if value in (None, "", "null"):
        return ()
    if isinstance(value, str):
        value = split_at_commas(value)
    if not isinstance(value, list):
        raise ValueError("a list is wanted")
    found = tuple(text(item) for item in value)
    if "" in found:
        raise ValueError("there is nothing between two commas")
    return found


SETTINGS: Mapping[str, Setting] = {
    "nodes": Setting("number of nodes", _whole(1), sweeps=True),
    "spares": Setting("nodes to hold in reserve for ones that fail", _whole(0)),
    "tasks_per_node": Setting("ranks per node; one per GPU where there are GPUs", _whole(1), sweeps=True),
    "gpus_per_node": Setting("GPUs per node; 0 runs on CPUs", _whole(0), sweeps=True),
    "cpus_per_task": Setting("CPUs of each rank", _whole(1), sweeps=True),
    "time": Setting("limit: minutes, 90m, 2h, HH:MM:SS, D-HH:MM:SS", minutes, sweeps=True),
    "memory": Setting("memory per node: 64G; 0 is all of it", memory, sweeps=True),
    "partition": Setting("Slurm partition, or several with commas", optional_text),
    "account": Setting("Slurm account", optional_text),
    "qos": Setting("Slurm quality of service", optional_text),
    "exclude": Setting("nodes to stay away from, with commas", items),
    "launch": Setting("how the tasks start", _choice(get_args(Launch)), get_args(Launch), sweeps=True),
    "preflight": Setting(
        "checks before the start", _choice(get_args(Preflight)), get_args(Preflight), sweeps=True
    ),
    "checks.sku": Setting("part of the GPU's name that every node must have: H100", text),
    "checks.rails": Setting("RDMA devices that must be up on every node", _whole(0)),
    "checks.without": Setting("checks that the nodes have no evidence for, with commas", items),
    "checks.links": Setting(
        "a bad link: leave out one of its nodes, or go on over it", _choice(get_args(Links)), get_args(Links)
    ),
    "container.kind": Setting(
        "what runs the container", _choice(get_args(ContainerKind)), get_args(ContainerKind)
    ),
    "container.image": Setting("image, or its file", text, sweeps=True),
    "container.python": Setting("interpreter inside the image", text),
    "container.mounts": Setting("HOST:CONTAINER, several with commas", items),
    "activate": Setting("shell lines before the job, with commas", items),
    "python": Setting("interpreter of the job", text),
    "fabric": Setting("network, a file of env/fabrics", text, sweeps=True),
    "run_root": Setting("folder of the run directories", text),
}

OPEN_GROUPS: Mapping[str, str] = {
    "sbatch": "any further sbatch flag: sbatch.exclusive= sbatch.gres=shard:1",
    "env": "a variable of the tasks: env.NCCL_DEBUG=INFO",
}
"""Groups whose keys are free. Their values never sweep: NCCL_IB_HCA=mlx5_0,mlx5_1 is one value."""

_SBATCH_OWNED = {
    "nodes": "nodes=",
    "ntasks": "nodes= and tasks_per_node=",
    "ntasks-per-node": "tasks_per_node=",
    "cpus-per-task": "cpus_per_task=",
    "gpus": "gpus_per_node=",
    "gpus-per-node": "gpus_per_node=",
    "gpus-per-task": "gpus_per_node=",
    "time": "time=",
    "mem": "memory=",
    "partition": "partition=",
    "account": "account=",
    "qos": "qos=",
    "exclude": "exclude=",
}
_SBATCH_LAUNCHER = frozenset(
    {
        "output",
        "error",
        "open-mode",
        "job-name",
        "requeue",
        "no-kill",
        "no-requeue",
        "signal",
        "export",
        "chdir",
        "array",
        "wrap",
    }
)
_ENVIRONMENT_LAUNCHER = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
        *("MASTER_ADDR", "MASTER_PORT", "RUN_DIR", "ATTEMPT", "ATTEMPT_DIR"),
    }
)


def read_setting(key: str, value: object, *, shown: str) -> tuple[str, Any]:
    """The key in its one spelling and the typed value of `nodes`, `sbatch.FLAG`, `env.NAME` …

    `shown` is what an error begins with: the word as it was typed, or the file and the key.
    Raises UserError for a value that the key does not take; the key itself is known to be one.
    """
    group, _, name = key.partition(".")
    try:
        if group == "sbatch":
            return f"sbatch.{_sbatch_flag(name)}", _sbatch_value(value)
        if group == "env":
            return key, _variable(name, value)
        return key, None if value is None else SETTINGS[key].read(value)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from None


def _sbatch_flag(name: str) -> str:
    flag = name.replace("_", "-").lstrip("-")
    if flag in _SBATCH_OWNED:
        raise ValueError(f"write {_SBATCH_OWNED[flag]}")
    if flag in _SBATCH_LAUNCHER:
        raise ValueError("the launcher sets this flag itself")
    if not re.fullmatch(r"[a-z][a-z0-9-]+", flag):
        raise ValueError("the long name of an sbatch flag is wanted, such as sbatch.exclusive=")
    return flag


def _sbatch_value(value: object) -> str | None:
    if value is None:
        return None
    return "" if value is True else text(value)


def _variable(name: str, value: object) -> str | None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"'{name}' cannot be the name of a variable")
    if name in _ENVIRONMENT_LAUNCHER:
        raise ValueError("the launcher sets this variable itself")
    return value if value is None or isinstance(value, str) else text(value)


def is_setting(key: str) -> bool:
    """Whether `key` is one of a job's: in the table, or a name in an open group."""
    group, dot, name = key.partition(".")
    return key in SETTINGS or (group in OPEN_GROUPS and bool(dot and name))


def read_settings(mapping: Mapping[Any, Any], *, shown: str) -> dict[str, Any]:
    """Typed settings of a YAML mapping, nested or dotted, by dotted key; null stays None: not set.

    Raises UserError, beginning with `shown`, for a key that no job has or a value that its key does not take.
    """
    flat = _flatten(mapping, shown)
    for key in flat:
        if not is_setting(str(key)):
            raise UserError(
                f"{shown}: unknown key '{key}': {did_you_mean(str(key), [*SETTINGS, *OPEN_GROUPS])}"
            )
    settings: dict[str, Any] = {}
    for key, value in flat.items():
        name, typed = read_setting(str(key), value, shown=f"{shown}: {key}")
        settings[name] = typed
    return settings


def _flatten(mapping: Mapping[Any, Any], shown: str) -> dict[Any, Any]:
    """`{container: {kind: x}}` with the dotted keys of the command line: `{container.kind: x}`."""
    flat: dict[Any, Any] = {}
    for key, value in mapping.items():
        if key not in _GROUPS:
            flat[key] = value
        elif isinstance(value, Mapping):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        elif value is not None:
            raise UserError(f"{shown}: {key}: a mapping of names to values is wanted")
    return flat


_GROUPS = frozenset(key.partition(".")[0] for key in SETTINGS if "." in key) | frozenset(OPEN_GROUPS)
