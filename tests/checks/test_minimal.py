"""Each check of the minimal preflight: healthy, faulty, and unable to look."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checks import minimal
from checks.__main__ import main
from checks.verdict import CheckResult, Verdict, worst
from launcher.verdicts import findings_of, silent


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """A /dev with two GPUs and what else the driver puts there."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(("wanted", "verdict"), [(0, Verdict.PASS), (2, Verdict.PASS), (3, Verdict.FAIL)])
def test_gpus_are_counted_by_their_device_files(devices: Path, wanted: int, verdict: Verdict) -> None:
    assert minimal.gpus_present(wanted, device_folder=devices).verdict is verdict


@pytest.mark.parametrize(
    ("visible", "verdict"), [("0,1", Verdict.PASS), ("1", Verdict.FAIL), ("", Verdict.FAIL)]
)
def test_gpus_that_slurm_withholds_do_not_count(devices: Path, visible: str, verdict: Verdict) -> None:
    assert minimal.gpus_present(2, device_folder=devices, visible=visible).verdict is verdict


def test_a_device_folder_that_cannot_be_read_is_unknown_not_healthy(tmp_path: Path) -> None:
    assert minimal.gpus_present(0, device_folder=tmp_path / "none").verdict is Verdict.UNKNOWN


def test_names_resolve_or_fail() -> None:
    assert minimal.name_resolves("localhost").verdict is Verdict.PASS
    assert minimal.name_resolves("no-such-host.invalid").verdict is Verdict.FAIL


def test_a_master_that_listens_is_reachable_and_one_that_does_not_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert minimal.reachable("127.0.0.1", port).verdict is Verdict.PASS
    assert minimal.reachable("127.0.0.1", port).verdict is Verdict.FAIL


def test_a_master_that_never_answers_costs_its_deadline_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimal, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        # A full backlog drops further connections without a word, as a firewall does.
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        result = minimal.reachable(*address)
        for filler in fillers:
            filler.close()
    assert result.verdict is Verdict.FAIL
    assert "timed out" in result.read


def test_a_folder_is_written_by_its_node(tmp_path: Path) -> None:
    assert minimal.writable(tmp_path, node="n1").verdict is Verdict.PASS
    assert (tmp_path / "node-n1").read_text() == "n1"
    assert minimal.writable(tmp_path / "none", node="n1").verdict is Verdict.FAIL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop to another user")
def test_a_folder_without_permission_fails_for_an_ordinary_user(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o755)
    code = (
        # Imports first: the interpreter may lie in a folder that only root can read.
        "import os, sys\nfrom pathlib import Path\nfrom checks import minimal\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "print(minimal.writable(Path(sys.argv[1]), node='n1').verdict.value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(locked)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "fail\n", done.stderr


def test_the_worst_verdict_counts_and_no_check_is_unknown() -> None:
    assert worst([Verdict.PASS, Verdict.WARN]) is Verdict.WARN
    assert worst([Verdict.UNKNOWN, Verdict.WARN]) is Verdict.UNKNOWN
    assert worst([Verdict.UNKNOWN, Verdict.FAIL]) is Verdict.FAIL
    assert worst([]) is Verdict.UNKNOWN


@pytest.mark.parametrize(("argv", "status"), [(["--gpus=0"], 0), (["--gpus=99"], 1)])
def test_the_exit_status_says_the_verdict(
    argv: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tier=minimal", *argv]) == status
    assert "device files" in capsys.readouterr().out


def test_wrong_usage_is_64() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--gpus=many"])
    assert ended.value.code == 64


def report(node: str, verdict: Verdict) -> dict[str, object]:
    result = CheckResult("gpus", verdict, "1 device files", "at least 2 GPUs", "leave it out")
    return json.loads(json.dumps({"node": node, "checks": [vars(result)]}))


@pytest.mark.parametrize(
    ("verdict", "count"), [(Verdict.PASS, 0), (Verdict.WARN, 0), (Verdict.UNKNOWN, 1), (Verdict.FAIL, 1)]
)
def test_unknown_and_fail_block_a_job(verdict: Verdict, count: int) -> None:
    findings = findings_of([report("n1", verdict), report("n2", Verdict.PASS)])
    assert [finding.node for finding in findings] == ["n1"] * count


def test_a_node_without_a_report_blocks() -> None:
    (finding,) = findings_of(
        silent([report("n1", Verdict.PASS)], ("n1", "n2"), "srun: error: n2 does not answer")
    )
    assert str(finding) == "n2: report unknown: srun: error: n2 does not answer, expected a report"
