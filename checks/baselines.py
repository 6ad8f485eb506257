"""What a measurement should give: figures keyed by GPU × fabric × nodes × ranks × payload, each with its source.

`baselines.json` holds published ones; `python -m checks baseline` records a cluster's own, which win. File system.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("baselines.json")


class BaselineError(ValueError):
    """One line: which file, which entry, what is wrong."""


@dataclass(frozen=True)
class Baseline:
    what: str
    """`all_reduce`, …, `pair`, `burn`, `copy`, `to device`, `to host`, `peers`, `ib_write_bw`."""
    gpu: str
    """Part of the GPU's name, or cpu."""
    fabric: str
    """`node` within one node; else infiniband, roce, efa, tcpx, tcp; any where it does not matter."""
    nodes: tuple[int, int]
    """From, to."""
    ranks: int
    """Per node; 0 where it does not matter."""
    payload: int
    """Bytes; 0 where it does not matter. Holds for this and larger ones, up to the next entry."""
    value: float
    """Gb/s for ib_write_bw, TFLOP/s for burn, else GB/s (bus bandwidth for collectives)."""
    least: float
    """Share of the value below which a measurement fails."""
    source: str

    @property
    def floor(self) -> float:
        return self.value * self.least


def read(path: Path) -> list[Baseline]:
    """Raises BaselineError for a file that is not of this form."""
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise BaselineError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BaselineError(f"{path}: no JSON: {error}") from None
    if not isinstance(entries, list):
        raise BaselineError(f"{path}: a list of entries was expected")
    return [_entry(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _entry(path: Path, number: int, entry: Any) -> Baseline:
    try:
        one = Baseline(**{**entry, "nodes": tuple(entry["nodes"])})
        lowest, highest = one.nodes
        if not (lowest <= highest and one.value > 0 and 0 < one.least <= 1 and one.source):
            raise ValueError("nodes, value, least or source make no sense")
    except (TypeError, ValueError, KeyError) as error:
        raise BaselineError(f"{path}: entry {number}: {error}") from None
    return one


def write(path: Path, entries: Sequence[Baseline]) -> None:
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n")


def find(
    baselines: Sequence[Baseline],
    what: str,
    *,
    gpu: str,
    fabric: str,
    nodes: int,
    ranks: int,
    payload: int = 0,
) -> Baseline | None:
    """The first entry for the largest payload that is not larger than this one: put a cluster's own entries first."""
    fitting = [
        one
        for one in baselines
        if one.what == what
        and one.gpu.lower() in gpu.lower()
        and one.fabric in (fabric, "any")
        and one.nodes[0] <= nodes <= one.nodes[1]
        and one.ranks in (0, ranks)
        and one.payload <= payload
    ]
    return max(fitting, key=lambda one: one.payload, default=None)
