"""NCCL's log says which way the messages go. The lines are of the forms in NCCL's source, 2.18 to 2.30."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from recipes.lib.transports import (
    interfaces_in_use,
    kind_of_way,
    logged_call,
    nccl_log,
    parse_nccl_log,
    read_nccl_log,
)

LOG = """\
n1:41:41 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
n1:41:60 [0] NCCL INFO NET/Plugin: Loaded net plugin AWS Libfabric (v10)
n1:41:60 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:192.0.2.1<0>
n1:41:60 [0] NCCL INFO Using network IB
n1:41:60 [0] NCCL INFO NVLS multicast support is available on dev 0
n1:41:60 [0] NCCL INFO comm 0x55d0 rank 0 nRanks 4 nNodes 2 localRanks 2 localRank 0 MNNVL 0
n1:41:62 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:41:62 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:41:62 [0] NCCL INFO Channel 00/0 : 3[1] -> 0[0] [receive] via NET/IB/0/GDRDMA
n1:41:62 [0] NCCL INFO Channel 00/0 : 0[0] -> 3[1] [send] via NET/IB/0(2)/GDRDMA
n1:41:62 [0] NCCL INFO Channel 00 : 1[1] -> 2[2] via SHM/direct/direct
n1:41:62 [0] NCCL INFO Channel 00/0 : 2[2] -> 1[1] via P2P/direct pointer/read
n1:41:41 [0] NCCL INFO AllReduce: 1048576 Bytes -> Algo NVLS proto SIMPLE channel{Lo..Hi}={0..15}
n1:41:41 [0] NCCL INFO AllReduce: 8 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..0}
n1:41:41 [0] misc/ibvwrap.cc:252 NCCL WARN Call to ibv_modify_qp failed with 110 Connection timed out
"""


def test_the_log_is_read() -> None:
    found = parse_nccl_log(LOG.splitlines())
    assert found.version == "2.28.9+cuda13.0"
    assert found.network == "IB"
    assert found.plugin == "AWS Libfabric (v10)"
    assert found.devices == "[0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:192.0.2.1<0>"
    assert found.multicast
    assert found.ways == {
        (0, 1): "P2P/CUMEM/read",
        (3, 0): "NET/IB/0/GDRDMA",
        (0, 3): "NET/IB/0(2)/GDRDMA",
        (1, 2): "SHM/direct/direct",
        (2, 1): "P2P/direct pointer/read",
    }
    assert found.choices == {
        ("AllReduce", 1048576): "NVLS/SIMPLE, 16 channels",
        ("AllReduce", 8): "RING/LL, 1 channel",
    }
    assert len(found.warnings) == 1
    assert found.warnings[0].endswith("Connection timed out")


def test_calls_are_found_by_nccl_s_name_and_bytes() -> None:
    choices = parse_nccl_log(LOG.splitlines()).choices
    assert choices[logged_call("all_reduce", 1048576, 4)] == "NVLS/SIMPLE, 16 channels"
    assert logged_call("reduce_scatter", 4096, 4) == ("ReduceScatter", 1024)


def test_a_changed_log_gives_a_changed_answer() -> None:
    changed = LOG.replace("network IB", "network Socket").replace("NET/IB/0/GDRDMA", "NET/Socket/0")
    found = parse_nccl_log(changed.replace("is available", "is not available").splitlines())
    assert (found.network, found.ways[3, 0], found.multicast) == ("Socket", "NET/Socket/0", False)


def test_sockets_of_plain_tcp_are_named() -> None:
    line = "n1:41:60 [0] NCCL INFO NET/Socket : Using [0]eth0:192.0.2.1<0>"
    assert parse_nccl_log([line]).devices == "[0]eth0:192.0.2.1<0>"


def test_an_empty_or_torn_log_says_nothing(tmp_path: Path) -> None:
    assert parse_nccl_log(["", "NCCL INFO Channel 00/0 : 0[0] -> "]).ways == {}
    assert read_nccl_log(tmp_path / "nccl.log").version == ""


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("P2P/CUMEM/read", "P2P"),
        ("SHM/direct/direct", "SHM"),
        ("NET/IB/0/GDRDMA", "NET/IB"),
        ("NET/Socket/0", "NET/Socket"),
    ],
)
def test_ways_are_counted_by_kind(way: str, kind: str) -> None:
    assert kind_of_way(way) == kind


def test_warnings_reach_the_terminal_when_the_run_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE"):
        monkeypatch.setenv(name, "WARN")
    logs = []

    def fail() -> None:
        with nccl_log() as log:
            assert os.environ["NCCL_DEBUG"] == "INFO"
            assert os.environ["NCCL_DEBUG_FILE"] == str(log)
            log.write_text(LOG)
            logs.append(log)
            raise RuntimeError("no way")

    with pytest.raises(RuntimeError, match="no way"):
        fail()
    assert "ibv_modify_qp failed" in capsys.readouterr().err
    assert not logs[0].exists()


def test_the_interface_of_an_open_connection_is_found_and_the_store_s_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", int(port))):
            accepted, _ = server.accept()
            with accepted:
                assert "lo (127.0.0.1)" in interfaces_in_use({})
                mine = interfaces_in_use({"MASTER_PORT": port})
                assert mine == [] or "lo (127.0.0.1)" not in mine
