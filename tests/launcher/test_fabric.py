"""The fabric's variables in a job: asked of every node, folded, compared, and given to the tasks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from checks.fabric_contradictions import find
from checks.fabric_environment import derive
from checks.fabric_facts import FabricFacts, FabricKind
from checks.fabric_rails import Rails
from checks.fabric_report import as_json
from checks.given import given_by
from launcher import fabric, node_environment
from launcher.allocation import Allocation, local_allocation
from launcher.clusters import fabric_files, load_fabric, load_profile, profile_files
from launcher.config import compose
from launcher.spec import JobSpec, UserError
from tests.launcher.conftest import SampleCheckout

FABRICS = sorted(fabric_files(environment={}))


def report(
    node: str, *, warnings: tuple[str, ...] = (), errors: tuple[str, ...] = (), **variables: str
) -> dict[str, Any]:
    return {
        "node": node,
        "settings": [{"name": name, "value": value, "reason": "seen"} for name, value in variables.items()],
        "warnings": list(warnings),
        "errors": list(errors),
    }


def spec(*words: str) -> JobSpec:
    return compose(["recipe=ch3_ddp", "cluster=local", *words])


# --- files of env/ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FABRICS)
def test_every_fabric_says_its_kind_and_does_not_contradict_itself(name: str) -> None:
    loaded = load_fabric(name, environment={})
    assert loaded.kind == name
    machine = FabricFacts("n")
    lines = map(str, find(machine, loaded.kind, given_by(loaded.environment, loaded.file), Rails()))
    assert [
        line for line in lines if "another transport" in line or "turns off" in line or "does not use" in line
    ] == []


def test_every_kind_has_a_file() -> None:
    assert sorted(get_args(FabricKind)) == FABRICS


def test_a_fabric_of_an_unknown_kind_is_one_line(checkout: SampleCheckout) -> None:
    checkout.write("env/fabrics/odd.yaml", "kind: wifi\n")
    with pytest.raises(
        UserError, match=r"^env/fabrics/odd\.yaml: kind: one of auto, infiniband, .* is wanted$"
    ):
        load_fabric("odd", checkout.path, {})


def test_a_fabric_that_names_no_kind_is_left_to_the_evidence(checkout: SampleCheckout) -> None:
    checkout.write("env/fabrics/ours.yaml", "env: {NCCL_IB_HCA: mlx5}\n")
    assert load_fabric("ours", checkout.path, {}).kind == "auto"


@pytest.mark.parametrize(
    ("profile", "kind"),
    [
        ("aws-p5", "efa"),
        ("aws-p5en", "efa"),
        ("azure-ndv5", "infiniband"),
        ("dgx-h100", "infiniband"),
        ("gcp-a3mega", "tcpxo"),
        ("oci-h100", "roce"),
    ],
)
def test_the_profiles_of_providers(profile: str, kind: str) -> None:
    composed = compose(["recipe=ch4_fsdp", f"cluster={profile}", "nodes=4"])
    assert (composed.fabric_kind, composed.gpus_per_node, composed.nodes) == (kind, 8, 4)
    path = Path(profile_files(environment={})[profile][0])
    assert "https://" in path.read_text(), "every profile names its source"
    assert load_profile(profile, environment={}).capacity.cpus_per_node in (96, 104, 112)


# --- one machine ----------------------------------------------------------------------------------------------------


def prepare(chosen: JobSpec, folder: Path, environment: dict[str, str] | None = None) -> fabric.Prepared:
    return fabric.prepare(
        chosen, local_allocation(chosen), master="127.0.0.1", attempt_dir=folder, python=sys.executable,
        environment=environment or {},
    )  # fmt: skip


def test_over_loopback_nothing_is_derived_and_that_is_written_down(tmp_path: Path) -> None:
    prepared = prepare(spec(), tmp_path)
    assert (prepared.variables, prepared.findings, prepared.lines) == ({}, [], [])
    content = json.loads((tmp_path / node_environment.FILE).read_text())
    kept = {one["name"]: one["reason"] for one in content["nodes"][0]["kept"]}
    assert kept == dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "the job's configuration")


def test_over_loopback_no_node_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no srun here: asking would be an error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    chosen = spec()
    allocation = Allocation("7", "box", ("n1", "n2"), 1, 1, 0)
    fabric.prepare(chosen, allocation, master="127.0.0.11", attempt_dir=tmp_path, python="", environment={})
    (entry,) = json.loads((tmp_path / node_environment.FILE).read_text())["nodes"]
    assert entry["nodes"] == ["n1", "n2"]


def test_this_machines_interface_is_derived_with_its_reason(tmp_path: Path) -> None:
    prepared = prepare(spec("fabric=tcp"), tmp_path)
    name = prepared.variables["GLOO_SOCKET_IFNAME"]
    assert prepared.variables["NCCL_SOCKET_IFNAME"] == f"={name}"
    assert Path("/sys/class/net", name).exists()
    (entry,) = json.loads((tmp_path / node_environment.FILE).read_text())["nodes"]
    assert all(setting["reason"] for setting in entry["settings"])
    assert prepared.lines == [
        f"fabric tcp: NCCL_SOCKET_IFNAME=={name} GLOO_SOCKET_IFNAME={name} UCX_NET_DEVICES={name}"
    ]


def test_what_the_job_or_the_shell_has_set_stays(tmp_path: Path) -> None:
    prepared = prepare(
        spec("fabric=tcp", "env.GLOO_SOCKET_IFNAME=lo"), tmp_path, {"NCCL_SOCKET_IFNAME": "eth9"}
    )
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & prepared.variables.keys()
    (entry,) = json.loads((tmp_path / node_environment.FILE).read_text())["nodes"]
    assert {one["name"]: one["reason"] for one in entry["kept"]} == {
        "GLOO_SOCKET_IFNAME": "the job's configuration",
        "NCCL_NET": "the job's configuration",
        "NCCL_SOCKET_IFNAME": "the environment of the job",
    }
    assert any("NCCL_SOCKET_IFNAME=eth9" in line for line in prepared.lines)


def test_what_the_configuration_takes_from_the_shell_is_said(tmp_path: Path) -> None:
    lines = prepare(spec("fabric=tcp"), tmp_path, {"NCCL_NET": "IB"}).lines
    assert lines[0] == (
        "fabric tcp: NCCL_NET=IB (the environment of the job): the job's configuration says Socket and wins; "
        "env.NCCL_NET=IB keeps yours"
    )
    assert not [
        line for line in prepare(spec("fabric=tcp"), tmp_path, {"NCCL_NET": "Socket"}).lines if "wins" in line
    ]


def test_a_fabric_that_is_not_there_blocks(tmp_path: Path) -> None:
    if Path("/sys/class/infiniband").exists():
        pytest.skip("this machine has RDMA devices")
    (finding,) = prepare(spec("fabric=infiniband"), tmp_path).findings
    assert (finding.check, finding.verdict) == ("fabric", "fail")
    assert "no active InfiniBand port on this node; there is no RDMA device" in finding.read


# --- many nodes -----------------------------------------------------------------------------------------------------


def test_equal_nodes_are_folded_and_their_variables_are_common() -> None:
    groups = node_environment.grouped([report(f"n{n}", A="1", B="2") for n in range(1024)])
    assert [len(group.nodes) for group in groups] == [1024]
    assert node_environment.common_variables(groups) == {"A": "1", "B": "2"}
    assert node_environment.differing_variables(groups) == {}


def test_nodes_that_differ_are_said_and_get_their_own() -> None:
    reports = [
        report("n1", A="1", HCA="x"),
        report("n2", A="1", HCA="y"),
        report("n3", A="1", HCA="x"),
        report("n4", A="1"),
    ]
    groups = node_environment.grouped(reports)
    assert node_environment.common_variables(groups) == {"A": "1"}
    assert node_environment.differing_variables(groups) == {"HCA": {"n1": "x", "n2": "y", "n4": ""}}
    assert fabric.summary("roce", groups) == [
        "fabric roce: A=1",
        "fabric roce: nodes differ in HCA: x on n1 and 1 more; y on n2; not set on n4; each node's tasks get its own",
    ]


def test_many_warnings_are_counted() -> None:
    groups = node_environment.grouped([report("n1", warnings=tuple(f"w{n}" for n in range(11)))])
    lines = fabric.summary("tcp", groups)
    assert lines[0] == "fabric tcp: n1: w0"
    assert lines[-1] == "fabric tcp: 3 more warnings in environment.json"


def test_a_task_takes_its_own_nodes_values_and_keeps_what_is_set(tmp_path: Path) -> None:
    groups = node_environment.grouped(
        [report("n1", A="1", HCA="x", GID="3"), report("n2", A="1", HCA="y", GID="5")]
    )
    node_environment.write(tmp_path, "roce", groups)
    environment = {"SLURMD_NODENAME": "n2", "GID": "7"}
    node_environment.apply(tmp_path, environment)
    assert environment == {
        "SLURMD_NODENAME": "n2",
        "GID": "7",
        "HCA": "y",
    }  # A is in every task's environment
    with pytest.raises(LookupError, match="nothing about node n9"):
        node_environment.apply(tmp_path, {"SLURMD_NODENAME": "n9"})


def test_where_nodes_agree_a_task_needs_no_name(tmp_path: Path) -> None:
    node_environment.write(tmp_path, "tcp", node_environment.grouped([report("n1", A="1")]))
    environment = {"SLURMD_NODENAME": "elsewhere"}
    node_environment.apply(tmp_path, environment)
    assert environment == {"SLURMD_NODENAME": "elsewhere"}


# --- the program on each node ---------------------------------------------------------------------------------------


def on_node(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("NCCL_", "GLOO_", "UCX_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "checks.fabric_report", *options],
        env={**environment, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_program_prints_one_line_that_the_launcher_reads(tmp_path: Path) -> None:
    done = on_node(
        "--kind=infiniband",
        f"--root={tmp_path}",
        "--configured=NCCL_NET",
        SLURMD_NODENAME="n7",
        NCCL_NET="IB",
    )
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    content = json.loads(line)
    assert line.startswith('{"node"')
    assert content["node"] == "n7"
    assert content["errors"] == [
        "fabric=infiniband: no active InfiniBand port on this node; there is no RDMA device"
    ]
    assert content["kept"] == [{"name": "NCCL_NET", "value": "IB", "reason": "the job's configuration"}]


def test_a_report_survives_json() -> None:
    derivation = derive(FabricFacts("n1"), "tcp", {})
    assert json.loads(json.dumps(as_json(derivation)))["errors"] == list(derivation.errors)
    assert dataclasses.asdict(derivation)["node"] == "n1"
