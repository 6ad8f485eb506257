"""The fabric's variables in a real job: derived on every node, written down with reasons, given to every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import runs
from tests.box_runs.support import FAST, Launcher, ended, submit_entrypoint


def seen(run: runs.Run, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((run.path / f"seen-{rank}.json").read_text())
    return found


def written(run: runs.Run) -> Any:
    return json.loads((run.path / "attempt-01" / "environment.json").read_text())


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
def test_every_rank_gets_what_was_derived_and_the_folder_says_why(launcher: Launcher, launch: str) -> None:
    words = ["nodes=2", "tasks_per_node=1", f"launch={launch}", "fabric=tcp", "env.UCX_NET_DEVICES=mine"]
    run = submit_entrypoint(launcher, *words, mode="torch")
    record = ended(run)
    assert record["state"] == "done", record
    (entry,) = written(run)["nodes"]
    assert sorted(entry["nodes"]) == sorted(record["nodes"])
    derived = {setting["name"]: setting["value"] for setting in entry["settings"]}
    assert sorted(derived) == ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]
    assert all("route" in setting["reason"] for setting in entry["settings"])
    assert {"name": "UCX_NET_DEVICES", "value": "mine", "reason": "the job's configuration"} in entry["kept"]
    for rank in range(2):
        assert derived.items() <= seen(run, rank).items()
        assert (seen(run, rank)["UCX_NET_DEVICES"], seen(run, rank)["NCCL_NET"]) == ("mine", "Socket")
    logs = launcher("logs", run.id).stdout
    assert f"fabric tcp: NCCL_SOCKET_IFNAME={derived['NCCL_SOCKET_IFNAME']}" in logs
    assert "UCX_NET_DEVICES=mine (the job's configuration): neither an active port nor an interface" in logs


@pytest.mark.parametrize(
    ("words", "theirs"), [(["launch=srun"], ""), (["launch=torchrun", "env.NCCL_HOSTID=one"], "one")]
)
def test_the_nodes_of_a_box_are_hosts_to_nccl_unless_somebody_says_otherwise(
    launcher: Launcher, words: list[str], theirs: str
) -> None:
    """By the host's name NCCL would take them for one, and never use its network between them."""
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=2", *words, mode="look")
    record = ended(run)
    assert record["state"] == "done", record
    ranks = [seen(run, rank) for rank in range(4)]
    assert [rank["node"] for rank in ranks] == [node for node in record["nodes"] for _ in range(2)]
    assert [rank["NCCL_HOSTID"] for rank in ranks] == [theirs or rank["node"] for rank in ranks]


def test_nodes_that_differ_are_said_and_each_rank_gets_its_own_nodes_value(
    launcher: Launcher, tmp_path: Path
) -> None:
    """An administrator's file that is another one on the second node, which NCCL_CONF_FILE makes possible here."""
    (tmp_path / "n1.conf").write_text("NCCL_DEBUG=WARN\n")
    (tmp_path / "n2.conf").write_text("NCCL_SOCKET_IFNAME=lo\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nexport NCCL_CONF_FILE="{tmp_path}/$SLURMD_NODENAME.conf"\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    run = submit_entrypoint(
        launcher, "nodes=2", "tasks_per_node=1", "fabric=tcp", f"python={python}", mode="look"
    )
    record = ended(run)
    assert record["state"] == "done", record
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= set(written(run)["differing"])
    of_node = {seen(run, rank)["node"]: seen(run, rank) for rank in range(2)}
    assert (of_node["n2"]["NCCL_SOCKET_IFNAME"], of_node["n2"]["GLOO_SOCKET_IFNAME"]) == ("lo", "lo")
    assert of_node["n1"]["GLOO_SOCKET_IFNAME"] != "lo"
    assert of_node["n1"]["NCCL_SOCKET_IFNAME"] == f"={of_node['n1']['GLOO_SOCKET_IFNAME']}"
    logs = launcher("logs", run.id).stdout
    assert "nodes differ in NCCL_SOCKET_IFNAME: " in logs
    assert "lo on n2" in logs


def test_a_fabric_that_is_not_there_stops_the_job_before_a_task(launcher: Launcher) -> None:
    if Path("/sys/class/infiniband").exists():
        pytest.skip("this machine has RDMA devices")
    words = ["recipe=ch3_ddp", "cluster=box", "nodes=2", "fabric=infiniband", *FAST]
    shown = launcher("submit", *words, "--wait", status=1).stdout
    record = ended(launcher.only_run())
    assert record["tasks_started"] is None
    assert (
        "fabric=infiniband: no active InfiniBand port on this node; there is no RDMA device"
        in record["reason"]
    )
    assert "preflight: on all 2 nodes: fabric fail" in shown, "every node lacks it, so that none is to blame"
    assert not list((launcher.only_run().path / "attempt-01").glob("rank-*.log"))


def test_the_box_itself_stays_on_loopback(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", mode="torch")
    assert ended(run)["state"] == "done"
    (entry,) = written(run)["nodes"]
    assert (entry["settings"], sorted(entry["nodes"])) == ([], ["n1", "n2"])
    assert seen(run, 1)["GLOO_SOCKET_IFNAME"] == "lo"
