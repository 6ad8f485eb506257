"""`show`: a job as it would be submitted, after every file and word has been read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config import Composed, compose_with_origins
from launcher.spec import JobSpec


def run(options: argparse.Namespace) -> int:
    composed = compose_with_origins(options.words)
    if options.json:
        print(composed.spec.to_json())
        return 0
    text = as_yaml(composed, origins=options.origins)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.syntax import Syntax

        Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        print(text, end="")
    return 0


def as_yaml(composed: Composed, *, origins: bool = False) -> str:
    """The job under the keys that a person types, one a line; with `origins`, where each value comes from."""
    lines = [f"# {composed.note}\n"] if composed.note else []
    for key, depth, shown in _lines(_as_typed(composed.spec)):
        name = key if depth == 0 else key.partition(".")[2]
        origin = composed.origins.get(key, "") if origins else ""
        lines.append(
            f"{'  ' * depth}{name}:{' ' if shown else ''}{shown}{f'  # {origin}' if origin else ''}\n"
        )
    return "".join(lines)


def _as_typed(spec: JobSpec) -> dict[str, Any]:
    days, minutes = divmod(spec.time_minutes, 24 * 60)
    clock = f"{minutes // 60:02}:{minutes % 60:02}:00"
    return {
        "recipe": spec.recipe,
        "entrypoint": spec.entrypoint,
        "cluster": spec.cluster,
        "executor": spec.executor,
        "nodes": spec.nodes,
        "tasks_per_node": spec.tasks_per_node,
        "gpus_per_node": spec.gpus_per_node,
        "cpus_per_task": spec.cpus_per_task,
        "time": f"{days}-{clock}" if days else clock,
        "memory": spec.memory,
        "partition": spec.partition,
        "account": spec.account,
        "qos": spec.qos,
        "exclude": list(spec.exclude),
        "launch": spec.launch,
        "preflight": spec.preflight,
        "python": spec.python,
        "activate": list(spec.activate),
        "fabric": spec.fabric,
        "run_root": spec.run_root,
        "checks": {
            "sku": spec.checks.sku,
            "rails": spec.checks.rails,
            "without": list(spec.checks.without),
            "links": spec.checks.links,
        },
        "container": {
            "kind": spec.container.kind,
            "image": spec.container.image,
            "mounts": list(spec.container.mounts),
            "python": spec.container.python,
        },
        "sbatch": dict(spec.sbatch),
        "env": dict(spec.environment),
        "args": dict(spec.args),
    }


def _lines(content: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Every key with its depth and its value as YAML on one line; a group has no value of its own."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield key, 0, ""
            for name, inner in value.items():
                yield f"{key}.{name}", 1, _scalar(inner)
        else:
            yield key, 0, _scalar(value)


def _scalar(value: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
