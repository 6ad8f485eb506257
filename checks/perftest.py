"""perftest's ib_write_bw: its command lines, and the bandwidth in what it prints. Pure.

The formats are those of linux-rdma/perftest v4.5-0.17 (Debian 12's; it calls itself 6.06). A report is printed by
print_full_bw_report (src/perftest_parameters.c:3556) below the header RESULT_FMT_G (src/perftest_parameters.h:204), as
REPORT_FMT (line 225), below 0.1 Gb/s as REPORT_FMT_EXT (line 229). What goes wrong is said on stderr, last of all by
main (src/write_bw.c). The commits since then have changed the header for MB/sec only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

TOOL = "ib_write_bw"
MESSAGE_BYTES = 1 << 20
ITERATIONS = 5000
"""5 GB: 0.1 s at 400 Gb/s, 4 s at 10. A duration would fit worse: its result leaves a quarter out at either end, in
whole seconds."""

_NUMBER = r"\d+(?:\.\d+)?"
_HEADER = re.compile(
    r"^ *#bytes +#iterations +BW peak\[(?P<unit>\S+)\] +BW average\[(?P=unit)\] +MsgRate\[Mpps\]"
)
_ROW = re.compile(rf"^ *\d+ +\d+ +{_NUMBER} +(?P<average>{_NUMBER})\s+{_NUMBER}\s*$")

NO_CONNECTION = "Unable to init the socket connection"
"""The client's last words where nobody listens yet (write_bw.c, after establish_connection)."""

OWN_FAULTS = re.compile(
    r"Unable to find the Infiniband/RoCE device|Couldn't get context for the device|Port number \d+ state is"
    r"|Couldn't (?:create IB resources|allocate)|Parser function exited|IB device \S+ not found",
)
"""Last words that are about this node alone: whoever says them has not met its partner yet."""


def command(
    device: str, port: int, *, gid: str | None, service: int, partner: str | None = None
) -> Sequence[str]:
    """The server's words, or with a partner the client's, which sends to it."""
    words = [
        TOOL,
        f"--ib-dev={device}",
        f"--ib-port={port}",
        f"--size={MESSAGE_BYTES}",
        f"--iters={ITERATIONS}",
    ]
    words += [f"--port={service}", "--report_gbits", "--CPU-freq"]
    return [*words, *([] if gid is None else [f"--gid-index={gid}"]), *([partner] if partner else [])]


def gigabits(printed: str) -> float:
    """The average of the report, in Gb/s. Raises ValueError where there is none."""
    unit = ""
    for line in printed.splitlines():
        if header := _HEADER.match(line):
            unit = header["unit"]
        elif unit and (row := _ROW.match(line)):
            if unit != "Gb/sec":
                raise ValueError(f"the report is in {unit}")
            return float(row["average"])
    raise ValueError("ib_write_bw printed no report")
