"""Stands where perftest's ib_write_bw would, on machines without RDMA: the same words and texts, a TCP connection.

Texts and their order: linux-rdma/perftest v4.5-0.17, src/write_bw.c (main), src/perftest_communication.c
(ethernet_client_connect), src/perftest_parameters.h lines 194, 204, 225. It is installed as an executable file of that
name in a folder of PATH. STAND_IN_FAULTS in the environment says what is broken, several with commas:

    n3/mlx5_1 45        what n3 sends and receives on mlx5_1 is 45 Gb/s
    n1-n4/mlx5_0 45     the same between these two only
    n3/mlx5_1 hang      a client or server of that port never ends
    n3/mlx5_1 down      its port is down
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time

LINE = "-" * 87
HEADER = " #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]"
HEALTHY = 392.5


def report(average: float, size: int = 1 << 20, iterations: int = 5000) -> str:
    """A whole output. REPORT_FMT: " %-7lu    %-10lu       %-7.2lf            %-7.2lf\\t\\t   %-7.6lf"."""
    rate = average * 1e9 / 8 / size / 1e6
    row = f" {size:<7d}    {iterations:<10d}       {average:<7.2f}            {average:<7.2f}\t\t   {rate:<7.6f}"
    about = " Mtu             : 4096[B]\n Link type       : IB\n ibv_wr* API     : ON"
    return f"{LINE}\n                    RDMA_Write BW Test\n{about}\n{LINE}\n{HEADER}\n{row}\n{LINE}\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--ib-dev", "--ib-port", "--size", "--iters", "--port", "--gid-index"):
        parser.add_argument(name)
    for name in ("--report_gbits", "--CPU-freq"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("server", nargs="?")
    options = parser.parse_args()
    assert options.report_gbits
    me = os.environ["SLURMD_NODENAME"]
    if "down" in faults(options.ib_dev, me):
        print(" Port number 1 state is Down\n Couldn't get context for the device", file=sys.stderr)
        return 1
    partner = met(options, me)
    if not partner:
        port = f"{options.server}:{options.port}"
        print(f"Couldn't connect to {port}\n Unable to init the socket connection", file=sys.stderr)
        return 1
    found = faults(options.ib_dev, me, partner)
    if "hang" in found:
        time.sleep(600)
    figures = [float(one) for one in found if one.replace(".", "").isdigit()]
    print(report(min(figures, default=HEALTHY)), end="")
    return 0


def met(options: argparse.Namespace, me: str) -> str:
    """The partner's name, over a connection as perftest's own."""
    if options.server:
        try:
            with socket.create_connection((options.server, int(options.port))) as connection:
                return exchanged(connection, me)
        except ConnectionRefusedError:
            return ""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("", int(options.port)))
        one.listen(1)
        connection, _ = one.accept()
        with connection:
            return exchanged(connection, me)


def exchanged(connection: socket.socket, me: str) -> str:
    connection.sendall(f"{me}\n".encode())
    return connection.makefile().readline().strip()


def faults(device: str, *nodes: str) -> list[str]:
    """What strikes this port when these nodes are at it."""
    found = []
    for one in filter(None, os.environ.get("STAND_IN_FAULTS", "").split(",")):
        where, _, fault = one.strip().partition(" ")
        whose, _, port = where.partition("/")
        if port == device and set(whose.split("-")) <= set(nodes):
            found.append(fault)
    return found


if __name__ == "__main__":
    sys.exit(main())
