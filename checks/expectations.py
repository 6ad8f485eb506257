"""What a node should be: given by options, by a cluster profile or by the launcher. Pure.

None means that nobody said. What nobody said and the machine does not have is a warning that names the option, never
silently fine: the difference between a laptop and a broken node is what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Fabric = Literal["infiniband", "roce", "efa", "tcpx", "tcp", "none"]
FABRICS: tuple[str, ...] = get_args(Fabric)


@dataclass(frozen=True)
class Expectations:
    gpus: int | None = None
    """GPUs that the job needs on this node; 0: it has none and needs none."""
    fabric: Fabric | None = None
    """tcp and none: the node has no RDMA device, and none is missed. tcpx is Google's GPUDirect-TCPX(O)."""
    sku: str | None = None
    """Part of the GPU's name, `H100`."""
    rails: int | None = None
    """RDMA devices that are up."""
    exclusive: bool = True
    """The job has the node for itself: a foreign process on any GPU is a finding, and not only on the job's own."""
    without: tuple[str, ...] = ()
    """Checks (`ib.counters`) or subjects (`pcie`) that this machine has no evidence for, says its profile."""
    demand_permission: bool = False
    """Evidence that only root may read blocks."""
    master: str | None = None
    """HOST:PORT of the job's first node."""
    peers: tuple[str, ...] = ()
    """Names of the other nodes."""
    folders: tuple[str, ...] = ()
    """Where the job writes."""

    @property
    def without_rdma(self) -> bool:
        return self.fabric in ("tcp", "tcpx", "none")
