"""The variables of a fabric that somebody has set, and who. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

BEGINNINGS = ("NCCL_", "GLOO_", "TP_", "UCX_", "FI_", "OFI_NCCL_")
"""What NCCL, Gloo, TensorPipe, UCX, libfabric and the EFA plugin read."""


NOT_OF_A_FABRIC = frozenset({"NCCL_HOSTID"})
"""Says which node this is: another value on every node, and about no network."""


@dataclass(frozen=True)
class Given:
    """A value and where it comes from: `your shell`, `env/fabrics/efa.yaml`, `command line`."""

    value: str
    origin: str


def given_by(variables: Mapping[str, str], origin: str) -> dict[str, Given]:
    """Those of `variables` that a fabric is about. An empty value counts too: it leaves the choice to the library."""
    return {
        name: Given(value, origin)
        for name, value in variables.items()
        if name.startswith(BEGINNINGS) and name not in NOT_OF_A_FABRIC
    }


def replaced(weaker: Mapping[str, Given], stronger: Mapping[str, Given]) -> list[str]:
    """One line for each variable whose value another place takes away: it would be a puzzle otherwise."""
    return [
        f"{name}={one.value} ({one.origin}): "
        f"{stronger[name].origin} says {stronger[name].value or 'nothing'} and wins; env.{name}={one.value} keeps yours"
        for name, one in weaker.items()
        if name in stronger and stronger[name].value != one.value
    ]


def parse_nccl_conf(texts: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """File name and text of each configuration file, the one that NCCL reads first first -> name: (value, file).

    As NCCL's src/misc/param.cc reads them: a line is NAME=VALUE up to its end, # begins a comment line, and the first
    file that names a variable counts. So `NCCL_IB_HCA==mlx5_0` sets `=mlx5_0`.
    """
    found: dict[str, tuple[str, str]] = {}
    for file, text in texts:
        seen: dict[str, tuple[str, str]] = {}
        for line in text.splitlines():
            name, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                seen.setdefault(name, (value, file))
        found = seen | found
    return found
