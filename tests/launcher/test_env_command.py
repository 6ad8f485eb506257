"""`python -m launcher env`: the table, the shell lines, the JSON, and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from launcher.__main__ import main


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("NCCL_", "GLOO_", "UCX_", "FI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node with one InfiniBand port, one of Ethernet, and eth0."""
    files = {
        "sys/class/net/eth0/operstate": "up",
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/lo/flags": "0x9",
        "proc/net/route": "Iface\tDestination\neth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0",
    }
    for device, layer in (("mlx5_0", "InfiniBand"), ("mlx5_1", "Ethernet")):
        files[f"sys/class/infiniband/{device}/ports/1/state"] = "4: ACTIVE"
        files[f"sys/class/infiniband/{device}/ports/1/link_layer"] = layer
        files[f"sys/class/infiniband/{device}/ports/1/rate"] = "400 Gb/sec (4X NDR)"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    return tmp_path


def test_the_table_says_value_and_reason_of_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "fabric=infiniband", "env.NCCL_DEBUG=INFO", f"--root={root}"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "fabric infiniband (env/fabrics/infiniband.yaml) on n1",
        "",
        "variable value why",
        "NCCL_DEBUG INFO set by command line",
        "NCCL_NET IB set by env/fabrics/infiniband.yaml",
        "NCCL_SOCKET_IFNAME =eth0 the default route leads through it; exact, a prefix would match others too",
        "GLOO_SOCKET_IFNAME eth0 the default route leads through it; Gloo takes an exact name",
        "NCCL_IB_HCA =mlx5_0 1 active InfiniBand port at 400 Gb/s",
        "UCX_NET_DEVICES mlx5_0:1 1 active InfiniBand port at 400 Gb/s",
        "",
        "not used, not set:",
        "mlx5_1:1: Ethernet, not InfiniBand",
    ]


def test_the_shell_lines_set_what_the_table_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "fabric=infiniband", "--shell", f"--root={root}", "env.NCCL_IB_TC=$(x) 'y'"]) == 0
    lines = capsys.readouterr().out
    shell = f'{lines}\nprintf "%s|" "$NCCL_IB_HCA" "$NCCL_SOCKET_IFNAME" "$NCCL_NET" "$NCCL_IB_TC"'
    assert subprocess.check_output(["bash", "-euc", shell], text=True) == "=mlx5_0|=eth0|IB|$(x) 'y'|"


def test_the_shells_own_variables_stay_and_need_no_line(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "=mlx5_1")
    assert main(["env", "fabric=infiniband", "--shell", f"--root={root}"]) == 0
    captured = capsys.readouterr()
    assert "NCCL_IB_HCA" not in captured.out
    assert (
        captured.err
        == "warning: NCCL_IB_HCA==mlx5_1 (your shell): takes in mlx5_1:1, which is not InfiniBand\n"
    )


def test_a_files_value_wins_over_the_shells_as_in_a_job_and_that_is_said(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_NET", "Socket")
    assert main(["env", "fabric=infiniband", f"--root={root}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("NCCL_NET")] == [["NCCL_NET", "IB"]]
    assert lines[-1] == (
        "warning: NCCL_NET=Socket (your shell): env/fabrics/infiniband.yaml says IB and wins; "
        "env.NCCL_NET=Socket keeps yours"
    )
    assert main(["env", "fabric=infiniband", f"--root={root}", "env.NCCL_NET=Socket"]) == 0
    assert (
        "warning: NCCL_NET=Socket (command line): fabric=infiniband is another transport"
        in capsys.readouterr().out
    )


def test_a_profile_brings_its_fabric_and_its_variables(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["env", "cluster=azure-ndv5", "--json", f"--root={root}"]) == 0
    content = json.loads(capsys.readouterr().out)
    kept = {one["name"]: (one["value"], one["reason"]) for one in content["kept"]}
    assert kept["GLOO_SOCKET_IFNAME"] == ("eth0", "env/clusters/azure-ndv5.yaml")
    assert kept["NCCL_NET"] == ("IB", "env/fabrics/infiniband.yaml")
    assert {one["name"]: one["value"] for one in content["settings"]} == {
        "NCCL_IB_HCA": "=mlx5_0",
        "UCX_NET_DEVICES": "mlx5_0:1",
    }


def test_words_win_over_the_profile(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster=azure-ndv5", "fabric=tcp", "env.GLOO_SOCKET_IFNAME=lo"]
    assert main(["env", *words, "--json", f"--root={root}"]) == 0
    content = json.loads(capsys.readouterr().out)
    kept = {one["name"]: one["value"] for one in content["kept"]}
    assert (content["fabric"], kept["GLOO_SOCKET_IFNAME"], kept["NCCL_NET"]) == ("tcp", "lo", "Socket")


def test_an_unusable_fabric_is_status_one_and_a_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "fabric=efa", f"--root={root}"]) == 1
    line = "error: fabric=efa: no active EFA device on this node; there is mlx5_0:1 ACTIVE (InfiniBand)"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("fabrik=tcp", "error: unknown key 'fabrik': did you mean fabric?"),
        ("fabric=tpc", "error: unknown fabric 'tpc' (fabric=): did you mean tcp?"),
        ("cluster=azure", "error: unknown cluster 'azure' (cluster=): did you mean azure-ndv5?"),
        ("env.NCCL DEBUG=1", "error: env.NCCL DEBUG=1: 'NCCL DEBUG' cannot be the name of a variable"),
        ("--root=/nowhere", "error: --root=/nowhere: no folder sys/ in it"),
        ("infiniband", "error: 'infiniband' is not a key=value word; write infiniband=VALUE"),
    ],
)
def test_a_mistake_is_one_line(word: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", word]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)
