"""What was measured of a workload, and of the same work on several ranks. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from recipes.lib.roofline import Roof


@dataclass(frozen=True)
class Workload:
    """One use of a model: what it computes and moves (counted), and how long it takes (measured)."""

    name: str
    sequences: int
    """At the same time."""
    tokens: int
    """That come out of it, or are trained on."""
    flops: int
    bytes: int
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def limit(self, roof: Roof) -> str:
        """ "compute" or "memory"; "host" where neither explains a tenth of the time."""
        of_compute = self.flops / self.seconds / roof.flops_per_second
        of_memory = self.bytes / self.seconds / roof.bytes_per_second
        if max(of_compute, of_memory) < 0.1:
            return "host"
        return roof.limit(self.intensity)

    def figures(self, roof: Roof) -> dict[str, object]:
        """For a line of results."""
        return {**asdict(self), "intensity": self.intensity, "limit": self.limit(roof)}


@dataclass(frozen=True)
class Gain:
    """The same batch on one rank and on several."""

    ranks: int
    tokens: int
    """Of the batch."""
    one: float
    """Seconds of a step on one rank."""
    several: float
    """On all of them."""
    silent: float
    """On all of them without the exchange of gradients."""

    @property
    def speedup(self) -> float:
        """Times as fast as one rank."""
        return self.one / self.several

    @property
    def efficiency(self) -> float:
        """The part of the ranks' time that became speed."""
        return self.speedup / self.ranks

    @property
    def exposed(self) -> float:
        """Seconds of a step that the exchange costs; what is behind arithmetic costs none."""
        return max(0.0, self.several - self.silent)

    def figures(self) -> dict[str, object]:
        """For a line of results."""
        return {
            **asdict(self),
            "speedup": self.speedup,
            "efficiency": self.efficiency,
            "exposed": self.exposed,
        }
