"""Arguments of `ch1_topology`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument


@dataclass(frozen=True, kw_only=True)
class TopologyArgs:
    """Which machine."""

    root: str = argument(
        "/", "folder with the sys/ and proc/ of the machine; in a copy, nvml.json holds what NVML said"
    )
