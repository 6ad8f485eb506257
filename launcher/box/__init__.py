"""A box: a real multi-node Slurm on one machine, for development, tests and the first try.

One slurmctld and a slurmd per node, from the distribution's own packages, run as the ordinary user who calls
`up`. Nothing is installed and nothing outside the cache folder changes.
"""

from launcher.box.lifecycle import Box, Shape, Status, down, environment, find, recorded_shape, status, up
from launcher.box.paths import BoxUnavailable, names

__all__ = [
    "Box",
    "BoxUnavailable",
    "Shape",
    "Status",
    "down",
    "environment",
    "find",
    "names",
    "recorded_shape",
    "status",
    "up",
]
